"""Window and sink alone, packed: equal to the definition without slots, gradients too."""

from __future__ import annotations

import pytest
import torch

from nha.ops import nha_attention, sliding_window
from tests.inputs import assert_close_to


def inputs(length: int, sinks: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = random(1, length, 4, 8), random(1, length, 2, 8), random(1, length, 2, 6)
    return q, k, v, random(1, length, 4, 8), (random(2, sinks, 8), random(2, sinks, 6))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize(
    "window, bounds",
    [
        (1, [0, 5, 37]),
        (4, [0, 3, 4, 21]),
        (8, [0, 40, 40, 47, 64, 64]),
        (16, [0, 9]),
        (17, [0, 50, 60]),
        (200, [0, 270, 280]),
        (1000, [0, 100, 300]),
    ],
    ids=str,
)
def test_equals_the_definition_without_slots(window, bounds, sinks, softcap):
    length = bounds[-1]
    q, k, v, q_slot, sink = inputs(length, sinks)
    cu = torch.tensor(bounds, dtype=torch.int32)
    options = dict(window_size=window, cu_seqlens=cu, scale=0.3, softcap=softcap)
    wanted = nha_attention(
        q, k, v, q.new_zeros(1, length, 2, 0), q_slot=q_slot, k_slot=k, sink=sink, impl="reference", **options
    ).out
    found = sliding_window.sliding_window_attention(q, k, v, q_slot, sink, **options)
    assert_close_to(found, wanted)
    leaves = [q, k, v, *([q_slot, *sink] if sinks else [])]
    weight = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), leaves, allow_unused=True),
        torch.autograd.grad((wanted * weight).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        if theirs is not None and ours is not None:
            assert_close_to(ours, theirs)


def test_groups_of_blocks_give_what_one_group_gives(monkeypatch):
    q, k, v, q_slot, sink = inputs(100, 2)
    options = dict(window_size=9, cu_seqlens=torch.tensor([0, 43, 100], dtype=torch.int32), scale=0.3)
    found = []
    for most in (1 << 30, 1):
        monkeypatch.setitem(sliding_window.GROUP_SCORES, "cpu", most)
        out = sliding_window.sliding_window_attention(q, k, v, q_slot, sink, **options)
        found.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v, q_slot, *sink])))
    for one, many in zip(*found, strict=True):
        assert_close_to(many, one)
