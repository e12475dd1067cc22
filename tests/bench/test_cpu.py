"""The benchmark on the CPU measures this library beside SDPA."""

from __future__ import annotations

import json
from itertools import product

import pytest

from nha import io
from nha.bench import cpu, cpu_model, resumable
from nha.bench.resumable import Outcome, complete
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
    got = {(r["model"], r["task"], r["T"], r["dtype"]) for r in found}
    cases = [(name, dtype) for dtype in cpu_model.DTYPES for name in cpu_model.names(dtype)]
    wanted = product(cases, ("prefill", "decode"), (20, 30))
    assert got == {(name, task, length, dtype) for (name, dtype), task, length in wanted}


def test_a_table_goes_on_where_it_stopped_and_not_with_other_versions(tmp_path):
    path, calls = tmp_path / "times.csv", []
    cases = {name: (lambda name=name: calls.append(name) or [{"ms": len(calls)}]) for name in ("a", "b", "c")}

    def go(about, budget_s):
        return complete(path, ["ms"], cases, about, budget_s, log=lambda line: None).whole

    assert not go({"torch": "1"}, 0) and not calls
    kept = tmp_path / "times.csv.cases"
    kept.write_text(json.dumps({"case": "b", "about": {"torch": "1"}, "rows": [{"ms": 7}]}) + '\n{"case": "c", "ab')
    assert not go({"torch": "2"}, 0)
    assert go({"torch": "1"}, 60) and calls == ["a", "c"] and not kept.exists()
    assert [row["ms"] for row in read_table(path)] == [1, 7, 2]


def test_one_case_is_measured_in_a_call_of_its_own(tmp_path):
    path = tmp_path / "times.csv"
    cases = {name: (lambda name=name: [{"ms": name}]) for name in ("T1", "T2")}
    for only, left in (("T2$", True), ("T2$", True), ("T1$", False)):
        assert complete(path, ["ms"], cases, {}, 60, lambda line: None, only).whole is not left
        assert path.exists() is not left
    with pytest.raises(ValueError, match="T3"):
        complete(path, ["ms"], cases, {}, 60, lambda line: None, "T3")


def test_a_measured_case_is_on_the_disk_before_the_next_begins(tmp_path, monkeypatch):
    path, order = tmp_path / "times.csv", []
    monkeypatch.setattr(io, "sync_file", lambda work: order.append("synced"))
    cases = {name: (lambda name=name: order.append(name) or [{"ms": 1}]) for name in ("a", "b")}
    assert complete(path, ["ms"], cases, {}, 60, lambda line: None).whole
    assert order[:4] == ["a", "synced", "b", "synced"]  # then the table


def test_a_case_that_fails_leaves_the_others_and_is_measured_again_by_the_next_call(tmp_path):
    path, lines, broken = tmp_path / "times.csv", [], {"b", "c"}

    def case(name):
        if name in broken:
            raise MemoryError(f"no room\nfor {name}")
        return [{"ms": name}]

    cases = {name: (lambda name=name: case(name)) for name in ("a", "b", "c", "d")}
    assert complete(path, ["ms"], cases, {}, 60, lines.append) == Outcome(False, ("b", "c"))
    assert lines[:2] == ["failed: b: MemoryError: no room for b", "failed: c: MemoryError: no room for c"]
    assert "2 of 4 cases" in lines[2] and not path.exists()
    broken.remove("b")
    calls = []
    for name in ("a", "d"):  # kept
        cases[name] = lambda name=name: calls.append(name) or []
    assert complete(path, ["ms"], cases, {}, 60, lambda line: None) == Outcome(False, ("c",))
    broken.clear()
    assert complete(path, ["ms"], cases, {}, 60, lambda line: None) == Outcome(True) and not calls
    assert [row["ms"] for row in read_table(path)] == ["a", "b", "c", "d"]


def test_a_table_that_cannot_be_written_is_no_case_that_failed(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(resumable, "write_atomically", full)
    with pytest.raises(OSError, match="no space left"):
        complete(tmp_path / "times.csv", ["ms"], {"a": lambda: [{"ms": 1}]}, {}, 60, lambda line: None)


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"3",
        b'{"case": "a"}',
        b'{"case": "a", "about": {}, "rows": "x"}',
        b'{"case": "a", "about": {}, "rows": [1]}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"case": "b", "ab',
    ],
)
def test_a_line_that_is_no_case_is_named_and_nothing_is_measured(line, tmp_path):
    path, kept = tmp_path / "times.csv", tmp_path / "times.csv.cases"
    whole = b'{"case": "a", "about": {}, "rows": [{"ms": 1}]}\n'
    kept.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(ValueError, match=r"expected a measured case in line 2 of .*times\.csv\.cases"):
        complete(path, ["ms"], {"a": lambda: pytest.fail("measured")}, {}, 60, lambda line: None)
    assert kept.read_bytes().count(whole) == 2 and not path.exists()
