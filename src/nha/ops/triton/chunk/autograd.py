"""The kernels as PyTorch operators with gradients, and the contract of `nha_attention` on top of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nha.ops.padding import align_left, restore
from nha.ops.state import NHAState, advance
from nha.ops.triton.chunk import host as launch
from nha.ops.triton.chunk.host import Inputs, Kept
from nha.ops.varlen import sequence_of


@torch.library.custom_op("nha::triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_slot: Tensor | None,
    k_slot: Tensor | None,
    log_gate: Tensor,
    slot_key: Tensor | None,
    slot_value: Tensor | None,
    sink_key: Tensor | None,
    sink_value: Tensor | None,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    past: int,
    scale: float,
    live: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [B, T, HQ, Dv], mass and log2-sum-exp [B, T, HQ], final slots [N, H, M, ...] and, for the backward pass, what
    `launch.Kept` holds; inputs as `launch.Inputs`.
    """
    inputs = Inputs(
        q,
        k,
        v,
        q_slot,
        k_slot,
        log_gate,
        slot_key,
        slot_value,
        sink_key,
        sink_value,
        first,
        cu_seqlens,
        window,
        past,
        scale,
        live,
    ).shaped()
    plan, sizes = inputs.plan()
    kept, last = launch.slot_states(inputs, plan, sizes)
    return *launch.outputs(inputs, plan, sizes, kept), *last, kept.key, kept.value, kept.decay


@_forward.register_fake
def _(*given):
    inputs = Inputs(*given)
    q, k, v, log_gate, cu_seqlens = inputs.q, inputs.k, inputs.v, inputs.log_gate, inputs.cu_seqlens
    batch, length, query_heads, dim = q.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (rows, k.shape[2], log_gate.shape[3])
    per_query = (batch, length, query_heads)
    return (
        v.new_empty(*per_query, v.shape[3]),
        q.new_empty(per_query, dtype=torch.float32),
        q.new_empty(per_query, dtype=torch.float32),
        q.new_empty(*state, dim, dtype=torch.float32),
        q.new_empty(*state, v.shape[3], dtype=torch.float32),
        *inputs.kept(inputs.blocks()),
    )


