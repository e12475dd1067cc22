"""Gradients of one block of queries: through the kept scores of sink and slots, and through the window."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import (
    LOG2_E,
    PART,
    bounds,
    in_pass,
    is_harsh,
    load_held,
    load_rows,
    load_slots,
    locate,
    matmul,
    store_rows,
)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block"])
def query_kernel(
    q, k, v, k_slot, slot_key, decay, sink_key, first, cu, chunk_base, table,
    lse, grad_out, delta, key_scores, sink_scores, borders, dq, dq_slot,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, ks_b, ks_t, ks_h,
    scale, length, past, window, chunks, blocks, first_block, heads, groups,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SINKS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr, WINDOWED: tl.constexpr, SEPARATE: tl.constexpr,
):  # fmt: skip
    """dq [T, HQ, D] of one block, from what `scores_kernel` left; programs (block, HEADS query heads).

    SEPARATE: the part through the slots goes to dq_slot.
    """
    rows: tl.constexpr = HEADS * CHUNK
    sequence, block = locate(first_block + tl.program_id(0), table, blocks, PACKED)
    if sequence < 0:
        return
    per_head = (groups + HEADS - 1) // HEADS
    head, group, query_heads = tl.program_id(1) // per_head, tl.program_id(1) % per_head * HEADS, heads * groups
    query_head = head * groups + group
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    offset = window - past
    chunk = block - (offset + CHUNK - 1) // CHUNK
    u0 = chunk * CHUNK
    token, line = tl.arange(0, CHUNK), tl.arange(0, rows) % CHUNK
    member = tl.arange(0, rows) // CHUNK
    u = u0 + line
    real = (u + offset >= 0) & (u < count - offset) & (group + member < groups)
    token0, query0 = key_start + u0, start + u0 + offset
    to = (row * length + query0) * query_heads + query_head
    to_line = line * query_heads + member
    acc = tl.zeros([rows, KEY], tl.float32)
    if chunk >= 0:
        block_head = tl.program_id(0).to(tl.int64) * heads + head
        saved = (block_head * groups + group) * CHUNK
        kept_line = tl.arange(0, rows)
        kept, at = key_scores + saved * (CHUNK + SLOTS), kept_line * (CHUNK + SLOTS)
        back = load_rows(kept, at, real, CHUNK, CHUNK)
        key_at = k_slot + row * ks_b + token0 * ks_t + head * ks_h
        keys = load_rows(key_at, token * ks_t, u0 + token < count - offset, D, KEY)
        acc = matmul(back, keys, DTYPE, PRECISION)
        place = (base + chunk) * heads + head
        harsh = is_harsh(decay + place * M, True, M, SLOTS)
        for part in range(0, 1 + harsh * (CHUNK // PART - 1)):
            border_at = borders + (block_head * (CHUNK // PART) + part) * SLOTS
            border = tl.load(border_at + tl.arange(0, SLOTS))
            score = load_rows(kept + CHUNK, at, real & in_pass(line, part, harsh), SLOTS, SLOTS)
            held = load_held(slot_key + place * M * D, border, True, M, SLOTS, D, KEY)
            acc += matmul(score, held, GATED, PRECISION)
        if S > 0:
            sink_score = load_rows(sink_scores + saved * S, kept_line * S, real, S, SINKS)
            sink = load_slots(sink_key + head * S * D, True, S, SINKS, D, KEY)
            acc += matmul(sink_score, sink, DTYPE, PRECISION)
    if SEPARATE:
        store_rows(dq_slot + to * D, to_line * D, real, acc, D, KEY)
        acc = tl.zeros([rows, KEY], tl.float32)
    if WINDOWED:
        begin = 0
        if LATE:
            begin = tl.load(first + sequence).to(tl.int32)
        query_at = q + row * q_b + query0 * q_t + query_head * q_h
        query = load_rows(query_at, line * q_t + member * q_h, real, D, KEY)
        grad = load_rows(grad_out + to * DV, to_line * DV, real, DV, VALUE)
        total = tl.load(lse + to + to_line, mask=real, other=float("inf"))
        taken_off = tl.load(delta + to + to_line, mask=real, other=0.0)
        near_key, near_value = k + row * k_b + head * k_h, v + row * v_b + head * v_h
        near = tl.arange(0, BLOCK)
        high = tl.minimum(u0 + CHUNK + window, past + count)
        for step in range(tl.maximum(u0 + 1, begin), high, BLOCK):
            there = step + near < high
            keys = load_rows(near_key + (key_start + step) * k_t, near * k_t, there, D, KEY)
            values = load_rows(near_value + (key_start + step) * v_t, near * v_t, there, DV, VALUE)
            score = matmul(query, tl.trans(keys), DTYPE, PRECISION) * (scale * LOG2_E) - total[:, None]
            inside = ((step + near)[None, :] - (u + 1)[:, None]).to(tl.uint32) < window.to(tl.uint32)
            weight = tl.exp2(tl.where(inside, score, float("-inf")))
            dscore = matmul(grad, tl.trans(values), DTYPE, PRECISION) - taken_off[:, None]
            acc += matmul(weight * (dscore * scale), keys, DTYPE, PRECISION)
    store_rows(dq + to * D, to_line * D, real, acc, D, KEY)
