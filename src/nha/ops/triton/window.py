"""Gradients through the window: of the queries tile by tile, of keys and values block by block, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import TILE, bounds, load_queries, load_tokens, locate, matmul, store_tokens


@triton.jit
def delta_kernel(
    out, grad_out, mass, grad_mass, delta, rows, DV: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """delta = out . grad_out + mass * grad_mass of every query: what the softmax takes off every score's gradient."""
    line = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, VALUE)
    inside = (line < rows)[:, None] & (column < DV)[None, :]
    where = line[:, None] * DV + column[None, :]
    a = tl.load(out + where, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(grad_out + where, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(a * b, 1)
    if WEIGHED:
        share = tl.load(mass + line, mask=line < rows, other=0.0)
        total += share * tl.load(grad_mass + line, mask=line < rows, other=0.0).to(tl.float32)
    tl.store(delta + line, total, mask=line < rows)


@triton.jit(do_not_specialize=["length", "past", "window", "tiles"])
def window_query_kernel(
    q, k, v, grad_out, lse, delta, first, cu, table, dq,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    scale, length, past, window, tiles, heads, groups,
    D: tl.constexpr, DV: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """dq [T, HQ, D] of one tile; programs as in `forward_kernel`."""
    rows: tl.constexpr = TILE * HEADS
    sequence, index = locate(tl.program_id(0), table, tiles, PACKED)
    if sequence < 0:
        return
    per_head = (groups + HEADS - 1) // HEADS
    head = tl.program_id(1) // per_head
    row, start, key_start, count, _ = bounds(sequence, cu, cu, length, past, 0, PACKED)
    offset = window - past
    u0 = (index - (offset + TILE - 1) // TILE) * TILE
    line = tl.arange(0, rows)
    u = u0 + line // HEADS
    group = (tl.program_id(1) % per_head) * HEADS + line % HEADS
    t = u + offset
    real = (t >= 0) & (t < count) & (group < groups)
    query_head = head * groups + group
    place = (row * length + start) * (heads * groups)
    begin = 0
    if LATE:
        begin = tl.load(first + sequence).to(tl.int32)
    query = load_queries(q + row * q_b + start * q_t, q_t, q_h, t, query_head, real, D, KEY)
    grad = load_queries(grad_out + place * DV, heads * groups * DV, DV, t, query_head, real, DV, VALUE)
    flat = place + t.to(tl.int64) * (heads * groups) + query_head
    total = tl.load(lse + flat, mask=real, other=0.0)
    taken_off = tl.load(delta + flat, mask=real, other=0.0)
    low = tl.maximum(u0 + 1, begin)
    high = tl.minimum(u0 + TILE + window, past + count)
    acc = tl.zeros([rows, KEY], tl.float32)
    for block in range(low, high, BLOCK):
        token = block + tl.arange(0, BLOCK)
        keys = load_tokens(k + row * k_b + key_start * k_t + head * k_h, k_t, token, low, high, D, KEY)
        values = load_tokens(v + row * v_b + key_start * v_t + head * v_h, v_t, token, low, high, DV, VALUE)
        score = matmul(query, tl.trans(keys), DTYPE, PRECISION) * (scale * 1.4426950408889634)
        distance = token[None, :] - u[:, None]
        seen = (distance > 0) & (distance <= window) & (token < high)[None, :] & real[:, None]
        weight = tl.exp2(tl.where(seen, score - total[:, None], float("-inf")))
        dscore = weight * (matmul(grad, tl.trans(values), DTYPE, PRECISION) - taken_off[:, None])
        acc += matmul(dscore, keys, DTYPE, PRECISION)
    column = tl.arange(0, KEY)
    tl.store(
        dq + flat[:, None] * D + column[None, :],
        (acc * scale).to(dq.dtype.element_ty),
        mask=real[:, None] & (column < D)[None, :],
    )


@triton.jit(do_not_specialize=["length", "past", "window", "key_blocks", "key_length"])
def window_key_kernel(
    q, k, v, grad_out, lse, delta, first, cu, table, dk, dv,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    scale, length, past, window, key_blocks, key_length, heads, groups,
    D: tl.constexpr, DV: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """dk [past + T, H, D] and dv of one block of keys, from all queries that see them; programs (block, head)."""
    rows: tl.constexpr = TILE * HEADS
    sequence, index = locate(tl.program_id(0), table, key_blocks, PACKED)
    if sequence < 0:
        return
    head = tl.program_id(1)
    row, start, key_start, count, _ = bounds(sequence, cu, cu, length, past, 0, PACKED)
    offset = window - past
    begin = 0
    if LATE:
        begin = tl.load(first + sequence).to(tl.int32)
    j0 = index * KEYS
    token = j0 + tl.arange(0, KEYS)
    high = past + count
    keys = load_tokens(k + row * k_b + key_start * k_t + head * k_h, k_t, token, 0, high, D, KEY)
    values = load_tokens(v + row * v_b + key_start * v_t + head * v_h, v_t, token, 0, high, DV, VALUE)
    place = (row * length + start) * (heads * groups)
    line = tl.arange(0, rows)
    dkey = tl.zeros([KEYS, KEY], tl.float32)
    dvalue = tl.zeros([KEYS, VALUE], tl.float32)
    u_low = tl.maximum(j0 - window, -offset)
    u_high = tl.minimum(j0 + KEYS - 1, count - offset)
    for some in range(0, (groups + HEADS - 1) // HEADS):
        group = some * HEADS + line % HEADS
        query_head = head * groups + group
        for u0 in range(u_low, u_high, TILE):
            u = u0 + line // HEADS
            t = u + offset
            real = (t < count) & (group < groups)
            query = load_queries(q + row * q_b + start * q_t, q_t, q_h, t, query_head, real, D, KEY)
            grad = load_queries(grad_out + place * DV, heads * groups * DV, DV, t, query_head, real, DV, VALUE)
            flat = place + t.to(tl.int64) * (heads * groups) + query_head
            total = tl.load(lse + flat, mask=real, other=0.0)
            taken_off = tl.load(delta + flat, mask=real, other=0.0)
            score = matmul(query, tl.trans(keys), DTYPE, PRECISION) * (scale * 1.4426950408889634)
            distance = token[None, :] - u[:, None]
            seen = (distance > 0) & (distance <= window) & (token >= begin)[None, :] & real[:, None]
            weight = tl.exp2(tl.where(seen, score - total[:, None], float("-inf")))
            dscore = weight * (matmul(grad, tl.trans(values), DTYPE, PRECISION) - taken_off[:, None])
            dkey += matmul(tl.trans(dscore), query, DTYPE, PRECISION)
            dvalue += matmul(tl.trans(weight), grad, DTYPE, PRECISION)
    to = (row * key_length + key_start) * heads + head
    store_tokens(dk + to * D, heads * D, token, 0, high, dkey * scale, D, KEY)
    store_tokens(dv + to * DV, heads * DV, token, 0, high, dvalue, DV, VALUE)
