"""The memory of a layer between two calls, in fewer bytes than the calls compute with.

Rounding must not lose what a token adds to a slot, which may be far below one step of the format. Slots are therefore
rounded up or down by a dither that runs through [0, 1) evenly from token to token: errors of one token are made good by
the next. In "int8" 4 bits of the rounding error are kept beside each number of a slot and added back as well. The
window is rounded once, when a token enters: scales are powers of 2, so that packing again changes no bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nha.ops.chunk_groups import GATE_FLOOR
from nha.ops.state import WINDOW_CACHE, NHAState, RingState, check_state, forget_newest, slot_dtype
from nha.settings import STATE_DTYPES, check_choice

GOLDEN, PLASTIC = 0x9E3779B9, 0xC13FA9A9  # in units of 2 ** -32; their multiples, modulo 1, fill [0, 1) evenly
MAX_INT8, MAX_INT12 = 127, 2038  # 2,038 = 16 * 127 + 6: a value of 8 bits and an error of 4 bits
GATE_SCALE = 1e-4  # log-gates below are stored in equal steps of 4e-6, those above within 2 % of themselves
GATE_STEP = math.log1p(-GATE_FLOOR / GATE_SCALE) / 255
SMALLEST = 2.0**-124  # of a row that is not taken for zeros
SLOTS = ("slot_key", "slot_value")
ROWS = ("key", "value", "window_slot_key")
EXTRA = tuple(f"{name}_error" for name in SLOTS) + tuple(f"{name}_scale" for name in SLOTS + ROWS)


def check_state_dtype(state_dtype: object) -> None:
    """Raise ValueError for a name that is none of `STATE_DTYPES`.

    >>> check_state_dtype("int4")
    Traceback (most recent call last):
    ValueError: expected state_dtype to be one of float32, bfloat16, int8, got 'int4'
    """
    check_choice("state_dtype", state_dtype, STATE_DTYPES)


@dataclass(kw_only=True)
class PackedState(NHAState):
    """A state in fewer bytes. `unpack` gives the state to compute with, `PackedState.of` packs the next one.

    Slots and window have the shapes of an `NHAState`. In "bfloat16" they have this dtype. In "int8" a row of D numbers
    has a scale, slots have two errors of 4 bits in a byte, and log-gates have 8 bits on a logarithmic scale.

    >>> state = NHAState.from_slots(torch.randn(1, 2, 8, 64), torch.randn(1, 2, 8, 64), window_size=16).padded()
    >>> packed = PackedState.of(state, "int8")
    >>> packed.slot_key.dtype, packed.slot_key_error.shape[-1], packed.nbytes < state.nbytes / 2.5
    (torch.int8, 32, True)
    >>> error = (packed.unpack().slot_key - state.slot_key).abs().amax(-1)
    >>> bool((error < state.slot_key.abs().amax(-1) / 1000).all())
    True
    """

    state_dtype: str
    dtype: torch.dtype  # of the inputs
    gate_dtype: torch.dtype
    is_ring: bool = False
    max_rollback: int = 0
    arrival_counter: Tensor | None = None
    num_written: Tensor | None = None
    slot_key_error: Tensor | None = None  # [B, H, M, D / 2] uint8
    slot_value_error: Tensor | None = None
    slot_key_scale: Tensor | None = None  # [B, H, M, 1] bfloat16
    slot_value_scale: Tensor | None = None
    key_scale: Tensor | None = None  # [B, n, H, 1] bfloat16
    value_scale: Tensor | None = None
    window_slot_key_scale: Tensor | None = None

    @classmethod
    def of(cls, state: NHAState, state_dtype: str) -> PackedState:
        """Pack a state, without gradients; a `RingState` without copying its window into order.

        Raises ValueError for an unknown format, and for an odd head dim in "int8".
        """
        check_state_dtype(state_dtype)
        is_ring = isinstance(state, RingState)
        state = state if is_ring else state.aligned()
        found: dict[str, Tensor | None] = {"num_tokens": state.num_tokens, "window_slot_key": None}
        for name in ("num_kept", "num_written", "arrival_counter"):
            found[name] = getattr(state, name, None)
        for name in SLOTS:
            found |= pack_slots(name, getattr(state, name).detach(), state.num_tokens, state_dtype)
        for name in WINDOW_CACHE:
            x = getattr(state, name)
            if x is not None and state_dtype == "int8":
                found |= pack_rows(name, x.detach()) if name in ROWS else {name: pack_gates(x.detach())}
            elif x is not None:
                found[name] = x.detach().to(narrow(x.dtype))
        return cls(
            window_size=state.window_size,
            slots_active=state.slots_active,
            state_dtype=state_dtype,
            dtype=state.key.dtype,
            gate_dtype=state.window_log_gate.dtype,
            is_ring=is_ring,
            max_rollback=state.max_rollback if isinstance(state, RingState) else 0,
            **found,  # type: ignore[arg-type]
        )

    def unpack(self) -> NHAState:
        """The state to compute with, in tensors of its own: an `NHAState`, or the `RingState` that was packed."""
        found: dict[str, Any] = {"num_tokens": self.num_tokens.clone(), "window_slot_key": None}
        found["num_kept"] = None if self.num_kept is None else self.num_kept.clone()
        for name in SLOTS:
            found[name] = self._unpack_slots(name)
        for name in WINDOW_CACHE:
            x, scale = getattr(self, name), getattr(self, f"{name}_scale", None)
            if x is not None and x.dtype == torch.uint8:
                found[name] = unpack_gates(x).to(self.gate_dtype)
            elif x is not None:
                dtype = self.gate_dtype if name == "window_log_gate" else self.dtype
                found[name] = x.to(dtype, copy=True) if scale is None else (x * scale.float()).to(dtype)
        options: dict[str, Any] = {"window_size": self.window_size, "slots_active": self.slots_active}
        if not self.is_ring:
            return NHAState(**options, **found)
        for name in ("arrival_counter", "num_written"):
            x = getattr(self, name)
            found[name] = None if x is None else x.clone()
        return RingState(**options, max_rollback=self.max_rollback, **found)

    def _unpack_slots(self, name: str) -> Tensor:
        x, error, scale = (getattr(self, part) for part in (name, f"{name}_error", f"{name}_scale"))
        dtype = slot_dtype(self.dtype)
        if scale is None:
            return x.to(dtype)
        errors = torch.cat((error & 15, error >> 4), -1).to(dtype) - 8
        return (x.to(dtype) * 16 + errors) * scale.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by field name, packed as they are, without the absent ones."""
        extra = {name: x for name in EXTRA if isinstance(x := getattr(self, name), Tensor)}
        return super().tensors() | extra

    def aligned(self) -> NHAState:
        """The state to compute with, its window oldest first."""
        return self.unpack().aligned()

    def padded(self) -> NHAState:
        """The packed state with a window of all W entries."""
        return self if self.is_ring else PackedState.of(self.unpack().padded(), self.state_dtype)

    def in_order(self) -> PackedState:
        """The packed state with its window oldest first, as files hold it."""
        return PackedState.of(self.aligned(), self.state_dtype) if self.is_ring else self

    def rollback(self, count: int) -> None:
        """Forget the newest `count` tokens of every sequence, in place, as `RingState.rollback` does."""
        if not self.is_ring or not 0 <= count <= self.max_rollback:
            raise ValueError(f"expected to take back 0 to {self.max_rollback} tokens, got {count}")
        forget_newest(self, count)

    def check(self) -> None:
        """Raise TypeError or ValueError for tensors, such as those of a file, that do not fit together."""
        check_state_dtype(self.state_dtype)
        try:
            state = self.unpack()
        except (RuntimeError, AttributeError) as error:
            raise ValueError(f"expected tensors of a state in {self.state_dtype}, got {error}") from None
        check_state(state)
        expected = {name: described(x) for name, x in PackedState.of(state, self.state_dtype).tensors().items()}
        got = {name: described(x) for name, x in self.tensors().items()}
        for name in sorted(expected.keys() | got.keys()):
            if expected.get(name) != got.get(name):
                raise ValueError(f"expected state.{name} to be {expected.get(name)}, got {got.get(name)}")


