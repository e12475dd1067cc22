"""The parts of a batch: every token once, and every state where the next step looks for it."""

from __future__ import annotations

import pytest
import torch

from nha.serve.parts import Part, plan_parts


def places(part: Part, total: int) -> list[int]:
    return torch.arange(total)[part.tokens].tolist()


def plan(lengths: list[int], drafts: list[int], accepted: list[int] | None = None, columns: int = 4) -> list[Part]:
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    blocks = torch.arange(len(lengths) * columns).view(len(lengths), columns)
    stood = None if accepted is None else torch.tensor(accepted, dtype=torch.int32)
    return plan_parts(starts, drafts, torch.arange(len(lengths)) * 100, blocks, stood)


@pytest.mark.parametrize(
    ("lengths", "drafts"),
    [
        ([1, 1, 1], [0, 0, 0]),
        ([5, 3], [-1, -1]),
        ([1, 4, 1, 3], [0, -1, 0, 2]),
        ([4, 2, 4], [3, 1, -1]),
        ([0, 1, 2], [-1] * 3),
    ],
)
def test_every_token_is_read_once(lengths, drafts):
    parts = plan(lengths, drafts)
    found = [place for part in parts for place in places(part, sum(lengths))]
    assert sorted(found) == list(range(sum(lengths)))


def test_tokens_that_follow_each_other_are_a_slice():
    single, longer = plan([1, 1, 5, 3], [-1] * 4)
    assert single.tokens == slice(0, 2)
    assert longer.tokens == slice(2, 10)
    assert longer.cu_seqlens is not None
    assert longer.cu_seqlens.tolist() == [0, 5, 8]
    assert longer.cu_seqlens.dtype == torch.int32


def test_states_stay_in_their_first_block_without_drafts():
    for part in plan([1, 5], [-1, -1]):
        assert part.source.tolist() == part.target.tolist()


def test_the_state_of_the_last_token_that_stood_is_read():
    parts = plan([1, 3], [0, 2], accepted=[3, 2])
    assert parts[0].source.tolist() == [2]
    assert parts[1].source.tolist() == [5]


def test_a_step_that_accepted_nothing_reads_the_first_block():
    assert plan([1], [0], accepted=[0])[0].source.tolist() == [0]


def test_each_drafted_token_leaves_a_state_of_its_own():
    steps = plan([3], [2])
    assert [step.source.tolist() for step in steps] == [[0], [0], [1]]
    assert [step.target.tolist() for step in steps] == [[0], [1], [2]]
    assert [step.num_tokens.tolist() for step in steps] == [[0], [1], [2]]
    assert all(step.cu_seqlens is None for step in steps)


def test_a_prompt_as_short_as_a_draft_leaves_one_state():
    (part,) = plan([3], [-1], accepted=[1])
    assert part.target.tolist() == [0]
    assert part.cu_seqlens is not None
