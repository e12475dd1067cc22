"""What every hybrid attention layer does with its queries, keys and gates, and the attention it had before."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nha.models.cache import Inputs, NHACacheLayer
from nha.ops import NHAState, RingState, full_decode, full_prefill, nha_attention, nha_decode, supports_decode
from nha.ops.autocast import cast_for_autocast
from nha.ops.padding import align_left
from nha.ops.sliding_window import sliding_window_attention
from nha.ops.state import MAX_NEW, advance

LAST = (1, 1, 0, 1)  # shape of the mask that stands for a causal one whose last query sees all keys
# That several query heads read one KV head has to be said from torch 2.12 on; before, it was understood.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
Initial = tuple[Tensor, Tensor]  # slots before the first token: key [H, M, D], value [H, M, Dv]


@dataclass
class Segment:
    """One layer's inputs for T tokens, all laid out [B, T, heads, dim] as `nha_attention` takes them.

    In a region of autocast they take its dtype, so that what a state keeps of them has one dtype for the whole text.
    """

    query: Tensor  # [B, T, HQ, D]
    key: Tensor  # [B, T, H, D]
    value: Tensor  # [B, T, H, Dv]
    log_gate: Tensor  # [B, T, H, M]
    slot_query: Tensor | None  # [B, T, HQ, D]; None where slots see what the window sees
    slot_key: Tensor | None  # [B, T, H, D]
    mask: Tensor | None  # [B, T] bool, False = padding
    cu_seqlens: Tensor | None

    def __post_init__(self) -> None:
        self.query, self.key, self.value, self.slot_query, self.slot_key = cast_for_autocast(
            self.query, self.key, self.value, self.slot_query, self.slot_key
        )

    @property
    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What attention reads."""
        return self.query, self.key, self.value, self.log_gate, self.slot_query, self.slot_key

    @property
    def inputs(self) -> Inputs:
        """What the segment writes into a state."""
        return Inputs(self.key, self.value, self.log_gate, self.slot_key, self.mask)