def described(x: Tensor) -> str:
    """A tensor's dtype and shape."""
    return f"{x.dtype} {list(x.shape)}"


def narrow(dtype: torch.dtype) -> torch.dtype:
    """The dtype of 16 bits for numbers that are rounded once."""
    return torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype


def power_of_two(size: Tensor) -> Tensor:
    """The least power of 2 above each size, exactly; sizes below 2 ** -124 count as this.

    >>> power_of_two(torch.tensor([0.75, 1.0, 3.0])).tolist()
    [1.0, 2.0, 4.0]
    """
    exponent = size.float().clamp_min(SMALLEST).view(torch.int32) & 0x7F800000
    return exponent.view(torch.float32) * 2


def dither(num_tokens: Tensor, like: Tensor) -> Tensor:
    """Numbers in [0, 1) [B, 1, M, D] for slots [B, H, M, D], which run through it evenly as tokens are read.

    They are multiples of 2 ** -12, so that float32 holds their sums with numbers of 12 bits exactly. They come from
    integers, which every device has; some have no float64.
    """
    slots, dim = like.shape[2:]
    place = torch.arange(slots * dim, device=like.device).view(slots, dim) * PLASTIC
    fraction = (num_tokens[:, None, None, None] * GOLDEN + place) & 0xFFFFFFFF
    return (fraction >> 20).to(torch.float32) / 2**12


