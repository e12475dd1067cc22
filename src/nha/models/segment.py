"""One segment of one hybrid layer: its inputs, how they are read, and the state they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nha.ops import NHAState, RingState, nha_attention, nha_decode, nha_prefill, supports_decode, supports_prefill
from nha.ops.autocast import cast_for_autocast
from nha.ops.backends import needs_grad
from nha.ops.exact import kept_tokens
from nha.ops.heads import take_heads
from nha.ops.padding import align_left
from nha.ops.single_token import FusedRing, supports_step
from nha.ops.sliding_window import has_window_kernel, sliding_window_attention, windowed_kernel
from nha.ops.state import MAX_NEW, advance

Sink = tuple[Tensor, Tensor]  # key [H, S, D], value [H, S, Dv]
Initial = tuple[Tensor, Tensor]  # slots before the first token: key [H, M, D], value [H, M, Dv]


@dataclass
class Inputs:
    """Tensors that a segment writes into a state: [B, T, H, ...] each, and its padding mask [B, T]."""

    key: Tensor
    value: Tensor
    log_gate: Tensor
    slot_key: Tensor | None
    mask: Tensor | None
    kept: Tensor | None = None  # [B, T, H] bool, tokens kept in exact slots

    @property
    def length(self) -> int:
        return self.key.shape[1]

    @property
    def nbytes(self) -> int:
        parts = vars(self).values()
        return sum(x.numel() * x.element_size() for x in parts if x is not None)

    def select(self, rows: Tensor) -> Inputs:
        return self._map(lambda x: x.index_select(0, rows.to(x.device)))

    def first(self, length: int) -> Inputs:
        return self._map(lambda x: x[:, :length])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(*(None if x is None else function(x) for x in vars(self).values()))  # type: ignore[arg-type]

    def advance(self, state: NHAState | None, window_size: int) -> NHAState | None:
        """The state after these inputs; the queries do not matter, so the keys serve as such."""
        after = nha_attention(
            self.key,
            self.key,
            self.value,
            self.log_gate,
            window_size=window_size,
            k_slot=self.slot_key,
            state=state,
            return_state=True,
            attention_mask=self.mask,
        ).state
        if self.kept is not None and after is not None:
            before = None if state is None else state.num_kept
            after.num_kept = self.kept.sum(1) if before is None else before + self.kept.sum(1)
        return after


@dataclass
class Segment:
    """One layer's inputs for T tokens, all laid out [B, T, heads, dim] as `nha_attention` takes them.

    In a region of autocast they take its dtype, so that a state keeps one dtype for the whole sequence.
    """

    query: Tensor  # [B, T, HQ, D]
    key: Tensor  # [B, T, H, D]
    value: Tensor  # [B, T, H, Dv]
    log_gate: Tensor  # [B, T, H, M]
    slot_query: Tensor | None  # [B, T, HQ, D]; None where slots see what the window sees
    slot_key: Tensor | None  # [B, T, H, D]
    mask: Tensor | None  # [B, T] bool, False = padding
    cu_seqlens: Tensor | None
    num_kept: Tensor | None = None  # [sequences, H] int64, tokens in exact slots after the segment; None for soft ones
    num_tokens: Tensor | None = None  # [B] int64, tokens before padding on the right, of a first segment

    def __post_init__(self) -> None:
        self.query, self.key, self.value, self.slot_query, self.slot_key = cast_for_autocast(
            self.query, self.key, self.value, self.slot_query, self.slot_key
        )

    @property
    def length(self) -> int:
        return self.key.shape[1]

    def part(self, start: int, stop: int) -> Segment:
        """The segment's tokens start .. stop - 1."""
        fields: dict[str, Any] = {name: x if x is None else x[:, start:stop] for name, x in vars(self).items()}
        fields["num_kept"] = fields["num_tokens"] = None
        return Segment(**fields)

    @property
    def by_head(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as transformers lays them out, [B, heads, T, dim]."""
        return self.query.transpose(1, 2), self.key.transpose(1, 2), self.value.transpose(1, 2)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Everything that attention reads."""
        return self.query, self.key, self.value, self.log_gate, self.slot_query, self.slot_key

    def take_heads(self, heads: Sequence[int]) -> Segment:
        """The part of some KV heads and of the query heads that read them."""
        count = self.key.shape[2]
        parts: Any = (None if x is None else take_heads(x, heads, 2, count) for x in self.tensors)
        kept = None if self.num_kept is None else take_heads(self.num_kept, heads, 1, count)
        others = {"mask": self.mask, "cu_seqlens": self.cu_seqlens, "num_tokens": self.num_tokens}
        return Segment(*parts, num_kept=kept, **others)

    @property
    def inputs(self) -> Inputs:
        """The tensors that it writes into a state."""
        kept = None if self.num_kept is None else kept_tokens(self.log_gate)
        return Inputs(self.key, self.value, self.log_gate, self.slot_key, self.mask, kept)


@dataclass(frozen=True)
class Reading:
    """How a layer reads segments.

    Attributes:
        window_size: tokens in the window, >= 0.
        scale: of the scores; None for D ** -0.5.
        sink: constant keys and values.
        softcap: of the scores.
        initial: what the slots of every sequence hold before its first token, active from there on.
        base: the attention of the unconverted layer, for a first segment that its window holds: the same bits. It maps
            queries [B, HQ, T, D], keys and values [B, H, T, D] to outputs [B, T, HQ, Dv].
        observe_mass: gets the attention mass of slots and of the sink, [B, T, HQ] each.
        impl: of `nha_attention`.
    """

    window_size: int
    scale: float | None = None
    sink: Sink | None = None
    softcap: float | None = None
    initial: Initial | None = None
    base: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    observe_mass: Callable[[Tensor, Tensor], None] | None = None
    impl: str = "auto"

    def take_heads(self, heads: Sequence[int], count: int, **changes: Any) -> Reading:
        """How some of `count` KV heads read segments: with their sinks and slots, and the changes given."""
        pairs = {
            name: None if pair is None else tuple(take_heads(x, heads, 0, count) for x in pair)
            for name, pair in (("sink", self.sink), ("initial", self.initial))
        }
        return replace(self, **pairs, **changes)


def attend(
    segment: Segment, reading: Reading, state: NHAState | None = None, *, keep: bool = False
) -> tuple[Tensor, NHAState | None]:
    """Read slots and window for a segment that follows `state`.

    Returns the output [B, T, HQ, Dv] and, with `keep`, the state after the segment. A `RingState` comes back where
    kernels can write later tokens into it, and one that comes in may be overwritten.
    """
    window, observer = reading.window_size, reading.observe_mass
    if segment.num_tokens is not None:
        return prefill_padded(segment, reading, state)
    if state is None:
        state = initial_state(segment, reading)
    if state is None and reading.base is not None and segment.cu_seqlens is None and segment.length <= window:
        out = reading.base(*segment.by_head)
        return out, first_state(segment, reading) if keep else None
    if reading.impl == "auto" and state is None and observer is None and has_window_only(segment, window):
        return attend_window(segment, reading), first_state(segment, reading) if keep else None
    short = keep and state is not None and observer is None and segment.length <= MAX_NEW
    if short and writes_in_place(segment, reading, state):
        assert state is not None
        ring = state if isinstance(state, RingState) else RingState.of(state)
        return decode(segment, reading, ring), ring
    first = keep and state is None and observer is None and reading.impl == "auto" and segment.mask is None
    if first and segment.cu_seqlens is None and is_prompt(segment, reading):
        return prefill(segment, reading)
    options: dict[str, Any] = dict(
        window_size=window,
        q_slot=segment.slot_query,
        k_slot=segment.slot_key,
        scale=reading.scale,
        state=state,
        attention_mask=segment.mask,
        cu_seqlens=segment.cu_seqlens,
        softcap=reading.softcap,
        impl=reading.impl,
    )
    result = nha_attention(
        segment.query,
        segment.key,
        segment.value,
        segment.log_gate,
        sink=reading.sink,
        return_state=keep,
        return_slot_mass=observer is not None,
        **options,
    )
    if observer is not None:
        mass = result.slot_mass
        assert mass is not None
        of_sink = sink_mass(segment, reading.sink, options) if segment.log_gate.shape[3] else mass
        observer((mass - of_sink).clamp_min(0), of_sink)
    if not keep or result.state is None:
        return result.out, None
    if not writes_in_place(segment, reading, state):
        return result.out, result.state
    return result.out, RingState.of(result.state)


def prefill(segment: Segment, reading: Reading) -> tuple[Tensor, NHAState | None]:
    """Read a first segment that is longer than the window; the state is a `RingState`."""
    result = nha_prefill(
        segment.query,
        segment.key,
        segment.value,
        segment.log_gate,
        window_size=reading.window_size,
        q_slot=segment.slot_query,
        k_slot=segment.slot_key,
        sink=reading.sink,
        scale=reading.scale,
        num_tokens=segment.num_tokens,
    )
    return result.out, result.state


def prefill_padded(segment: Segment, reading: Reading, state: NHAState | None) -> tuple[Tensor, NHAState | None]:
    """`prefill` of a segment that is padded on the right.

    Raises NotImplementedError where no kernel reads it.
    """
    first = state is None and reading.initial is None and segment.mask is None and segment.cu_seqlens is None
    plain = reading.observe_mass is None and reading.impl == "auto" and segment.num_kept is None
    if not (first and plain and is_prompt(segment, reading)):
        raise NotImplementedError(
            "expected a prompt that the kernels read, got one padded on the right that they cannot"
        )
    return prefill(segment, reading)


def count_kept(state: NHAState | None, num_kept: Tensor | None) -> None:
    """Let a state hold the number of tokens in exact slots; one that is updated in place keeps its tensor."""
    if state is None or num_kept is None:
        return
    if state.num_kept is None or type(state) is NHAState:
        state.num_kept = num_kept
    else:
        state.num_kept.copy_(num_kept)


def is_prompt(segment: Segment, reading: Reading) -> bool:
    """Whether `nha_prefill` reads a first segment."""
    given = (*segment.tensors, *(reading.sink or ()))
    return supports_prefill(*given, softcap=reading.softcap, window_size=reading.window_size)


def steps_in_place(segment: Segment, reading: Reading, state: NHAState | None) -> bool:
    """Whether a segment is a token of each sequence on a CPU, which a step writes into its state."""
    if segment.length != 1 or segment.mask is not None or segment.cu_seqlens is not None or reading.impl != "auto":
        return False
    return reading.observe_mass is None and supports_step(state, (*segment.tensors, *(reading.sink or ())))


def decode(segment: Segment, reading: Reading, ring: RingState) -> Tensor:
    """Read a segment in one kernel, which writes it into the ring."""
    return nha_decode(
        segment.query,
        segment.key,
        segment.value,
        segment.log_gate,
        state=ring,
        q_slot=segment.slot_query,
        k_slot=segment.slot_key,
        sink=reading.sink,
        scale=reading.scale,
        attention_mask=segment.mask,
    ).out


def writes_in_place(segment: Segment, reading: Reading, state: NHAState | None) -> bool:
    """Whether later tokens of these sequences can be written into their state by one kernel."""
    before = () if state is None else state.tensors().values()
    return supports_decode(*segment.tensors, *(reading.sink or ()), *before, softcap=reading.softcap, impl=reading.impl)


def has_window_only(segment: Segment, window_size: int) -> bool:
    """Whether `attend_window` reads a first segment: one without slots or padding that its window does not hold."""
    if segment.log_gate.shape[3] or segment.mask is not None or window_size < 1:
        return False
    return segment.cu_seqlens is not None or window_size < segment.length


def attend_window(segment: Segment, reading: Reading) -> Tensor:
    """Read window and sink for sequences from their first token on, [B, T, HQ, Dv]: all rows as one packed row."""
    batch, length = segment.key.shape[:2]
    cu = segment.cu_seqlens
    if cu is None:
        cu = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=segment.key.device)
    slot_query = segment.query if segment.slot_query is None else segment.slot_query
    q, k, v, q_slot = (x.flatten(0, 1)[None] for x in (segment.query, segment.key, segment.value, slot_query))
    options: dict[str, Any] = {"window_size": reading.window_size, "cu_seqlens": cu}
    scale = q.shape[-1] ** -0.5 if reading.scale is None else reading.scale
    if segment.cu_seqlens is None and has_window_kernel(q, v, reading.sink, reading.softcap):
        out = windowed_kernel(q, k, v, **options, max_seq_len=length, scale=scale)
    else:
        out = sliding_window_attention(q, k, v, q_slot, reading.sink, **options, scale=scale, softcap=reading.softcap)
    return out.view(batch, length, *out.shape[2:])


