"""Outputs: sink, slots and window of one query tile under one online softmax.

One program takes 16 tokens and some query heads of one KV head. Sink and slots are the first key block of the online
softmax, the window's keys the following ones; nothing of size T x M or T x W is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import (
    LOG2_E,
    TILE,
    border_of,
    bounds,
    load_gates,
    load_rows,
    load_slots,
    locate_tile,
    matmul,
    rise_of,
    share_of,
    store_rows,
    taken,
)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block"])
def forward_kernel(
    q, k, v, q_slot, k_slot, log_gate, slot_key, slot_value, sink_key, sink_value, first, cu, chunk_base, table,
    out, mass, lse,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, qs_b, qs_t, qs_h, ks_b, ks_t, ks_h, g_b, g_t, g_h,
    scale, length, past, window, chunks, blocks, first_block, heads, groups,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SINKS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr, LIVE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """out [T, HQ, DV], mass [T, HQ], lse [T, HQ] (base 2) of one tile; programs (tile, block of query heads).

    `scale` includes log2(e). LATE: keys before `first` are blank, and queries before it see no slots unless they are LIVE.
    """
    rows: tl.constexpr = TILE * HEADS
    offset = window - past
    sequence, u0 = locate_tile(first_block, table, blocks, offset, PACKED, CHUNK)
    if sequence < 0:
        return
    per_head = (groups + HEADS - 1) // HEADS
    head = tl.program_id(1) // per_head
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    if (u0 + TILE <= -offset) | (u0 >= count - offset):
        return
    line = tl.arange(0, rows)
    u = u0 + line // HEADS
    group = (tl.program_id(1) % per_head) * HEADS + line % HEADS
    t = u + offset
    real = (t >= 0) & (t < count) & (group < groups)
    query_head = head * groups + group
    begin, live_from = 0, 0
    if LATE:
        begin = tl.load(first + sequence).to(tl.int32)
        if not LIVE:
            live_from = begin
    value_at = v + row * v_b + key_start * v_t + head * v_h

    top = tl.full([rows], float("-inf"), tl.float32)
    norm = tl.zeros([rows], tl.float32)
    old = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, VALUE], tl.float32)
    if u0 >= 0:
        committed = count - offset
        chunk = u0 // CHUNK
        within = u0 - chunk * CHUNK
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        place = ((base + chunk) * heads + head) * M
        gate_at = log_gate + row * g_b + key_start * g_t + head * g_h
        gate = load_gates(gate_at, token, g_t, committed, M, SLOTS)
        query_at = t.to(tl.int64) * qs_t + query_head.to(tl.int64) * qs_h
        query = load_rows(q_slot + row * qs_b + start * qs_t, query_at, real, D, KEY)
        held = load_slots(slot_key + place * D, M, SLOTS, D, KEY)
        key_at = k_slot + row * ks_b + key_start * ks_t + head * ks_h
        keys = load_rows(key_at, token.to(tl.int64) * ks_t, token < committed, D, KEY)

        border = border_of(gate, within, CHUNK)
        fall = (share_of(gate, within, CHUNK) * taken(gate, DTYPE == tl.float32)).to(GATED)
        rise = rise_of(gate_at, u0, g_t, committed, HEADS, M, SLOTS)
        seen = token[None, :] <= u[:, None]
        dots = tl.where(seen, matmul(query, tl.trans(keys), DTYPE, PRECISION), 0.0)
        score = matmul(query, tl.trans(held), DTYPE, PRECISION) * border[None, :]
        score = (score + matmul(dots, fall, GATED, PRECISION)) * (rise * scale)
        if M < SLOTS:
            score = tl.where((tl.arange(0, SLOTS) < M)[None, :], score, float("-inf"))
        if LATE:
            score = tl.where((u >= live_from)[:, None], score, float("-inf"))
        top = tl.max(score, 1)
        if S > 0:
            sink = load_slots(sink_key + head * S * D, S, SINKS, D, KEY)
            sink_score = matmul(query, tl.trans(sink), DTYPE, PRECISION) * scale
            sink_score = tl.where((tl.arange(0, SINKS) < S)[None, :], sink_score, float("-inf"))
            if LATE:
                sink_score = tl.where((u >= live_from)[:, None], sink_score, float("-inf"))
            top = tl.maximum(top, tl.max(sink_score, 1))
        safe = tl.where(u >= live_from, top, 0.0) if LATE else top
        weight = tl.exp2(score - safe[:, None])
        norm = tl.sum(weight, 1)
        if S > 0:
            sink_weight = tl.exp2(sink_score - safe[:, None])
            norm += tl.sum(sink_weight, 1)
            sink = load_slots(sink_value + head * S * DV, S, SINKS, DV, VALUE)
            acc = matmul(sink_weight, sink, DTYPE, PRECISION)
        spread = weight * rise
        held = load_slots(slot_value + place * DV, M, SLOTS, DV, VALUE)
        acc += matmul(spread * border[None, :], held, DTYPE, PRECISION)
        values = load_rows(value_at, token.to(tl.int64) * v_t, token < committed, DV, VALUE)
        read = tl.where(seen, matmul(spread, tl.trans(fall), GATED, PRECISION), 0.0)
        acc += matmul(read, values, DTYPE, PRECISION)
        old = norm
    if WINDOWED:
        query_at = t.to(tl.int64) * q_t + query_head.to(tl.int64) * q_h
        query = load_rows(q + row * q_b + start * q_t, query_at, real, D, KEY)
        key_at = k + row * k_b + key_start * k_t + head * k_h
        high = tl.minimum(u0 + TILE + window, past + count)
        for block in range(tl.maximum(u0 + 1, begin), high, BLOCK):
            token = block + tl.arange(0, BLOCK)
            keys = load_rows(key_at, token.to(tl.int64) * k_t, token < high, D, KEY)
            score = matmul(query, tl.trans(keys), DTYPE, PRECISION) * scale
            # One unsigned comparison for 0 < token - u <= window.
            seen = (token[None, :] - (u + 1)[:, None]).to(tl.uint32) < window.to(tl.uint32)
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(top - safe)
            weight = tl.exp2(score - safe[:, None])
            norm = norm * shrink + tl.sum(weight, 1)
            old *= shrink
            values = load_rows(value_at, token.to(tl.int64) * v_t, token < high, DV, VALUE)
            acc = acc * shrink[:, None] + matmul(weight, values, DTYPE, PRECISION)
            top = higher
    place = (row * length + start + t) * (heads * groups) + query_head
    norm = tl.where(norm > 0, norm, 1.0)
    store_rows(out, place * DV, real, acc * (1 / norm)[:, None], DV, VALUE)
    tl.store(lse + place, top + tl.log2(norm), mask=real)
    tl.store(mass + place, old / norm, mask=real)
