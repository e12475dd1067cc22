"""Gradients on the side of the keys and values, chunk by chunk, without atomics.

`scores_kernel` has left the scores' gradients and the weights; `slots_kernel` multiplies them with queries and gradients
of outputs to what the chunk's tokens and the slots before it receive. After the reverse pass over the slots
(`reverse_kernel`) has turned the second into gradients of the slots after every chunk, `key_kernel` adds what the tokens
receive through those and through the window.

A log-gate reaches the scores through running sums: of the queries (`rise`), of the tokens (`fall`) and of the whole
chunk. The gradient of each sum is an inner product that needs no division; a cumulative sum within the chunk gives the
gradient of the gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import (
    LOG2_E,
    PART,
    bounds,
    clamp_gate,
    in_pass,
    is_harsh,
    left_at_end,
    load_gates,
    load_rows,
    load_slots,
    locate,
    matmul,
    share_of,
    store_rows,
    store_slots,
    sum_earlier,
    sum_from,
    taken,
)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block", "key_length"])
def slots_kernel(
    x, y, log_gate, decay, scores, sink_scores, drise, cu, chunk_base, table, dtoken, dslot, dsink, dgate,
    x_b, x_t, x_h, y_b, y_t, y_h, g_b, g_t, g_h,
    length, past, window, chunks, blocks, first_block, key_length, heads, groups,
    M: tl.constexpr, DIM: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, SINKS: tl.constexpr, CHUNK: tl.constexpr,
    DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, RISING: tl.constexpr,
):  # fmt: skip
    """dtoken [past + T, H, DIM], dslot [chunks, H, M, DIM] and dsink [chunks, H, S, DIM] float32 of one chunk, and
    dgate [past + T, H, M], all but what comes through later chunks. Programs (block, KV head).

    x are queries, y keys and scores key_scores, or x gradients of outputs, y values and scores value_scores. RISING: add
    drise to this dgate.
    """
    sequence, block = locate(first_block + tl.program_id(0), table, blocks, PACKED)
    if sequence < 0:
        return
    offset = window - past
    chunk = block - (offset + CHUNK - 1) // CHUNK
    head, query_heads = tl.program_id(1), heads * groups
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    line = tl.arange(0, CHUNK)
    u0 = chunk * CHUNK
    there = u0 + line < count - offset
    if (chunk < 0) | (u0 >= count - offset):
        return
    token0 = key_start + u0
    place = (base + chunk) * heads + head
    gate_at = log_gate + row * g_b + token0 * g_t + head * g_h
    tokens = load_rows(y + row * y_b + token0 * y_t + head * y_h, line * y_t, there, DIM, WIDTH)
    dtokens = tl.zeros([CHUNK, WIDTH], tl.float32)
    dslots = tl.zeros([SLOTS, WIDTH], tl.float32)
    dsinks = tl.zeros([SINKS, WIDTH], tl.float32)
    dshare = tl.zeros([CHUNK, SLOTS], tl.float32)
    harsh = is_harsh(decay + place * M, True, M, SLOTS)
    for part in tl.range(0, 1 + harsh * (CHUNK // PART - 1), disable_licm=True):
        mine = there & in_pass(part, harsh, CHUNK)
        dfall = tl.zeros([CHUNK, SLOTS], tl.float32)
        for group in tl.range(0, groups, disable_licm=True):
            query_head = head * groups + group
            x_at = x + row * x_b + (start + u0 + offset) * x_t + query_head * x_h
            rows = load_rows(x_at, line * x_t, mine, DIM, WIDTH)
            saved = (tl.program_id(0).to(tl.int64) * query_heads + query_head) * CHUNK
            kept, at = scores + saved * (CHUNK + 2 * SLOTS), line * (CHUNK + 2 * SLOTS)
            score = load_rows(kept, at, mine, CHUNK, CHUNK)
            dtokens += matmul(tl.trans(score), rows, DTYPE, PRECISION)
            score = load_rows(kept + CHUNK, at, mine, SLOTS, SLOTS)
            dslots += matmul(tl.trans(score), rows, DTYPE, PRECISION)
            if S > 0:
                score = load_rows(sink_scores + saved * S, line * S, mine, S, SINKS)
                dsinks += matmul(tl.trans(score), rows, DTYPE, PRECISION)
            dots = matmul(rows, tl.trans(tokens), DTYPE, PRECISION)
            dots = tl.where(line[None, :] <= line[:, None], dots, 0.0).to(GATED)
            score = load_rows(kept + (CHUNK + SLOTS), at, mine, SLOTS, SLOTS)
            dfall += matmul(tl.trans(dots), score, GATED, PRECISION)
        gate = load_gates(gate_at, line * g_t, there, M, SLOTS)
        dshare += dfall * share_of(gate, part, harsh, CHUNK)
    to = (row * key_length + token0) * heads + head
    store_rows(dtoken + to * DIM, line * (heads * DIM), there, dtokens, DIM, WIDTH)
    store_slots(dslot + place * M * DIM, dslots, M, SLOTS, DIM, WIDTH)
    if S > 0:
        store_slots(dsink + place * S * DIM, dsinks, S, SINKS, DIM, WIDTH)
    gate = load_gates(gate_at, line * g_t, there, M, SLOTS)
    change = -taken(gate, DTYPE == tl.float32) * dshare
    if RISING:
        rise_at = drise + (tl.program_id(0).to(tl.int64) * heads + head) * (CHUNK * SLOTS)
        change += load_rows(rise_at, line * SLOTS, there, SLOTS, SLOTS)
    change = sum_from(change, CHUNK, DTYPE == tl.float32) - tl.exp2(gate.to(tl.float32) * LOG2_E) * dshare
    store_rows(dgate + to * M, line * (heads * M), there, change, M, SLOTS)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "key_length"])
def key_kernel(
    q, k, v, k_slot, log_gate, dslot_key, dslot_value, dend, grad_out, lse, delta,
    first, cu, chunk_base, table, dk, dk_slot, dv, dgate, dgate_value,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, ks_b, ks_t, ks_h, g_b, g_t, g_h,
    scale, length, past, window, chunks, blocks, key_length, heads, groups, parts,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr, WINDOWED: tl.constexpr, SEPARATE: tl.constexpr,
):  # fmt: skip
    """dk, dv [past + T, H, ...] and dgate [past + T, H, M] of one chunk of keys; programs (chunk, KV head).

    Adds up what the keys receive from all queries whose window holds them, what `slots_kernel` left in dk_slot, dv,
    dgate and dgate_value, and what comes through the slots after the chunk, whose gradients are `dslot_*` and whose inner products
    with the slots that decay into them are `dend` [chunks, H, parts, M]. SEPARATE: the slots' part of the keys stays in
    dk_slot.
    """
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
    line = tl.arange(0, CHUNK)
    token = j0 + line
    there = token < past + count
    token0, query_heads = key_start + j0, heads * groups
    values = load_rows(v + row * v_b + token0 * v_t + head * v_h, line * v_t, there, DV, VALUE)
    to = (row * key_length + token0) * heads + head
    to_line = line * heads
    dkeys = tl.zeros([CHUNK, KEY], tl.float32)
    dvalues = tl.zeros([CHUNK, VALUE], tl.float32)
    if WINDOWED:
        keys = load_rows(k + row * k_b + token0 * k_t + head * k_h, line * k_t, there, D, KEY)
        # Tokens before `begin` are seen by nobody: they lie outside every window that is moved up to it.
        shown = tl.where(token >= begin, token, -window - CHUNK) if LATE else token
        first_u, stop_u = tl.maximum(j0 - window, -offset), tl.minimum(j0 + CHUNK - 1, count - offset)
        steps = tl.maximum(stop_u - first_u + BLOCK - 1, 0) // BLOCK
        near = tl.arange(0, BLOCK)
        for step in range(0, steps * groups):
            u0 = first_u + step // groups * BLOCK
            query_head = head * groups + step % groups
            query0 = start + u0 + offset
            real = u0 + near < count - offset
            query_at = q + row * q_b + query0 * q_t + query_head * q_h
            query = load_rows(query_at, near * q_t, real, D, KEY)
            place = (row * length + query0) * query_heads + query_head
            grad = load_rows(grad_out + place * DV, near * (query_heads * DV), real, DV, VALUE)
            total = tl.load(lse + place + near * query_heads, mask=real, other=float("inf"))
            taken_off = tl.load(delta + place + near * query_heads, mask=real, other=0.0)
            score = matmul(keys, tl.trans(query), DTYPE, PRECISION) * (scale * LOG2_E) - total[None, :]
            inside = (shown[:, None] - (u0 + 1 + near)[None, :]).to(tl.uint32) < window.to(tl.uint32)
            weight = tl.exp2(tl.where(inside, score, float("-inf")))
            dvalues += matmul(weight, grad, DTYPE, PRECISION)
            dscore = weight * (matmul(values, tl.trans(grad), DTYPE, PRECISION) - taken_off[None, :])
            dkeys += matmul(dscore, query, DTYPE, PRECISION)
        dkeys *= scale
    if SEPARATE and WINDOWED:
        store_rows(dk + to * D, to_line * D, there, dkeys, D, KEY)
        dkeys = tl.zeros([CHUNK, KEY], tl.float32)
    change = tl.zeros([CHUNK, SLOTS], tl.float32)
    if j0 < committed:
        taken_in = token < committed
        gate_at = log_gate + row * g_b + token0 * g_t + head * g_h
        place = (base + chunk) * heads + head
        gate = load_gates(gate_at, line * g_t, taken_in, M, SLOTS)
        weight = (left_at_end(gate, CHUNK) * taken(gate, DTYPE == tl.float32)).to(DTYPE)
        grad = load_slots(dslot_value + place * M * DV, True, M, SLOTS, DV, VALUE)
        dvalues += load_rows(dv + to * DV, to_line * DV, taken_in, DV, VALUE).to(tl.float32)
        dvalues += matmul(weight, grad, DTYPE, PRECISION)
        dweight = matmul(values, tl.trans(grad), DTYPE, PRECISION)
        store_rows(dv + to * DV, to_line * DV, there, dvalues, DV, VALUE)
        grad = load_slots(dslot_key + place * M * D, True, M, SLOTS, D, KEY)
        dkeys += load_rows(dk_slot + to * D, to_line * D, taken_in, D, KEY).to(tl.float32)
        dkeys += matmul(weight, grad, DTYPE, PRECISION)
        store_rows(dk_slot + to * D, to_line * D, there, dkeys, D, KEY)
        keys = load_rows(k_slot + row * ks_b + token0 * ks_t + head * ks_h, line * ks_t, taken_in, D, KEY)
        dweight += matmul(keys, tl.trans(grad), DTYPE, PRECISION)

        # The sum over the chunk gains weight * dweight of every token; each token's own running sum loses it again.
        raw = load_rows(gate_at, line * g_t, taken_in, M, SLOTS)
        gate = clamp_gate(raw)
        dweight *= left_at_end(gate.to(raw.dtype), CHUNK)
        change = sum_earlier(taken(gate, DTYPE == tl.float32) * dweight, CHUNK, DTYPE == tl.float32)
        change -= tl.exp2(gate * LOG2_E) * dweight
        slot = tl.arange(0, SLOTS)
        for part in range(0, parts):
            change += tl.load(dend + (place * parts + part) * M + slot, mask=slot < M, other=0.0)[None, :]
        change += load_rows(dgate + to * M, to_line * M, taken_in, M, SLOTS).to(tl.float32)
        change += load_rows(dgate_value + to * M, to_line * M, taken_in, M, SLOTS).to(tl.float32)
        change = tl.where((gate == raw.to(tl.float32)) & taken_in[:, None], change, 0.0)
    else:
        store_rows(dk_slot + to * D, to_line * D, there, dkeys, D, KEY)
        store_rows(dv + to * DV, to_line * DV, there, dvalues, DV, VALUE)
    store_rows(dgate + to * M, to_line * M, there, change, M, SLOTS)
