"""States in fewer bytes: the tokens that transformers writes with them, and more sequences at a time."""

from __future__ import annotations

import pytest

from tests.vllm_plugin.material import (
    DRAFTS,
    add,
    draft_counts,
    drafting_prompts,
    engine,
    greedy,
    make_prompts,
    tokens,
    write,
)

pytestmark = pytest.mark.vllm
NEW = 16


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_tokens_are_those_of_transformers_in_the_same_format(state_dtype, hybrid):
    prompts = make_prompts([10, 1, 33, 150, 256, 300])
    expected = greedy(hybrid, prompts, NEW, state_dtype)
    with engine(hybrid, hf_overrides={"state_dtype": state_dtype}) as llm:
        assert tokens(write(llm, prompts, NEW)) == expected
        assert [tokens(write(llm, [prompt], NEW))[0] for prompt in prompts] == expected


def count_running(path, state_dtype: str) -> int:
    """How many of 150 sequences vLLM reads at a time where a mebibyte holds all states."""
    sizes = {"kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 150, "max_model_len": 64}
    with engine(path, hf_overrides={"state_dtype": state_dtype}, **sizes) as llm:
        add(llm, make_prompts([10] * 150))
        llm.llm_engine.step()
        return len(llm.llm_engine.engine_core.engine_core.scheduler.running)


def test_int8_holds_more_than_twice_as_many_sequences(scratch):
    running = [count_running(scratch, state_dtype) for state_dtype in ("float32", "int8")]
    assert 10 < 2 * running[0] < running[1] < 150, running


def test_drafts_and_prefixes_change_no_token(hybrid):
    prompts = drafting_prompts()
    firsts = greedy(hybrid, prompts, 48, "int8")
    options = {"hf_overrides": {"state_dtype": "int8"}, "enable_prefix_caching": True, "speculative_config": DRAFTS}
    with engine(hybrid, apart=True, **options) as llm:
        assert tokens(write(llm, prompts, 48)) == firsts
        again = write(llm, prompts, 48)
        drafted, accepted = draft_counts(llm)
    assert tokens(again) == firsts
    assert 0 < accepted < drafted
