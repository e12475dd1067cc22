"""Launching the kernels of a call: allocation, strides, grids."""

# Triton's types give a launch the signature of the kernel, without the options of the compiler.
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nha.ops.triton.chunk.bwd_dkv import nha_chunk_bwd_kernel_dkv
from nha.ops.triton.chunk.bwd_dq import nha_chunk_bwd_kernel_dq
from nha.ops.triton.chunk.bwd_dstate import nha_chunk_bwd_kernel_dstate
from nha.ops.triton.chunk.call import STATE_WIDTH, Call, ChunkStates, Inputs, count_columns, strides
from nha.ops.triton.chunk.fwd import nha_chunk_fwd_kernel
from nha.ops.triton.chunk.state import (
    nha_chunk_state_kernel_bwd,
    nha_chunk_state_kernel_local,
    nha_chunk_state_kernel_scan,
    nha_chunk_state_kernel_serial,
)
from nha.ops.triton.primitives import LOG2_E, SUBCHUNK

SCAN = {"ROWS": 16, "WIDTH": 64}  # slots and columns that one program of a scan holds
SLAB = 2112  # blocks of query heads whose scores the backward pass stores at a time


def _scan_tiles(inputs: Inputs) -> int:
    """Programs of a scan for the slots of one sequence and head."""
    return count_columns(inputs.dims, SCAN["WIDTH"]) * -(-inputs.slots // SCAN["ROWS"])


class Gradients(NamedTuple):
    """Gradients by input; None for inputs that were not given."""

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


def slot_states(call: Call) -> tuple[ChunkStates, tuple[Tensor, Tensor]]:
    """Slots before every chunk and, float32, after every sequence [N, H, M, ...]."""
    inputs, plan, sizes = call
    states = ChunkStates.empty(inputs, sizes.chunk)
    final_key, final_value = (
        inputs.v.new_empty(plan.sequences, inputs.heads, inputs.slots, dim, dtype=torch.float32) for dim in inputs.dims
    )
    final = final_key, final_value
    if plan.scanned:
        _local_states(call, states)
        _scan_states(call, states, final)
    else:
        _serial_states(call, states, final)
    return states, final


def _serial_states(call: Call, states: ChunkStates, final: tuple[Tensor, Tensor]) -> None:
    inputs, plan, sizes = call
    read = (inputs.token_key, inputs.v, inputs.log_gate)
    nha_chunk_state_kernel_serial[(plan.sequences, inputs.heads, count_columns(inputs.dims, STATE_WIDTH))](
        *read,
        inputs.slot_key,
        inputs.slot_value,
        *states,
        *final,
        *strides(*read),
        *call.tokens,
        inputs.heads,
        **call.shapes,
        BLOCK_M=sizes.block_m,
        DTYPE=sizes.dtype,
        PRECISION=sizes.precision,
        WIDTH=STATE_WIDTH,
        HAS_INITIAL_STATE=inputs.slot_key is not None,
        num_warps=4,
        num_stages=3,
    )


def _local_states(call: Call, states: ChunkStates) -> None:
    """Each chunk's own contribution to the slots -> states."""
    inputs, plan, _ = call
    read = (inputs.token_key, inputs.v, inputs.log_gate)
    nha_chunk_state_kernel_local[(plan.programs(plan.blocks), inputs.heads)](
        *read,
        *states,
        plan.cu_seqlens,
        plan.chunk_base,
        plan.block_table,
        *strides(*read),
        *call.tokens,
        plan.blocks,
        inputs.heads,
        **call.shapes,
        **call.tiles,
        PACKED=plan.packed,
        num_warps=4,
        num_stages=1,
    )


def _scan_states(call: Call, states: ChunkStates, final: tuple[Tensor, Tensor]) -> None:
    """Replace the contributions in states by the slots before every chunk."""
    inputs, plan, sizes = call
    nha_chunk_state_kernel_scan[(plan.sequences, inputs.heads, _scan_tiles(inputs))](
        *states,
        inputs.slot_key,
        inputs.slot_value,
        *final,
        plan.cu_seqlens,
        plan.chunk_base,
        *call.tokens,
        inputs.heads,
        **call.shapes,
        **SCAN,
        STAGES=sizes.scan_stages,
        PACKED=plan.packed,
        HAS_INITIAL_STATE=inputs.slot_key is not None,
        num_warps=4,
    )


def outputs(call: Call, states: ChunkStates) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, T, HQ, Dv], mass and log2-sum-exp [B, T, HQ] float32."""
    inputs, plan, sizes = call
    q, k, v = inputs.q, inputs.k, inputs.v
    out = v.new_empty(*q.shape[:3], v.shape[3])
    mass, lse = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    read = (q, k, v, inputs.slot_query, inputs.token_key, inputs.log_gate)
    nha_chunk_fwd_kernel[(plan.programs(plan.blocks), inputs.heads)](
        *read,
        *states,
        inputs.sink_key,
        inputs.sink_value,
        inputs.first_key,
        plan.cu_seqlens,
        plan.chunk_base,
        plan.block_table,
        out,
        mass,
        lse,
        *strides(*read),
        inputs.scale * LOG2_E.value,
        *call.tokens,
        plan.blocks,
        inputs.heads,
        inputs.groups,
        **call.shapes,
        **call.tiles,
        **call.sink_tiles,
        **call.options,
        BLOCK_H=sizes.block_h,
        BLOCK_N=sizes.block_n,
        STAGES=sizes.stages,
        SLOTS_ACTIVE=inputs.slots_active,
        SHARED_QK=plan.window > 0 and inputs.q_slot is None and inputs.k_slot is None,
        COVERS_CHUNK=plan.window >= sizes.chunk,
        WINDOW_IN_TILE=sizes.window_in_tile,
        HAS_SLOT_QK=inputs.q_slot is not None,
        num_warps=sizes.warps,
        num_stages=1,
    )
    return out, mass, lse


class Scores(NamedTuple):
    """Scratch memory of a slab of blocks, between the kernels of dq and of dstate."""

    key: Tensor
    value: Tensor
    q_decay_grads: Tensor
    sink: Tensor
    sink_weights: Tensor
    chunk_decays: Tensor

    @classmethod
    def empty(cls, call: Call, blocks: int) -> Scores:
        inputs, _, sizes = call
        new, per_query = inputs.v.new_empty, (blocks, inputs.q.shape[2], sizes.chunk)
        dtype = torch.bfloat16 if sizes.gate_dtype == tl.bfloat16 else torch.float32
        passes = sizes.chunk // SUBCHUNK.value
        return cls(
            new(*per_query, sizes.chunk + sizes.block_m, dtype=dtype),
            new(*per_query, sizes.chunk + sizes.block_m, dtype=dtype),
            new(*per_query, sizes.block_m, dtype=dtype),
            new(*per_query, inputs.sinks, dtype=torch.float32),
            new(*per_query, inputs.sinks, dtype=torch.float32),
            new(blocks, inputs.heads, passes, sizes.block_m, dtype=torch.float32),
        )


class Saved(NamedTuple):
    """Tensors of a forward pass, and the gradients of its outputs, contiguous, that the backward pass reads."""

    states: ChunkStates
    out: Tensor
    mass: Tensor
    lse: Tensor
    dout: Tensor
    dmass: Tensor | None


class _Grads(NamedTuple):
    """Memory for the gradients; `dq_slot` is `dq`, and `dk_slot` is `dk`, where the slots see the same."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dq_slot: Tensor
    dk_slot: Tensor
    dgate: Tensor
    dslot_key: Tensor  # [chunks, H, M, D], as the states
    dslot_value: Tensor
    dsinks: Tensor  # [chunks, H, S D + S DV] float32
    delta: Tensor

    @classmethod
    def empty(cls, inputs: Inputs, saved: Saved) -> _Grads:
        q, k, v, gate = inputs.q, inputs.k, inputs.v, inputs.log_gate
        dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        if inputs.k_slot is not None and inputs.window == 0:
            dk.zero_()  # nothing reads these keys
        chunks = saved.states.key.shape[0]
        return cls(
            dq,
            dk,
            v.new_empty(*k.shape[:3], v.shape[3]),
            dq if inputs.q_slot is None else torch.empty_like(dq),
            dk if inputs.k_slot is None else torch.empty_like(dk),
            torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
            torch.empty_like(saved.states.key),
            torch.empty_like(saved.states.value),
            v.new_zeros(chunks, inputs.heads, inputs.sinks * sum(inputs.dims), dtype=torch.float32),
            torch.empty_like(saved.lse),
        )


