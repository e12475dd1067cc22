"""The definition as a loop over tokens: slow, differentiable, any dtype. Every other implementation equals it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nha.ops.state import NHAState, slot_dtype


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

    Every row is run alone, without its padding, and token by token.
    """
    out = v.new_zeros(*q.shape[:3], v.shape[-1])
    mass = q.new_zeros(q.shape[:3], dtype=slot_dtype(q.dtype))
    states = []
    for row, (batch, tokens) in enumerate(_rows(q, attention_mask, cu_seqlens)):
        inputs = [x[batch, tokens] for x in (q, k, v, log_gate, q_slot, k_slot)]
        out_row, mass_row, state_row = _one_sequence(
            *inputs, sink=sink, scale=scale, softcap=softcap, state=state.select(torch.tensor([row]))
        )
        out[batch, tokens], mass[batch, tokens] = out_row, mass_row
        states.append(state_row)
    return out, mass, NHAState.join(states)


def _rows(q: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> list[tuple[int, slice]]:
    """(batch index, slice of its real tokens) for every sequence."""
    batch, length = q.shape[:2]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [(0, slice(start, stop)) for start, stop in itertools.pairwise(bounds)]
    if attention_mask is None:
        return [(b, slice(0, length)) for b in range(batch)]
    counts, first = attention_mask.sum(1).tolist(), attention_mask.int().argmax(1).tolist()
    return [(b, slice(first[b], first[b] + counts[b])) for b in range(batch)]


def _one_sequence(q, k, v, log_gate, q_slot, k_slot, sink, scale, softcap, state):
    """One row: q, q_slot [T, HQ, D], k, k_slot [T, H, D], v [T, H, Dv], log_gate [T, H, M]; state of one row."""
    window, seen = state.window_size, int(state.num_tokens)
    slot_key, slot_value = state.slot_key[0], state.slot_value[0]  # [H, M, D], [H, M, Dv]
    used = slice(max(state.key.shape[1] - seen, 0), None)
    window_slot_key = state.key if state.window_slot_key is None else state.window_slot_key
    tail = list(
        zip(
            state.key[0, used],
            state.value[0, used],
            window_slot_key[0, used],
            state.window_log_gate[0, used],
            strict=True,
        )
    )
    heads, dim = k.shape[1:]
    outputs, masses = [], []
    for t in range(q.shape[0]):
        tail.append((k[t], v[t], k_slot[t], log_gate[t]))
        if 0 <= window < len(tail):
            _, value, key, gate = tail.pop(0)
            alpha = gate.to(slot_key.dtype).clamp(-5, 0).exp()[..., None]  # [H, M, 1]
            slot_key = alpha * slot_key + (1 - alpha) * key[:, None]
            slot_value = alpha * slot_value + (1 - alpha) * value[:, None]

        window_query = q[t].view(heads, -1, dim)  # [H, G, D]: query head h reads KV head h // G
        slot_query = q_slot[t].view(heads, -1, dim)
        keys, values = [], []  # [H, n, D], [H, n, Dv] of each part
        scores = []  # [H, G, n] of each part
        if window >= 0 and (state.slots_active or seen + t >= window):
            parts = ([sink] if sink is not None else []) + [(slot_key.to(q.dtype), slot_value.to(v.dtype))]
            for part_key, part_value in parts:
                keys.append(part_key)
                values.append(part_value)
                scores.append(slot_query @ part_key.transpose(1, 2))
        slots = sum(part.shape[1] for part in keys)
        if tail:
            window_key = torch.stack([key for key, *_ in tail], 1)
            values.append(torch.stack([value for _, value, *_ in tail], 1))
            scores.append(window_query @ window_key.transpose(1, 2))
        score = scale * torch.cat(scores, -1)
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        weights = score.softmax(-1)
        outputs.append((weights.to(v.dtype) @ torch.cat(values, 1)).reshape(q.shape[1], -1))
        masses.append(weights[..., :slots].to(slot_key.dtype).sum(-1).reshape(-1))

    out = torch.stack(outputs) if outputs else v.new_zeros(0, q.shape[1], v.shape[-1])
    mass = torch.stack(masses) if masses else slot_key.new_zeros(0, q.shape[1])
    return out, mass, _state_of(state, tail, slot_key, slot_value, seen + q.shape[0])


def _state_of(state: NHAState, tail: list, slot_key: Tensor, slot_value: Tensor, seen: int) -> NHAState:
    width = len(tail) if state.window_size < 0 else state.window_size

    def stacked(index: int, like: Tensor) -> Tensor:
        blank = like.new_zeros(width - len(tail), *like.shape[2:])
        return torch.cat([blank, *(entry[index][None] for entry in tail)])[None]

    return NHAState(
        window_size=state.window_size,
        slot_key=slot_key[None],
        slot_value=slot_value[None],
        key=stacked(0, state.key),
        value=stacked(1, state.value),
        window_slot_key=None if state.window_slot_key is None else stacked(2, state.window_slot_key),
        window_log_gate=stacked(3, state.window_log_gate),
        num_tokens=torch.full_like(state.num_tokens, seen),
        slots_active=state.slots_active,
    )
