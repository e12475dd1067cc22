"""The rows of `nha bench serve`."""

from __future__ import annotations

import pytest

from nha.bench import serve
from nha.bench.timing import read_table
from nha.errors import BadInput


def fake(case: serve.Case, timeout_s: float) -> dict:
    if case.attention == "full":
        raise RuntimeError("no memory")
    return serve.speeds(case, 1.0, 2.0)


def test_a_row_that_fails_keeps_its_reason_beside_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(serve, "run_apart", fake)
    rows = serve.cases("models/tiny", [100], 2, 11)
    assert serve.run(rows, tmp_path, 60, print) == 1
    hybrid, full = read_table(tmp_path / "serve.csv")
    assert (hybrid["attention"], hybrid["prompt_tokens_per_s"], hybrid["new_tokens_per_s"]) == ("hybrid", 200, 20)
    assert (full["attention"], full["status"], full["new_tokens_per_s"]) == ("full", "no memory", None)


def test_rows_beyond_the_budget_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "vllm_version", lambda: "0.32.0")
    lines: list[str] = []
    assert serve.run(serve.cases("m", [100], 2, 11), tmp_path, 0, lines.append) == 0
    assert not (tmp_path / "serve.csv").exists()


def test_an_untested_vllm_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "vllm_version", lambda: "0.11.0")
    with pytest.raises(BadInput, match=r"0\.11\.0"):
        serve.run([], tmp_path, 60, print)
