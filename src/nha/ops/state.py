"""The memory of one NHA layer: a fixed set of slots and the last tokens in a sliding window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nha.ops.exact import kept_tokens
from nha.ops.padding import readable
from nha.settings import MAX_WINDOW

MAX_NEW = 16  # tokens that can be written into a ring at a time
MAX_ROLLBACK = 2**12  # tokens that a ring may hold besides its window
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Dimensions by letter, read once: these checks run before every decoded token.
LETTERS = {
    name: tuple(shape.split(", "))
    for name, shape in {
        "q": "B, T, HQ, D",
        "k": "B, T, H, D",
        "v": "B, T, H, Dv",
        "log_gate": "B, T, H, M",
        "q_slot": "B, T, HQ, D",
        "k_slot": "B, T, H, D",
        "slot_key": "B, H, M, D",
        "slot_value": "B, H, M, Dv",
        "key": "B, n, H, D",
        "value": "B, n, H, Dv",
        "window_slot_key": "B, n, H, D",
        "window_log_gate": "B, n, H, M",
        "num_tokens": "B",
        "num_written": "B",
        "num_kept": "B, H",
        "arrival_counter": "B, H + 1",
    }.items()
}
# Fields of a state that hold tensors; torch.compile of PyTorch 2.11 cannot list the fields of an object itself.
STATE_TENSORS = tuple(name for name in LETTERS if name not in ("q", "k", "v", "log_gate", "q_slot", "k_slot"))
WINDOW_CACHE = ("key", "value", "window_slot_key", "window_log_gate")  # fields [B, n, H, ...]


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


def check_tensor(name: str, x: Any, letters: tuple[str, ...]) -> Tensor:
    """The tensor; refuses what is no tensor of as many dimensions as there are letters."""
    if not isinstance(x, Tensor) or x.dim() != len(letters):
        got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected {name} to be a tensor [{', '.join(letters)}], got {got}")
    return x


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], letters: tuple[str, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"expected {name} of shape [{', '.join(letters)}] = {list(shape)}, got {list(x.shape)}")


@dataclass
class NHAState:
    """The memory of a layer for a batch of sequences. A call of `nha_attention` returns a new one.

    `B` sequences, `H` KV heads, `M` slots, `D`/`Dv` head dims, `W` the window size. The window cache holds the last
    `n <= W` tokens of each sequence, oldest first and right-aligned, and grows as tokens come, so that a wide window
    costs a short sequence nothing. A sequence with fewer than `n` tokens leaves its first entries unused. With
    `window_size == -1` (full attention) the cache holds every token and nothing is written to the slots.

    >>> state = NHAState.from_slots(torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4), window_size=3)
    >>> state.slots_active, state.num_tokens.tolist(), tuple(state.key.shape)
    (True, [0], (1, 0, 2, 4))
    >>> tuple(state.padded().key.shape)
    (1, 3, 2, 4)
    >>> state.nbytes == sum(t.numel() * t.element_size() for t in state.tensors().values())
    True
    """

    window_size: int
    slot_key: Tensor  # [B, H, M, D], float32 (float64 next to float64 inputs)
    slot_value: Tensor  # [B, H, M, Dv]
    key: Tensor  # [B, n, H, D]
    value: Tensor  # [B, n, H, Dv]
    window_slot_key: Tensor | None  # [B, n, H, D]; None where slots and window have the same keys
    window_log_gate: Tensor  # [B, n, H, M]
    num_tokens: Tensor  # [B] int64, tokens read by each sequence so far
    slots_active: bool = False  # slots handed in by the caller are active from token 0
    num_kept: Tensor | None = None  # [B, H] int64, tokens kept in exact slots so far: counted by what makes the gates

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
        """The state before the first token, with sizes, dtypes and device of one segment of inputs (any length).

        `key` [B, T, H, D], `value` [B, T, H, Dv], `log_gate` [B, T, H, M]; `shared` if slots and window read the
        same keys. With `cu_seqlens` [N + 1] it is the state of N packed sequences.
        """
        batch, _, heads, dim = key.shape
        batch = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        value_dim, slots = value.shape[-1], log_gate.shape[-1]
        slots_in = slot_dtype(key.dtype)
        return cls(
            window_size=window_size,
            slot_key=key.new_zeros(batch, heads, slots, dim, dtype=slots_in),
            slot_value=key.new_zeros(batch, heads, slots, value_dim, dtype=slots_in),
            key=key.new_zeros(batch, 0, heads, dim),
            value=value.new_zeros(batch, 0, heads, value_dim),
            window_slot_key=None if shared else key.new_zeros(batch, 0, heads, dim),
            window_log_gate=log_gate.new_zeros(batch, 0, heads, slots),
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
        """The state before the first token with slots that are active from token 0; they may require gradients.

        `slot_key` [B, H, M, D] and `slot_value` [B, H, M, Dv] are cast to the slot dtype; `dtype` is that of the keys
        and values to come (default: that of `slot_key`). Set `shared_keys=False` if the calls will pass `k_slot`.

        Raises:
            ValueError: shapes or devices that do not fit together, or a `window_size` below 0.
            TypeError: slots that are no floating point tensors.
        """
        check_window_size(window_size)
        if window_size < 0:
            raise ValueError(f"expected window_size >= 0 for slots, got {window_size}")
        for name, x in (("slot_key", slot_key), ("slot_value", slot_value)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"expected {name} to be a floating point tensor, got {got}")
        if slot_key.dim() != 4 or slot_value.dim() != 4 or slot_key.shape[:3] != slot_value.shape[:3]:
            raise ValueError(
                "expected slot_key [B, H, M, D] and slot_value [B, H, M, Dv], "
                f"got {list(slot_key.shape)} and {list(slot_value.shape)}"
            )
        if slot_key.device != slot_value.device:
            raise ValueError(f"expected slot_value on {slot_key.device} like slot_key, got {slot_value.device}")
        like = slot_key.transpose(1, 2)[:, :0].to(dtype or slot_key.dtype)  # [B, 0, H, D]
        state = cls.empty(
            window_size,
            key=like,
            value=like.new_empty(*like.shape[:3], slot_value.shape[3]),
            log_gate=like.new_empty(*like.shape[:3], slot_key.shape[2]),
            shared=shared_keys,
        )
        slots_in = slot_dtype(like.dtype)
        return replace(state, slot_key=slot_key.to(slots_in), slot_value=slot_value.to(slots_in), slots_active=True)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, without the absent ones."""
        return {name: x for name in STATE_TENSORS if isinstance(x := getattr(self, name, None), Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of the state."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def map(self, function: Callable[[Tensor], Tensor]) -> NHAState:
        """The state with a function applied to each of its tensors."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def aligned(self) -> NHAState:
        """The state with its window oldest first: this one."""
        return self

    def padded(self) -> NHAState:
        """The state with a window cache of all W entries, whose size no longer changes; unused ones are zero."""
        missing = self.window_size - self.key.shape[1]
        if missing <= 0:
            return self
        cache = {name: getattr(self, name) for name in WINDOW_CACHE}
        wide = {name: F.pad(x, (0, 0, 0, 0, missing, 0)) for name, x in cache.items() if x is not None}
        return replace(self, **wide)

    def to(self, device: torch.device | str) -> NHAState:
        """The state on another device."""
        return self.map(lambda t: t.to(device))

    def detach(self) -> NHAState:
        """The state cut off from the graph that made it (truncated back-propagation through time)."""
        return self.map(torch.Tensor.detach)

    def select(self, rows: Tensor) -> NHAState:
        """The sequences with these indices, in this order, repeats allowed (`rows` int64 [N])."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    @classmethod
    def join(cls, states: list[NHAState]) -> NHAState:
        """The sequences of several states of one window size as one batch; window caches are right-aligned."""
        joined = {}
        for name in states[0].tensors():
            rows = [getattr(state, name) for state in states]
            if name in WINDOW_CACHE:
                width = max(row.shape[1] for row in rows)
                rows = [F.pad(row, (0, 0, 0, 0, width - row.shape[1], 0)) for row in rows]
            joined[name] = torch.cat(rows)
        return replace(states[0], **joined)


def after_first(
    window_size: int, k: Tensor, v: Tensor, log_gate: Tensor, k_slot: Tensor | None, slots: tuple[Tensor, Tensor]
) -> NHAState:
    """The state after a first segment of at least W tokens without padding: `advance` of an empty state, with fewer
    operations; `k_slot` is None where slots and window read the same keys."""

    def last(x: Tensor) -> Tensor:
        return x[:, x.shape[1] - window_size :].clone(memory_format=torch.contiguous_format)

    return NHAState(
        window_size=window_size,
        slot_key=slots[0],
        slot_value=slots[1],
        key=last(k),
        value=last(v),
        window_slot_key=None if k_slot is None else last(k_slot),
        window_log_gate=last(log_gate),
        num_tokens=torch.full((k.shape[0],), k.shape[1], device=k.device),
    )


def advance(
    state: NHAState,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    k_slot: Tensor,
    slots: tuple[Tensor, Tensor],
    count: Tensor | None,
) -> NHAState:
    """The state after a segment: the given slots, and the last tokens of window cache and segment.

    `count` [B] is the number of real tokens of each (left-aligned) sequence, None if all are.
    """
    past, length = state.key.shape[1], k.shape[1]
    width = past + length if state.window_size < 0 else min(past + length, state.window_size)

    def last(old: Tensor, new: Tensor) -> Tensor:
        if count is None and width <= length:
            return new[:, length - width :].to(old.dtype, copy=True, memory_format=torch.contiguous_format)
        joined = torch.cat([old, new.to(old.dtype)], 1)
        if count is None:
            return joined[:, past + length - width :].clone()
        joined = F.pad(joined, (0, 0, 0, 0, width - past, 0))
        index = torch.arange(width, device=new.device) + count[:, None]
        return joined.gather(1, index[..., None, None].expand(-1, -1, *new.shape[2:]))

    return replace(
        state,
        slot_key=slots[0],
        slot_value=slots[1],
        key=last(state.key, k),
        value=last(state.value, v),
        window_slot_key=None if state.window_slot_key is None else last(state.window_slot_key, k_slot),
        window_log_gate=last(state.window_log_gate, log_gate),
        num_tokens=state.num_tokens + (length if count is None else count),
    )


@dataclass(kw_only=True)
class RingState(NHAState):
    """A state that is updated in place, whose window cache is a ring buffer: token t lies at index t mod W.

    Writing a token moves no other, and all tensors keep their addresses, so that a CUDA graph can replay a step. The
    tensors are those of `NHAState`, contiguous and shared with no other state. `aligned` returns the state with its
    window in order; `nha_attention` and `nha.save_state` call it themselves. The ring has all W entries from the start.

    With `max_rollback` of R > 0 it has W + R: a token is written to the slots R tokens after it left the window, so
    that `rollback` can take back up to R of the newest tokens, exactly, by moving a cursor. Such a ring is read and
    written by `nha_decode`, or written by `append`, which gives the state to read, with older tokens in its slots.

    >>> state = NHAState.from_slots(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), window_size=3)
    >>> state = state.padded()
    >>> state.key[0, :, 0, 0] = torch.tensor([4.0, 5.0, 6.0])
    >>> state.num_tokens += 7  # the last were tokens 4, 5 and 6
    >>> ring = RingState.of(state)
    >>> ring.key[0, :, 0, 0].tolist(), ring.aligned().key[0, :, 0, 0].tolist()
    ([6.0, 4.0, 5.0], [4.0, 5.0, 6.0])
    >>> ring, new = RingState.of(state, max_rollback=2), torch.zeros(1, 2, 1, 4)
    >>> ring.append(new, new, torch.zeros(1, 2, 1, 2), None).num_tokens.tolist()
    [7]
    >>> ring.rollback(2)
    >>> ring.aligned().key[0, :, 0, 0].tolist(), ring.num_tokens.tolist()
    ([4.0, 5.0, 6.0], [7])
    """

    arrival_counter: Tensor  # [B, H + 1] int32: programs done per head and heads done per sequence; 0 between steps
    max_rollback: int = 0  # R, the tokens that `rollback` can take back
    num_written: Tensor | None = None  # [B] int64, tokens in the slots; None where R is 0: all that left the window

    @classmethod
    def of(cls, state: NHAState, max_rollback: int = 0) -> RingState:
        """A copy of a state in ring order, from which up to `max_rollback` of the tokens to come can be taken back.

        Raises ValueError for full attention, whose window is unbounded, and for a `max_rollback` out of range.
        """
        check_state(state)
        check_max_rollback(max_rollback)
        if state.window_size < 0:
            raise ValueError(f"expected a state of window_size >= 0, got one of {state.window_size}")
        if isinstance(state, RingState) and state.max_rollback == max_rollback:
            return state.map(torch.clone)  # type: ignore[return-value]
        arrival_counter = state.num_tokens.new_zeros(
            state.num_tokens.shape[0], state.slot_key.shape[1] + 1, dtype=torch.int32
        )
        state = state.aligned().padded()
        wide = {name: getattr(state, name) for name in WINDOW_CACHE if max_rollback}
        wide = {name: F.pad(x, (0, 0, 0, 0, max_rollback, 0)) for name, x in wide.items() if x is not None}
        return cls(
            window_size=state.window_size,
            slots_active=state.slots_active,
            arrival_counter=arrival_counter,
            max_rollback=max_rollback,
            num_written=(state.num_tokens - state.window_size).clamp_min(0) if max_rollback else None,
            **_copies(replace(state, **wide), -1),
        )

    def aligned(self) -> NHAState:
        """A copy of the state with its window oldest first and all other tokens in the slots, as in an `NHAState`."""
        if not self.max_rollback:
            return NHAState(window_size=self.window_size, slots_active=self.slots_active, **_copies(self, 1))
        return self._with_slots(self._slots(self.num_tokens - self.window_size)[0])

    def _with_slots(self, slots: tuple[Tensor, Tensor]) -> NHAState:
        """A copy of the window, oldest first, beside these slots."""
        copies = _copies(replace(self, slot_key=slots[0], slot_value=slots[1]), 1, self.max_rollback)
        return NHAState(window_size=self.window_size, slots_active=self.slots_active, **copies)

    def _slots(self, *stops: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The slots (key, value) once they hold tokens 0 .. stop - 1, for each stop [B]; no exponent is above 0."""
        assert self.num_written is not None
        width = self.window_size + self.max_rollback
        token = torch.arange(-width, -self.window_size, device=self.key.device) + self.num_tokens[:, None]
        place = token.remainder(width)[..., None, None]  # of tokens older than the window

        def oldest(x: Tensor) -> Tensor:  # [B, H, R, ...]
            return x.gather(1, place.expand(-1, -1, *x.shape[2:])).transpose(1, 2).to(self.slot_key.dtype)

        written = (token < self.num_written[:, None], *(token >= stop[:, None] for stop in stops))
        skipped = torch.stack([written[0] | later for later in written[1:]])[:, :, None, :, None]
        gate = oldest(self.window_log_gate).clamp(-5, 0).masked_fill(skipped, 0)  # [stops, B, H, R, M]
        total = gate.cumsum(3)
        share = (torch.expm1(gate) * -torch.exp(total[:, :, :, -1:] - total)).mT
        decay = total[:, :, :, -1].exp()[..., None]
        slot_key = self.key if self.window_slot_key is None else self.window_slot_key
        keys = torch.addcmul(share @ oldest(slot_key), decay, self.slot_key)
        values = torch.addcmul(share @ oldest(self.value), decay, self.slot_value)
        return list(zip(keys, values, strict=True))

    def append(self, key: Tensor, value: Tensor, log_gate: Tensor, slot_key: Tensor | None) -> NHAState:
        """Add up to `max_rollback` tokens [B, T, H, ...] of every sequence, in place; returns the state before them.

        Tokens older than window and `max_rollback` together are written to the slots, and the new ones take their
        places. Raises ValueError for more tokens than that.
        """
        length = key.shape[1]
        if not self.max_rollback or length > self.max_rollback:
            raise ValueError(f"expected at most {self.max_rollback} tokens, got {length}")
        assert self.num_written is not None
        first = self.num_tokens + (length - self.window_size - self.max_rollback)  # that stays out of the slots
        now, later = self._slots(self.num_tokens - self.window_size, first)
        before = self._with_slots(now)
        self.slot_key.copy_(later[0])
        self.slot_value.copy_(later[1])
        self.num_written.copy_(torch.maximum(self.num_written, first))
        place = torch.arange(length, device=key.device) + self.num_tokens[:, None]
        place = place.remainder(self.window_size + self.max_rollback)[..., None, None]
        new = {"key": key, "value": value, "window_log_gate": log_gate}
        if self.window_slot_key is not None:
            new["window_slot_key"] = key if slot_key is None else slot_key
        for name, x in new.items():
            held = getattr(self, name)
            held.scatter_(1, place.expand(-1, -1, *held.shape[2:]), x.detach().to(held.dtype))
        self.num_tokens += length
        return before

    def rollback(self, count: int) -> None:
        """Forget the newest `count` tokens of every sequence, in place: only their number changes.

        At most `max_rollback` tokens behind the furthest that was read; what goes further back is not checked here,
        since the numbers may be on a GPU.
        """
        if not 0 <= count <= self.max_rollback:
            raise ValueError(f"expected to take back 0 to {self.max_rollback} tokens, got {count}")
        forget_newest(self, count)


def forget_newest(state: NHAState, count: int) -> None:
    """Let a state whose window is a ring count the newest `count` tokens of every sequence no more, in place."""
    if state.num_kept is not None:
        token = torch.arange(-count, 0, device=state.key.device) + state.num_tokens[:, None]
        kept = kept_tokens(state.window_log_gate)
        place = token.remainder(max(kept.shape[1], 1))[..., None].expand(-1, -1, kept.shape[2])
        state.num_kept -= kept.gather(1, place).sum(1)
    state.num_tokens -= count


def check_max_rollback(max_rollback: object) -> None:
    """Raise ValueError for what is no number of tokens that can be taken back.

    >>> check_max_rollback(-1)
    Traceback (most recent call last):
    ValueError: expected max_rollback to be an int from 0 to 4096, got -1
    """
    number = isinstance(max_rollback, int) and not isinstance(max_rollback, bool)
    if not number or not 0 <= max_rollback <= MAX_ROLLBACK:  # type: ignore[operator]
        raise ValueError(f"expected max_rollback to be an int from 0 to {MAX_ROLLBACK}, got {max_rollback!r}")


def _copies(state: NHAState, direction: int, skip: int = 0) -> dict[str, Any]:
    """Contiguous copies of the tensors without gradients, each sequence's window rolled by its number of tokens.

    The first `skip` entries of the rolled window are left out.
    """
    width = state.key.shape[1]
    index = torch.arange(skip, width, device=state.num_tokens.device) + direction * state.num_tokens[:, None]
    index = (index.remainder(width) if width else index)[..., None, None]
    copies: dict[str, Any] = {"window_slot_key": None}
    for name in WINDOW_CACHE:
        x = getattr(state, name)
        if x is not None:
            copies[name] = x.detach().gather(1, index.expand(-1, -1, *x.shape[2:]))
    for name in ("slot_key", "slot_value", "num_tokens", "num_kept"):
        x = getattr(state, name)
        copies[name] = None if x is None else x.detach().clone(memory_format=torch.contiguous_format)
    return copies


def check_state(state: NHAState) -> None:
    """Raise TypeError or ValueError for a state whose tensors do not fit together or do not fit its window."""
    if not isinstance(state, NHAState):
        raise TypeError(f"expected state to be an NHAState, got {type(state).__name__}")
    check_window_size(state.window_size)
    tensors = state.tensors()
    rollback = state.max_rollback if isinstance(state, RingState) else 0
    for name in STATE_TENSORS:
        x = getattr(state, name, None)
        optional = name in ("window_slot_key", "num_kept") or (name == "num_written" and not rollback)
        if not (x is None and (optional or not hasattr(state, name))):
            check_tensor(f"state.{name}", x, LETTERS[name])
    batch, heads, slots, dim = state.slot_key.shape
    width, window_size = state.key.shape[1], state.window_size
    exact = isinstance(state, RingState)
    places = window_size + rollback
    if window_size >= 0 and (width != places if exact else width > window_size):
        limit = f"{places}" if exact else f"at most {window_size}"
        raise ValueError(f"expected state.key of {limit} tokens with window_size={window_size}, got {width}")
    sizes = {
        "B": batch,
        "H": heads,
        "M": slots,
        "D": dim,
        "Dv": state.slot_value.shape[3],
        "n": width,
        "H + 1": heads + 1,
    }
    dtypes = _state_dtypes(state.key.dtype)
    for name, x in tensors.items():
        letters = LETTERS[name]
        expected = tuple([sizes[letter] for letter in letters])
        check_shape(f"state.{name}", x, expected, letters)
        if x.dtype != dtypes.get(name, x.dtype):
            raise TypeError(f"expected state.{name} of {dtypes[name]} beside keys of {state.key.dtype}, got {x.dtype}")
        if name in ("key", "window_log_gate") and x.dtype not in DTYPES:
            raise TypeError(f"expected state.{name} to be floating point, got {x.dtype}")
        if x.device != state.key.device:
            raise ValueError(f"expected state.{name} on {state.key.device} like state.key, got {x.device}")
    if batch and readable(state.num_tokens):
        lowest, highest = (int(x) for x in state.num_tokens.aminmax())
        if lowest < 0 or (width != places and highest > width):
            limit = "0 or more" if width == places else f"0 to {width}, all of a window of {window_size} so far"
            raise ValueError(f"expected state.num_tokens of {limit}, got {lowest} to {highest}")


def _state_dtypes(of_inputs: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every tensor of a state beside keys of a dtype; log-gates may be of any floating-point one."""
    of_slots = slot_dtype(of_inputs)
    return {
        "value": of_inputs,
        "window_slot_key": of_inputs,
        "slot_key": of_slots,
        "slot_value": of_slots,
        "num_tokens": torch.int64,
        "num_written": torch.int64,
        "num_kept": torch.int64,
        "arrival_counter": torch.int32,
    }
