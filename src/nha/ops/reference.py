"""The definition on one screen, then the reference: the same loop over tokens with heads, states, padding and packing.

Slow, differentiable, any dtype. Every other implementation is tested against the reference.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nha.ops.state import NHAState


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    q_slot: Tensor,
    k_slot: Tensor,
    sink_key: Tensor,
    sink_value: Tensor,
    window_size: int,
    scale: float,
) -> Tensor:
    """Native Hybrid Attention of one head over one sequence: outputs [T, Dv].

    q, k, q_slot, k_slot [T, D], v [T, Dv], log_gate [T, M], sink_key [S, D], sink_value [S, Dv]; a window of at least
    T tokens is full attention, one of 0 a pure linear RNN.
    """
    slot_key = k.new_zeros(log_gate.shape[1], k.shape[1])  # [M, D]
    slot_value = v.new_zeros(log_gate.shape[1], v.shape[1])  # [M, Dv]
    outputs = []
    for t in range(len(q)):
        window = slice(max(t - window_size + 1, 0), t + 1)
        scores, values = [q[t] @ k[window].T], [v[window]]
        if t >= window_size:
            old = t - window_size  # this token leaves the window and is written to the slots
            alpha = log_gate[old].clamp(-5, 0).exp()[:, None]
            slot_key = alpha * slot_key + (1 - alpha) * k_slot[old]
            slot_value = alpha * slot_value + (1 - alpha) * v[old]
            scores += [q_slot[t] @ sink_key.T, q_slot[t] @ slot_key.T]
            values += [sink_value, slot_value]
        weights = (scale * torch.cat(scores)).softmax(0)
        outputs.append(weights @ torch.cat(values))
    return torch.stack(outputs)


def reference(
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
    state: NHAState,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, NHAState]:
    """Outputs [B, T, HQ, Dv], slot mass [B, T, HQ] and the state after the segment (shapes as `nha_attention`).

    Every sequence runs alone, without its padding, token by token.
    """
    outs, masses, states = [], [], []
    for row, (batch, start, stop) in enumerate(_spans(q, attention_mask, cu_seqlens)):
        inputs = [x[batch, start:stop] for x in (q, k, v, log_gate, q_slot, k_slot)]
        own = state.select(torch.tensor([row], device=state.num_tokens.device))
        out, mass, after = _one_sequence(*inputs, sink=sink, scale=scale, softcap=softcap, state=own)
        after_stop = 0 if cu_seqlens is not None else q.shape[1] - stop
        before_start = 0 if cu_seqlens is not None else start
        outs.append(F.pad(out, (0, 0, 0, 0, before_start, after_stop)))
        masses.append(F.pad(mass, (0, 0, before_start, after_stop)))
        states.append(after)
    if cu_seqlens is not None:
        return torch.cat(outs)[None], torch.cat(masses)[None], NHAState.join(states)
    return torch.stack(outs), torch.stack(masses), NHAState.join(states)


def _spans(q: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """(batch index, first token, end) of every sequence's real tokens."""
    batch, length = q.shape[:2]
    if cu_seqlens is not None:
        return [(0, start, stop) for start, stop in itertools.pairwise(cu_seqlens.tolist())]
    if attention_mask is None:
        return [(b, 0, length) for b in range(batch)]
    counts, first = attention_mask.sum(1).tolist(), attention_mask.int().argmax(1).tolist()
    return [(b, first[b], first[b] + counts[b]) for b in range(batch)]


class _Token(NamedTuple):
    """One token of the window cache, [H, ...] each."""

    key: Tensor
    value: Tensor
    slot_key: Tensor
    log_gate: Tensor


def _one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    q_slot: Tensor,
    k_slot: Tensor,
    sink: tuple[Tensor, Tensor] | None,
    scale: float,
    softcap: float | None,
    state: NHAState,
) -> tuple[Tensor, Tensor, NHAState]:
    """One sequence: q, q_slot [T, HQ, D], k, k_slot [T, H, D], v [T, H, Dv], log_gate [T, H, M]; its own state."""
    window_size, past = state.window_size, int(state.num_tokens)
    slot_key, slot_value = state.slot_key[0], state.slot_value[0]  # [H, M, D], [H, M, Dv]
    window_slot_key = state.key if state.window_slot_key is None else state.window_slot_key
    cached = (state.key, state.value, window_slot_key, state.window_log_gate)
    used = slice(max(state.key.shape[1] - past, 0), None)
    window = [_Token(*parts) for parts in zip(*(x[0, used] for x in cached), strict=True)]
    heads, dim = k.shape[1:]
    outputs, masses = [], []
    for t in range(q.shape[0]):
        window.append(_Token(k[t], v[t], k_slot[t], log_gate[t]))
        if 0 <= window_size < len(window):
            old = window.pop(0)
            alpha = old.log_gate.to(slot_key.dtype).clamp(-5, 0).exp()[..., None]  # [H, M, 1]
            slot_key = alpha * slot_key + (1 - alpha) * old.slot_key[:, None]
            slot_value = alpha * slot_value + (1 - alpha) * old.value[:, None]
        window_query = q[t].view(heads, -1, dim)  # [H, G, D]: query head h reads KV head h // G
        slot_query = q_slot[t].view(heads, -1, dim)
        scores, values = [], []  # [H, G, n], [H, n, Dv] of each part
        if window_size >= 0 and (state.slots_active or past + t >= window_size):
            for key, value in ([] if sink is None else [sink]) + [(slot_key.to(q.dtype), slot_value.to(v.dtype))]:
                scores.append(slot_query @ key.transpose(1, 2))
                values.append(value)
        slots = sum(value.shape[1] for value in values)
        if window:
            scores.append(window_query @ torch.stack([token.key for token in window], 1).transpose(1, 2))
            values.append(torch.stack([token.value for token in window], 1))
        score = scale * torch.cat(scores, -1)
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        weights = score.softmax(-1)
        outputs.append((weights.to(v.dtype) @ torch.cat(values, 1)).reshape(q.shape[1], -1))
        masses.append(weights[..., :slots].to(slot_key.dtype).sum(-1).reshape(-1))
    out = torch.stack(outputs) if outputs else v.new_zeros(0, q.shape[1], v.shape[-1])
    mass = torch.stack(masses) if masses else slot_key.new_zeros(0, q.shape[1])
    return out, mass, _state_of(state, window, slot_key, slot_value, past + q.shape[0])


def _state_of(state: NHAState, window: list[_Token], slot_key: Tensor, slot_value: Tensor, count: int) -> NHAState:
    """The state of one sequence after `count` tokens."""

    def stacked(name: str, like: Tensor) -> Tensor:
        return torch.stack([getattr(token, name) for token in window])[None] if window else like[:, :0]

    return NHAState(
        window_size=state.window_size,
        slot_key=slot_key[None],
        slot_value=slot_value[None],
        key=stacked("key", state.key),
        value=stacked("value", state.value),
        window_slot_key=None if state.window_slot_key is None else stacked("slot_key", state.window_slot_key),
        window_log_gate=stacked("log_gate", state.window_log_gate),
        num_tokens=torch.full_like(state.num_tokens, count),
        slots_active=state.slots_active,
        num_kept=state.num_kept,
    )
