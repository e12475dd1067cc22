"""Gradients on the side of the queries: sink, slots and window of one query tile again, from the saved log-sum-exp."""

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
def query_kernel(
    q, k, v, q_slot, k_slot, log_gate, slot_key, slot_value, sink_key, sink_value, first, cu, chunk_base, table,
    out, mass, lse, grad_out, grad_mass, delta, dq, dq_slot, dscores, weights, drise, dsink_scores, sink_weights,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, qs_b, qs_t, qs_h, ks_b, ks_t, ks_h, g_b, g_t, g_h,
    scale, length, past, window, chunks, blocks, first_block, heads, groups,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SINKS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr, LIVE: tl.constexpr, WINDOWED: tl.constexpr,
    SEPARATE: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """dq [T, HQ, D] and delta [T, HQ] of one tile; programs and options as in `forward_kernel`.

    delta = out . grad_out + mass * grad_mass is what the softmax takes off every score's gradient. SEPARATE: the part
    through the slots goes to dq_slot. WEIGHED: there is a grad_mass.

    For `slots_kernel`, of the rows of the blocks from first_block on: what multiplies a slot's key in the gradient of
    a query, and a slot's value in an output, without `border` (dscores, weights [rows, SLOTS]), the same for the sinks
    (dsink_scores, sink_weights [rows, S]) and the gradient of L_i summed over a tile's heads (drise [tokens, SLOTS]).
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

    place = (row * length + start + t) * (heads * groups) + query_head
    grad = load_rows(grad_out, place * DV, real, DV, VALUE)
    taken_off = tl.sum(load_rows(out, place * DV, real, DV, VALUE).to(tl.float32) * grad.to(tl.float32), 1)
    off_slots = taken_off
    if WEIGHED:
        off_mass = tl.load(grad_mass + place, mask=real, other=0.0).to(tl.float32)
        taken_off += tl.load(mass + place, mask=real, other=0.0) * off_mass
        off_slots = taken_off - off_mass
    tl.store(delta + place, taken_off, mask=real)
    total = tl.load(lse + place, mask=real, other=float("inf"))
    acc = tl.zeros([rows, KEY], tl.float32)
    if u0 >= 0:
        committed = count - offset
        chunk = u0 // CHUNK
        within = u0 - chunk * CHUNK
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        slots_at = ((base + chunk) * heads + head) * M
        gate_at = log_gate + row * g_b + key_start * g_t + head * g_h
        gate = load_gates(gate_at, token, g_t, committed, M, SLOTS)
        query_at = t.to(tl.int64) * qs_t + query_head.to(tl.int64) * qs_h
        query = load_rows(q_slot + row * qs_b + start * qs_t, query_at, real, D, KEY)
        held = load_slots(slot_key + slots_at * D, M, SLOTS, D, KEY)
        key_at = k_slot + row * ks_b + key_start * ks_t + head * ks_h
        keys = load_rows(key_at, token.to(tl.int64) * ks_t, token < committed, D, KEY)

        border = border_of(gate, within, CHUNK)
        fall = (share_of(gate, within, CHUNK) * taken(gate, DTYPE == tl.float32)).to(GATED)
        rise = rise_of(gate_at, u0, g_t, committed, HEADS, M, SLOTS)
        seen = token[None, :] <= u[:, None]
        dots = tl.where(seen, matmul(query, tl.trans(keys), DTYPE, PRECISION), 0.0)
        score = matmul(query, tl.trans(held), DTYPE, PRECISION) * border[None, :]
        score = (score + matmul(dots, fall, GATED, PRECISION)) * (rise * scale)
        weight = tl.exp2(score * LOG2_E - total[:, None])
        if M < SLOTS:
            weight = tl.where((tl.arange(0, SLOTS) < M)[None, :], weight, 0.0)
        if LATE:
            weight = tl.where((u >= live_from)[:, None], weight, 0.0)
        values = load_rows(value_at, token.to(tl.int64) * v_t, token < committed, DV, VALUE)
        reach = tl.where(seen, matmul(grad, tl.trans(values), DTYPE, PRECISION), 0.0)
        held_value = load_slots(slot_value + slots_at * DV, M, SLOTS, DV, VALUE)
        dspread = matmul(grad, tl.trans(held_value), DTYPE, PRECISION) * border[None, :]
        dspread = (dspread + matmul(reach, fall, GATED, PRECISION)) * rise
        change = weight * ((dspread - off_slots[:, None]) * score + dspread)
        dbare = weight * (dspread - off_slots[:, None]) * (rise * scale)

        saved = (tl.program_id(0) // (CHUNK // TILE) * heads * per_head + tl.program_id(1)).to(tl.int64) * CHUNK
        saved += tl.program_id(0) % (CHUNK // TILE) * TILE
        tokens_at = (saved + tl.arange(0, TILE)) * SLOTS
        rows_at = saved * HEADS + line
        every = line >= 0
        summed = tl.sum(tl.reshape(change, [TILE, HEADS, SLOTS]), 1)
        store_rows(drise, tokens_at, tl.arange(0, TILE) >= 0, summed, SLOTS, SLOTS)
        store_rows(dscores, rows_at * SLOTS, every, dbare, SLOTS, SLOTS)
        store_rows(weights, rows_at * SLOTS, every, weight * rise, SLOTS, SLOTS)

        acc = matmul(dbare * border[None, :], held, DTYPE, PRECISION)
        ddots = tl.where(seen, matmul(dbare, tl.trans(fall), GATED, PRECISION), 0.0)
        acc += matmul(ddots, keys, DTYPE, PRECISION)
        if S > 0:
            sink = load_slots(sink_key + head * S * D, S, SINKS, D, KEY)
            score = matmul(query, tl.trans(sink), DTYPE, PRECISION) * (scale * LOG2_E) - total[:, None]
            weight = tl.where((tl.arange(0, SINKS) < S)[None, :], tl.exp2(score), 0.0)
            if LATE:
                weight = tl.where((u >= live_from)[:, None], weight, 0.0)
            held_value = load_slots(sink_value + head * S * DV, S, SINKS, DV, VALUE)
            dscore = (matmul(grad, tl.trans(held_value), DTYPE, PRECISION) - off_slots[:, None]) * weight * scale
            acc += matmul(dscore, sink, DTYPE, PRECISION)
            store_rows(dsink_scores, rows_at * S, every, dscore, S, SINKS)
            store_rows(sink_weights, rows_at * S, every, weight, S, SINKS)
    if SEPARATE:
        store_rows(dq_slot, place * D, real, acc, D, KEY)
        acc = tl.zeros([rows, KEY], tl.float32)
    if WINDOWED:
        query_at = t.to(tl.int64) * q_t + query_head.to(tl.int64) * q_h
        query = load_rows(q + row * q_b + start * q_t, query_at, real, D, KEY)
        key_at = k + row * k_b + key_start * k_t + head * k_h
        high = tl.minimum(u0 + TILE + window, past + count)
        for block in range(tl.maximum(u0 + 1, begin), high, BLOCK):
            token = block + tl.arange(0, BLOCK)
            keys = load_rows(key_at, token.to(tl.int64) * k_t, token < high, D, KEY)
            values = load_rows(value_at, token.to(tl.int64) * v_t, token < high, DV, VALUE)
            score = matmul(query, tl.trans(keys), DTYPE, PRECISION) * (scale * LOG2_E) - total[:, None]
            seen = (token[None, :] - (u + 1)[:, None]).to(tl.uint32) < window.to(tl.uint32)
            weight = tl.exp2(tl.where(seen, score, float("-inf")))
            dscore = weight * ((matmul(grad, tl.trans(values), DTYPE, PRECISION) - taken_off[:, None]) * scale)
            acc += matmul(dscore, keys, DTYPE, PRECISION)
    store_rows(dq, place * D, real, acc, D, KEY)
