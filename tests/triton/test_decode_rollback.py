"""Drafts decoded into a ring with spare places and taken back: the fused kernel stays exact."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from nha.ops import RingState, nha_decode
from tests.inputs import TOKENWISE, call
from tests.triton.test_decode import CASES, PREFILL, assert_within, bounds, decode, double, inputs, part, whole

NAMES = [
    ("no window", 5),
    ("a window of one token", 16),
    ("segments longer than the window", 7),
    ("a window that fills up on the way", 5),
]


@pytest.mark.parametrize("name, max_rollback", NAMES)
def test_drafts_that_are_taken_back_leave_no_trace(name, max_rollback):
    case = replace(CASES[name], batch=1)
    flat = inputs(case)
    exact = whole(double(flat), case.window)
    bound = bounds(flat, exact, whole(flat, case.window))
    first: Any = call(
        part(flat, 0, PREFILL), window_size=case.window, impl="triton", return_state=True, return_slot_mass=True
    )
    ring = RingState.of(first.state, max_rollback)
    outputs: list[Any] = [first]
    cuts = [20, 21, 24, 34, 39, 46]
    for turn, (start, stop) in enumerate(itertools.pairwise(cuts)):
        length = (1, max_rollback, 3)[turn % 3]
        decode(part(flat, turn, turn + length), ring)  # a draft of other tokens
        ring.rollback(length)
        for begin in range(start, stop, max_rollback):
            outputs.append(decode(part(flat, begin, min(begin + max_rollback, stop)), ring))
    assert not ring.arrival_counter.any()
    found = {"out": torch.cat([o.out for o in outputs], 1), "mass": torch.cat([o.slot_mass for o in outputs], 1)}
    assert_within(found | ring.aligned().padded().tensors(), exact, bound)


def test_the_kernel_and_append_leave_the_same_ring():
    case = CASES["segments longer than the window"]
    flat = inputs(case)
    first: Any = call(part(flat, 0, PREFILL), window_size=case.window, impl="triton", return_state=True)
    ring, other = (RingState.of(first.state, 6) for _ in range(2))
    for start, stop in ((20, 26), (26, 27), (27, 31)):
        step = part(flat, start, stop)
        decode(step, ring)
        other.append(step["k"], step["v"], step["log_gate"], step.get("k_slot"))
        ring.rollback(1)
        other.rollback(1)
        for name, x in other.tensors().items():
            torch.testing.assert_close(ring.tensors()[name], x, msg=name)


def test_more_tokens_than_can_be_taken_back_are_refused():
    case = CASES["a window of one token"]
    flat = inputs(case)
    first: Any = call(part(flat, 0, PREFILL), window_size=case.window, impl="triton", return_state=True)
    step: Any = {n: x for n, x in part(flat, 20, 26).items() if n in TOKENWISE}
    with pytest.raises(ValueError, match="at most 5 new tokens, got 6"):
        nha_decode(**step, state=RingState.of(first.state, 5))
