"""Tensor parallelism: two processes share the heads of every layer and write the same tokens."""

from __future__ import annotations

import pytest

from tests.vllm_plugin.material import engine, greedy, make_prompts, tokens, write

pytestmark = pytest.mark.vllm


def test_two_processes_write_what_one_does(hybrid, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    prompts = make_prompts([10, 1, 40, 150])
    with engine(hybrid, apart=True, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert tokens(write(llm, prompts, 16)) == greedy(hybrid, prompts, 16)
