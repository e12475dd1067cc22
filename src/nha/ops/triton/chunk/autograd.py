"""The kernels as PyTorch operators with gradients, and the contract of `nha_attention` on top of them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops.backends import can_skip_dispatch
from nha.ops.padding import align_left, restore
from nha.ops.state import NHAState, RingState, advance, after_first
from nha.ops.triton.chunk import host
from nha.ops.triton.chunk.call import Call, ChunkStates, Inputs
from nha.ops.triton.chunk.host import Saved
from nha.ops.triton.chunk.tiling import device_guard
from nha.ops.triton.ring import ring_after_prompt
from nha.ops.varlen import sequence_of

# Arguments of the operators, as schemas; those of `nha::triton` are the fields of `Inputs`.
INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_slot, Tensor? k_slot, Tensor log_gate, Tensor? slot_key, "
    "Tensor? slot_value, Tensor? sink_key, Tensor? sink_value, Tensor? first_key, Tensor? cu_seqlens, "
    "int window, int past, float scale, bool slots_active"
)
GRADS = (
    "Tensor? dout, Tensor? dmass, Tensor? dslot_key, Tensor? dslot_value, Tensor out, Tensor mass, Tensor lse, "
    "Tensor states_key, Tensor states_value, Tensor states_decay"
)
TENSORS = 12  # arguments of `nha::triton` that are tensors
DIFFERENTIABLE = 10  # the first of them, which have gradients


def _compute(*args):
    """out [B, T, HQ, Dv], mass and log2-sum-exp [B, T, HQ], final slots [N, H, M, ...] and the `ChunkStates`."""
    inputs = Inputs(*args)
    with device_guard(inputs.q):
        call = Call.of(inputs)
        states, final = host.slot_states(call)
        return *host.outputs(call, states), *final, *states


_forward = torch.library.custom_op(
    "nha::triton", _compute, mutates_args=(), schema=f"({INPUTS}) -> ({', '.join(['Tensor'] * 8)})"
)


@_forward.register_fake
def _(*args):
    inputs = Inputs(*args)
    per_query = inputs.q.shape[:3]
    final = (inputs.sequences, inputs.heads, inputs.slots)
    return (
        inputs.v.new_empty(*per_query, inputs.v.shape[3]),
        inputs.q.new_empty(per_query, dtype=torch.float32),
        inputs.q.new_empty(per_query, dtype=torch.float32),
        *(inputs.q.new_empty(*final, dim, dtype=torch.float32) for dim in inputs.dims),
        *ChunkStates.empty(inputs, inputs.block_sizes().chunk),
    )


@torch.library.custom_op(
    "nha::triton_backward",
    mutates_args=(),
    schema=f"({GRADS}, {INPUTS}) -> ({', '.join(['Tensor'] * DIFFERENTIABLE)})",
)
def _backward(dout, dmass, dslot_key, dslot_value, out, mass, lse, *rest):
    """Gradients of q ... sink_value; an empty tensor for those not given."""
    states, inputs = ChunkStates(*rest[:3]), Inputs(*rest[3:])
    final = (inputs.sequences, inputs.heads, inputs.slots)

    def or_zeros(grad: Tensor | None, dim: int) -> Tensor:
        return inputs.q.new_zeros(*final, dim, dtype=torch.float32) if grad is None else grad.contiguous()

    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    saved = Saved(states, out, mass, lse, dout, None if dmass is None else dmass.contiguous())
    dfinal = (or_zeros(grad, dim) for grad, dim in zip((dslot_key, dslot_value), inputs.dims, strict=True))
    with device_guard(out):
        grads = host.gradients(Call.of(inputs), saved, *dfinal)
    given = inputs[:DIFFERENTIABLE]
    return tuple(inputs.q.new_empty(0) if x is None else grad for x, grad in zip(given, grads, strict=True))


@_backward.register_fake
def _(*args):
    inputs = Inputs(*args[-len(Inputs._fields) :])
    return tuple(
        inputs.q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in inputs[:DIFFERENTIABLE]
    )


def _save(ctx, inputs, output) -> None:
    out, mass, lse, _, _, *states = output
    ctx.save_for_backward(out, mass, lse, *states, *inputs[:TENSORS])
    ctx.options = inputs[TENSORS:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dmass, _, dslot_key, dslot_value, *__):
    saved = ctx.saved_tensors
    grads = _backward(dout, dmass, dslot_key, dslot_value, *saved, *ctx.options)
    given = saved[-TENSORS:][:DIFFERENTIABLE]
    without = [None] * (len(Inputs._fields) - DIFFERENTIABLE)
    return *(None if x is None else grad for x, grad in zip(given, grads, strict=True)), *without


_forward.register_autograd(_differentiate, setup_context=_save)


def _pack(cu_seqlens: Tensor, window: int, caches: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """Insert each sequence's window cache [N, W, ...] before its tokens [1, T, ...]: tensors [1, T + N * W, ...]."""
    count, length = cu_seqlens.shape[0] - 1, new[0].shape[1]
    device = cu_seqlens.device
    token = torch.arange(length, device=device)
    sequence = sequence_of(cu_seqlens, token).clamp_max(count - 1)
    row = torch.arange(count, device=device)[:, None]
    cached = cu_seqlens[:-1, None] + row * window + torch.arange(window, device=device)
    index = torch.cat([cached.flatten(), token + (sequence + 1) * window])
    source = torch.empty_like(index).scatter_(0, index, torch.arange(index.shape[0], device=device))
    return [torch.cat([a.flatten(0, 1), b[0]]).index_select(0, source)[None] for a, b in zip(caches, new, strict=True)]


