"""Prefix caching and speculative decoding: no token twice, and the same tokens."""

from __future__ import annotations

import pytest

from tests.vllm_plugin.material import engine, greedy, make_prompts, metric, tokens, write

pytestmark = pytest.mark.vllm
NEW = 16


def test_a_second_turn_reads_only_what_is_new(hybrid):
    (first,), (question,) = make_prompts([3000]), make_prompts([12], seed=2)
    with engine(hybrid, enable_prefix_caching=True) as llm:
        (answer,) = write(llm, [first], NEW)
        second = first + tokens([answer])[0] + question
        (again,) = write(llm, [second], NEW)
        block = llm.llm_engine.vllm_config.cache_config.block_size
    read = len(second) - again.num_cached_tokens
    assert read < 2 * 16 + block, f"{read} tokens were read, blocks of {block}"
    assert tokens([again]) == greedy(hybrid, [second], NEW)


def test_branches_share_their_prefix(hybrid):
    (shared,), ends = make_prompts([600]), make_prompts([5, 9, 20], seed=3)
    branches = [shared + end for end in ends]
    with engine(hybrid, enable_prefix_caching=True) as llm:
        write(llm, [shared], 1)
        answers = write(llm, branches, NEW)
    assert all(answer.num_cached_tokens >= 256 for answer in answers)
    assert tokens(answers) == greedy(hybrid, branches, NEW)


@pytest.mark.parametrize("kind", ["hybrid", "scratch"])
def test_drafts_change_no_token(kind, request):
    path = request.getfixturevalue(kind)
    prompts = [prompt * 6 for prompt in make_prompts([9, 17])] + make_prompts([3, 40, 200])
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    # vLLM drafts with numba, and no engine starts in a process that has loaded it.
    with engine(path, apart=True, speculative_config=drafts) as llm:
        written = tokens(write(llm, prompts, 48))
        drafted = metric(llm, "vllm:spec_decode_num_draft_tokens")
        accepted = metric(llm, "vllm:spec_decode_num_accepted_tokens")
    assert written == greedy(path, prompts, 48)
    assert 0 < accepted < drafted, "expected drafts that stand and drafts that do not"
