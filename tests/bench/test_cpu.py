"""The benchmark on the CPU measures this library beside SDPA."""

from __future__ import annotations

from nha.bench import cpu, cpu_model
from nha.bench.timing import read_table


def test_the_tiny_benchmark_runs(tmp_path):
    cpu.run(cpu.rows(lengths=False, tiny=True), tmp_path / "cpu.csv", repeats=1, log=lambda line: None)
    found = read_table(tmp_path / "cpu.csv")
    assert tuple(found[0]) == cpu.COLUMNS
    assert [(r["impl"], r["pass"]) for r in found] == [(i, p) for i in ("nha", "sdpa") for p in ("fwd", "fwd+bwd")]
    assert all(r["ms"] > 0 for r in found)


def test_the_tiny_benchmark_of_a_model_runs(tmp_path):
    cpu_model.run(tmp_path / "cpu-model.csv", rounds=1, tiny=True, log=lambda line: None)
    found = read_table(tmp_path / "cpu-model.csv")
    assert tuple(found[0]) == cpu_model.COLUMNS
    names = {(r["model"], r["task"], r["T"]) for r in found}
    assert names == {(m, t, n) for m in ("hybrid", "full") for t in ("prefill", "decode") for n in (20, 30)}
