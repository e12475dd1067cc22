"""Launching the kernels on tensors: allocation, strides, grids."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nha.ops.triton.chunk.bwd_dkv import key_kernel
from nha.ops.triton.chunk.bwd_dq import query_kernel
from nha.ops.triton.chunk.bwd_dstate import slots_kernel
from nha.ops.triton.chunk.fwd import forward_kernel
from nha.ops.triton.chunk.state import reverse_kernel, scan_kernel, shares_kernel, states_kernel
from nha.ops.triton.chunk.tiling import Blocks, Plan, blocks, chunks_of, make_plan, shared_memory
from nha.ops.triton.launcher import launch

LOG2_E = 1.4426950408889634
STATE_WIDTH = 128  # columns of the slots that one program of the pass over tokens holds
SCAN = {"ROWS": 16, "WIDTH": 64}  # slots and columns that one program of a scan holds
SLAB = 528  # programs of the backward pass whose scores are kept at a time


class Kept(NamedTuple):
    """Slots before every chunk, in the dtype of `v` [chunks, H, M, ...], and its log decay, float32 [chunks, H, M]."""

    key: Tensor
    value: Tensor
    decay: Tensor


class Inputs(NamedTuple):
    """What the kernels read; `q_slot`, `k_slot` None where they are `q`, `k`; the key side holds `past` + T tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_slot: Tensor | None
    k_slot: Tensor | None
    log_gate: Tensor
    slot_key: Tensor | None  # [N, H, M, D] float32
    slot_value: Tensor | None
    sink_key: Tensor | None  # [H, S, D]
    sink_value: Tensor | None
    first: Tensor | None  # [N] int64, first key in use
    cu_seqlens: Tensor | None
    window: int
    past: int
    scale: float
    live: bool

    def shaped(self) -> Inputs:
        """The inputs with the last dimension contiguous, and whole where kernels want it."""
        named = self._asdict()
        for name in ("q", "k", "v", "q_slot", "k_slot", "log_gate"):
            x = named[name]
            if x is not None and x.stride(-1) != 1:
                named[name] = x.contiguous()
        for name in ("slot_key", "slot_value", "sink_key", "sink_value"):
            if named[name] is not None:
                named[name] = named[name].contiguous()
        return Inputs(**named)

    @property
    def kind(self) -> Hashable:
        """All that Triton compiles a call for, but for the constants that are named at every launch."""
        tensors = [None if x is None else (x.dtype, x.stride()) for x in self[:12]]
        return (*tensors, self.q.shape, self.v.shape, self.q.device)

    @property
    def slot_query(self) -> Tensor:
        return self.q if self.q_slot is None else self.q_slot

    @property
    def token_key(self) -> Tensor:
        return self.k if self.k_slot is None else self.k_slot

    @property
    def sinks(self) -> int:
        return 0 if self.sink_key is None else self.sink_key.shape[1]

    @property
    def sizes(self) -> dict[str, int]:
        return {"M": self.log_gate.shape[3], "D": self.q.shape[3], "DV": self.v.shape[3]}

    def blocks(self) -> Blocks:
        """Block sizes of this call."""
        sizes = (*self.sizes.values(), self.sinks, self.q.shape[2] // self.k.shape[2])
        slots, dim, value_dim, sinks, groups = (int(size) for size in sizes)
        return blocks(
            self.q.dtype,
            dim,
            value_dim,
            slots,
            sinks,
            shared_memory(self.q.device),
            self.window,
            groups,
            self.log_gate.dtype,
        )

    def plan(self) -> tuple[Plan, Blocks]:
        """Programs and block sizes of this call."""
        sizes = self.blocks()
        columns = self.k.shape[2] * _columns((self.q.shape[3], self.v.shape[3]), STATE_WIDTH)
        batch, length = self.q.shape[:2]
        return make_plan(batch, length, self.past, self.window, sizes, columns, self.cu_seqlens), sizes

    def kept(self, sizes: Blocks) -> Kept:
        """Room for the slots before every chunk."""
        batch, length = self.q.shape[:2]
        packed = None if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        total = chunks_of(length, self.past, self.window, sizes.chunk, packed)
        shape = (total * batch if packed is None else total, self.k.shape[2], self.log_gate.shape[3])
        dims = (self.q.shape[3], self.v.shape[3])
        key, value = (self.v.new_empty(*shape, dim) for dim in dims)
        return Kept(key, value, self.v.new_empty(shape, dtype=torch.float32))


def strides(*tensors: Tensor) -> list[int]:
    """(batch, token, head) strides of tensors [B, T, heads, dim]."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _columns(dims: tuple[int, int], width: int) -> int:
    """Programs for the columns of a slot's key and value."""
    return sum(-(-dim // width) for dim in dims)


def _tiles(dims: tuple[int, int], slots: int) -> int:
    """Programs of a scan for the slots of one sequence and head."""
    return _columns(dims, SCAN["WIDTH"]) * -(-slots // SCAN["ROWS"])


def slot_states(inputs: Inputs, plan: Plan, sizes: Blocks) -> tuple[Kept, tuple[Tensor, Tensor]]:
    """Slots before every chunk and, float32, after every sequence [N, H, M, ...]: by one pass over the tokens, or from
    what every chunk adds and a scan of that.
    """
    key, v, gate, heads = inputs.token_key, inputs.v, inputs.log_gate, inputs.k.shape[2]
    slots, dims = gate.shape[3], (inputs.q.shape[3], v.shape[3])
    kept = inputs.kept(sizes)
    last_key, last_value = (v.new_empty(plan.sequences, heads, slots, d, dtype=torch.float32) for d in dims)
    started = inputs.slot_key is not None
    place = (plan.length, plan.past, plan.window, plan.chunks)
    product = {"SLOTS": sizes.slots, "DTYPE": sizes.dtype, "PRECISION": sizes.precision}
    sized, cut = {**inputs.sizes, "CHUNK": sizes.chunk}, {"PACKED": plan.cu is not None}
    if plan.scanned:
        launch(
            shares_kernel,
            (plan.programs(plan.blocks), heads),
            inputs.kind,
            key,
            v,
            gate,
            *kept,
            plan.cu,
            plan.chunk_base,
            plan.block_table,
            *strides(key, v, gate),
            *place,
            plan.blocks,
            heads,
            KEY=sizes.key,
            VALUE=sizes.value,
            **sized,
            **product,
            **cut,
            num_warps=4,
            num_stages=1,
        )
        launch(
            scan_kernel,
            (plan.sequences, heads, _tiles(dims, slots)),
            inputs.kind,
            *kept,
            inputs.slot_key,
            inputs.slot_value,
            last_key,
            last_value,
            plan.cu,
            plan.chunk_base,
            *place,
            heads,
            STARTED=started,
            STAGES=sizes.scan_stages,
            **sized,
            **SCAN,
            **cut,
            num_warps=4,
        )
    else:
        launch(
            states_kernel,
            (plan.sequences, heads, _columns(dims, STATE_WIDTH)),
            inputs.kind,
            key,
            v,
            gate,
            inputs.slot_key,
            inputs.slot_value,
            *kept,
            last_key,
            last_value,
            *strides(key, v, gate),
            *place,
            heads,
            WIDTH=STATE_WIDTH,
            STARTED=started,
            **sized,
            **product,
            num_warps=4,
            num_stages=3,
        )
    return kept, (last_key, last_value)


def outputs(inputs: Inputs, plan: Plan, sizes: Blocks, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, T, HQ, Dv], mass and log2-sum-exp [B, T, HQ] float32."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, length, query_heads, _ = q.shape
    heads = k.shape[2]
    out = v.new_empty(batch, length, query_heads, v.shape[3])
    mass, lse = (q.new_empty(batch, length, query_heads, dtype=torch.float32) for _ in range(2))
    groups = query_heads // heads
    launch(
        forward_kernel,
        (plan.programs(plan.blocks), heads),
        inputs.kind,
        q,
        k,
        v,
        inputs.slot_query,
        inputs.token_key,
        inputs.log_gate,
        *kept,
        inputs.sink_key,
        inputs.sink_value,
        inputs.first,
        plan.cu,
        plan.chunk_base,
        plan.block_table,
        out,
        mass,
        lse,
        *strides(q, k, v, inputs.slot_query, inputs.token_key, inputs.log_gate),
        inputs.scale * LOG2_E,
        plan.length,
        plan.past,
        plan.window,
        plan.chunks,
        plan.blocks,
        heads,
        groups,
        **inputs.sizes,
        S=inputs.sinks,
        SLOTS=sizes.slots,
        KEY=sizes.key,
        VALUE=sizes.value,
        SINKS=sizes.sinks,
        CHUNK=sizes.chunk,
        HEADS=sizes.heads,
        BLOCK=sizes.block,
        STAGES=sizes.stages,
        DTYPE=sizes.dtype,
        GATED=sizes.gated,
        PRECISION=sizes.precision,
        PACKED=plan.cu is not None,
        LATE=inputs.first is not None,
        LIVE=inputs.live,
        WINDOWED=plan.window > 0,
        SEPARATE=inputs.q_slot is not None,
        WIDE=sizes.wide,
        num_warps=sizes.warps,
        num_stages=1,
    )
    return out, mass, lse


class Gradients(NamedTuple):
    """What `gradients` finds; None for inputs that were left out."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_slot: Tensor | None
    k_slot: Tensor | None
    log_gate: Tensor
    slot_key: Tensor
    slot_value: Tensor
    sink_key: Tensor | None
    sink_value: Tensor | None


def gradients(
    inputs: Inputs,
    kept: Kept,
    out: Tensor,
    mass: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_slot_key: Tensor,
    grad_slot_value: Tensor,
) -> Gradients:
    """Gradients of all inputs. `grad_out` and `grad_mass` are contiguous, `grad_slot_*` those of the final slots."""
    plan, sizes = inputs.plan()
    q, k, v, gate = inputs.q, inputs.k, inputs.v, inputs.log_gate
    packed, windowed, sinks = plan.cu is not None, plan.window > 0, inputs.sinks
    batch, length, query_heads, dim = q.shape
    key_length, heads, value_dim, slots = *k.shape[1:3], v.shape[3], gate.shape[3]
    groups, late = query_heads // heads, inputs.first is not None
    slot_query, token_key = inputs.slot_query, inputs.token_key
    own_keys = inputs.k_slot is not None

    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    dv = v.new_empty(batch, key_length, heads, value_dim)
    dq_slot = dq if inputs.q_slot is None else torch.empty_like(dq)
    dk_slot = torch.empty_like(dk) if own_keys else dk
    if own_keys and not windowed:
        dk.zero_()  # nothing reads these keys
    delta = torch.empty_like(lse)

    total = kept.key.shape[0]
    dslots = [torch.empty_like(x) for x in kept[:2]]
    dsinks = v.new_zeros(total, heads, sinks * (dim + value_dim), dtype=torch.float32)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=q.device)
    blocks = plan.programs(plan.blocks)
    slab = min(max(1, SLAB // heads), max(blocks, 1))
    gated = torch.bfloat16 if sizes.gated == tl.bfloat16 else torch.float32
    width = sizes.chunk + sizes.slots
    scores = [v.new_empty(slab, query_heads, sizes.chunk, width, dtype=gated) for _ in range(2)]
    sink_scores = [v.new_empty(slab, query_heads, sizes.chunk, sinks, dtype=torch.float32) for _ in range(2)]
    rise_grads = v.new_empty(slab, query_heads, sizes.chunk, sizes.slots, dtype=gated)
    borders = v.new_empty(slab, heads, sizes.chunk // 16, sizes.slots, dtype=torch.float32)
    shared = {"CHUNK": sizes.chunk, "DTYPE": sizes.dtype, "PRECISION": sizes.precision, "PACKED": packed}
    slotted = {"M": slots, "S": sinks, "SLOTS": sizes.slots, "SINKS": sizes.sinks, **shared}
    wide = {"D": dim, "DV": value_dim, "KEY": sizes.key, "VALUE": sizes.value}
    tables = (plan.cu, plan.chunk_base, plan.block_table)
    for start in range(0, blocks, slab):
        count = min(slab, blocks - start)
        place = (length, plan.past, plan.window, plan.chunks, plan.blocks, start)
        launch(
            query_kernel,
            (count, heads),
            inputs.kind,
            q,
            k,
            v,
            slot_query,
            token_key,
            gate,
            *kept,
            inputs.sink_key,
            inputs.sink_value,
            inputs.first,
            *tables,
            out,
            mass,
            lse,
            grad_out,
            grad_mass,
            delta,
            dq,
            dq_slot,
            *scores,
            rise_grads,
            *sink_scores,
            borders,
            *strides(q, k, v, slot_query, token_key, gate),
            inputs.scale,
            *place,
            heads,
            groups,
            HEADS=sizes.heads,
            BLOCK=sizes.back_block,
            STAGES=sizes.stages,
            GATED=sizes.gated,
            LATE=late,
            LIVE=inputs.live,
            WINDOWED=windowed,
            SEPARATE=inputs.q_slot is not None,
            WEIGHED=grad_mass is not None,
            WIDE=sizes.wide,
            num_warps=sizes.warps,
            num_stages=1,
            **slotted,
            **wide,
        )
        launch(
            slots_kernel,
            (count, heads),
            inputs.kind,
            v,
            slot_query,
            token_key,
            gate,
            kept.decay,
            grad_out,
            *scores,
            rise_grads,
            *sink_scores,
            borders,
            *tables,
            dk_slot,
            dv,
            *dslots,
            dsinks,
            dgate,
            *strides(v, slot_query, token_key, gate),
            *place,
            key_length,
            heads,
            groups,
            GATED=sizes.gated,
            num_warps=sizes.slot_warps,
            num_stages=sizes.slot_stages,
            **slotted,
            **wide,
        )

    del scores, sink_scores, rise_grads, borders  # their memory serves the next pass
    first = [torch.empty_like(x, dtype=torch.float32) for x in (grad_slot_key, grad_slot_value)]
    columns = _columns((dim, value_dim), SCAN["WIDTH"])
    dend = v.new_empty(total, heads, columns, slots, dtype=torch.float32)
    launch(
        reverse_kernel,
        (plan.sequences, heads, _tiles((dim, value_dim), slots)),
        inputs.kind,
        kept.decay,
        kept.key,
        kept.value,
        grad_slot_key,
        grad_slot_value,
        *dslots,
        *first,
        dend,
        plan.cu,
        plan.chunk_base,
        length,
        plan.past,
        plan.window,
        plan.chunks,
        heads,
        M=slots,
        D=dim,
        DV=value_dim,
        CHUNK=sizes.chunk,
        PACKED=packed,
        STAGES=sizes.scan_stages,
        **SCAN,
        num_warps=4,
    )
    launch(
        key_kernel,
        (plan.programs(plan.key_blocks), heads),
        inputs.kind,
        q,
        k,
        v,
        token_key,
        gate,
        *dslots,
        dend,
        grad_out,
        lse,
        delta,
        inputs.first,
        plan.cu,
        plan.chunk_base,
        plan.key_table,
        dk,
        dk_slot,
        dv,
        dgate,
        *strides(q, k, v, token_key, gate),
        inputs.scale,
        length,
        plan.past,
        plan.window,
        plan.chunks,
        plan.key_blocks,
        key_length,
        heads,
        groups,
        columns,
        M=slots,
        SLOTS=sizes.slots,
        BLOCK=sizes.back_block,
        LATE=late,
        WINDOWED=windowed,
        SEPARATE=own_keys,
        WIDE=sizes.wide,
        num_warps=sizes.key_warps,
        num_stages=sizes.key_stages,
        **shared,
        **wide,
    )
    return Gradients(
        dq,
        dk,
        dv,
        None if inputs.q_slot is None else dq_slot,
        dk_slot if own_keys else None,
        dgate,
        *first,
        *_sink_gradients(inputs, dsinks),
    )


def _sink_gradients(inputs: Inputs, of_chunks: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the sinks' keys and values from those of every chunk [chunks, H, S D + S DV]."""
    if inputs.sink_key is None or inputs.sink_value is None:
        return None, None
    key, value = inputs.sink_key, inputs.sink_value
    parts = of_chunks.sum(0).split([key[0].numel(), value[0].numel()], -1)
    dkey, dvalue = (x.reshape(y.shape).to(y.dtype, copy=True) for x, y in zip(parts, (key, value), strict=True))
    return dkey, dvalue


def every_kernel(inputs: Inputs) -> None:
    """Launch the kernels of one forward and backward pass (used to compile them ahead of time)."""
    inputs = inputs.shaped()
    plan, sizes = inputs.plan()
    kept, last = slot_states(inputs, plan, sizes)
    out, mass, lse = outputs(inputs, plan, sizes, kept)
    gradients(inputs, kept, out, mass, lse, out, None, *last)