@torch.library.custom_op("nha::triton_backward", mutates_args=())
def _backward(
    grad_out: Tensor | None,
    grad_mass: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    out: Tensor,
    mass: Tensor,
    lse: Tensor,
    kept_key: Tensor,
    kept_value: Tensor,
    kept_decay: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_slot: Tensor | None,
    k_slot: Tensor | None,
    log_gate: Tensor,
    slot_key: Tensor | None,
    slot_value: Tensor | None,
    sink_key: Tensor | None,
    sink_value: Tensor | None,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    past: int,
    scale: float,
    live: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q ... sink_value; an empty tensor for what was left out."""
    inputs = Inputs(
        q,
        k,
        v,
        q_slot,
        k_slot,
        log_gate,
        slot_key,
        slot_value,
        sink_key,
        sink_value,
        first,
        cu_seqlens,
        window,
        past,
        scale,
        live,
    ).shaped()
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (rows, k.shape[2], log_gate.shape[3])

    def given(grad: Tensor | None, *shape: int) -> Tensor:
        return q.new_zeros(shape, dtype=torch.float32) if grad is None else grad.contiguous()

    grads = launch.gradients(
        inputs,
        Kept(kept_key, kept_value, kept_decay),
        out,
        mass,
        lse,
        torch.zeros_like(out) if grad_out is None else grad_out.contiguous(),
        None if grad_mass is None else grad_mass.contiguous(),
        given(grad_key, *state, q.shape[3]),
        given(grad_value, *state, v.shape[3]),
    )
    absent = inputs[:10]
    return tuple(q.new_empty(0) if x is None else g for x, g in zip(absent, grads, strict=True))  # type: ignore


@_backward.register_fake
def _(grad_out, grad_mass, grad_key, grad_value, out, mass, lse, kept_key, kept_value, kept_decay, *inputs):
    like = inputs[:10]
    nothing = inputs[0].new_empty
    return tuple(nothing(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)


def _save(ctx, inputs, output) -> None:
    out, mass, lse, _, _, *kept = output
    ctx.save_for_backward(out, mass, lse, *kept, *inputs[:12])
    ctx.options = inputs[12:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_out, grad_mass, _, grad_key, grad_value, *__):
    saved = ctx.saved_tensors
    grads = _backward(grad_out, grad_mass, grad_key, grad_value, *saved, *ctx.options)
    given = saved[6:16]
    return *(None if x is None else g for x, g in zip(given, grads, strict=True)), *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)


def _pack(cu_seqlens: Tensor, window: int, tails: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """The tail [N, W, ...] of every sequence before its tokens: tensors [1, T + N * W, ...] of new ones [1, T, ...]."""
    count, length = cu_seqlens.shape[0] - 1, new[0].shape[1]
    device = cu_seqlens.device
    token = torch.arange(length, device=device)
    sequence = sequence_of(cu_seqlens, token).clamp_max(count - 1)
    row = torch.arange(count, device=device)[:, None]
    tail_place = cu_seqlens[:-1, None] + row * window + torch.arange(window, device=device)
    place = torch.cat([tail_place.flatten(), token + (sequence + 1) * window])
    source = torch.empty_like(place).scatter_(0, place, torch.arange(place.shape[0], device=device))
    return [torch.cat([a.flatten(0, 1), b[0]]).index_select(0, source)[None] for a, b in zip(tails, new, strict=True)]


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


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    q_slot: Tensor,
    k_slot: Tensor,
    sink: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    softcap: float | None,
    state: NHAState | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window_size: int,
    fresh: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, NHAState | None]:
    """Outputs [B, T, HQ, Dv], slot mass [B, T, HQ] and, to `keep`, the state after the segment (as `nha_attention`).

    `fresh` says that `state` has seen nothing and holds no slots; it may then be None, if none is to be kept.
    """
    shared_query, shared_key = q_slot is q, k_slot is k
    count = None
    if attention_mask is not None:
        q, k, v, log_gate = align_left(attention_mask, q, k, v, log_gate)
        q_slot = q if shared_query else align_left(attention_mask, q_slot)[0]
        k_slot = k if shared_key else align_left(attention_mask, k_slot)[0]
        count = attention_mask.sum(1)
    window, before = window_size, None if fresh else state
    past = window if before is not None else 0
    first = None if before is None else window - before.num_tokens.clamp_max(window)
    keys, values, token_keys, gates = k, v, k_slot, log_gate
    packed = cu_seqlens is not None and window > 0
    joined = None
    if state is not None and (past or (packed and keep)):
        slot_tail = state.key if state.window_slot_key is None else state.window_slot_key
        tails = [state.key, state.value, slot_tail, state.window_log_gate.to(log_gate.dtype)]
        new = [k, v, k_slot, log_gate]
        joined = _pack(cu_seqlens, window, tails, new) if packed and cu_seqlens is not None else None
        if past:
            keys, values, token_keys, gates = joined or [torch.cat(pair, 1) for pair in zip(tails, new, strict=True)]
    if count is not None:
        token = torch.arange(gates.shape[1], device=q.device)
        gates = torch.where((token < (count + past - window)[:, None])[..., None, None], gates, 0)
    sink_key, sink_value = (None, None) if sink is None else sink
    out, mass, _, slot_key, slot_value, *_ = _forward(
        q,
        keys,
        values,
        None if shared_query else q_slot,
        None if shared_key else token_keys,
        gates,
        None if before is None else before.slot_key,
        None if before is None else before.slot_value,
        sink_key,
        sink_value,
        first,
        cu_seqlens,
        window,
        past,
        scale,
        before is not None and before.slots_active,
    )
    slots = (slot_key, slot_value)
    after = None
    if keep and state is not None and cu_seqlens is not None:
        joined = joined or [x[:, :0] for x in (k, v, k_slot, log_gate)]
        after = _advance_packed(state, cu_seqlens, joined, slots)
    elif keep and state is not None:
        after = advance(state, k, v, log_gate, k_slot, slots, count)
    if attention_mask is not None:
        out, mass = restore(attention_mask, out), restore(attention_mask, mass)
    return out, mass, after