def _advance_packed(
    state: NHAState, cu_seqlens: Tensor, joined: list[Tensor], slots: tuple[Tensor, Tensor]
) -> NHAState:
    """The state after packed sequences: the last W tokens of every sequence of `joined` tensors (see `_pack`)."""
    window = state.window_size
    count = cu_seqlens.shape[0] - 1
    row = torch.arange(1, count + 1, device=cu_seqlens.device)[:, None]
    index = cu_seqlens[1:, None] + row * window - window + torch.arange(window, device=cu_seqlens.device)
    key, value, slot_key, gate = (x[0].index_select(0, index.flatten()).unflatten(0, (count, window)) for x in joined)
    return replace(
        state,
        slot_key=slots[0],
        slot_value=slots[1],
        key=key,
        value=value,
        window_slot_key=None if state.window_slot_key is None else slot_key,
        window_log_gate=gate,
        num_tokens=state.num_tokens + (cu_seqlens[1:] - cu_seqlens[:-1]),
    )


class Segment(NamedTuple):
    """The tokens of a call, padded or packed; `q_slot` and `k_slot` may be `q` and `k` themselves."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gate: Tensor
    q_slot: Tensor
    k_slot: Tensor

    @property
    def keys(self) -> list[Tensor]:
        """Entries of the window cache for each token: key, value, slot key, log-gate."""
        return [self.k, self.v, self.k_slot, self.log_gate]

    def align_left(self, attention_mask: Tensor) -> Segment:
        q, k, v, log_gate = align_left(attention_mask, self.q, self.k, self.v, self.log_gate)
        q_slot = q if self.q_slot is self.q else align_left(attention_mask, self.q_slot)[0]
        k_slot = k if self.k_slot is self.k else align_left(attention_mask, self.k_slot)[0]
        return Segment(q, k, v, log_gate, q_slot, k_slot)


def triton_prefill(
    segment: Segment,
    sink: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    window_size: int,
    num_tokens: Tensor | None = None,
) -> tuple[Tensor, RingState]:
    """Outputs [B, T, HQ, Dv] of first segments of at least W tokens, and the ring of the state after them.

    As `triton_attention` without gradients, with fewer operations: the last tokens go into the ring in one launch.
    `num_tokens` [B] are the tokens before padding on the right, whose outputs mean nothing.
    """
    q, k, v, log_gate = (x if x.stride(-1) == 1 else x.contiguous() for x in segment[:4])
    q_slot = None if segment.q_slot is segment.q else segment.q_slot
    k_slot = None if segment.k_slot is segment.k else segment.k_slot
    if k_slot is not None and k_slot.stride(-1) != 1:
        k_slot = k_slot.contiguous()
    gate = log_gate
    if num_tokens is not None:  # no token behind the last one that leaves a window is written to the slots
        unwritten = torch.arange(k.shape[1], device=k.device) >= (num_tokens - window_size)[:, None]
        gate = log_gate.masked_fill(unwritten[..., None, None], 0.0)
    given = (q, k, v, q_slot, k_slot, gate, None, None, *(sink or (None, None)), None, None)
    out, _, _, slot_key, slot_value, *_ = _compute(*given, window_size, 0, scale, False)
    return out, ring_after_prompt(k, v, log_gate, k_slot, (slot_key, slot_value), window_size, num_tokens)


def triton_attention(
    segment: Segment,
    sink: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    state: NHAState | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window_size: int,
    fresh: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, NHAState | None]:
    """Outputs [B, T, HQ, Dv], slot mass [B, T, HQ] and, with `keep`, the state after the segment (as `nha_attention`).

    `fresh` means that `state` holds no tokens and no slots. It may then be None, unless `keep` and the segment is
    padded, packed or shorter than its window.
    """
    count = None
    if attention_mask is not None:
        segment, count = segment.align_left(attention_mask), attention_mask.sum(1)
    window, before = window_size, None if fresh else state
    past = window if before is not None else 0
    keys, joined = segment.keys, None
    if state is not None and window and (past or (cu_seqlens is not None and keep)):
        slot_key = state.key if state.window_slot_key is None else state.window_slot_key
        cached = [state.key, state.value, slot_key, state.window_log_gate.to(segment.log_gate.dtype)]
        joined = None if cu_seqlens is None else _pack(cu_seqlens, window, cached, segment.keys)
        if past:
            keys = joined or [torch.cat(pair, 1) for pair in zip(cached, segment.keys, strict=True)]
    k, v, k_slot, gates = keys
    if count is not None:
        token = torch.arange(gates.shape[1], device=gates.device)
        gates = torch.where((token < (count + past - window)[:, None])[..., None, None], gates, 0)
    args = (
        segment.q,
        k,
        v,
        None if segment.q_slot is segment.q else segment.q_slot,
        None if segment.k_slot is segment.k else k_slot,
        gates,
        None if before is None else before.slot_key,
        None if before is None else before.slot_value,
        *(sink or (None, None)),
        None if before is None else window - before.num_tokens.clamp_max(window),
        cu_seqlens,
        window,
        past,
        scale,
        before is not None and before.slots_active,
    )
    out, mass, _, slot_key, slot_value, *_ = (_compute if can_skip_dispatch(args) else _forward)(*args)
    slots, after = (slot_key, slot_value), None
    if keep and state is None:
        after = after_first(window, k, v, gates, None if k_slot is k else k_slot, slots)
    elif keep and state is not None and cu_seqlens is not None:
        after = _advance_packed(state, cu_seqlens, joined or [x[:, :0] for x in segment.keys], slots)
    elif keep and state is not None:
        after = advance(state, segment.k, segment.v, segment.log_gate, segment.k_slot, slots, count)
    if attention_mask is not None:
        out, mass = restore(attention_mask, out), restore(attention_mask, mass)
    return out, mass, after
