"""Scripts that time training steps time them on a CPU too, and do not repeat what is there."""

import json

from experiments import recall_speed, train_profile

TABLE = """
name: small
title: a size for a test
kind: recall
shape: {hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}
lrs: [1e-3]
models:
  nha: {windows: 4, num_slots: 4}
recall:
  batch_size: 2
  train: [{seq_len: 16, num_items: 2, vocab_size: 16}]
  test: [{seq_len: 16, num_items: 2, vocab_size: 16}]
"""


def test_steps_of_a_recall_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recall_speed, "TIMED_STEPS", 2)
    (tmp_path / "small.yaml").write_text(TABLE)
    arguments = ["--output", str(tmp_path), "--table", str(tmp_path / "small.yaml"), "--modes", "eager"]
    assert recall_speed.main(arguments) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "recall_speed.jsonl").read_text().splitlines()]
    assert (row["model"], row["mode"], list(row["shapes"])) == ("nha", "eager", ["mqar 16/2 x 2"])
    assert row["ms"] > 0 and abs(row["row_s"] - row["ms"] * 4) < 0.02
    capsys.readouterr()
    assert recall_speed.main(arguments) == 0 and not capsys.readouterr().out
    assert recall_speed.main([*arguments, "--output", str(tmp_path / "late"), "--budget-s", "0"]) == 3


def test_kernels_of_a_training_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_profile, "WARMUP_STEPS", 1)
    monkeypatch.setattr(train_profile, "TIMED_STEPS", 1)
    small = ["--preset", "tiny", "--seq-len", "32", "--step-tokens", "64", "--cases", "nha"]
    assert train_profile.main(["--output", str(tmp_path), *small]) == 0
    found = json.loads((tmp_path / "nha-32.json").read_text())
    times = [kernel["ms"] for kernel in found["kernels"]]
    assert times == sorted(times, reverse=True) and abs(sum(times) - found["kernels_ms"]) < 0.01
    assert abs(sum(found["groups"].values()) - found["kernels_ms"]) < 0.01
    assert "nha: " in capsys.readouterr().out
    assert train_profile.main(["--output", str(tmp_path), *small, "--budget-s", "-1"]) == 3