def gradients(call: Call, saved: Saved, dfinal_key: Tensor, dfinal_value: Tensor) -> Gradients:
    """Gradients of all inputs. `dfinal_*`, float32, are those of the final slots, `saved` has those of the outputs."""
    inputs, plan, _ = call
    grads = _Grads.empty(inputs, saved)
    blocks = plan.programs(plan.blocks)
    slab = min(max(1, SLAB // inputs.q.shape[2]), max(blocks, 1))
    scores = Scores.empty(call, slab)
    for start in range(0, blocks, slab):
        count = min(slab, blocks - start)
        _dq(call, saved, grads, scores, start, count)
        _dstate(call, saved, grads, scores, start, count)
    del scores  # its memory serves the next pass
    dinitial = (torch.empty_like(dfinal_key), torch.empty_like(dfinal_value))
    dend = _scan_dstates(call, saved.states, grads, (dfinal_key, dfinal_value), dinitial)
    _dkv(call, saved, grads, dend)
    return Gradients(
        grads.dq,
        grads.dk,
        grads.dv,
        None if inputs.q_slot is None else grads.dq_slot,
        None if inputs.k_slot is None else grads.dk_slot,
        grads.dgate,
        dinitial[0],
        dinitial[1],
        *_sink_gradients(inputs, grads.dsinks),
    )


def _dq(call: Call, saved: Saved, grads: _Grads, scores: Scores, start: int, count: int) -> None:
    """dq, delta and the scores of `count` blocks from `start` on."""
    inputs, plan, sizes = call
    read = (inputs.q, inputs.k, inputs.v, inputs.slot_query, inputs.token_key, inputs.log_gate)
    nha_chunk_bwd_kernel_dq[(count, inputs.heads)](
        *read,
        *saved.states,
        inputs.sink_key,
        inputs.sink_value,
        inputs.first_key,
        plan.cu_seqlens,
        plan.chunk_base,
        plan.block_table,
        saved.out,
        saved.mass,
        saved.lse,
        saved.dout,
        saved.dmass,
        grads.delta,
        grads.dq,
        grads.dq_slot,
        *scores,
        *strides(*read),
        inputs.scale,
        *call.tokens,
        plan.blocks,
        start,
        inputs.heads,
        inputs.groups,
        **call.shapes,
        **call.tiles,
        **call.sink_tiles,
        **call.options,
        BLOCK_H=sizes.block_h,
        BLOCK_N=sizes.bwd_block_n,
        STAGES=sizes.dq_stages,
        SLOTS_ACTIVE=inputs.slots_active,
        HAS_SLOT_QK=inputs.q_slot is not None,
        HAS_DMASS=saved.dmass is not None,
        ONE_GATE_SUM=sizes.one_gate_sum,
        num_warps=sizes.warps,
        num_stages=1,
    )


def _dstate(call: Call, saved: Saved, grads: _Grads, scores: Scores, start: int, count: int) -> None:
    """Gradients of tokens, gates and slots from the scores of `count` blocks from `start` on."""
    inputs, plan, sizes = call
    read = (inputs.v, inputs.slot_query, inputs.token_key, inputs.log_gate)
    nha_chunk_bwd_kernel_dstate[(count, inputs.heads)](
        *read,
        saved.states.decay,
        saved.dout,
        *scores,
        plan.cu_seqlens,
        plan.chunk_base,
        plan.block_table,
        grads.dk_slot,
        grads.dv,
        grads.dslot_key,
        grads.dslot_value,
        grads.dsinks,
        grads.dgate,
        *strides(*read),
        *call.tokens,
        plan.blocks,
        start,
        inputs.k.shape[1],
        inputs.heads,
        inputs.groups,
        **call.shapes,
        **call.tiles,
        **call.sink_tiles,
        PACKED=plan.packed,
        GATE_STAGES=sizes.dstate_stages,
        num_warps=sizes.dstate_warps,
        num_stages=sizes.dstate_stages,
    )


def _scan_dstates(
    call: Call, states: ChunkStates, grads: _Grads, dfinal: tuple[Tensor, Tensor], dinitial: tuple[Tensor, Tensor]
) -> Tensor:
    """Replace the gradients in grads.dslot_* by those of the slots after every chunk; returns `dend` for `_dkv`."""
    inputs, plan, sizes = call
    columns = count_columns(inputs.dims, SCAN["WIDTH"])
    dend = inputs.v.new_empty(states.key.shape[0], inputs.heads, columns, inputs.slots, dtype=torch.float32)
    nha_chunk_state_kernel_bwd[(plan.sequences, inputs.heads, _scan_tiles(inputs))](
        states.decay,
        states.key,
        states.value,
        *dfinal,
        grads.dslot_key,
        grads.dslot_value,
        *dinitial,
        dend,
        plan.cu_seqlens,
        plan.chunk_base,
        *call.tokens,
        inputs.heads,
        **call.shapes,
        **SCAN,
        STAGES=sizes.scan_stages,
        PACKED=plan.packed,
        num_warps=4,
    )
    return dend


def _dkv(call: Call, saved: Saved, grads: _Grads, dend: Tensor) -> None:
    """Add up the gradients of keys, values and gates."""
    inputs, plan, sizes = call
    read = (inputs.q, inputs.k, inputs.v, inputs.token_key, inputs.log_gate)
    nha_chunk_bwd_kernel_dkv[(plan.programs(plan.key_blocks), inputs.heads)](
        *read,
        grads.dslot_key,
        grads.dslot_value,
        dend,
        saved.dout,
        saved.lse,
        grads.delta,
        inputs.first_key,
        plan.cu_seqlens,
        plan.chunk_base,
        plan.key_table,
        grads.dk,
        grads.dk_slot,
        grads.dv,
        grads.dgate,
        *strides(*read),
        inputs.scale,
        *call.tokens,
        plan.key_blocks,
        inputs.k.shape[1],
        inputs.heads,
        inputs.groups,
        dend.shape[2],
        **call.shapes,
        **call.tiles,
        **call.options,
        BLOCK_N=sizes.bwd_block_n,
        HAS_SLOT_QK=inputs.k_slot is not None,
        num_warps=sizes.dkv_warps,
        num_stages=sizes.dkv_stages,
    )


def _sink_gradients(inputs: Inputs, dsinks: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the sinks' keys and values from those of every chunk [chunks, H, S D + S DV]."""
    if inputs.sink_key is None or inputs.sink_value is None:
        return None, None
    key, value = inputs.sink_key, inputs.sink_value
    parts = dsinks.sum(0).split([key[0].numel(), value[0].numel()], -1)
    dkey, dvalue = (x.reshape(y.shape).to(y.dtype, copy=True) for x, y in zip(parts, (key, value), strict=True))
    return dkey, dvalue
