"""Tensor parallelism: two processes share the heads of every layer and write the same tokens, also with drafts."""

from __future__ import annotations

import pytest

from tests.vllm_plugin.material import (
    DRAFTS,
    draft_counts,
    drafting_prompts,
    engine,
    greedy,
    make_prompts,
    tokens,
    write,
)

pytestmark = pytest.mark.vllm


def test_two_processes_write_what_one_does(hybrid, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    prompts = make_prompts([10, 1, 150]) + drafting_prompts()
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "speculative_config": DRAFTS}
    with engine(hybrid, apart=True, **options) as llm:
        written, drafted, accepted = tokens(write(llm, prompts, 48)), *draft_counts(llm)
    assert written == greedy(hybrid, prompts, 48)
    assert 0 < accepted < drafted, "expected drafts that stand and drafts that do not"
