"""Short segments as PyTorch operators: one that returns new slots, one that writes into the state."""

# Triton's types give a launch the signature of the kernel, without the options of the compiler.
# pyright: reportCallIssue=false

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops.padding import align_left
from nha.ops.state import NHAState, RingState, advance
from nha.ops.triton.chunk.tiling import DTYPES, device_guard, padded_width
from nha.ops.triton.decode.kernel import nha_decode_kernel
from nha.ops.triton.primitives import LOG2_E

PROGRAMS = 132  # programs that read the window of a small batch: one per multiprocessor
TILE_BYTES = 2**14  # keys and values of a block of the window


class BlockSizes(NamedTuple):
    """Sizes the kernel is compiled for; nothing depends on the number of sequences or tokens."""

    block_m: int  # slots of one program
    block_d: int
    block_dv: int
    block_s: int
    block_g: int  # slots of a row of log-gates
    block_q: int  # queries that read a block of the window at a time
    block_n: int  # tokens of a block of the window
    block_c: int  # queries whose splits are combined at a time
    warps: int
    registers: int | None  # limit per thread: 128 let four programs share a multiprocessor, 168 three


def _fitting(size: int) -> int:
    """The largest power of two up to size, but at least 16 and at most 64."""
    return min(max(16, 1 << size.bit_length() - 1), 64)


