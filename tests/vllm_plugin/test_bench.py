"""`nha bench serve` measures a hybrid and vLLM's own full attention of the same weights."""

from __future__ import annotations

import pytest

from nha.bench.serve import cases, run
from nha.bench.timing import read_table

pytestmark = pytest.mark.vllm


def test_both_kinds_of_attention_are_measured(hybrid, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert run(cases(str(hybrid), [64], 2, 4, "float32", True), tmp_path, 500) == 0
    rows = read_table(tmp_path / "serve.csv")
    assert [row["attention"] for row in rows] == ["hybrid", "full"]
    assert all(row["status"] == "ok" and row["new_tokens_per_s"] > 0 and row["cache_tokens"] > 0 for row in rows)
