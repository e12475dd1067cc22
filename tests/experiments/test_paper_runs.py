"""The estimate of the paper's runs follows from what was measured, and the page shows it."""

from __future__ import annotations

import json

import pytest

from experiments.paper_runs import ROOT, estimate_run, measured_speed, run_settings, table

SPEED = ROOT / "results" / "from_scratch" / "train_speed.jsonl"


def test_the_table_on_the_page_is_that_of_the_measured_speed():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- paper runs -->\n")[2].partition("<!-- /paper runs -->")[0]
    assert shown.strip() == table(SPEED)


def test_the_time_is_that_of_the_measured_tokens_per_second():
    speed = measured_speed(SPEED)
    found = estimate_run(run_settings("340m-15b.yaml"), 8, speed["mfu"])
    assert found.seconds is not None
    # The measured model has a vocabulary of 32,000, hence somewhat fewer operations for each token.
    assert found.tokens / found.seconds / 8 == pytest.approx(speed["tokens_per_s"] / speed["gpus"], rel=0.06)


def test_a_record_without_a_row_under_ddp_is_refused_and_most_gpus_win(tmp_path):
    path = tmp_path / "speed.jsonl"
    row = {"case": "nha", "preset": "340m", "seq_len": 2048, "gpus": 1, "mfu": 0.4, "parallel": "fsdp"}
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="2048"):
        measured_speed(path)
    row["parallel"] = "ddp"
    rows = [row | {"gpus": 2, "mfu": 0.3}, row, row | {"preset": "1.3b", "mfu": 0.5}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [measured_speed(path, preset)["mfu"] for preset in ("340m", "1.3b", "60m")] == [0.3, 0.5, 0.3]