def attend(
    segment: Segment,
    *,
    window_size: int,
    scale: float | None,
    sink: tuple[Tensor, Tensor] | None,
    layer: NHACacheLayer | None,
    initial: Initial | None,
    softcap: float | None = None,
    impl: str = "auto",
    see_mass: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Read slots and window for a segment, [B, T, HQ, Dv], and leave what was read in the cache layer, if any.

    `initial` is what the slots of every text hold before its first token, live from there on. `see_mass`, if given,
    gets the shares of the softmax that went to slots and to the sink, [B, T, HQ] each.
    """
    state = None if layer is None else layer.state
    if state is None and initial is not None:
        state = initial_state(segment, window_size, initial)
    if impl == "auto" and state is None and see_mass is None and banded(segment, window_size):
        if layer is not None:
            remember(segment, window_size, layer, softcap)
        return without_slots(segment, window_size, scale, sink, softcap)
    before = () if state is None else state.tensors().values()
    in_place = layer is not None and supports_decode(*segment.read, *(sink or ()), *before, softcap=softcap, impl=impl)
    if layer is not None and in_place and state is not None and see_mass is None and segment.key.shape[1] <= MAX_NEW:
        ring = state if isinstance(state, RingState) else RingState.of(state)
        layer.record(segment.inputs, ring)
        result = nha_decode(
            segment.query,
            segment.key,
            segment.value,
            segment.log_gate,
            state=ring,
            q_slot=segment.slot_query,
            k_slot=segment.slot_key,
            sink=sink,
            scale=scale,
            attention_mask=segment.mask,
        )
        layer.keep(ring)
        return result.out
    options: dict[str, Any] = dict(
        window_size=window_size,
        q_slot=segment.slot_query,
        k_slot=segment.slot_key,
        scale=scale,
        state=state,
        attention_mask=segment.mask,
        cu_seqlens=segment.cu_seqlens,
        softcap=softcap,
        impl=impl,
    )
    result = nha_attention(
        segment.query,
        segment.key,
        segment.value,
        segment.log_gate,
        sink=sink,
        return_state=layer is not None,
        return_slot_mass=see_mass is not None,
        **options,
    )
    if see_mass is not None:
        mass = result.slot_mass
        assert mass is not None
        to_sink = sink_mass(segment, sink, options) if segment.log_gate.shape[3] else mass
        see_mass((mass - to_sink).clamp_min(0), to_sink)
    if layer is not None and result.state is not None:
        layer.record(segment.inputs, state)
        layer.keep(RingState.of(result.state) if in_place else result.state)
    return result.out


def banded(segment: Segment, window_size: int) -> bool:
    """Whether `without_slots` reads a first segment: one without slots or padding that its window does not hold."""
    if segment.log_gate.shape[3] or segment.mask is not None or window_size < 1:
        return False
    return segment.cu_seqlens is not None or window_size < segment.key.shape[1]


def without_slots(
    segment: Segment, window_size: int, scale: float | None, sink: tuple[Tensor, Tensor] | None, softcap: float | None
) -> Tensor:
    """Read window and sink for texts from their first token on, [B, T, HQ, Dv]: the rows as one packed row."""
    batch, length = segment.key.shape[:2]
    cu = segment.cu_seqlens
    if cu is None:
        cu = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=segment.key.device)
    slot_query = segment.query if segment.slot_query is None else segment.slot_query
    q, k, v, q_slot = (x.flatten(0, 1)[None] for x in (segment.query, segment.key, segment.value, slot_query))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    out = sliding_window_attention(
        q, k, v, q_slot, sink, window_size=window_size, cu_seqlens=cu, scale=factor, softcap=softcap
    )
    return out.view(batch, length, *out.shape[2:])


def sink_mass(segment: Segment, sink: tuple[Tensor, Tensor] | None, options: dict[str, Any]) -> Tensor:
    """The sink's share [B, T, HQ] of the softmax: what is read where sinks hold ones and all else zeros."""
    value, state = torch.zeros_like(segment.value), options["state"]
    if sink is None:
        return value.new_zeros(segment.query.shape[:3])
    if state is not None:
        none = {"slot_value": torch.zeros_like(state.slot_value), "value": torch.zeros_like(state.value)}
        state = replace(state, **none)
    ones = (sink[0], torch.ones_like(sink[1]))
    options = options | {"state": state, "sink": ones}
    read = nha_attention(segment.query, segment.key, value, segment.log_gate, **options)
    return read.out.float().mean(-1)


def remember(segment: Segment, window_size: int, layer: NHACacheLayer, softcap: float | None = None) -> None:
    """Leave a first segment in the cache layer where no slot takes a token: it fits into the window, or M = 0."""
    key, value, gate = segment.key, segment.value, segment.log_gate
    slot_key = key if segment.slot_key is None else segment.slot_key
    state = NHAState.empty(window_size, key=key, value=value, log_gate=gate, shared=segment.slot_key is None)
    count = None
    if segment.mask is not None:
        key, value, gate, slot_key = align_left(segment.mask, key, value, gate, slot_key)
        count = segment.mask.sum(1)
    after = advance(state, key, value, gate, slot_key, (state.slot_key, state.slot_value), count)
    layer.record(segment.inputs, None)
    layer.keep(RingState.of(after) if supports_decode(*segment.read, softcap=softcap) else after)


def initial_state(segment: Segment, window_size: int, initial: Initial) -> NHAState:
    """The state of texts that start with these slots (key [H, M, D], value [H, M, Dv]), one for every text."""
    rows = segment.key.shape[0] if segment.cu_seqlens is None else segment.cu_seqlens.shape[0] - 1
    key, value = (x[..., : segment.log_gate.shape[3], :].expand(rows, -1, -1, -1) for x in initial)
    shared = segment.slot_key is None
    return NHAState.from_slots(key, value, window_size, dtype=segment.key.dtype, shared_keys=shared)


def zero_slots(segment: Segment) -> Initial:
    """All-zero slots, which take part from token 0 in the code published with the paper."""
    heads, slots = segment.log_gate.shape[2:]
    key, value = (x.new_zeros(heads, slots, x.shape[-1]) for x in (segment.key, segment.value))
    return key, value


def mask_first_token_write(
    log_gate: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, state: NHAState | None
) -> Tensor:
    """Set the log-gate of every sequence's first token to 0: the sink stands in for it, the slots skip it.

    >>> gate = torch.full((1, 3, 1, 1), -1.0)
    >>> mask_first_token_write(gate, torch.tensor([[False, True, True]]), None, None).flatten().tolist()
    [-1.0, 0.0, -1.0]
    """
    length = log_gate.shape[1]
    if length == 1 and cu_seqlens is None and state is not None:
        return log_gate.masked_fill((state.num_tokens == 0)[:, None, None, None], 0.0)
    place = torch.arange(length, device=log_gate.device)
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1] if state is None else torch.where(state.num_tokens > 0, length, cu_seqlens[:-1])
        beyond = torch.zeros(length + 1, dtype=torch.bool, device=log_gate.device)  # empty texts may start at the end
        first = beyond.index_fill(0, starts.long(), True)[None, :length]
    else:
        start = 0 if mask is None else mask.int().argmax(1, keepdim=True)
        first = (place == start)[None] if mask is None else place == start
        if state is not None:
            first = first & (state.num_tokens == 0)[:, None]
    return log_gate.masked_fill(first[..., None, None], 0.0)


