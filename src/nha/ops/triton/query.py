"""Gradients of one block of queries: through the kept scores of sink and slots, and through the window."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import LOG2_E, bounds, load_rows, load_slots, locate, matmul, store_rows


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block"])
def query_kernel(
    q, k, v, k_slot, slot_key, sink_key, first, cu, chunk_base, table,
    lse, grad_out, delta, key_scores, sink_scores, dq, dq_slot,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, ks_b, ks_t, ks_h,
    scale, length, past, window, chunks, blocks, first_block, heads, groups,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SINKS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr, WINDOWED: tl.constexpr, SEPARATE: tl.constexpr,
):  # fmt: skip
    """dq [T, HQ, D] of one block, from what `scores_kernel` left; programs (block, query head).

    SEPARATE: the part through the slots goes to dq_slot.
    """
    sequence, block = locate(first_block + tl.program_id(0), table, blocks, PACKED)
    if sequence < 0:
        return
    query_head, query_heads = tl.program_id(1), heads * groups
    head = query_head // groups
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    offset = window - past
    chunk = block - (offset + CHUNK - 1) // CHUNK
    u0 = chunk * CHUNK
    line = tl.arange(0, CHUNK)
    u = u0 + line
    real = (u + offset >= 0) & (u < count - offset)
    token0, query0 = key_start + u0, start + u0 + offset
    to = (row * length + query0) * query_heads + query_head
    to_line = line * query_heads
    acc = tl.zeros([CHUNK, KEY], tl.float32)
    if chunk >= 0:
        saved = (tl.program_id(0).to(tl.int64) * query_heads + query_head) * CHUNK
        kept = key_scores + saved * (CHUNK + 2 * SLOTS)
        at = line * (CHUNK + 2 * SLOTS)
        score = load_rows(kept, at, real, CHUNK, CHUNK)
        keys = load_rows(k_slot + row * ks_b + token0 * ks_t + head * ks_h, line * ks_t, real, D, KEY)
        acc = matmul(score, keys, DTYPE, PRECISION)
        score = load_rows(kept + CHUNK, at, real, SLOTS, SLOTS)
        held = load_slots(slot_key + ((base + chunk) * heads + head) * M * D, True, M, SLOTS, D, KEY)
        acc += matmul(score, held, DTYPE, PRECISION)
        if S > 0:
            score = load_rows(sink_scores + saved * S, line * S, real, S, SINKS)
            held = load_slots(sink_key + head * S * D, True, S, SINKS, D, KEY)
            acc += matmul(score, held, DTYPE, PRECISION)
    if SEPARATE:
        store_rows(dq_slot + to * D, to_line * D, real, acc, D, KEY)
        acc = tl.zeros([CHUNK, KEY], tl.float32)
    if WINDOWED:
        begin = 0
        if LATE:
            begin = tl.load(first + sequence).to(tl.int32)
        query = load_rows(q + row * q_b + query0 * q_t + query_head * q_h, line * q_t, real, D, KEY)
        grad = load_rows(grad_out + to * DV, to_line * DV, real, DV, VALUE)
        total = tl.load(lse + to + to_line, mask=real, other=float("inf"))
        taken_off = tl.load(delta + to + to_line, mask=real, other=0.0)
        near_key, near_value = k + row * k_b + head * k_h, v + row * v_b + head * v_h
        high = tl.minimum(u0 + CHUNK + window, past + count)
        for step in range(tl.maximum(u0 + 1, begin), high, BLOCK):
            near = tl.arange(0, BLOCK)
            token = step + near
            keys = load_rows(near_key + (key_start + step) * k_t, near * k_t, token < high, D, KEY)
            values = load_rows(near_value + (key_start + step) * v_t, near * v_t, token < high, DV, VALUE)
            score = matmul(query, tl.trans(keys), DTYPE, PRECISION) * (scale * LOG2_E) - total[:, None]
            inside = (token[None, :] - (u + 1)[:, None]).to(tl.uint32) < window.to(tl.uint32)
            weight = tl.exp2(tl.where(inside, score, float("-inf")))
            dscore = matmul(grad, tl.trans(values), DTYPE, PRECISION) - taken_off[:, None]
            acc += matmul(weight * (dscore * scale), keys, DTYPE, PRECISION)
    store_rows(dq + to * D, to_line * D, real, acc, D, KEY)
