"""What the tokens of a chunk, the slots before it and their gates receive from the chunk's own queries, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import (
    LOG2_E,
    PART,
    bounds,
    in_pass,
    is_harsh,
    load_gates,
    load_rows,
    load_slots,
    locate,
    matmul,
    share_of,
    store_rows,
    store_slots,
    sum_from,
    taken,
)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block", "key_length"])
def slots_kernel(
    query, grad, decay, key_scores, value_scores, sink_scores, sink_weights, borders, cu, chunk_base, table,
    dkey, dvalue, dslot_key, dslot_value, dsink_key, dsink_value, q_b, q_t, q_h, o_b, o_t, o_h,
    length, past, window, chunks, blocks, first_block, key_length, heads, groups,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SINKS: tl.constexpr, CHUNK: tl.constexpr,
    DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dkey, dvalue [past + T, H, ...] of one chunk's tokens, dslot_* [chunks, H, M, ...] of the slots before it and
    dsink_* [chunks, H, S, ...] float32, from what `scores_kernel` left; programs (block, KV head, keys or values).
    """
    sequence, block = locate(first_block + tl.program_id(0), table, blocks, PACKED)
    if sequence < 0:
        return
    offset = window - past
    chunk = block - (offset + CHUNK - 1) // CHUNK
    head = tl.program_id(1)
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    u0 = chunk * CHUNK
    committed = count - offset - u0
    if (chunk < 0) | (committed <= 0):
        return
    place = (base + chunk) * heads + head
    passes = 1 + is_harsh(decay + place * M, True, M, SLOTS) * (CHUNK // PART - 1)
    query0, to = start + u0 + offset, (row * key_length + key_start + u0) * heads + head
    if tl.program_id(2) == 0:
        at = query + row * q_b + query0 * q_t + head * groups * q_h
        _collect(
            at, q_t, q_h, key_scores, sink_scores, borders, dkey + to * D, dslot_key + place * M * D,
            dsink_key + place * S * D, committed, passes, heads, groups,
            M, D, S, SLOTS, KEY, SINKS, CHUNK, DTYPE, GATED, PRECISION,
        )  # fmt: skip
    else:
        at = grad + row * o_b + query0 * o_t + head * groups * o_h
        _collect(
            at, o_t, o_h, value_scores, sink_weights, borders, dvalue + to * DV, dslot_value + place * M * DV,
            dsink_value + place * S * DV, committed, passes, heads, groups,
            M, DV, S, SLOTS, VALUE, SINKS, CHUNK, DTYPE, GATED, PRECISION,
        )  # fmt: skip


@triton.jit
def _collect(
    x, x_t, x_h, scores, sink_scores, borders, dtoken, dslot, dsink, committed, passes, heads, groups,
    M: tl.constexpr, DIM: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, SINKS: tl.constexpr, CHUNK: tl.constexpr,
    DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One side of `slots_kernel`: the transposed scores of a chunk's queries times their rows of x."""
    line = tl.arange(0, CHUNK)
    there = line < committed
    block_head = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    to_line = line * (heads * DIM)
    for part in range(0, passes):
        mine = there & in_pass(part, (passes > 1).to(tl.int32), CHUNK)
        dtokens = tl.zeros([CHUNK, WIDTH], tl.float32)
        dslots = tl.zeros([SLOTS, WIDTH], tl.float32)
        dsinks = tl.zeros([SINKS, WIDTH], tl.float32)
        for group in range(0, groups):
            rows = load_rows(x + group * x_h, line * x_t, mine, DIM, WIDTH)
            saved = (block_head * groups + group) * CHUNK
            kept, at = scores + saved * (CHUNK + SLOTS), line * (CHUNK + SLOTS)
            score = load_rows(kept, at, mine, CHUNK, CHUNK)
            dtokens += matmul(tl.trans(score), rows, DTYPE, PRECISION)
            score = load_rows(kept + CHUNK, at, mine, SLOTS, SLOTS)
            dslots += matmul(tl.trans(score), rows, GATED, PRECISION)
            if S > 0:
                score = load_rows(sink_scores + saved * S, line * S, mine, S, SINKS)
                dsinks += matmul(tl.trans(score), rows, DTYPE, PRECISION)
        border_at = borders + (block_head * (CHUNK // PART) + part) * SLOTS
        dslots *= tl.load(border_at + tl.arange(0, SLOTS))[:, None]
        if part > 0:
            dtokens += load_rows(dtoken, to_line, there, DIM, WIDTH).to(tl.float32)
            dslots += load_slots(dslot, True, M, SLOTS, DIM, WIDTH).to(tl.float32)
            if S > 0:
                dsinks += load_slots(dsink, True, S, SINKS, DIM, WIDTH)
            tl.debug_barrier()
        store_rows(dtoken, to_line, there, dtokens, DIM, WIDTH)
        store_slots(dslot, dslots, M, SLOTS, DIM, WIDTH)
        if S > 0:
            store_slots(dsink, dsinks, S, SINKS, DIM, WIDTH)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block", "key_length"])
def gates_kernel(
    v, q_slot, k_slot, log_gate, decay, grad_out, key_scores, value_scores, drise, cu, chunk_base, table, dgate,
    v_b, v_t, v_h, qs_b, qs_t, qs_h, ks_b, ks_t, ks_h, g_b, g_t, g_h,
    length, past, window, chunks, blocks, first_block, key_length, heads, groups,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr,
    DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dgate [past + T, H, M] of one chunk, all but what comes through later chunks. Programs (block, KV head).

    A log-gate reaches the scores through running sums: of the queries (`rise`, whose gradient is drise) and of the
    tokens (`fall`). A sum over later tokens of the chunk turns their gradients into that of the gates.
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
    token0, query0 = key_start + u0, start + u0 + offset
    gate_at = log_gate + row * g_b + token0 * g_t + head * g_h
    to = dgate + ((row * key_length + token0) * heads + head) * M
    keys = load_rows(k_slot + row * ks_b + token0 * ks_t + head * ks_h, line * ks_t, there, D, KEY)
    values = load_rows(v + row * v_b + token0 * v_t + head * v_h, line * v_t, there, DV, VALUE)
    harsh = is_harsh(decay + ((base + chunk) * heads + head) * M, True, M, SLOTS)
    for part in range(0, 1 + harsh * (CHUNK // PART - 1)):
        mine = there & in_pass(part, harsh, CHUNK)
        dfall = tl.zeros([CHUNK, SLOTS], tl.float32)
        for group in range(0, groups):
            query_head = head * groups + group
            at = line * (CHUNK + SLOTS)
            saved = (tl.program_id(0).to(tl.int64) * query_heads + query_head) * CHUNK * (CHUNK + SLOTS) + CHUNK
            seen = line[None, :] <= line[:, None]
            query_at = q_slot + row * qs_b + query0 * qs_t + query_head * qs_h
            query = load_rows(query_at, line * qs_t, mine, D, KEY)
            dots = tl.where(seen, matmul(query, tl.trans(keys), DTYPE, PRECISION), 0.0).to(GATED)
            score = load_rows(key_scores + saved, at, mine, SLOTS, SLOTS)
            dfall += matmul(tl.trans(dots), score, GATED, PRECISION)
            grad_at = grad_out + ((row * length + query0) * query_heads + query_head) * DV
            grad = load_rows(grad_at, line * (query_heads * DV), mine, DV, VALUE)
            reach = tl.where(seen, matmul(grad, tl.trans(values), DTYPE, PRECISION), 0.0).to(GATED)
            score = load_rows(value_scores + saved, at, mine, SLOTS, SLOTS)
            dfall += matmul(tl.trans(reach), score, GATED, PRECISION)
        gate = load_gates(gate_at, line * g_t, there, M, SLOTS)
        dshare = dfall * share_of(gate, part, harsh, CHUNK)
        rise_at = drise + (tl.program_id(0).to(tl.int64) * heads + head) * (CHUNK * SLOTS)
        change = load_rows(rise_at, line * SLOTS, mine, SLOTS, SLOTS) - taken(gate, DTYPE == tl.float32) * dshare
        change = sum_from(change, CHUNK, DTYPE == tl.float32) - tl.exp2(gate.to(tl.float32) * LOG2_E) * dshare
        if part > 0:
            change += load_rows(to, line * (heads * M), there, M, SLOTS).to(tl.float32)
            tl.debug_barrier()
        store_rows(to, line * (heads * M), there, change, M, SLOTS)
        tl.debug_barrier()
