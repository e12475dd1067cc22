"""Every shift of the gates' biases is measured once, and shown."""

from __future__ import annotations

import json

from experiments import slower_gates
from nha import hybridize
from tests.data.tokenizers import small_tokenizer
from tests.evaluate.test_public import PROSE, lines
from tests.models.families import teacher, tokens

TEXT = tokens(4, 64, seed=3)


def test_every_shift_is_measured_once_and_shown(tmp_path, capsys):
    tokenizer = small_tokenizer("digits")
    base = teacher(vocab_size=len(tokenizer), max_position_embeddings=1024).eval()
    hybridize(base, num_slots=4, window_size=16, calibration=TEXT).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "heldout.jsonl").write_text(lines(PROSE))
    given = ["--data", tmp_path, "--output", tmp_path / "out", "--model", tmp_path / "tiny"]
    given = [*map(str, given), "--needle-lengths", "256", "--needles", "1", "--lengths", "256", "--documents", "1"]
    given += ["--parts", "needle,perplexity", "--state-dtype", "int8"]
    assert slower_gates.main([*given, "--shifts", "0"]) == 0
    assert slower_gates.main([*given, "--shifts", "0,2"]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / slower_gates.RESULT).read_text())
    assert [row["shift"] for row in rows] == [0, 2] and shown.count("needle 256") == 2
    assert rows[0]["found"]["perplexity"]["256"]["ppl"] != rows[1]["found"]["perplexity"]["256"]["ppl"]
    assert all(row["versions"]["torch"] and row["about"]["state_dtype"] == "int8" for row in rows)
