"""Gradients through sink and slots, chunk by chunk, without atomics.

`slots_kernel` runs every query tile of a chunk again and collects, on the side of the keys or of the values, what its
tokens, the slots before it and the sink receive. After the reverse pass over the slots (`reverse_kernel`) has turned
the latter into gradients of the slots after every chunk, `finish_kernel` adds what the tokens receive through them.

A log-gate reaches the scores through running sums: of the queries (`rise`), of the tokens (`share`) and of the whole
chunk. The gradient of each sum is an inner product that needs no division; a reverse cumulative sum within the chunk
gives the gradient of the gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import (
    TILE,
    after_token,
    bounds,
    clamp_gate,
    factors,
    load_queries,
    load_slots,
    load_tokens,
    locate,
    matmul,
    store_slots,
    store_tokens,
    taken,
)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "key_length"])
def slots_kernel(
    q_slot, k_slot, v, log_gate, slot_key, slot_value, sink_key, sink_value, grad_out, grad_mass, lse, delta,
    first, cu, chunk_base, table, dq_slot, dtoken, dgate, dread, dsink,
    qs_b, qs_t, qs_h, ks_b, ks_t, ks_h, v_b, v_t, v_h, g_b, g_t, g_h,
    scale, length, past, window, chunks, key_length, heads, groups,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SINKS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr,
    DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr, LIVE: tl.constexpr, WEIGHED: tl.constexpr,
    KEY_SIDE: tl.constexpr, ADD_QUERY: tl.constexpr, ADD_TOKEN: tl.constexpr,
):  # fmt: skip
    """One chunk and KV head. KEY_SIDE: dq_slot, and keys' part of dtoken, dread, dsink, dgate; else the values' part.

    dgate [past + T, H, M] float32: the key side writes it, the value side adds to it. ADD_*: add to what is there.
    """
    rows: tl.constexpr = TILE * HEADS
    DIM: tl.constexpr = D if KEY_SIDE else DV
    WIDTH: tl.constexpr = KEY if KEY_SIDE else VALUE
    sequence, chunk = locate(tl.program_id(0), table, chunks, PACKED)
    if sequence < 0:
        return
    head = tl.program_id(1)
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    offset = window - past
    committed = count - offset
    begin = 0
    if LATE:
        begin = tl.load(first + sequence).to(tl.int32)
    c0 = chunk * CHUNK
    token = c0 + tl.arange(0, CHUNK)
    gates = log_gate + row * g_b + key_start * g_t + head * g_h
    gate = clamp_gate(load_tokens(gates, g_t, token, 0, committed, M, SLOTS))
    keys = load_tokens(k_slot + row * ks_b + key_start * ks_t + head * ks_h, ks_t, token, 0, committed, D, KEY)
    place = ((base + chunk) * heads + head) * M
    held = load_slots(slot_key + place * D, M, SLOTS, D, KEY)
    to = (row * key_length + key_start) * heads + head
    flat0 = (row * length + start) * (heads * groups)
    line = tl.arange(0, rows)
    column = tl.arange(0, WIDTH)
    dtokens = tl.zeros([CHUNK, WIDTH], tl.float32)
    dslots = tl.zeros([SLOTS, WIDTH], tl.float32)
    dsinks = tl.zeros([SINKS, WIDTH], tl.float32)
    dshare = tl.zeros([CHUNK, SLOTS], tl.float32)
    for within in range(0, tl.minimum(CHUNK, committed - c0), TILE):
        u0 = c0 + within
        tile_token = u0 + tl.arange(0, TILE)
        tile_gate = clamp_gate(load_tokens(gates, g_t, tile_token, 0, committed, M, SLOTS))
        rise, share, border = factors(gate, tile_gate, within, CHUNK, HEADS, SLOTS)
        fall = share * taken(gate)
        drise = tl.zeros([TILE, SLOTS], tl.float32)
        u = u0 + line // HEADS
        t = u + offset
        seen = token[None, :] <= u[:, None]
        for some in range(0, (groups + HEADS - 1) // HEADS):
            group = some * HEADS + line % HEADS
            query_head = head * groups + group
            real = (t < count) & (group < groups)
            live = real & (u >= begin)
            if LIVE:
                live = real
            flat = flat0 + t.to(tl.int64) * (heads * groups) + query_head
            total = tl.load(lse + flat, mask=real, other=0.0)
            query = load_queries(q_slot + row * qs_b + start * qs_t, qs_t, qs_h, t, query_head, real, D, KEY)
            grad = load_queries(grad_out + flat0 * DV, heads * groups * DV, DV, t, query_head, real, DV, VALUE)
            dots = tl.where(seen, matmul(query, tl.trans(keys), DTYPE, PRECISION), 0.0)
            bare = matmul(query, tl.trans(held), DTYPE, PRECISION) * border[None, :]
            bare += matmul(dots, fall, GATED, PRECISION)
            score = bare * rise * scale
            shown = live[:, None] & (tl.arange(0, SLOTS) < M)[None, :]
            log2_e = 1.4426950408889634
            weight = tl.exp2(tl.where(shown, score * log2_e - total[:, None], float("-inf")))
            spread = weight * rise
            values = load_tokens(v + row * v_b + key_start * v_t + head * v_h, v_t, token, 0, committed, DV, VALUE)
            reach = tl.where(seen, matmul(grad, tl.trans(values), DTYPE, PRECISION), 0.0)
            if S > 0:
                sink = load_slots(sink_key + head * S * D, S, SINKS, D, KEY)
                sink_score = matmul(query, tl.trans(sink), DTYPE, PRECISION) * (scale * log2_e) - total[:, None]
                sink_shown = live[:, None] & (tl.arange(0, SINKS) < S)[None, :]
                sink_weight = tl.exp2(tl.where(sink_shown, sink_score, float("-inf")))
            if KEY_SIDE:
                taken_off = tl.load(delta + flat, mask=real, other=0.0)
                if WEIGHED:
                    taken_off -= tl.load(grad_mass + flat, mask=real, other=0.0).to(tl.float32)
                held_value = load_slots(slot_value + place * DV, M, SLOTS, DV, VALUE)
                dspread = matmul(grad, tl.trans(held_value), DTYPE, PRECISION) * border[None, :]
                dspread += matmul(reach, fall, GATED, PRECISION)
                dscore = weight * (rise * dspread - taken_off[:, None])
                change = dscore * score + spread * dspread
                drise += tl.sum(tl.reshape(change, [TILE, HEADS, SLOTS]), 1)
                dbare = dscore * rise * scale
                ddots = tl.where(seen, matmul(dbare, tl.trans(fall), GATED, PRECISION), 0.0)
                dquery = matmul(ddots, keys, DTYPE, PRECISION)
                dquery += matmul(dbare * border[None, :], held, DTYPE, PRECISION)
                dtokens += matmul(tl.trans(ddots), query, DTYPE, PRECISION)
                dslots += matmul(tl.trans(dbare * border[None, :]), query, DTYPE, PRECISION)
                dshare += matmul(tl.trans(dots), dbare, GATED, PRECISION) * share
                if S > 0:
                    sink_v = load_slots(sink_value + head * S * DV, S, SINKS, DV, VALUE)
                    dsink_score = matmul(grad, tl.trans(sink_v), DTYPE, PRECISION) - taken_off[:, None]
                    dsink_score *= sink_weight * scale
                    dquery += matmul(dsink_score, sink, DTYPE, PRECISION)
                    dsinks += matmul(tl.trans(dsink_score), query, DTYPE, PRECISION)
                where = dq_slot + flat[:, None] * D + column[None, :]
                inside = real[:, None] & (column < D)[None, :]
                if ADD_QUERY:
                    dquery += tl.load(where, mask=inside, other=0.0).to(tl.float32)
                tl.store(where, dquery.to(dq_slot.dtype.element_ty), mask=inside)
            else:
                read = tl.where(seen, matmul(spread, tl.trans(fall), GATED, PRECISION), 0.0)
                dtokens += matmul(tl.trans(read), grad, DTYPE, PRECISION)
                dslots += matmul(tl.trans(spread * border[None, :]), grad, DTYPE, PRECISION)
                dshare += matmul(tl.trans(reach), spread, GATED, PRECISION) * share
                if S > 0:
                    dsinks += matmul(tl.trans(sink_weight), grad, DTYPE, PRECISION)
        if KEY_SIDE:
            store_tokens(dgate + to * M, heads * M, tile_token, 0, committed, drise, M, SLOTS)
    change = -taken(gate) * dshare
    if KEY_SIDE:
        tl.debug_barrier()  # the rows above were written by other threads of this program
        change += load_tokens(dgate + to * M, heads * M, token, 0, committed, M, SLOTS)
        tl.debug_barrier()
    change = tl.cumsum(change, 0, reverse=True) - tl.exp(gate) * dshare
    if not KEY_SIDE:
        change += load_tokens(dgate + to * M, heads * M, token, 0, committed, M, SLOTS)
    store_tokens(dgate + to * M, heads * M, token, 0, committed, change, M, SLOTS)
    if ADD_TOKEN:
        dtokens += load_tokens(dtoken + to * DIM, heads * DIM, token, 0, committed, DIM, WIDTH).to(tl.float32)
    store_tokens(dtoken + to * DIM, heads * DIM, token, 0, committed, dtokens, DIM, WIDTH)
    store_slots(dread + place * DIM, dslots, M, SLOTS, DIM, WIDTH)
    if S > 0:
        store_slots(dsink + ((base + chunk) * heads + head) * S * DIM, dsinks, S, SINKS, DIM, WIDTH)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "key_length"])
def finish_kernel(
    k_slot, v, log_gate, slot_key, slot_value, dafter_key, dafter_value, cu, chunk_base, table,
    dk_slot, dv, dgate, ks_b, ks_t, ks_h, v_b, v_t, v_h, g_b, g_t, g_h,
    length, past, window, chunks, key_length, heads,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SLOTS: tl.constexpr, KEY: tl.constexpr,
    VALUE: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Add to dk_slot, dv and dgate of one chunk what comes through the slots after it (`dafter`)."""
    sequence, chunk = locate(tl.program_id(0), table, chunks, PACKED)
    if sequence < 0:
        return
    head = tl.program_id(1)
    row, _, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    committed = count + past - window
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    raw = load_tokens(
        log_gate + row * g_b + key_start * g_t + head * g_h, g_t, token, 0, committed, M, SLOTS
    ).to(tl.float32)  # fmt: skip
    gate = clamp_gate(raw)
    left = tl.exp(after_token(gate))
    weight = taken(gate) * left
    place = ((base + chunk) * heads + head) * M
    to = (row * key_length + key_start) * heads + head

    grad = load_slots(dafter_key + place * D, M, SLOTS, D, KEY)
    x = load_tokens(k_slot + row * ks_b + key_start * ks_t + head * ks_h, ks_t, token, 0, committed, D, KEY)
    dweight = matmul(x, tl.trans(grad), DTYPE, PRECISION)
    held = load_slots(slot_key + place * D, M, SLOTS, D, KEY).to(tl.float32)
    dend = tl.sum(held * grad.to(tl.float32), 1)
    dx = matmul(weight, grad, DTYPE, PRECISION)
    dx += load_tokens(dk_slot + to * D, heads * D, token, 0, committed, D, KEY).to(tl.float32)
    store_tokens(dk_slot + to * D, heads * D, token, 0, committed, dx, D, KEY)

    grad_v = load_slots(dafter_value + place * DV, M, SLOTS, DV, VALUE)
    y = load_tokens(v + row * v_b + key_start * v_t + head * v_h, v_t, token, 0, committed, DV, VALUE)
    dweight += matmul(y, tl.trans(grad_v), DTYPE, PRECISION)
    held_v = load_slots(slot_value + place * DV, M, SLOTS, DV, VALUE).to(tl.float32)
    dend += tl.sum(held_v * grad_v.to(tl.float32), 1)
    dy = matmul(weight, grad_v, DTYPE, PRECISION)
    dy += load_tokens(dv + to * DV, heads * DV, token, 0, committed, DV, VALUE).to(tl.float32)
    store_tokens(dv + to * DV, heads * DV, token, 0, committed, dy, DV, VALUE)

    # The sum over the chunk gains weight * dweight of every token; each token's own running sum loses it again.
    change = weight * dweight
    earlier = tl.cumsum(change, 0) - change
    dgates = (dend * tl.exp(tl.sum(gate, 0)))[None, :] + earlier - tl.exp(gate) * left * dweight
    dgates += load_tokens(dgate + to * M, heads * M, token, 0, committed, M, SLOTS)
    dgates = tl.where(raw == gate, dgates, 0.0)
    store_tokens(dgate + to * M, heads * M, token, 0, committed, dgates, M, SLOTS)
