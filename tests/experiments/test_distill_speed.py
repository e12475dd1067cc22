"""The start and the speed of `nha distill` are read from the files of a run that a command made."""

from __future__ import annotations

import json

import pytest

from experiments import distill_speed
from tests.convert.test_hybridize import byte_tokenizer
from tests.data.test_corpus import texts
from tests.distill.material import LENGTH, tiny


def test_a_command_gives_a_row(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path / "base")
    byte_tokenizer(tmp_path / "base")
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts()))
    monkeypatch.setattr(distill_speed, "STEPS", {"cold": 4})
    given = {"model": tmp_path / "base", "text": tmp_path / "text.jsonl", "out": tmp_path / "out"}
    given |= {"steps": 4, "step-tokens": 2 * LENGTH, "budget-s": 300, "log-every": 1, "seq-len": LENGTH}
    given |= {"batch-size": 2, "window": 16, "slots": 6, "align-steps": 1, "align-sequences": 2, "recall-fraction": 0}
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert distill_speed.main(arguments) == 0, (tmp_path / "out" / "cold.txt").read_text()
    row = json.loads((tmp_path / "out" / "distill_speed.jsonl").read_text())
    assert 0 < row["first_step_s"] <= row["stages"]["third step"]
    assert row["compile_s"] == pytest.approx(row["stages"]["third step"] - row["stages"]["aligned"], abs=0.01)
    assert row["tokens_per_s"] > 0 and row["steps"] == 4


def test_a_command_that_fails_gives_the_stages_until_then(tmp_path, monkeypatch):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "x"}))
    monkeypatch.setattr(distill_speed, "STEPS", {"cold": 4})
    given = {"model": tmp_path / "nothing", "text": tmp_path / "text.jsonl", "out": tmp_path / "out"}
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert distill_speed.main(arguments) == 1
    row = json.loads((tmp_path / "out" / "distill_speed.jsonl").read_text())
    assert (row["steps"], row["first_step_s"]) == (0, None)
    assert "nothing" in (tmp_path / "out" / "cold.txt").read_text()


def test_text_is_cut_after_whole_documents(tmp_path):
    lines = [json.dumps({"text": "x" * 1000}) for _ in range(10)]
    (tmp_path / "all").write_text("\n".join(lines))
    distill_speed.cut_text(tmp_path / "all", tmp_path / "some", 0.0025)
    assert (tmp_path / "some").read_text().splitlines() == lines[:3]
