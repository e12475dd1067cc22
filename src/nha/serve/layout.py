"""How a layer's states are laid out in a row of bytes, as vLLM's blocks hold them. Imports no vLLM."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops import NHAState
from nha.ops.packed_state import PackedState

ALIGNMENT = 16  # bytes at whose multiples every part begins
SLOTS, WINDOW = "slot_", ("key", "value", "window_")  # how names begin


class Piece(NamedTuple):
    """A tensor of a sequence's states: its name in `NHAState` or `PackedState`, and where its bytes begin."""

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_slot(self) -> bool:
        """Whether it belongs to slots and not to the window."""
        return self.name.startswith(SLOTS)

    @property
    def stop(self) -> int:
        """Where its bytes end."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def view(self, rows: Tensor) -> Tensor:
        """This tensor of all sequences, [N, *shape], in the memory of rows of bytes [N, at least `stop`]."""
        return rows[:, self.start : self.stop].view(self.dtype).unflatten(1, self.shape)


def lay_out(
    heads: int, dim: int, slots: int, places: int, dtype: torch.dtype, state_dtype: str = "float32"
) -> tuple[Piece, ...]:
    """The pieces of a layer's states, one after the other.

    Args:
        heads: KV heads.
        dim: head dim D.
        slots: M, slots of a head.
        places: tokens in the windows of all heads together.
        dtype: of keys and values.
        state_dtype: how numbers are kept: "float32" for slots in float32 and a window in `dtype`, or packed.

    Raises ValueError for an unknown state_dtype, and for an odd head dim in "int8".

    >>> [(piece.name, piece.start, piece.shape) for piece in lay_out(2, 4, 8, 6, torch.float32)][:3]
    [('slot_key', 0, (2, 8, 4)), ('slot_value', 256, (2, 8, 4)), ('key', 512, (6, 4))]
    >>> [nbytes(lay_out(3, 64, 64, 192, torch.bfloat16, name)) for name in ("float32", "bfloat16", "int8")]
    [196608, 147456, 87936]
    """
    token = torch.zeros(1, 1, 1, dim, dtype=dtype)
    gate = token.new_zeros(1, 1, 1, slots)
    state = NHAState.empty(1, key=token, value=token, log_gate=gate, shared=False).padded()
    if state_dtype != "float32":
        state = PackedState.of(state, state_dtype)
    pieces, start = [], 0
    for name, x in state.tensors().items():
        if not name.startswith((SLOTS, *WINDOW)):
            continue
        shape = (heads, *x.shape[2:]) if name.startswith(SLOTS) else (places, *x.shape[3:])
        piece = Piece(name, start, shape, x.dtype)
        pieces.append(piece)
        start = -(-piece.stop // ALIGNMENT) * ALIGNMENT
    return tuple(pieces)


def nbytes(pieces: tuple[Piece, ...]) -> int:
    """Bytes of a row, a multiple of `ALIGNMENT`."""
    return -(-pieces[-1].stop // ALIGNMENT) * ALIGNMENT
