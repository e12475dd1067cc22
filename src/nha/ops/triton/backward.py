"""Gradients on the side of the keys and values, chunk by chunk, without atomics.

`slots_kernel` collects, from the score gradients and weights that `query_kernel` left, what the tokens of a chunk
receive from the chunk's own queries, and what the slots before it and the sink receive. After the reverse pass over
the slots (`reverse_kernel`) has turned the second into gradients of the slots after every chunk, `key_kernel` adds what
the tokens receive through those and through the window.

A log-gate reaches the scores through running sums: of the queries (`rise`), of the tokens (`fall`) and of the whole
chunk. The gradient of each sum is an inner product that needs no division; a reverse cumulative sum within the chunk
gives the gradient of the gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import (
    LOG2_E,
    TILE,
    border_of,
    bounds,
    left_at_end,
    load_gates,
    load_rows,
    load_slots,
    locate,
    matmul,
    share_of,
    store_rows,
    store_slots,
    taken,
)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block", "key_length"])
def slots_kernel(
    x, y, log_gate, scores, sink_scores, drise, cu, chunk_base, table, dtoken, dslot, dsink, dgate,
    x_b, x_t, x_h, y_b, y_t, y_h, g_b, g_t, g_h,
    length, past, window, chunks, blocks, first_block, key_length, heads, groups,
    M: tl.constexpr, DIM: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, SINKS: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, ON_KEYS: tl.constexpr,
):  # fmt: skip
    """dtoken [past + T, H, DIM], dslot [chunks, H, M, DIM] and dsink [chunks, H, S, DIM] float32 of one chunk.

    ON_KEYS: x are queries, y keys, scores their gradients. Else x are gradients of outputs, y values and scores weights.
    dgate [past + T, H, M] float32, without what comes through later chunks, is written on the side of the keys, which
    also adds drise, and added to on the other. Programs (block, KV head).
    """
    rows: tl.constexpr = TILE * HEADS
    sequence, block = locate(first_block + tl.program_id(0), table, blocks, PACKED)
    if sequence < 0:
        return
    offset = window - past
    chunk = block - (offset + CHUNK - 1) // CHUNK
    head = tl.program_id(1)
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    committed = count - offset
    c0 = chunk * CHUNK
    if (chunk < 0) | (c0 >= committed):
        return
    per_head = (groups + HEADS - 1) // HEADS
    saved = (tl.program_id(0) * heads + head).to(tl.int64) * per_head * CHUNK
    token = c0 + tl.arange(0, CHUNK)
    there = token < committed
    gate_at = log_gate + row * g_b + key_start * g_t + head * g_h
    tokens = load_rows(y + row * y_b + key_start * y_t + head * y_h, token.to(tl.int64) * y_t, there, DIM, WIDTH)
    line = tl.arange(0, rows)
    dtokens = tl.zeros([CHUNK, WIDTH], tl.float32)
    dslots = tl.zeros([SLOTS, WIDTH], tl.float32)
    dsinks = tl.zeros([SINKS, WIDTH], tl.float32)
    dshare = tl.zeros([CHUNK, SLOTS], tl.float32)
    tiles = (tl.minimum(CHUNK, committed - c0) + TILE - 1) // TILE
    for step in tl.range(0, tiles * per_head, disable_licm=True):
        within = step // per_head * TILE
        part = step % per_head
        group = part * HEADS + line % HEADS
        u = c0 + within + line // HEADS
        t = u + offset
        real = (t < count) & (group < groups)
        x_at = t.to(tl.int64) * x_t + (head * groups + group).to(tl.int64) * x_h
        queries = load_rows(x + row * x_b + start * x_t, x_at, real, DIM, WIDTH)
        rows_at = (saved + part * CHUNK + within) * HEADS + line
        score = load_rows(scores, rows_at * SLOTS, line >= 0, SLOTS, SLOTS)
        gate = load_gates(gate_at, token, g_t, committed, M, SLOTS)
        share = share_of(gate, within, CHUNK)
        fall = (share * taken(gate, DTYPE == tl.float32)).to(GATED)
        seen = token[None, :] <= u[:, None]
        dots = tl.where(seen, matmul(queries, tl.trans(tokens), DTYPE, PRECISION), 0.0).to(GATED)
        dshare += matmul(tl.trans(dots), score, GATED, PRECISION) * share
        back = tl.where(seen, matmul(score, tl.trans(fall), GATED, PRECISION), 0.0).to(DTYPE)
        dtokens += matmul(tl.trans(back), queries, DTYPE, PRECISION)
        border = border_of(gate, within, CHUNK)
        dslots += matmul(tl.trans((score * border[None, :]).to(DTYPE)), queries, DTYPE, PRECISION)
        if S > 0:
            sink_score = load_rows(sink_scores, rows_at * S, line >= 0, S, SINKS)
            dsinks += matmul(tl.trans(sink_score.to(DTYPE)), queries, DTYPE, PRECISION)
    gate = load_gates(gate_at, token, g_t, committed, M, SLOTS)
    change = -taken(gate, DTYPE == tl.float32) * dshare
    if ON_KEYS:
        for part in range(0, per_head):
            rise_at = (saved + part * CHUNK + tl.arange(0, CHUNK)) * SLOTS
            change += load_rows(drise, rise_at, there, SLOTS, SLOTS)
    change = tl.cumsum(change, 0, reverse=True) - tl.exp2(gate.to(tl.float32) * LOG2_E) * dshare
    to = (row * key_length + key_start + token) * heads + head
    if not ON_KEYS:
        change += load_rows(dgate, to * M, there, M, SLOTS)
    store_rows(dgate, to * M, there, change, M, SLOTS)
    store_rows(dtoken, to * DIM, there, dtokens, DIM, WIDTH)
    place = (base + chunk) * heads + head
    store_slots(dslot + place * M * DIM, dslots, M, SLOTS, DIM, WIDTH)
    if S > 0:
        store_slots(dsink + place * S * DIM, dsinks, S, SINKS, DIM, WIDTH)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "key_length"])
def key_kernel(
    q, k, v, k_slot, log_gate, slot_key, slot_value, dslot_key, dslot_value, grad_out, lse, delta,
    first, cu, chunk_base, table, dk, dk_slot, dv, dgate, dgate_out,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, ks_b, ks_t, ks_h, g_b, g_t, g_h,
    scale, length, past, window, chunks, blocks, key_length, heads, groups,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr, WINDOWED: tl.constexpr, SEPARATE: tl.constexpr,
):  # fmt: skip
    """dk, dv [past + T, H, ...] and dgate_out [past + T, H, M] of one chunk of keys; programs (chunk, KV head).

    Adds up what the keys receive from all queries whose window holds them, what `slots_kernel` left in dk_slot, dv
    and dgate, and what comes through the slots after the chunk, whose gradients are `dslot_*`. SEPARATE: the slots'
    part of the keys stays in dk_slot.
    """
    rows: tl.constexpr = TILE * HEADS
    sequence, chunk = locate(tl.program_id(0), table, blocks, PACKED)
    if sequence < 0:
        return
    head = tl.program_id(1)
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    offset = window - past
    committed = count - offset
    begin = 0
    if LATE:
        begin = tl.load(first + sequence).to(tl.int32)
    j0 = chunk * CHUNK
    token = j0 + tl.arange(0, CHUNK)
    there = token < past + count
    values = load_rows(v + row * v_b + key_start * v_t + head * v_h, token.to(tl.int64) * v_t, there, DV, VALUE)
    to = (row * key_length + key_start + token) * heads + head
    dkeys = tl.zeros([CHUNK, KEY], tl.float32)
    dvalues = tl.zeros([CHUNK, VALUE], tl.float32)
    if WINDOWED:
        keys = load_rows(k + row * k_b + key_start * k_t + head * k_h, token.to(tl.int64) * k_t, there, D, KEY)
        line = tl.arange(0, rows)
        # Tokens before `begin` are seen by nobody: they lie outside every window that is moved up to it.
        shown = tl.where(token >= begin, token, -window - CHUNK) if LATE else token
        for some in tl.range(0, (groups + HEADS - 1) // HEADS, disable_licm=True):
            group = some * HEADS + line % HEADS
            query_head = head * groups + group
            for u0 in range(tl.maximum(j0 - window, -offset), tl.minimum(j0 + CHUNK - 1, count - offset), TILE):
                u = u0 + line // HEADS
                t = u + offset
                real = (t < count) & (group < groups)
                query_at = t.to(tl.int64) * q_t + query_head.to(tl.int64) * q_h
                query = load_rows(q + row * q_b + start * q_t, query_at, real, D, KEY)
                place = (row * length + start + t) * (heads * groups) + query_head
                grad = load_rows(grad_out, place * DV, real, DV, VALUE)
                total = tl.load(lse + place, mask=real, other=float("inf"))
                taken_off = tl.load(delta + place, mask=real, other=0.0)
                score = matmul(keys, tl.trans(query), DTYPE, PRECISION) * (scale * LOG2_E) - total[None, :]
                seen = (shown[:, None] - (u + 1)[None, :]).to(tl.uint32) < window.to(tl.uint32)
                weight = tl.exp2(tl.where(seen, score, float("-inf")))
                dvalues += matmul(weight, grad, DTYPE, PRECISION)
                dscore = weight * (matmul(values, tl.trans(grad), DTYPE, PRECISION) - taken_off[None, :])
                dkeys += matmul(dscore, query, DTYPE, PRECISION)
        dkeys *= scale
    if SEPARATE and WINDOWED:
        store_rows(dk, to * D, there, dkeys, D, KEY)
        dkeys = tl.zeros([CHUNK, KEY], tl.float32)
    if j0 < committed:
        taken_in = token < committed
        gate_at = log_gate + row * g_b + key_start * g_t + head * g_h
        gate = load_gates(gate_at, token, g_t, committed, M, SLOTS)
        left = left_at_end(gate, CHUNK)
        weight = left * taken(gate, DTYPE == tl.float32)
        slots_at = ((base + chunk) * heads + head) * M

        grad = load_slots(dslot_value + slots_at * DV, M, SLOTS, DV, VALUE)
        dvalues += load_rows(dv, to * DV, taken_in, DV, VALUE).to(tl.float32)
        dvalues += matmul(weight, grad, DTYPE, PRECISION)
        dweight = matmul(values, tl.trans(grad), DTYPE, PRECISION)
        held = load_slots(slot_value + slots_at * DV, M, SLOTS, DV, VALUE).to(tl.float32)
        dend = tl.sum(held * grad.to(tl.float32), 1)

        grad = load_slots(dslot_key + slots_at * D, M, SLOTS, D, KEY)
        dkeys += load_rows(dk_slot, to * D, taken_in, D, KEY).to(tl.float32)
        dkeys += matmul(weight, grad, DTYPE, PRECISION)
        key_at = k_slot + row * ks_b + key_start * ks_t + head * ks_h
        keys = load_rows(key_at, token.to(tl.int64) * ks_t, taken_in, D, KEY)
        dweight += matmul(keys, tl.trans(grad), DTYPE, PRECISION)
        held = load_slots(slot_key + slots_at * D, M, SLOTS, D, KEY).to(tl.float32)
        dend += tl.sum(held * grad.to(tl.float32), 1)

        # The sum over the chunk gains weight * dweight of every token; each token's own running sum loses it again.
        change = weight * dweight
        earlier = tl.cumsum(change, 0) - change
        change = earlier - tl.exp2(gate.to(tl.float32) * LOG2_E) * left * dweight
        change += (dend * tl.exp2(tl.sum(gate.to(tl.float32), 0) * LOG2_E))[None, :]
        change += load_rows(dgate, to * M, taken_in, M, SLOTS)
        raw = load_rows(gate_at, token.to(tl.int64) * g_t, taken_in, M, SLOTS).to(tl.float32)
        change = tl.where((raw >= -5) & (raw <= 0) & taken_in[:, None], change, 0.0)
        store_rows(dgate_out, to * M, there, change, M, SLOTS)
        store_rows(dk_slot, to * D, there, dkeys, D, KEY)
    else:
        store_rows(dgate_out, to * M, there, tl.zeros([CHUNK, SLOTS], tl.float32), M, SLOTS)
        store_rows(dk_slot, to * D, there, dkeys, D, KEY)
    store_rows(dv, to * DV, there, dvalues, DV, VALUE)
