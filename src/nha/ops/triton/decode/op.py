"""Short segments as PyTorch operators: one that leaves the state alone, one that writes into it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops.padding import align_left
from nha.ops.state import NHAState, RingState, advance
from nha.ops.triton.chunk.tiling import DTYPES, width
from nha.ops.triton.decode.kernel import decode_kernel
from nha.ops.triton.launcher import launch
from nha.ops.triton.primitives import LOG2_E

PROGRAMS = 132  # programs that read the window of a small batch: one for every multiprocessor
TILE_BYTES = 2**14  # keys and values of a block of the window


class Sizes(NamedTuple):
    """What the kernel is compiled for; nothing depends on the number of texts or of tokens seen."""

    slots: int  # slots of one program
    key: int
    value: int
    sinks: int
    gates: int
    rows: int  # queries that read a block of the window at a time
    block: int  # tokens of a block of the window
    together: int  # queries whose parts are put together at a time
    warps: int
    registers: int | None  # the most of a thread: 128 let four programs share a multiprocessor, 168 three


def _fitting(size: int) -> int:
    """The largest power of two up to size, but at least 16 and at most 64."""
    return min(max(16, 1 << size.bit_length() - 1), 64)


@cache
def sizes(dtype: torch.dtype, length: int, groups: int, dim: int, value_dim: int, slots: int, sinks: int) -> Sizes:
    """Sizes within the registers and shared memory of a current GPU, also of one with 100 KB."""
    exact, step = dtype == torch.float32, length == 1
    key, value = (width(d, 16 if exact else 64) for d in (dim, value_dim))  # see `plan.blocks`
    wide, full = key + value, key == dim and value == value_dim
    registers = 128 if step and full and wide <= 256 else 168
    if exact or (not step and wide > 256):
        registers = None
    return Sizes(
        slots=min(_fitting((8192 if step and not exact else 4096) // wide), width(slots)),
        key=key,
        value=value,
        sinks=width(sinks),
        gates=width(slots),
        rows=16 if exact or length * groups <= 16 else 32,
        block=_fitting(TILE_BYTES // (wide * dtype.itemsize)),
        together=min(512 // value, 4 if step else 16),
        warps=8 if exact else 4,
        registers=registers,
    )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_slot: Tensor | None,
    k_slot: Tensor | None,
    log_gate: Tensor,
    slots: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor] | None,
    key: Tensor,
    value: Tensor,
    window_slot_key: Tensor | None,
    window_log_gate: Tensor,
    seen: Tensor,
    arrival_counter: Tensor,
    mask: Tensor | None,
    sink_key: Tensor | None,
    sink_value: Tensor | None,
    window: int,
    scale: float,
    live: bool,
    *,
    ring: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, T, HQ, Dv] and mass [B, T, HQ]; the slots after the segment go to `after`, if given."""
    own_keys = window_slot_key is not None
    tokens: list[Tensor] = [q, k, v, q if q_slot is None else q_slot, k if k_slot is None else k_slot, log_gate]
    tokens = [x if x.stride(-1) == 1 else x.contiguous() for x in tokens]
    near = [key, value, key if window_slot_key is None else window_slot_key, window_log_gate]
    near = near if ring else [x if x.stride(-1) == 1 else x.contiguous() for x in near]
    sink = [None if x is None or not x.numel() else x.contiguous() for x in (sink_key, sink_value)]
    mask = None if mask is None else mask.contiguous().view(torch.int8)
    batch, length, query_heads, dim = q.shape
    heads, value_dim, count = k.shape[2], v.shape[3], log_gate.shape[3]
    groups, sinks = query_heads // heads, 0 if sink_key is None else sink_key.shape[1]
    size = sizes(q.dtype, length, groups, dim, value_dim, count, sinks)
    blocks = -(-window // size.block)
    tiles = max(-(-blocks * batch * heads // PROGRAMS), 1)
    shares, slot_parts, row_blocks = -(-blocks // tiles), -(-count // size.slots), -(-length * groups // size.rows)
    left = (batch * heads, slot_parts + shares, length * groups)
    partial = q.new_empty(*left, value_dim, dtype=torch.float32)
    peaks, norms = (q.new_empty(left, dtype=torch.float32) for _ in range(2))
    out = v.new_empty(batch, length, query_heads, value_dim)
    mass = q.new_empty(batch, length, query_heads, dtype=torch.float32)
    pointers = (*tokens, *slots, *(after or slots), *near, seen, arrival_counter, mask, *sink)
    kind = (
        *(None if x is None else x.dtype for x in pointers),
        *(x.stride() for x in (*tokens, *near)),
        q.device,
    )
    launch(
        decode_kernel,
        (batch * heads * (slot_parts + shares * row_blocks),),
        kind,
        *pointers,
        partial,
        peaks,
        norms,
        out,
        mass,
        *(n for x in (*tokens, *near) for n in x.stride()[:3]),
        scale * LOG2_E.value,
        length,
        window,
        shares,
        tiles,
        heads,
        groups,
        M=count,
        D=dim,
        DV=value_dim,
        S=sinks,
        SLOTS=size.slots,
        KEY=size.key,
        VALUE=size.value,
        SINKS=size.sinks,
        GATES=size.gates,
        ROWS=size.rows,
        BLOCK=size.block,
        TOGETHER=size.together,
        DTYPE=DTYPES[q.dtype],
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        WINDOWED=window > 0,
        RING=ring,
        KEPT=after is not None,
        LIVE=live,
        MASKED=mask is not None,
        SEPARATE=own_keys,
        STEP=length == 1,
        num_warps=size.warps,
        num_stages=3,
        maxnreg=size.registers,
    )
    return out, mass


@torch.library.custom_op("nha::decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_slot: Tensor | None,
    k_slot: Tensor | None,
    log_gate: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    key: Tensor,
    value: Tensor,
    window_slot_key: Tensor | None,
    window_log_gate: Tensor,
    seen: Tensor,
    mask: Tensor | None,
    sink_key: Tensor | None,
    sink_value: Tensor | None,
    window: int,
    scale: float,
    live: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, mass and, if kept, the slots after the segment; the window [B, W, H, ...] is oldest first."""
    slots = slot_key.contiguous(), slot_value.contiguous()
    after = (torch.empty_like(slots[0]), torch.empty_like(slots[1])) if keep else None
    arrival_counter = seen.new_zeros(seen.shape[0], k.shape[2] + 1, dtype=torch.int32)
    out, mass = _launch(
        q,
        k,
        v,
        q_slot,
        k_slot,
        log_gate,
        slots,
        after,
        key,
        value,
        window_slot_key,
        window_log_gate,
        seen,
        arrival_counter,
        mask,
        sink_key,
        sink_value,
        window,
        scale,
        live,
        ring=False,
    )
    return out, mass, *(after or (q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)))


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    per_query = q.shape[:3]
    return v.new_empty(*per_query, v.shape[3]), q.new_empty(per_query, dtype=torch.float32)


@_decode.register_fake
def _(q, k, v, q_slot, k_slot, log_gate, slot_key, slot_value, *rest):
    slots = (slot_key, slot_value)
    after = (x.new_empty(x.shape if rest[-1] else 0) for x in slots)
    return *_empty_outputs(q, v), *after


# Not a `custom_op`: what that does in Python for every argument that is written takes longer than the step.
_library = torch.library.Library("nha", "FRAGMENT")
_library.define(
    "decode_in_place(Tensor q, Tensor k, Tensor v, Tensor? q_slot, Tensor? k_slot, Tensor log_gate, "
    "Tensor(a!) slot_key, Tensor(b!) slot_value, Tensor(c!) key, Tensor(d!) value, Tensor(e!)? window_slot_key, "
    "Tensor(f!) window_log_gate, Tensor(g!) seen, Tensor(h!) arrival_counter, Tensor? mask, Tensor? sink_key, "
    "Tensor? sink_value, int window, float scale, bool live) -> (Tensor, Tensor)"
)


def _decode_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_slot: Tensor | None,
    k_slot: Tensor | None,
    log_gate: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    key: Tensor,
    value: Tensor,
    window_slot_key: Tensor | None,
    window_log_gate: Tensor,
    seen: Tensor,
    arrival_counter: Tensor,
    mask: Tensor | None,
    sink_key: Tensor | None,
    sink_value: Tensor | None,
    window: int,
    scale: float,
    live: bool,
) -> tuple[Tensor, Tensor]:
    """out and mass; the state, whose window is a ring, is that after the segment."""
    slots = slot_key, slot_value
    return _launch(
        q,
        k,
        v,
        q_slot,
        k_slot,
        log_gate,
        slots,
        slots,
        key,
        value,
        window_slot_key,
        window_log_gate,
        seen,
        arrival_counter,
        mask,
        sink_key,
        sink_value,
        window,
        scale,
        live,
        ring=True,
    )


_library.impl("decode_in_place", _decode_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("nha::decode_in_place", lambda q, k, v, *_: _empty_outputs(q, v), lib=_library)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    q_slot: Tensor,
    k_slot: Tensor,
    sink: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    state: NHAState,
    attention_mask: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, NHAState]:
    """Outputs, slot mass and the state after up to 16 tokens (shapes as `nha_attention`).

    The state given stays as it is. Without `keep` it is also the one returned.
    """
    out, mass, *slots = _decode(
        q,
        k,
        v,
        None if q_slot is q else q_slot,
        None if k_slot is k else k_slot,
        log_gate,
        state.slot_key,
        state.slot_value,
        state.key,
        state.value,
        state.window_slot_key,
        state.window_log_gate,
        state.num_tokens,
        attention_mask,
        *(sink or (None, None)),
        state.window_size,
        scale,
        state.slots_active,
        keep,
    )
    if not keep:
        return out, mass, state
    count = None
    if attention_mask is not None:
        k, v, log_gate, k_slot = align_left(attention_mask, k, v, log_gate, k_slot)
        count = attention_mask.sum(1)
    return out, mass, advance(state, k, v, log_gate, k_slot, (slots[0], slots[1]), count)


def decode_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    q_slot: Tensor | None,
    k_slot: Tensor | None,
    sink: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    state: RingState,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and slot mass of up to 16 tokens (shapes as `nha_attention`), which are written into the state."""
    return torch.ops.nha.decode_in_place(
        q,
        k,
        v,
        q_slot,
        k_slot,
        log_gate,
        state.slot_key,
        state.slot_value,
        state.key,
        state.value,
        state.window_slot_key,
        state.window_log_gate,
        state.num_tokens,
        state.arrival_counter,
        attention_mask,
        *(sink or (None, None)),
        state.window_size,
        scale,
        state.slots_active,
    )
