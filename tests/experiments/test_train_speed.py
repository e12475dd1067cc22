"""The page shows the recorded speeds of training."""

from __future__ import annotations

from pathlib import Path

import torch

from experiments import train_speed
from nha.models.nha import NHAForCausalLM
from nha.train.estimate import estimate
from nha.train.presets import model_config

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_rows_of_the_record():
    rows = train_speed.read_rows(ROOT / "results" / "from_scratch" / "train_speed.jsonl")
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- throughput -->\n")[2].partition("<!-- /throughput -->")[0]
    assert shown == train_speed.table(rows)
    (learned,) = [row for row in rows if row["case"] == "learn"]
    assert learned["steps"] == 100 and f"{learned['first_loss']:.2f} to {learned['last_loss']:.2f}" in page


def test_a_tiny_case_is_timed_and_not_repeated(tmp_path):
    options = [
        "--tiny",
        "--steps",
        "2",
        "--compile",
        "nothing",
        "--only",
        "nha-32,full-cudnn-32",
        "--output",
        str(tmp_path),
    ]
    assert [train_speed.main(options) for _ in range(2)] == [0, 0]
    rows = train_speed.read_rows(tmp_path / "train_speed.jsonl")
    assert [(row["case"], row["steps"]) for row in rows] == [("nha", 2), ("full-cudnn", 2)]


def test_the_estimate_of_memory_is_at_most_a_tenth_above_what_each_row_took():
    for row in train_speed.read_rows(ROOT / "results" / "from_scratch" / "train_speed.jsonl"):
        options = train_speed.parse_options(["--preset", row["preset"], "--parallel", row["parallel"]])
        settings = train_speed.settings_of(train_speed.Case(row["case"], row["seq_len"]), options, row["gpus"])
        with torch.device("meta"):
            model = NHAForCausalLM(model_config(settings, train_speed.VOCABULARY))
        found = estimate(model, settings, world=row["gpus"], device=row["gpu"])
        assert 1 < found.total_bytes / 2**30 / row["peak_gib"] < 1.1
