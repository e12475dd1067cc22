"""States in rows of bytes: what is written into a row is read from it, and formats take what packed states take."""

from __future__ import annotations

import itertools

import pytest
import torch

from nha.ops import NHAState
from nha.ops.packed_state import PackedState
from nha.serve.layout import ALIGNMENT, lay_out, nbytes

FORMATS = ("float32", "bfloat16", "int8")


def make_state(heads: int, dim: int, slots: int, window: int, dtype: torch.dtype) -> NHAState:
    torch.manual_seed(0)
    token = torch.zeros(2, 1, heads, dim, dtype=dtype)
    empty = NHAState.empty(window, key=token, value=token, log_gate=token.new_zeros(2, 1, heads, slots), shared=False)
    return empty.padded().map(lambda x: torch.randn(x.shape).abs().neg().to(x.dtype) if x.is_floating_point() else x)


@pytest.mark.parametrize("state_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots, window", [(7, 5), (8, 1), (1, 3)])
def test_rows_hold_the_bits_of_states(state_dtype, dtype, slots, window):
    heads, dim = 3, 6
    pieces = lay_out(heads, dim, slots, heads * window, dtype, state_dtype)
    state = make_state(heads, dim, slots, window, dtype)
    state = state if state_dtype == "float32" else PackedState.of(state, state_dtype)
    rows = torch.full((2, nbytes(pieces)), 77, dtype=torch.uint8)
    for piece in pieces:
        x = getattr(state, piece.name)
        piece.view(rows).copy_(x if piece.is_slot else x.flatten(1, 2))
    for piece in pieces:
        found = piece.view(rows)
        found = found if piece.is_slot else found.unflatten(1, (window, heads))
        assert torch.equal(found, getattr(state, piece.name)), piece.name


@pytest.mark.parametrize("state_dtype", FORMATS)
def test_pieces_follow_each_other_at_aligned_places(state_dtype):
    pieces = lay_out(3, 6, 7, 15, torch.bfloat16, state_dtype)
    assert all(piece.start % ALIGNMENT == 0 for piece in pieces)
    assert all(0 <= after.start - before.stop < ALIGNMENT for before, after in itertools.pairwise(pieces))
    assert {"slot_key", "slot_value", "key", "value", "window_slot_key", "window_log_gate"} <= {p.name for p in pieces}


def test_an_unknown_format_and_an_odd_head_dim_are_refused():
    with pytest.raises(ValueError, match="int4"):
        lay_out(2, 4, 8, 6, torch.float32, "int4")
    with pytest.raises(ValueError, match="5"):
        lay_out(2, 5, 8, 6, torch.float32, "int8")
