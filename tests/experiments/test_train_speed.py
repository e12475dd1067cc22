"""The page shows the recorded speeds of training."""

from __future__ import annotations

from pathlib import Path

from experiments import train_speed

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_rows_of_the_record():
    rows = train_speed.read_rows(ROOT / "results" / "from_scratch" / "train_speed.jsonl")
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- throughput -->\n")[2].partition("<!-- /throughput -->")[0]
    assert shown == train_speed.table(rows)
    (learned,) = [row for row in rows if row["case"] == "learn"]
    assert learned["steps"] == 100 and f"{learned['first_loss']:.2f} to {learned['last_loss']:.2f}" in page
