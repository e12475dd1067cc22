"""Prefix caching and speculative decoding: no token twice, and the same tokens."""

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
NEW, LONG = 16, 200


@pytest.fixture(scope="class", params=[False, True], ids=["plain", "drafting"])
def caching(hybrid, request):
    """An engine that keeps prefixes, without and with drafts."""
    # vLLM drafts with numba, and no engine starts in a process that has loaded it.
    options = {"apart": True, "speculative_config": DRAFTS} if request.param else {}
    with engine(hybrid, enable_prefix_caching=True, **options) as llm:
        yield llm


class TestPrefixCaching:
    def test_a_second_turn_reads_only_what_is_new(self, hybrid, caching):
        (first,), (question,) = make_prompts([3000]), make_prompts([12], seed=2)
        (answer,) = write(caching, [first], LONG)
        second = first + tokens([answer])[0] + question
        (again,) = write(caching, [second], NEW)
        block = caching.llm_engine.vllm_config.cache_config.block_size
        assert block < LONG
        read = len(second) - again.num_cached_tokens
        assert read < 2 * 16 + block, f"{read} tokens were read, blocks of {block}"
        assert tokens([answer, again]) == greedy(hybrid, [first], LONG) + greedy(hybrid, [second], NEW)

    def test_branches_share_their_prefix(self, hybrid, caching):
        (shared,), ends = make_prompts([600], seed=5), make_prompts([5, 9, 20], seed=3)
        branches = [shared + end for end in ends]
        write(caching, [shared], 1)
        answers = write(caching, branches, NEW)
        assert all(answer.num_cached_tokens >= 512 for answer in answers)
        assert tokens(answers) == greedy(hybrid, branches, NEW)

    def test_answers_that_end_blocks_go_on_as_they_are_read(self, hybrid, caching):
        prompts = [
            (prompt * 40)[:length] for prompt, length in zip(make_prompts([9, 17, 5]), (120, 250, 100), strict=True)
        ]
        firsts, questions = greedy(hybrid, prompts, 48), make_prompts([7, 7, 7], seed=9)
        assert tokens(write(caching, prompts, 48)) == firsts
        seconds = [a + b + c for a, b, c in zip(prompts, firsts, questions, strict=True)]
        answers = write(caching, seconds, 48)
        assert [answer.num_cached_tokens for answer in answers] == [128, 256, 128]
        assert tokens(answers) == greedy(hybrid, seconds, 48)


def test_drafts_change_no_token(scratch):
    prompts = drafting_prompts()
    # vLLM drafts with numba, and no engine starts in a process that has loaded it.
    with engine(scratch, apart=True, speculative_config=DRAFTS) as llm:
        written, drafted, accepted = tokens(write(llm, prompts, 48)), *draft_counts(llm)
    assert written == greedy(scratch, prompts, 48)
    assert 0 < accepted < drafted, "expected drafts that stand and drafts that do not"