def pack_slots(name: str, x: Tensor, num_tokens: Tensor, state_dtype: str) -> dict[str, Tensor | None]:
    """The packed parts of slots [B, H, M, D] by field name."""
    if state_dtype == "float32":
        return {name: x}
    offset = dither(num_tokens, x)
    if state_dtype == "bfloat16":
        bits = x.float().contiguous().view(torch.int32) + (offset * 2**16).to(torch.int32)
        return {name: (bits & -(2**16)).view(torch.float32).to(torch.bfloat16)}
    if x.shape[-1] % 2:
        raise ValueError(f"expected an even head dim for state_dtype 'int8', got {x.shape[-1]}")
    scale = power_of_two(x.abs().amax(-1, keepdim=True) / (MAX_INT12 + 1))
    value = torch.floor(x / scale + offset).clamp(-MAX_INT12, MAX_INT12).to(torch.int16)
    rounded = (value + 8) >> 4
    low, high = (value - 16 * rounded + 8).to(torch.uint8).chunk(2, -1)
    return {
        name: rounded.to(torch.int8),
        f"{name}_error": low | high << 4,
        f"{name}_scale": scale.to(torch.bfloat16),
    }


def pack_rows(name: str, x: Tensor) -> dict[str, Tensor | None]:
    """The packed parts of tokens of the window [B, n, H, D] by field name: 8 bits a number and a scale a row."""
    scale = power_of_two(x.abs().amax(-1, keepdim=True).float() / (MAX_INT8 + 0.5))
    value = torch.round(x.float() / scale).clamp(-MAX_INT8, MAX_INT8)
    return {name: value.to(torch.int8), f"{name}_scale": scale.to(torch.bfloat16)}


def pack_gates(x: Tensor) -> Tensor:
    """Log-gates [B, n, H, M] from -5 to 0 as uint8; both ends are exact, and what is outside counts as them."""
    size = -x.float().clamp(GATE_FLOOR, 0)
    return torch.round(torch.log1p(size / GATE_SCALE) / GATE_STEP).to(torch.uint8)


def unpack_gates(x: Tensor) -> Tensor:
    """The log-gates of `pack_gates`, in float32.

    >>> unpack_gates(pack_gates(torch.tensor([0.0, -0.001, -0.125, -5.0]))).mul(1e3).round().tolist()
    [-0.0, -1.0, -125.0, -5000.0]
    """
    size = torch.expm1(x.float() * GATE_STEP) * GATE_SCALE
    return torch.where(x == 255, GATE_FLOOR, -size)


def like_ring(state: NHAState, held: NHAState) -> NHAState:
    """The state with its window in ring order where `held` has it so, else oldest first."""
    wanted = held.is_ring if isinstance(held, PackedState) else isinstance(held, RingState)
    if isinstance(state, PackedState) or wanted == isinstance(state, RingState):
        return state
    return RingState.of(state) if wanted else state.aligned()