def base_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softcap: float | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention that the layer had before: SDPA, or the family's own code where scores are capped.

    `query` [B, HQ, T, D], `key` and `value` [B, H, Tk, D]; `mask` is bool [B, 1, T, Tk], None for causal, or of shape
    LAST. With a mask transformers copies keys and values for every query head, and SDPA alone leaves a GPU idle where
    there are few texts: a single token has an operator of its own.
    """
    length, scale, dropped = query.shape[2], kwargs.get("scaling"), kwargs.get("dropout") or 0.0
    if softcap is None and length == 1 and not dropped and kwargs.get("position_bias") is None:
        return full_decode(query, key, value, mask, scale), None
    if mask is not None and mask.shape == LAST:
        return full_prefill(query, key, value, scale, dropped), None
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    low = max(torch.finfo(query.dtype).min, torch.finfo(torch.float32).min)  # its softmax is in float32
    additive = torch.where(mask, torch.zeros((), dtype=query.dtype, device=mask.device), low)
    eager = sys.modules[module.family.__module__].eager_attention_forward
    return eager(module, query, key, value, additive, softcap=softcap, **kwargs)


def packed_base_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scaling: float | None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    longest: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`base_attention` of sequences packed into one row: query [1, HQ, T, D], key and value [1, H, T, D].

    One kernel on a GPU in 16-bit, else sequence by sequence with the very kernel of a sequence alone; never a mask of
    T x T. `longest` bounds the lengths (default T); `sliding_window` is the family's own.
    """
    length = query.shape[2]
    if query.is_cuda and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        most, left = longest or length, -1 if sliding_window is None else sliding_window - 1
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, most, most, scale=scaling, window_size=(left, 0), **GROUPED)
        assert isinstance(out, Tensor)
        return out[None], None
    outs = []
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if start == stop:
            continue
        mask = None
        if sliding_window is not None and stop - start > sliding_window:
            whole = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device)
            mask = (whole.tril() & whole.triu(1 - sliding_window))[None, None]
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        outs.append(base_attention(module, q, k, v, mask, softcap=softcap, scaling=scaling, **kwargs)[0])
    return torch.cat(outs, 1), None


def causal_mask(padding: Tensor | None) -> Tensor | None:
    """The mask [B, 1, T, T] of a segment that starts its rows, from its padding [B, T]; None without any."""
    if padding is None:
        return None
    length = padding.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=padding.device).tril()
    return causal & padding[:, None, None, :]
