"""Gradients of one chunk of keys, values and gates: from its own queries, through later slots and the window."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import (
    LOG2_E,
    around,
    bounds,
    clamp_gate,
    far,
    left_at_end,
    load_gates,
    load_rows,
    load_slots,
    locate,
    matmul,
    store_rows,
    sum_earlier,
    taken,
    whole_blocks,
)


@triton.jit
def receive(
    keys,
    values,
    dkeys,
    dvalues,
    q,
    grad_out,
    lse,
    delta,
    q_b,
    q_t,
    q_h,
    row,
    start,
    length,
    offset,
    count,
    u0,
    near,
    query_head,
    query_heads,
    shown,
    window,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(dkeys, dvalues) with what the queries `u0 + near` of one head add to them.

    MASKED: only those that there are, each to the keys of its own window, whose tokens are `shown`.
    """
    query0 = start + u0 + offset
    real = u0 + near < count - offset if MASKED else None
    query_at = q + row * q_b + query0 * q_t + far(query_head, q_h)
    query = load_rows(query_at, near * q_t, real, D, KEY)
    place = (row * length + query0) * query_heads + query_head
    grad = load_rows(grad_out + place * DV, near * (query_heads * DV), real, DV, VALUE)
    if MASKED:
        total = tl.load(lse + place + near * query_heads, mask=real, other=float("inf"))
        taken_off = tl.load(delta + place + near * query_heads, mask=real, other=0.0)
    else:
        total = tl.load(lse + place + near * query_heads)
        taken_off = tl.load(delta + place + near * query_heads)
    score = matmul(keys, tl.trans(query), DTYPE, PRECISION) * (scale * LOG2_E) - total[None, :]
    if MASKED:
        inside = (shown[:, None] - (u0 + 1 + near)[None, :]).to(tl.uint32) < window.to(tl.uint32)
        score = tl.where(inside, score, float("-inf"))
    weight = tl.exp2(score)
    dvalues += matmul(weight, grad, DTYPE, PRECISION)
    dscore = weight * (matmul(values, tl.trans(grad), DTYPE, PRECISION) - taken_off[None, :])
    dkeys += matmul(dscore, query, DTYPE, PRECISION)
    return dkeys, dvalues


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "key_length"])
def key_kernel(
    q,
    k,
    v,
    k_slot,
    log_gate,
    dslot_key,
    dslot_value,
    dend,
    grad_out,
    lse,
    delta,
    first,
    cu,
    chunk_base,
    table,
    dk,
    dk_slot,
    dv,
    dgate,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    ks_b,
    ks_t,
    ks_h,
    g_b,
    g_t,
    g_h,
    scale,
    length,
    past,
    window,
    chunks,
    blocks,
    key_length,
    heads,
    groups,
    parts,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SLOTS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    LATE: tl.constexpr,
    WINDOWED: tl.constexpr,
    SEPARATE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dk, dv [past + T, H, ...] and dgate [past + T, H, M] of one chunk of keys; programs (chunk, KV head).

    Adds up what the keys receive from all queries whose window holds them, what `slots_kernel` left in dk_slot, dv and
    dgate, and what comes through the slots after the chunk, whose gradients are `dslot_*` and whose inner products with
    the slots that decay into them are `dend` [chunks, H, parts, M]. SEPARATE: the slots' part of the keys stays in
    dk_slot. WIDE: queries whose windows hold the whole chunk have a loop without masks.
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
    values = load_rows(v + row * v_b + token0 * v_t + far(head, v_h), line * v_t, there, DV, VALUE)
    to = (row * key_length + token0) * heads + head
    to_line = line * heads
    dkeys = tl.zeros([CHUNK, KEY], tl.float32)
    dvalues = tl.zeros([CHUNK, VALUE], tl.float32)
    if WINDOWED:
        keys = load_rows(k + row * k_b + token0 * k_t + far(head, k_h), line * k_t, there, D, KEY)
        # Tokens before `begin` are seen by nobody: they lie outside every window that is moved up to it.
        shown = tl.where(token >= begin, token, -window - CHUNK) if LATE else token
        first_u, stop_u = tl.maximum(j0 - window, -offset), tl.minimum(j0 + CHUNK - 1, count - offset)
        inner = 0
        if WIDE:
            # The windows of these queries hold all keys of the chunk, none of which must then lie before `begin`.
            stop_inner = tl.minimum(j0, count - offset)
            if LATE:
                stop_inner = tl.where(j0 < begin, first_u, stop_inner)
            inner = whole_blocks(first_u + CHUNK, stop_inner, BLOCK)
        steps = tl.maximum(stop_u - inner - first_u + BLOCK - 1, 0) // BLOCK
        near = tl.arange(0, BLOCK)
        if WIDE:
            for step in range(0, inner // BLOCK * groups):
                u0 = first_u + CHUNK + step // groups * BLOCK
                dkeys, dvalues = receive(
                    keys,
                    values,
                    dkeys,
                    dvalues,
                    q,
                    grad_out,
                    lse,
                    delta,
                    q_b,
                    q_t,
                    q_h,
                    row,
                    start,
                    length,
                    offset,
                    count,
                    u0,
                    near,
                    head * groups + step % groups,
                    query_heads,
                    shown,
                    window,
                    scale,
                    D,
                    DV,
                    KEY,
                    VALUE,
                    DTYPE,
                    PRECISION,
                    MASKED=False,
                )
        for step in range(0, steps * groups):
            at = first_u + step // groups * BLOCK
            u0 = around(at, first_u + CHUNK, inner) if WIDE else at
            dkeys, dvalues = receive(
                keys,
                values,
                dkeys,
                dvalues,
                q,
                grad_out,
                lse,
                delta,
                q_b,
                q_t,
                q_h,
                row,
                start,
                length,
                offset,
                count,
                u0,
                near,
                head * groups + step % groups,
                query_heads,
                shown,
                window,
                scale,
                D,
                DV,
                KEY,
                VALUE,
                DTYPE,
                PRECISION,
                MASKED=True,
            )
        dkeys *= scale
    if SEPARATE and WINDOWED:
        store_rows(dk + to * D, to_line * D, there, dkeys, D, KEY)
        dkeys = tl.zeros([CHUNK, KEY], tl.float32)
    change = tl.zeros([CHUNK, SLOTS], tl.float32)
    if j0 < committed:
        taken_in = token < committed
        gate_at = log_gate + row * g_b + token0 * g_t + far(head, g_h)
        place = (base + chunk) * heads + head
        gate = load_gates(gate_at, line * g_t, taken_in, M, SLOTS)
        weight = (left_at_end(gate, CHUNK) * taken(gate, DTYPE)).to(DTYPE)
        grad = load_slots(dslot_value + place * M * DV, True, M, SLOTS, DV, VALUE)
        dvalues += load_rows(dv + to * DV, to_line * DV, taken_in, DV, VALUE).to(tl.float32)
        dvalues += matmul(weight, grad, DTYPE, PRECISION)
        dweight = matmul(values, tl.trans(grad), DTYPE, PRECISION)
        store_rows(dv + to * DV, to_line * DV, there, dvalues, DV, VALUE)
        grad = load_slots(dslot_key + place * M * D, True, M, SLOTS, D, KEY)
        dkeys += load_rows(dk_slot + to * D, to_line * D, taken_in, D, KEY).to(tl.float32)
        dkeys += matmul(weight, grad, DTYPE, PRECISION)
        store_rows(dk_slot + to * D, to_line * D, there, dkeys, D, KEY)
        keys = load_rows(k_slot + row * ks_b + token0 * ks_t + far(head, ks_h), line * ks_t, taken_in, D, KEY)
        dweight += matmul(keys, tl.trans(grad), DTYPE, PRECISION)

        # The sum over the chunk gains weight * dweight of every token; each token's own running sum loses it again.
        raw = load_rows(gate_at, line * g_t, taken_in, M, SLOTS)
        gate = clamp_gate(raw)
        dweight *= left_at_end(gate.to(raw.dtype), CHUNK)
        change = sum_earlier(taken(gate, DTYPE) * dweight, CHUNK, DTYPE)
        change -= tl.exp2(gate * LOG2_E) * dweight
        slot = tl.arange(0, SLOTS)
        for part in range(0, parts):
            change += tl.load(dend + (place * parts + part) * M + slot, mask=slot < M, other=0.0)[None, :]
        change += load_rows(dgate + to * M, to_line * M, taken_in, M, SLOTS).to(tl.float32)
        change = tl.where((gate == raw.to(tl.float32)) & taken_in[:, None], change, 0.0)
    else:
        store_rows(dk_slot + to * D, to_line * D, there, dkeys, D, KEY)
        store_rows(dv + to * DV, to_line * DV, there, dvalues, DV, VALUE)
    store_rows(dgate + to * M, to_line * M, there, change, M, SLOTS)
