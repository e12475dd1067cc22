"""States in fewer bytes: the tokens that transformers writes with them, and more sequences at a time."""

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
NEW = 16


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_tokens_are_those_of_transformers_in_the_same_format(state_dtype, hybrid):
    prompts = make_prompts([10, 1, 33, 150, 256, 300])
    expected = greedy(hybrid, prompts, NEW, state_dtype)
    with engine(hybrid, hf_overrides={"state_dtype": state_dtype}) as llm:
        assert tokens(write(llm, prompts, NEW)) == expected
        assert [tokens(write(llm, [prompt], NEW))[0] for prompt in prompts] == expected


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