def sink_mass(segment: Segment, sink: Sink | None, options: dict[str, Any]) -> Tensor:
    """The sink's attention mass [B, T, HQ]: what is read where sinks hold ones and all else zeros."""
    value, state = torch.zeros_like(segment.value), options["state"]
    if sink is None:
        return value.new_zeros(segment.query.shape[:3])
    if state is not None:
        none = {"slot_value": torch.zeros_like(state.slot_value), "value": torch.zeros_like(state.value)}
        state = replace(state, **none)
    options = options | {"state": state, "sink": (sink[0], torch.ones_like(sink[1]))}
    return nha_attention(segment.query, segment.key, value, segment.log_gate, **options).out.float().mean(-1)


def first_state(segment: Segment, reading: Reading) -> NHAState:
    """The state after a first segment that writes no token to slots: it fits into the window, or there are no slots."""
    key, value, gate = segment.key, segment.value, segment.log_gate
    slot_key = key if segment.slot_key is None else segment.slot_key
    shared = segment.slot_key is None
    state = NHAState.empty(reading.window_size, key=key, value=value, log_gate=gate, shared=shared)
    count = None
    if segment.mask is not None:
        key, value, gate, slot_key = align_left(segment.mask, key, value, gate, slot_key)
        count = segment.mask.sum(1)
    after = advance(state, key, value, gate, slot_key, (state.slot_key, state.slot_value), count)
    return RingState.of(after) if writes_in_place(segment, replace(reading, sink=None, impl="auto"), None) else after


