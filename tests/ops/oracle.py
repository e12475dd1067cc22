"""An independent float64 oracle of Native Hybrid Attention, written from the equations of docs/math.md in NumPy.

It shares no code with the library and has another form: no recurrence. The weight with which token j is in slot m
after tokens 0 .. n is `(1 - alpha_j) * alpha_{j+1} * ... * alpha_n`, so every slot is a weighted sum over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass
class Sequence:
    """One sequence, float64: q, q_slot [T, HQ, D], k, k_slot [T, H, D], v [T, H, Dv], log_gate [T, H, M]."""

    q: Array
    k: Array
    v: Array
    log_gate: Array
    q_slot: Array
    k_slot: Array


@dataclass
class Result:
    """Outputs [T, HQ, Dv], attention mass on sink and slots [T, HQ], slots after the last token [H, M, D or Dv]."""

    out: Array
    mass: Array
    slot_key: Array
    slot_value: Array


def slot_weights(alpha: Array, count: int) -> tuple[Array, Array]:
    """Weights [count, M] of tokens 0 .. count-1 in each slot, and [M] of what the slots held at first."""
    weights = np.zeros((count, alpha.shape[1]))
    for m in range(alpha.shape[1]):
        remaining = 1.0  # product of the alphas of all later tokens
        for j in reversed(range(count)):
            weights[j, m] = (1.0 - alpha[j, m]) * remaining
            remaining *= alpha[j, m]
    first = np.array([np.prod(alpha[:count, m]) for m in range(alpha.shape[1])])
    return weights, first


def read_slots(alpha: Array, count: int, x: Array, initial: Array | None) -> Array:
    """Slots [M, D] after the first `count` tokens x [T, D] were written."""
    weights, first = slot_weights(alpha, count)
    slots = weights.T @ x[:count]
    return slots if initial is None else slots + first[:, None] * initial


def oracle(
    tokens: Sequence,
    window_size: int,
    *,
    scale: float,
    softcap: float | None = None,
    sink: tuple[Array, Array] | None = None,
    initial: tuple[Array, Array] | None = None,
) -> Result:
    """One sequence with a sink (key [H, S, D], value [H, S, Dv]) and initial slots ([H, M, D], [H, M, Dv])."""
    length, query_heads, _ = tokens.q.shape
    heads, groups = tokens.k.shape[1], query_heads // tokens.k.shape[1]
    out = np.zeros((length, query_heads, tokens.v.shape[2]))
    mass = np.zeros((length, query_heads))
    slot_keys, slot_values = [], []
    for h in range(heads):
        alpha = np.exp(np.minimum(np.maximum(tokens.log_gate[:, h], -5.0), 0.0))
        start = (None, None) if initial is None else (initial[0][h], initial[1][h])

        def slots(count: int, h: int = h, alpha: Array = alpha, start: tuple = start) -> tuple[Array, Array]:
            key = read_slots(alpha, count, tokens.k_slot[:, h], start[0])
            return key, read_slots(alpha, count, tokens.v[:, h], start[1])

        for t in range(length):
            written = 0 if window_size < 0 else max(t - window_size + 1, 0)  # tokens 0 .. t - W are in the slots
            active = window_size >= 0 and (initial is not None or t >= window_size)
            slot_key, slot_value = slots(written)
            for query_head in range(h * groups, (h + 1) * groups):
                scores, values = [], []
                if active and sink is not None:
                    scores += [tokens.q_slot[t, query_head] @ key for key in sink[0][h]]
                    values += list(sink[1][h])
                if active:
                    scores += [tokens.q_slot[t, query_head] @ key for key in slot_key]
                    values += list(slot_value)
                far = len(scores)
                for j in range(written, t + 1):
                    scores.append(tokens.q[t, query_head] @ tokens.k[j, h])
                    values.append(tokens.v[j, h])
                score = scale * np.array(scores)
                if softcap is not None:
                    score = softcap * np.tanh(score / softcap)
                weight = np.exp(score - score.max())
                weight = weight / weight.sum()
                out[t, query_head] = weight @ np.array(values)
                mass[t, query_head] = weight[:far].sum()
        key, value = slots(0 if window_size < 0 else max(length - window_size, 0))
        slot_keys.append(key)
        slot_values.append(value)
    return Result(out, mass, np.stack(slot_keys), np.stack(slot_values))
