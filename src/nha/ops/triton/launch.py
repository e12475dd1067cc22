"""Launching the kernels on tensors: allocation, strides, grids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops.triton.backward import finish_kernel, slots_kernel
from nha.ops.triton.forward import forward_kernel
from nha.ops.triton.plan import Blocks, Plan, blocks, make_plan
from nha.ops.triton.state import reverse_kernel, states_kernel
from nha.ops.triton.window import delta_kernel, window_key_kernel, window_query_kernel

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
    inputs: Inputs, out: Tensor, mass: Tensor, lse: Tensor, grad_out: Tensor, grad_mass: Tensor | None,
    grad_slot_key: Tensor, grad_slot_value: Tensor,
) -> Gradients:  # fmt: skip
    """Gradients of all inputs. `grad_out` and `grad_mass` are contiguous, `grad_slot_*` those of the final slots."""
    plan, sizes = inputs.plan()
    q, k, v, gate = inputs.q, inputs.k, inputs.v, inputs.log_gate
    packed, windowed, sinks = plan.cu is not None, plan.window > 0, inputs.sinks
    batch, length, query_heads, dim = q.shape
    key_length, heads, value_dim, slots = *k.shape[1:3], v.shape[3], gate.shape[3]
    groups, late = query_heads // heads, inputs.first is not None

    delta = torch.empty_like(lse)
    rows, block = lse.numel(), 32
    delta_kernel[(-(-rows // block),)](
        out, grad_out, mass, grad_mass, delta, rows, DV=value_dim, VALUE=sizes.value, BLOCK=block,
        WEIGHED=grad_mass is not None, num_warps=4,
    )  # fmt: skip

    def fresh(x: Tensor, tokens: int, filled: bool) -> Tensor:
        return x.new_empty(batch, tokens, *x.shape[2:]) if filled else x.new_zeros(batch, tokens, *x.shape[2:])

    # Kernels write every token of what they are the first to write; the rest starts at zero.
    covered = not windowed and not packed
    dq = fresh(q, length, windowed or (inputs.q_slot is None and covered))
    dk = fresh(k, key_length, windowed or (inputs.k_slot is None and covered))
    dv = fresh(v, key_length, windowed or covered)
    dq_slot = dq if inputs.q_slot is None else fresh(q, length, covered)
    dk_slot = dk if inputs.k_slot is None else fresh(k, key_length, covered)
    dgate = torch.zeros(batch, key_length, heads, slots, dtype=torch.float32, device=q.device)

    common = {"DTYPE": sizes.dtype, "PRECISION": sizes.precision, "PACKED": packed}
    wide = {"D": dim, "DV": value_dim, "KEY": sizes.key, "VALUE": sizes.value}
    if windowed:
        options = {**common, **wide, "HEADS": sizes.heads, "LATE": late, "num_warps": sizes.warps, "num_stages": 2}
        window_query_kernel[(plan.programs(plan.tiles), heads * -(-groups // sizes.heads))](
            q, k, v, grad_out, lse, delta, inputs.first, plan.cu, plan.tile_table, dq, *strides(q, k, v),
            inputs.scale, length, plan.past, plan.window, plan.tiles, heads, groups, BLOCK=sizes.block, **options,
        )  # fmt: skip
        window_key_kernel[(plan.programs(plan.key_blocks), heads)](
            q, k, v, grad_out, lse, delta, inputs.first, plan.cu, plan.key_table, dk, dv, *strides(q, k, v),
            inputs.scale, length, plan.past, plan.window, plan.key_blocks, key_length, heads, groups,
            KEYS=sizes.keys, **options,
        )  # fmt: skip

    slot_key, slot_value, _, _ = slot_states(inputs, plan, sizes)
    total = plan.programs(plan.chunks)
    # Gradients may leave the range of float16.
    kept = torch.float32 if v.dtype == torch.float16 else v.dtype
    dread = [v.new_empty(total, heads, slots, d, dtype=kept) for d in (dim, value_dim)]
    dsink = [v.new_zeros(total, heads, sinks, d, dtype=torch.float32) for d in (dim, value_dim)]
    grid = (total, heads)
    for side in (0, 1):
        if not total:
            break
        slots_kernel[grid](
            inputs.slot_query, inputs.token_key, v, gate, slot_key, slot_value, inputs.sink_key, inputs.sink_value,
            grad_out, grad_mass, lse, delta, inputs.first, plan.cu, plan.chunk_base, plan.chunk_table,
            dq_slot, (dk_slot, dv)[side], dgate, dread[side], dsink[side],
            *strides(inputs.slot_query, inputs.token_key, v, gate),
            inputs.scale, length, plan.past, plan.window, plan.chunks, key_length, heads, groups,
            M=slots, S=sinks, SLOTS=sizes.slots, SINKS=sizes.sinks, CHUNK=sizes.chunk, HEADS=sizes.slot_heads,
            GATED=sizes.gated, LATE=late, LIVE=inputs.live, WEIGHED=grad_mass is not None, KEY_SIDE=side == 0,
            ADD_QUERY=windowed and inputs.q_slot is None,
            ADD_TOKEN=windowed and (side == 1 or inputs.k_slot is None), num_warps=8, num_stages=1, **common, **wide,
        )  # fmt: skip

    first = [torch.empty_like(x, dtype=torch.float32) for x in (grad_slot_key, grad_slot_value)]
    segments = plan.programs(plan.segments)
    added, decay = [None, None], None
    if plan.split:
        added = [v.new_empty(segments, heads, slots, d, dtype=torch.float32) for d in (dim, value_dim)]
        decay = v.new_empty(segments, heads, slots, dtype=torch.float32)
    columns = -(-dim // STATE_WIDTH) + -(-value_dim // STATE_WIDTH)
    for adding in (True, False) if plan.split else (False,):
        reverse_kernel[(segments, heads, columns)](
            gate, grad_slot_key, grad_slot_value, *added, decay, *dread, *first,
            plan.cu, plan.chunk_base, plan.segment_table, *strides(gate),
            length, plan.past, plan.window, plan.chunks, plan.segments, plan.segment_chunks, heads,
            M=slots, D=dim, DV=value_dim, SLOTS=sizes.slots, CHUNK=sizes.chunk, WIDTH=STATE_WIDTH,
            PACKED=packed, ADDING=adding, FOLDED=plan.split and not adding, num_warps=4, num_stages=2,
        )  # fmt: skip
    if total:
        finish_kernel[grid](
            inputs.token_key, v, gate, slot_key, slot_value, *dread, plan.cu, plan.chunk_base, plan.chunk_table,
            dk_slot, dv, dgate, *strides(inputs.token_key, v, gate),
            length, plan.past, plan.window, plan.chunks, key_length, heads,
            M=slots, SLOTS=sizes.slots, CHUNK=sizes.chunk, num_warps=8, num_stages=1, **common, **wide,
        )  # fmt: skip
    return Gradients(
        dq, dk, dv, None if inputs.q_slot is None else dq_slot, None if inputs.k_slot is None else dk_slot,
        dgate.to(gate.dtype), first[0], first[1],
        None if inputs.sink_key is None else dsink[0].sum(0).to(inputs.sink_key.dtype),
        None if inputs.sink_value is None else dsink[1].sum(0).to(inputs.sink_value.dtype),
    )  # fmt: skip


def every_kernel(inputs: Inputs) -> None:
    """Launch the kernels of one forward and backward pass (used to compile them ahead of time)."""
    inputs = inputs.shaped()
    plan, sizes = inputs.plan()
    slot_key, slot_value, last_key, last_value = slot_states(inputs, plan, sizes)
    out, mass, lse = outputs(inputs, plan, sizes, slot_key, slot_value)
    gradients(inputs, out, mass, lse, out, None, last_key, last_value)