def initial_state(segment: Segment, reading: Reading) -> NHAState | None:
    """The state of sequences whose slots start with `reading.initial`; None where they start empty."""
    if reading.initial is None:
        return None
    rows = segment.key.shape[0] if segment.cu_seqlens is None else segment.cu_seqlens.shape[0] - 1
    key, value = (x[..., : segment.log_gate.shape[3], :].expand(rows, -1, -1, -1) for x in reading.initial)
    shared = segment.slot_key is None
    return NHAState.from_slots(key, value, reading.window_size, dtype=segment.key.dtype, shared_keys=shared)


def zero_slots(segment: Segment) -> Initial:
    """All-zero slots, which take part from token 0 in the code published with the paper."""
    heads, slots = segment.log_gate.shape[2:]
    key, value = (x.new_zeros(heads, slots, x.shape[-1]) for x in (segment.key, segment.value))
    return key, value


def mask_first_token_write(
    log_gate: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, state: NHAState | None
) -> Tensor:
    """Set the log-gate of every sequence's first token to 0: the sink stands in for it, the slots skip it.

    Where no gradient is needed, `log_gate` itself may be changed.

    >>> gate = torch.full((1, 3, 1, 1), -1.0)
    >>> mask_first_token_write(gate, torch.tensor([[False, True, True]]), None, None).flatten().tolist()
    [-1.0, 0.0, -1.0]
    """
    length = log_gate.shape[1]
    if isinstance(state, FusedRing):  # the first token was read long ago
        return log_gate
    if length == 1 and cu_seqlens is None and state is not None:
        return log_gate.masked_fill((state.num_tokens == 0)[:, None, None, None], 0.0)
    if mask is None and cu_seqlens is None and state is None and not needs_grad([log_gate]):
        log_gate[:, :1].zero_()  # one operation: short prompts wait for the host
        return log_gate
    place = torch.arange(length, device=log_gate.device)
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1] if state is None else torch.where(state.num_tokens > 0, length, cu_seqlens[:-1])
        beyond = torch.zeros(
            length + 1, dtype=torch.bool, device=log_gate.device
        )  # empty sequences may start at the end
        first = beyond.index_fill(0, starts.long(), True)[None, :length]
    else:
        start = 0 if mask is None else mask.int().argmax(1, keepdim=True)
        first = (place == start)[None] if mask is None else place == start
        if state is not None:
            first = first & (state.num_tokens == 0)[:, None]
    return log_gate.masked_fill(first[..., None, None], 0.0)
