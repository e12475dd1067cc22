"""Every picture is drawn from the tables alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from nha.bench import model, plots
from nha.bench import op as bench
from nha.bench.drawing import crossover
from nha.bench.roofline import floor_ms

ROOT = Path(__file__).parents[2]
LIMITS = {"bytes_per_s": 3e12, "operations_per_s": 7.5e14}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A table as the benchmark writes it, with invented times."""
    folder = tmp_path_factory.mktemp("results")
    with (folder / "ops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, bench.COLUMNS)
        writer.writeheader()
        for row in [row.fields for row in bench.rows(tiny=False)]:
            slots = 0.4 if row["impl"] == "triton" and row["pass"] != "decode" else 0.0
            ms = floor_ms(row, LIMITS) * (1.3 if row["impl"] == "sdpa-cudnn" else 3) + slots + 0.01
            about = {"extra_bytes": 0, "first_call_s": 1, "gpu": "none", "torch": "2", "triton": "3", "date": "2026"}
            writer.writerow(row | about | {"ms": round(ms, 4)})
    (folder / "ceilings.json").write_text(json.dumps(LIMITS))
    return folder


def test_every_picture_is_drawn_from_the_tables_alone(results, tmp_path):
    pytest.importorskip("matplotlib")
    about = {"gpu": "none", "date": "2026", "B": 1, "tokens_s": 1, "peak_gib": 1, "status": "ok"}
    (results / "models").mkdir()
    rows = [about | cell.fields | {"ms": cell.length / 9} for cell in model.cells()]
    model.write_rows(results / "models" / "some.csv", rows)
    lines: list[str] = []
    plots.draw(results, tmp_path, lines.append)
    names = ("length-llama", "length-qwen", "length-smollm", "speedup", "roofline", "decode", "model-some")
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in names}
    assert not any("not enough rows" in line for line in lines)


def test_the_crossover_is_where_the_curves_meet_for_good():
    records = [{"impl": "triton", "W": 64, "T": t, "ms": 2.0} for t in (1024, 2048, 4096)]
    records += [{"impl": "sdpa-cudnn", "W": -1, "T": t, "ms": ms} for t, ms in ((1024, 1.0), (2048, 1.0), (4096, 4.0))]
    ours, theirs = plots.curve(records, "triton", 64), plots.curve(records, "sdpa-cudnn", -1)
    assert crossover(ours, theirs) == pytest.approx(2048 * 2**0.5)
    assert crossover(theirs, ours) is None
    assert crossover(ours, [(t, 9.0) for t, _ in ours]) == 0.0


def test_tables_in_the_repository_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plots.draw(ROOT / "benchmarks" / "results", tmp_path)
    assert (tmp_path / "length-llama.png").exists()


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"ops\.csv.*models"):
        plots.draw(tmp_path, tmp_path)
