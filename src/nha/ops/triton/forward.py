"""Outputs: sink, slots and window of one query tile under one online softmax.

One program takes 16 tokens and some query heads of one KV head. Sink and slots are the first key block of the online
softmax, the window's keys the following ones; nothing of size T x M or T x W is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import (
    TILE,
    bounds,
    clamp_gate,
    factors,
    load_queries,
    load_slots,
    load_tokens,
    locate,
    matmul,
    taken,
)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "tiles"])
def forward_kernel(
    q, k, v, q_slot, k_slot, log_gate, slot_key, slot_value, sink_key, sink_value, first, cu, chunk_base, table,
    out, mass, lse,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, qs_b, qs_t, qs_h, ks_b, ks_t, ks_h, g_b, g_t, g_h,
    scale, length, past, window, chunks, tiles, heads, groups,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SINKS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr, LIVE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """out [T, HQ, DV], mass [T, HQ], lse [T, HQ] (base 2) of one tile; programs (tile, block of query heads).

    `scale` includes log2(e). LATE: keys before `first` are blank; LIVE: slots take part from the first token.
    """
    rows: tl.constexpr = TILE * HEADS
    sequence, index = locate(tl.program_id(0), table, tiles, PACKED)
    if sequence < 0:
        return
    per_head = (groups + HEADS - 1) // HEADS
    head = tl.program_id(1) // per_head
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    offset = window - past
    u0 = (index - (offset + TILE - 1) // TILE) * TILE
    line = tl.arange(0, rows)
    u = u0 + line // HEADS
    group = (tl.program_id(1) % per_head) * HEADS + line % HEADS
    t = u + offset
    real = (t >= 0) & (t < count) & (group < groups)
    query_head = head * groups + group
    begin = 0
    if LATE:
        begin = tl.load(first + sequence).to(tl.int32)

    top = tl.full([rows], float("-inf"), tl.float32)
    norm = tl.zeros([rows], tl.float32)
    old = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, VALUE], tl.float32)
    if u0 >= 0:
        committed = count + past - window
        chunk = u0 // CHUNK
        within = u0 - chunk * CHUNK
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        gates = log_gate + row * g_b + key_start * g_t + head * g_h
        gate = clamp_gate(load_tokens(gates, g_t, token, 0, committed, M, SLOTS))
        tile_gate = clamp_gate(load_tokens(gates, g_t, u0 + tl.arange(0, TILE), 0, committed, M, SLOTS))
        rise, share, border = factors(gate, tile_gate, within, CHUNK, HEADS, SLOTS)
        fall = tl.trans(share * taken(gate))
        query = load_queries(q_slot + row * qs_b + start * qs_t, qs_t, qs_h, t, query_head, real, D, KEY)
        keys = load_tokens(k_slot + row * ks_b + key_start * ks_t + head * ks_h, ks_t, token, 0, committed, D, KEY)
        place = ((base + chunk) * heads + head) * M
        held = load_slots(slot_key + place * D, M, SLOTS, D, KEY)
        seen = token[None, :] <= u[:, None]
        dots = tl.where(seen, matmul(query, tl.trans(keys), DTYPE, PRECISION), 0.0)
        score = matmul(query, tl.trans(held), DTYPE, PRECISION) * border[None, :]
        score = (score + matmul(dots, tl.trans(fall), GATED, PRECISION)) * rise * scale
        live = u >= begin
        if LIVE:
            live = u >= 0
        score = tl.where(live[:, None] & (tl.arange(0, SLOTS) < M)[None, :], score, float("-inf"))
        top = tl.max(score, 1)
        if S > 0:
            sink = load_slots(sink_key + head * S * D, S, SINKS, D, KEY)
            sink_score = matmul(query, tl.trans(sink), DTYPE, PRECISION) * scale
            sink_score = tl.where(live[:, None] & (tl.arange(0, SINKS) < S)[None, :], sink_score, float("-inf"))
            top = tl.maximum(top, tl.max(sink_score, 1))
        safe = tl.where(live, top, 0.0)
        weight = tl.exp2(score - safe[:, None])
        norm = tl.sum(weight, 1)
        spread = weight * rise
        values = load_tokens(v + row * v_b + key_start * v_t + head * v_h, v_t, token, 0, committed, DV, VALUE)
        held_value = load_slots(slot_value + place * DV, M, SLOTS, DV, VALUE)
        read = tl.where(seen, matmul(spread, fall, GATED, PRECISION), 0.0)
        acc = matmul(spread * border[None, :], held_value, DTYPE, PRECISION)
        acc += matmul(read, values, DTYPE, PRECISION)
        if S > 0:
            sink_weight = tl.exp2(sink_score - safe[:, None])
            norm += tl.sum(sink_weight, 1)
            sink_v = load_slots(sink_value + head * S * DV, S, SINKS, DV, VALUE)
            acc += matmul(sink_weight, sink_v, DTYPE, PRECISION)
        old = norm
    if WINDOWED:
        query = load_queries(q + row * q_b + start * q_t, q_t, q_h, t, query_head, real, D, KEY)
        key_base = k + row * k_b + key_start * k_t + head * k_h
        value_base = v + row * v_b + key_start * v_t + head * v_h
        low = tl.maximum(u0 + 1, begin)
        high = tl.minimum(u0 + TILE + window, past + count)
        for block in range(low, high, BLOCK):
            token = block + tl.arange(0, BLOCK)
            keys = load_tokens(key_base, k_t, token, low, high, D, KEY)
            score = matmul(query, tl.trans(keys), DTYPE, PRECISION) * scale
            distance = token[None, :] - u[:, None]
            seen = (distance > 0) & (distance <= window) & (token < high)[None, :]
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(top - safe)
            weight = tl.exp2(score - safe[:, None])
            norm = norm * shrink + tl.sum(weight, 1)
            old *= shrink
            values = load_tokens(value_base, v_t, token, low, high, DV, VALUE)
            acc = acc * shrink[:, None] + matmul(weight, values, DTYPE, PRECISION)
            top = higher
    place = (row * length + start + t) * (heads * groups) + query_head
    norm = tl.where(norm > 0, norm, 1.0)
    column = tl.arange(0, VALUE)
    tl.store(
        out + place[:, None] * DV + column[None, :],
        (acc / norm[:, None]).to(out.dtype.element_ty),
        mask=real[:, None] & (column < DV)[None, :],
    )
    tl.store(lse + place, top + tl.log2(norm), mask=real)
    tl.store(mass + place, old / norm, mask=real)
