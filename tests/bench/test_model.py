"""The benchmark of a model measures the hybrid and full attention, transformers' and this library's, in every way."""

from __future__ import annotations

from nha.bench import model
from nha.bench.timing import read_table, select


def test_the_tiny_benchmark_of_prompts_runs(tmp_path):
    lines: list[str] = []
    rows = select(model.prompt_rows(tiny=True), "T30")
    assert model.run(rows, tmp_path / "model.csv", 500, tiny=True, log=lines.append) == 0
    found = read_table(tmp_path / "model.csv")
    assert [(r["model"], r["how"]) for r in found] == [
        ("hybrid", "one call"),
        ("hybrid", "segments"),
        ("full", "one call"),
    ]
    assert any("prompt of 30 tokens, segments" in line for line in lines)


def test_the_tiny_benchmark_of_decoding_runs(tmp_path):
    lines: list[str] = []
    rows = select(model.decode_rows(tiny=True), "graph T20|eager T|hybrid decode both T20")
    assert model.run(rows, tmp_path / "decode.csv", 500, tiny=True, log=lines.append) == 0
    found = read_table(tmp_path / "decode.csv")
    tasks = {(r["model"], r["task"]) for r in found}
    assert tasks == {(name, task) for name in ("hybrid", "full", "full-kernels") for task in ("decode", "throughput")}
    assert any("decode after 20 tokens, graph" in line and "full-kernels, graph" in line for line in lines)


def test_no_row_is_started_when_the_time_is_up(tmp_path):
    lines: list[str] = []
    assert model.run(model.prompt_rows(tiny=True), tmp_path / "model.csv", -1, tiny=True, log=lines.append) == 0
    assert "0 rows" in lines[-1] and not (tmp_path / "model.csv").exists()