@cache
def block_sizes(
    dtype: torch.dtype, length: int, groups: int, dim: int, value_dim: int, slots: int, sinks: int
) -> BlockSizes:
    """Sizes within the registers and shared memory of a current GPU, also of one with 100 KB."""
    is_fp32, single_token = dtype == torch.float32, length == 1
    block_d, block_dv = (padded_width(d, 16 if is_fp32 else 64) for d in (dim, value_dim))  # see chunk/tiling.py
    width, unpadded = block_d + block_dv, block_d == dim and block_dv == value_dim
    registers = 128 if single_token and unpadded and width <= 256 else 168
    if is_fp32 or (not single_token and width > 256):
        registers = None
    return BlockSizes(
        block_m=min(_fitting((8192 if single_token and not is_fp32 else 4096) // width), padded_width(slots)),
        block_d=block_d,
        block_dv=block_dv,
        block_s=padded_width(sinks),
        block_g=padded_width(slots),
        block_q=16 if is_fp32 or length * groups <= 16 else 32,
        block_n=_fitting(TILE_BYTES // (width * dtype.itemsize)),
        block_c=min(512 // block_dv, 4 if single_token else 16),
        warps=8 if is_fp32 else 4,
        registers=registers,
    )


class Inputs(NamedTuple):
    """Arguments of the operator that writes into the state; the window cache [B, W + R, H, ...] is a ring buffer."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_slot: Tensor | None
    k_slot: Tensor | None
    log_gate: Tensor
    slot_key: Tensor
    slot_value: Tensor
    key: Tensor
    value: Tensor
    window_slot_key: Tensor | None
    window_log_gate: Tensor
    num_tokens: Tensor
    num_written: Tensor | None
    arrival_counter: Tensor
    mask: Tensor | None
    sink_key: Tensor | None
    sink_value: Tensor | None
    window: int
    scale: float
    slots_active: bool
    rollback: int = 0

    @property
    def tokens(self) -> tuple[Tensor, ...]:
        """q, k, v, q_slot, k_slot, log_gate of the new tokens, contiguous in their last dimension."""
        q_slot, k_slot = self.q_slot, self.k_slot
        tokens = (self.q, self.k, self.v, self.q if q_slot is None else q_slot, self.k if k_slot is None else k_slot)
        return tuple(map(_last_contiguous, (*tokens, self.log_gate)))

    @property
    def cached(self) -> tuple[Tensor, ...]:
        """key, value, slot key, log-gate of the window cache."""
        slot_key = self.key if self.window_slot_key is None else self.window_slot_key
        return self.key, self.value, slot_key, self.window_log_gate

    @property
    def sink(self) -> list[Tensor | None]:
        return [None if x is None or not x.numel() else x.contiguous() for x in (self.sink_key, self.sink_value)]


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(inputs: Inputs, after: tuple[Tensor, Tensor] | None, *, ring: bool) -> tuple[Tensor, Tensor]:
    """out [B, T, HQ, Dv] and mass [B, T, HQ]; the slots after the segment go to `after`, if given."""
    q, v = inputs.q, inputs.v
    batch, length, query_heads, dim = q.shape
    heads, value_dim, slots = inputs.k.shape[2], v.shape[3], inputs.log_gate.shape[3]
    groups, sinks = query_heads // heads, 0 if inputs.sink_key is None else inputs.sink_key.shape[1]
    sizes = block_sizes(q.dtype, length, groups, dim, value_dim, slots, sinks)
    places = inputs.window + inputs.rollback if inputs.window else 0
    window_blocks, slot_splits = -(-places // sizes.block_n), -(-slots // sizes.block_m)
    tiles = max(-(-window_blocks * batch * heads // PROGRAMS), 1)
    window_splits, query_blocks = -(-window_blocks // tiles), -(-length * groups // sizes.block_q)
    scratch = (batch * heads, slot_splits + window_splits, length * groups)
    split_acc = q.new_empty(*scratch, value_dim, dtype=torch.float32)
    split_max, split_sum = (q.new_empty(scratch, dtype=torch.float32) for _ in range(2))
    out = v.new_empty(batch, length, query_heads, value_dim)
    mass = q.new_empty(batch, length, query_heads, dtype=torch.float32)

    tokens, cached, before = inputs.tokens, inputs.cached, (inputs.slot_key, inputs.slot_value)
    cached = cached if ring else tuple(map(_last_contiguous, cached))
    mask = None if inputs.mask is None else inputs.mask.contiguous().view(torch.int8)
    counters = (inputs.num_tokens, inputs.num_written, inputs.arrival_counter)
    pointers = (*tokens, *before, *(after or before), *cached, *counters, mask, *inputs.sink)
    nha_decode_kernel[(batch * heads * (slot_splits + window_splits * query_blocks),)](
        *pointers,
        split_acc,
        split_max,
        split_sum,
        out,
        mass,
        *(n for x in (*tokens, *cached) for n in x.stride()[:3]),
        inputs.scale * LOG2_E.value,
        length,
        inputs.window,
        inputs.rollback,
        window_splits,
        tiles,
        heads,
        groups,
        M=slots,
        D=dim,
        DV=value_dim,
        S=sinks,
        **_constants(sizes, q.dtype),
        HAS_WINDOW=inputs.window > 0,
        RING=ring,
        STORE_STATE=after is not None,
        SLOTS_ACTIVE=inputs.slots_active,
        HAS_MASK=mask is not None,
        HAS_SLOT_QK=inputs.window_slot_key is not None,
        ROLLBACK=inputs.rollback > 0,
        SINGLE_TOKEN=length == 1,
        num_warps=sizes.warps,
        num_stages=3,
        maxnreg=None if inputs.rollback else sizes.registers,
    )
    return out, mass


def _constants(sizes: BlockSizes, dtype: torch.dtype) -> dict[str, object]:
    """The constants of the kernel that follow from its sizes."""
    return {
        "BLOCK_M": sizes.block_m,
        "BLOCK_D": sizes.block_d,
        "BLOCK_DV": sizes.block_dv,
        "BLOCK_S": sizes.block_s,
        "BLOCK_G": sizes.block_g,
        "BLOCK_Q": sizes.block_q,
        "BLOCK_N": sizes.block_n,
        "BLOCK_C": sizes.block_c,
        "DTYPE": DTYPES[dtype],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    per_query = q.shape[:3]
    return v.new_empty(*per_query, v.shape[3]), q.new_empty(per_query, dtype=torch.float32)


@torch.library.custom_op(
    "nha::decode",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? q_slot, Tensor? k_slot, Tensor log_gate, Tensor slot_key, "
    "Tensor slot_value, Tensor key, Tensor value, Tensor? window_slot_key, Tensor window_log_gate, Tensor num_tokens, "
    "Tensor? mask, Tensor? sink_key, Tensor? sink_value, int window, float scale, bool slots_active, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _decode(*args):
    """out, mass and, with `keep`, the slots after the segment; the window cache [B, W, H, ...] is oldest first."""
    *fields, keep = args
    num_tokens, heads = fields[12], fields[1].shape[2]
    arrival_counter = num_tokens.new_zeros(num_tokens.shape[0], heads + 1, dtype=torch.int32)
    inputs = Inputs._make([*fields[:13], None, arrival_counter, *fields[13:], 0])
    inputs = inputs._replace(slot_key=inputs.slot_key.contiguous(), slot_value=inputs.slot_value.contiguous())
    after = (torch.empty_like(inputs.slot_key), torch.empty_like(inputs.slot_value)) if keep else None
    with device_guard(inputs.q):
        out, mass = _launch(inputs, after, ring=False)
    nothing = inputs.q.new_empty
    return out, mass, *(after or (nothing(0, dtype=torch.float32), nothing(0, dtype=torch.float32)))


@_decode.register_fake
def _(q, k, v, q_slot, k_slot, log_gate, slot_key, slot_value, *rest):
    after = (x.new_empty(x.shape if rest[-1] else 0) for x in (slot_key, slot_value))
    return *_empty_outputs(q, v), *after


# Registered through torch.library directly: custom_op's per-mutated-argument overhead exceeds the kernel's run time.
_library = torch.library.Library("nha", "FRAGMENT")
_library.define(
    "decode_in_place(Tensor q, Tensor k, Tensor v, Tensor? q_slot, Tensor? k_slot, Tensor log_gate, "
    "Tensor(a!) slot_key, Tensor(b!) slot_value, Tensor(c!) key, Tensor(d!) value, Tensor(e!)? window_slot_key, "
    "Tensor(f!) window_log_gate, Tensor(g!) num_tokens, Tensor(h!)? num_written, Tensor(i!) arrival_counter, "
    "Tensor? mask, Tensor? sink_key, Tensor? sink_value, int window, float scale, bool slots_active, int rollback) "
    "-> (Tensor, Tensor)"
)


def _decode_in_place(*args):
    """out and mass; the arguments are the fields of `Inputs`. The state becomes that after the segment."""
    inputs = Inputs(*args)
    with device_guard(inputs.q):
        return _launch(inputs, (inputs.slot_key, inputs.slot_value), ring=True)


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

    The given state is not changed. Without `keep` it is also the one returned.
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
    """Outputs and slot mass of up to 16 tokens (shapes as `nha_attention`); writes the tokens into the state."""
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
        state.num_written,
        state.arrival_counter,
        attention_mask,
        *(sink or (None, None)),
        state.window_size,
        scale,
        state.slots_active,
        state.max_rollback,
    )
