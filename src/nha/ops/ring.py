"""The state of a running text that new tokens are written into: what a fused decoding step updates in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nha.ops.state import NHAState

MAX_NEW = 16  # tokens that can be written at a time


@dataclass(kw_only=True)
class RingState(NHAState):
    """A state whose window is a ring: token t lies at place t mod W, so that a new token moves no other.

    The tensors are those of `NHAState`, its own and contiguous; a step overwrites them where they are. `aligned` gives
    the state with its window in order; `nha_attention` and `nha.save_state` do that by themselves.

    >>> state = NHAState.from_slots(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), window_size=3)
    >>> state.key[0, :, 0, 0] = torch.tensor([4.0, 5.0, 6.0])
    >>> state.num_tokens += 7  # tokens 4, 5 and 6 came last
    >>> ring = RingState.of(state)
    >>> ring.key[0, :, 0, 0].tolist(), ring.aligned().key[0, :, 0, 0].tolist()
    ([6.0, 4.0, 5.0], [4.0, 5.0, 6.0])
    """

    arrival_counter: (
        Tensor  # [B, H + 1] int32, zero between steps: how many programs of a head, and heads of a row, are through
    )

    @classmethod
    def of(cls, state: NHAState) -> RingState:
        """A copy of a state in ring order. Raises ValueError for full attention, whose window has no end."""
        if state.window_size < 0:
            raise ValueError(f"expected a state of window_size >= 0, got one of {state.window_size}")
        if isinstance(state, RingState):
            return state._map(torch.clone)  # type: ignore[return-value]
        arrival_counter = state.num_tokens.new_zeros(
            state.num_tokens.shape[0], state.slot_key.shape[1] + 1, dtype=torch.int32
        )
        return cls(
            window_size=state.window_size,
            slots_active=state.slots_active,
            arrival_counter=arrival_counter,
            **_copies(state, -1),
        )

    def aligned(self) -> NHAState:
        """A copy of the state with its window oldest first, as `NHAState` has it."""
        return NHAState(window_size=self.window_size, slots_active=self.slots_active, **_copies(self, 1))


def _copies(state: NHAState, direction: int) -> dict[str, Any]:
    """Copies of the tensors, contiguous and without gradients, every row's window turned by its count of tokens."""
    window = state.window_size
    place = torch.arange(window, device=state.num_tokens.device) + direction * state.num_tokens[:, None]
    index = (place.remainder(window) if window else place)[..., None, None]
    copies: dict[str, Any] = {"window_slot_key": None}
    for name in ("key", "value", "window_slot_key", "window_log_gate"):
        x = getattr(state, name)
        if x is not None:
            copies[name] = x.detach().gather(1, index.expand(-1, -1, *x.shape[2:]))
    for name in ("slot_key", "slot_value", "num_tokens"):
        copies[name] = getattr(state, name).detach().clone(memory_format=torch.contiguous_format)
    return copies
