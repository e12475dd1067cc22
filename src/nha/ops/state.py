"""The memory of one NHA layer: a fixed set of slots and the tail of a sliding window."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_WINDOW = 2**24  # tokens; positions in kernels are 32-bit numbers


def slot_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype slots are kept in: float32, or float64 next to float64 inputs.

    >>> slot_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_window_size(window_size: object) -> None:
    """Raise ValueError for what is no window size.

    >>> check_window_size(2**40)
    Traceback (most recent call last):
    ValueError: expected window_size to be an int from -1 to 16777216, got 1099511627776
    """
    number = isinstance(window_size, int) and not isinstance(window_size, bool)
    if not number or not -1 <= window_size <= MAX_WINDOW:  # type: ignore[operator]
        raise ValueError(f"expected window_size to be an int from -1 to {MAX_WINDOW}, got {window_size!r}")


@dataclass
class NHAState:
    """What a layer remembers of the tokens it has seen. Every call returns a new one.

    `B` rows, `H` KV heads, `M` slots, `D`/`Dv` head dims, `W` the window size. The tail holds the last `W`
    tokens, oldest first and right-aligned: with fewer than `W` tokens seen its first entries are unused.
    With `window_size == -1` (full attention) the tail holds every token and the slots are empty (`M == 0`).

    >>> state = NHAState.from_slots(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), window_size=3)
    >>> state.slots_active, state.num_tokens.tolist(), tuple(state.key.shape)
    (True, [0], (1, 3, 2, 4))
    >>> state.nbytes == sum(t.numel() * t.element_size() for t in state.tensors().values())
    True
    """

    window_size: int
    slot_key: Tensor  # [B, H, M, D], float32 (float64 next to float64 inputs)
    slot_value: Tensor  # [B, H, M, Dv]
    key: Tensor  # [B, W, H, D]
    value: Tensor  # [B, W, H, Dv]
    window_slot_key: Tensor | None  # [B, W, H, D]; None where the slots see the same keys as the window
    window_log_gate: Tensor  # [B, W, H, M]
    num_tokens: Tensor  # [B] int64, tokens seen by each row
    slots_active: bool = False  # slots handed in by the caller take part from token 0

    @classmethod
    def empty(
        cls,
        window_size: int,
        *,
        key: Tensor,
        value: Tensor,
        log_gate: Tensor,
        shared: bool,
        cu_seqlens: Tensor | None = None,
    ) -> NHAState:
        """A state that has seen nothing, shaped after one segment of inputs (any length).

        `key` [B, T, H, D], `value` [B, T, H, Dv], `log_gate` [B, T, H, M]; `shared` says that slots and
        window see the same keys. With `cu_seqlens` [N + 1] there is a row for each of N packed sequences.
        """
        batch, _, heads, dim = key.shape
        batch = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        value_dim, slots = value.shape[-1], log_gate.shape[-1]
        width = max(window_size, 0)
        kept = slot_dtype(key.dtype)
        return cls(
            window_size=window_size,
            slot_key=key.new_zeros(batch, heads, slots, dim, dtype=kept),
            slot_value=key.new_zeros(batch, heads, slots, value_dim, dtype=kept),
            key=key.new_zeros(batch, width, heads, dim),
            value=value.new_zeros(batch, width, heads, value_dim),
            window_slot_key=None if shared else key.new_zeros(batch, width, heads, dim),
            window_log_gate=log_gate.new_zeros(batch, width, heads, slots),
            num_tokens=torch.zeros(batch, dtype=torch.int64, device=key.device),
        )

    @classmethod
    def from_slots(
        cls,
        slot_key: Tensor,
        slot_value: Tensor,
        window_size: int,
        *,
        dtype: torch.dtype | None = None,
        shared_keys: bool = True,
    ) -> NHAState:
        """A state whose slots are given and live from token 0; they may require gradients.

        `slot_key` [B, H, M, D] and `slot_value` [B, H, M, Dv] keep (or get) the slot dtype; `dtype` is that of
        the keys and values to come (default: that of `slot_key`). Set `shared_keys=False` if the calls will pass
        `k_slot`. Raises ValueError for shapes that do not fit and for `window_size < 0`.
        """
        if window_size < 0:
            raise ValueError(f"slots need window_size >= 0, got {window_size}")
        if slot_key.dim() != 4 or slot_value.dim() != 4 or slot_key.shape[:3] != slot_value.shape[:3]:
            raise ValueError(
                "expected slot_key [B, H, M, D] and slot_value [B, H, M, Dv], "
                f"got {list(slot_key.shape)} and {list(slot_value.shape)}"
            )
        batch, heads, slots, dim = slot_key.shape
        dtype = dtype or slot_key.dtype
        kept = slot_dtype(dtype)

        def zeros(last: int) -> Tensor:
            return slot_key.new_zeros(batch, window_size, heads, last, dtype=dtype)

        return cls(
            window_size=window_size,
            slot_key=slot_key.to(kept),
            slot_value=slot_value.to(kept),
            key=zeros(dim),
            value=zeros(slot_value.shape[-1]),
            window_slot_key=None if shared_keys else zeros(dim),
            window_log_gate=zeros(slots),
            num_tokens=torch.zeros(batch, dtype=torch.int64, device=slot_key.device),
            slots_active=True,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, without the absent ones."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the state."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def _map(self, function) -> NHAState:
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def aligned(self) -> NHAState:
        """The state with its window oldest first: this one."""
        return self

    def to(self, device: torch.device | str) -> NHAState:
        """The state on another device."""
        return self._map(lambda t: t.to(device))

    def detach(self) -> NHAState:
        """The state cut off from the graph that made it (truncated back-propagation through time)."""
        return self._map(torch.Tensor.detach)

    def select(self, rows: Tensor) -> NHAState:
        """The rows with these indices, in this order, repeats allowed (`rows` int64 [N])."""
        return self._map(lambda t: t.index_select(0, rows.to(t.device)))

    @classmethod
    def join(cls, states: list[NHAState]) -> NHAState:
        """States of one window size as the rows of one; tails of unlike length (full attention) are right-aligned."""
        joined = {}
        for name in states[0].tensors():
            rows = [getattr(state, name) for state in states]
            if name in ("key", "value", "window_slot_key", "window_log_gate"):
                width = max(row.shape[1] for row in rows)
                rows = [F.pad(row, (0, 0, 0, 0, width - row.shape[1], 0)) for row in rows]
            joined[name] = torch.cat(rows)
        return replace(states[0], **joined)
