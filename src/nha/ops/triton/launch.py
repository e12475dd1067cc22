"""Launching the kernels on tensors: allocation, strides, grids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops.triton.forward import forward_kernel
from nha.ops.triton.plan import Blocks, Plan, blocks, make_plan
from nha.ops.triton.state import states_kernel

LOG2_E = 1.4426950408889634
STATE_WIDTH = 64  # columns of the slots that one state program holds


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

    def plan(self) -> tuple[Plan, Blocks]:
        """Programs and block sizes of this call."""
        batch, length, query_heads, dim = self.q.shape
        heads, value_dim, slots = self.k.shape[2], self.v.shape[3], self.log_gate.shape[3]
        sizes = blocks(self.q.dtype, dim, value_dim, slots, self.sinks, query_heads // heads, self.window)
        columns = heads * (-(-dim // STATE_WIDTH) + -(-value_dim // STATE_WIDTH))
        return make_plan(batch, length, self.past, self.window, sizes, columns, self.cu_seqlens), sizes


def strides(*tensors: Tensor) -> list[int]:
    """(batch, token, head) strides of tensors [B, T, heads, dim]."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def slot_states(inputs: Inputs, plan: Plan, sizes: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots before every chunk, in the dtype of `v`, and after the sequence, float32: keys and values of each."""
    v, gate, heads = inputs.v, inputs.log_gate, inputs.k.shape[2]
    slots, dim, value_dim = gate.shape[3], inputs.q.shape[3], v.shape[3]
    total = plan.programs(plan.chunks)
    out = [v.new_empty(total, heads, slots, d) for d in (dim, value_dim)]
    last = [v.new_empty(plan.sequences, heads, slots, d, dtype=torch.float32) for d in (dim, value_dim)]
    segments = plan.programs(plan.segments)
    added, decay = [None, None], None
    if plan.split:
        added = [v.new_empty(segments, heads, slots, d, dtype=torch.float32) for d in (dim, value_dim)]
        decay = v.new_empty(segments, heads, slots, dtype=torch.float32)
    columns = -(-dim // STATE_WIDTH) + -(-value_dim // STATE_WIDTH)
    for adding in (True, False) if plan.split else (False,):
        states_kernel[(segments, heads, columns)](
            inputs.token_key, v, gate, inputs.slot_key, inputs.slot_value, *added, decay, *out, *last,
            plan.cu, plan.chunk_base, plan.segment_table,
            *strides(inputs.token_key, v, gate),
            plan.length, plan.past, plan.window, plan.chunks, plan.segments, plan.segment_chunks, heads,
            **inputs.sizes, SLOTS=sizes.slots, CHUNK=sizes.chunk, WIDTH=STATE_WIDTH,
            DTYPE=sizes.dtype, PRECISION=sizes.precision, PACKED=plan.cu is not None,
            STARTED=inputs.slot_key is not None, ADDING=adding, FOLDED=plan.split and not adding,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out[0], out[1], last[0], last[1]


def outputs(
    inputs: Inputs, plan: Plan, sizes: Blocks, slot_key: Tensor, slot_value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, T, HQ, Dv], mass and log2-sum-exp [B, T, HQ] float32."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, length, query_heads, _ = q.shape
    heads = k.shape[2]
    out = v.new_empty(batch, length, query_heads, v.shape[3])
    mass, lse = (q.new_empty(batch, length, query_heads, dtype=torch.float32) for _ in range(2))
    groups = query_heads // heads
    grid = (plan.programs(plan.tiles), heads * -(-groups // sizes.heads))
    forward_kernel[grid](
        q, k, v, inputs.slot_query, inputs.token_key, inputs.log_gate, slot_key, slot_value,
        inputs.sink_key, inputs.sink_value, inputs.first, plan.cu, plan.chunk_base, plan.tile_table,
        out, mass, lse, *strides(q, k, v, inputs.slot_query, inputs.token_key, inputs.log_gate),
        inputs.scale * LOG2_E, plan.length, plan.past, plan.window, plan.chunks, plan.tiles, heads, groups,
        **inputs.sizes, S=inputs.sinks, SLOTS=sizes.slots, KEY=sizes.key, VALUE=sizes.value, SINKS=sizes.sinks,
        CHUNK=sizes.chunk, HEADS=sizes.heads, BLOCK=sizes.block,
        DTYPE=sizes.dtype, GATED=sizes.gated, PRECISION=sizes.precision,
        PACKED=plan.cu is not None, LATE=inputs.first is not None, LIVE=inputs.live, WINDOWED=plan.window > 0,
        num_warps=sizes.warps, num_stages=2,
    )  # fmt: skip
    return out, mass, lse


def every_kernel(inputs: Inputs) -> None:
    """Launch the kernels of one forward and backward pass (used to compile them ahead of time)."""
    inputs = inputs.shaped()
    plan, sizes = inputs.plan()
    slot_key, slot_value, _, _ = slot_states(inputs, plan, sizes)
    outputs(inputs, plan, sizes, slot_key, slot_value)
