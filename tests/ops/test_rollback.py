"""A ring with spare places: tokens are taken back by moving a cursor, and what is read stays exact."""

from __future__ import annotations

import random

import pytest
import torch

from nha.ops import NHAState, RingState, nha_attention
from tests.inputs import assert_close_to

POOL, HEADS, DIM, SLOTS, ROWS = 60, 2, 4, 3, 2


class Sequences:
    """A ring and the tokens, as indices into a pool of inputs, that it should hold."""

    def __init__(self, window_size: int, max_rollback: int, own_slot_keys: bool, seed: int):
        generator = torch.Generator().manual_seed(seed)

        def inputs(size: int) -> torch.Tensor:
            return torch.randn(ROWS, POOL, HEADS, size, generator=generator, dtype=torch.float64)

        self.window_size = window_size
        self.q, self.k, self.v, self.gate = inputs(DIM), inputs(DIM), inputs(DIM), -6 * inputs(SLOTS).abs()
        self.k_slot = inputs(DIM) if own_slot_keys else None
        shared = not own_slot_keys
        state = NHAState.empty(window_size, key=self.k, value=self.v, log_gate=self.gate, shared=shared)
        self.ring = RingState.of(state, max_rollback)
        self.tokens: list[int] = []

    def attend(self, tokens: list[int], state: NHAState | None):
        k_slot = None if self.k_slot is None else self.k_slot[:, tokens]
        q, k, v, gate = (x[:, tokens] for x in (self.q, self.k, self.v, self.gate))
        return nha_attention(q, k, v, gate, window_size=self.window_size, k_slot=k_slot, state=state, return_state=True)

    def read(self, tokens: list[int]) -> torch.Tensor:
        k_slot = None if self.k_slot is None else self.k_slot[:, tokens]
        before = self.ring.append(self.k[:, tokens], self.v[:, tokens], self.gate[:, tokens], k_slot)
        self.tokens += tokens
        return self.attend(tokens, before).out

    def rollback(self, count: int) -> None:
        self.ring.rollback(count)
        self.tokens = self.tokens[: len(self.tokens) - count]


@pytest.mark.parametrize("own_slot_keys", [False, True])
@pytest.mark.parametrize("window_size", [0, 1, 3, 8])
@pytest.mark.parametrize("max_rollback", [1, 2, 5, 9])
def test_drafts_that_are_taken_back_leave_no_trace(window_size, max_rollback, own_slot_keys):
    draw = random.Random(window_size * 10 + max_rollback)
    one = Sequences(window_size, max_rollback, own_slot_keys, seed=1)
    while len(one.tokens) < 30:
        new = [draw.randrange(POOL) for _ in range(draw.randint(1, max_rollback))]
        found = one.read(new)
        wanted = one.attend(one.tokens, None)
        assert_close_to(found, wanted.out[:, -len(new) :])
        assert wanted.state is not None
        state, whole = one.ring.aligned(), wanted.state.padded()
        used = min(window_size, len(one.tokens))
        assert_close_to(state.slot_key, whole.slot_key)
        assert_close_to(state.slot_value, whole.slot_value)
        assert torch.equal(state.key[:, window_size - used :], whole.key[:, window_size - used :])
        assert torch.equal(state.num_tokens, whole.num_tokens)
        one.rollback(draw.randint(0, len(new)))


def test_a_rollback_moves_the_cursor_alone():
    one = Sequences(3, 4, False, seed=2)
    one.read(list(range(4)))
    one.read(list(range(4, 8)))
    before = one.ring.map(torch.clone).tensors()
    addresses = {name: x.data_ptr() for name, x in one.ring.tensors().items()}
    one.rollback(4)
    for name, x in one.ring.tensors().items():
        assert x.data_ptr() == addresses[name]
        if name != "num_tokens":
            assert torch.equal(x, before[name]), name
    assert one.ring.num_tokens.tolist() == [4, 4]


def test_the_ring_of_another_number_of_spare_places_holds_the_same():
    one = Sequences(3, 4, True, seed=3)
    for start in range(0, 12, 3):
        one.read(list(range(start, start + 3)))
    for max_rollback in (0, 2, 7):
        other = RingState.of(one.ring, max_rollback).aligned().tensors()
        for name, x in one.ring.aligned().tensors().items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("bad", [-1, 5, True, 2.0])
def test_refused_numbers(bad):
    one = Sequences(3, 4, False, seed=4)
    one.read([0, 1])
    if bad != 5:
        with pytest.raises(ValueError, match="max_rollback"):
            RingState.of(one.ring, bad)
    if type(bad) is int:
        with pytest.raises(ValueError, match=str(bad)):
            one.ring.rollback(bad)
    k = torch.zeros(ROWS, 5, HEADS, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="at most 4 tokens, got 5"):
        one.ring.append(k, k, k[..., :SLOTS], None)
