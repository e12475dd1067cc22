"""What a chunk's tokens, their gates and the slots before it receive from the chunk's own queries, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import (
    LOG2_E,
    PART,
    bounds,
    chunk_of,
    far,
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
    v,
    q_slot,
    k_slot,
    log_gate,
    decay,
    grad_out,
    key_scores,
    value_scores,
    rise_grads,
    sink_scores,
    sink_weights,
    borders,
    cu,
    chunk_base,
    table,
    dk_slot,
    dv,
    dslot_key,
    dslot_value,
    dsinks,
    dgate,
    v_b,
    v_t,
    v_h,
    qs_b,
    qs_t,
    qs_h,
    ks_b,
    ks_t,
    ks_h,
    g_b,
    g_t,
    g_h,
    length,
    past,
    window,
    chunks,
    blocks,
    first_block,
    key_length,
    heads,
    groups,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SINKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dk_slot, dv [past + T, H, ...] and dgate [past + T, H, M] of one chunk's tokens, dslot_* [chunks, H, M, ...] of
    the slots before it and dsinks [chunks, H, S D + S DV] float32, keys before values, from what `query_kernel` left.
    Programs: (block, KV head).

    A log-gate reaches the scores through running sums: of the queries (`rise`) and of the tokens (`fall`). A sum over
    later tokens of the chunk turns their gradients into that of the gates.
    """
    sequence, block = locate(first_block + tl.program_id(0), table, blocks, PACKED)
    if sequence < 0:
        return
    offset = window - past
    chunk = chunk_of(block, offset, CHUNK)
    head, query_heads = tl.program_id(1), heads * groups
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    u0 = chunk * CHUNK
    committed = count - offset - u0
    if (chunk < 0) | (committed <= 0):
        return
    line = tl.arange(0, CHUNK)
    there = line < committed
    token0, query0 = key_start + u0, start + u0 + offset
    place, block_head = (base + chunk) * heads + head, tl.program_id(0).to(tl.int64) * heads + head
    to, query_head = (row * key_length + token0) * heads + head, head * groups
    keys = k_slot + row * ks_b + token0 * ks_t + far(head, ks_h)
    values = v + row * v_b + token0 * v_t + far(head, v_h)
    queries = q_slot + row * qs_b + query0 * qs_t + far(query_head, qs_h)
    grads = grad_out + ((row * length + query0) * query_heads + query_head) * DV
    saved = block_head * groups * CHUNK
    needs_subchunks = is_harsh(decay + place * M, True, M, SLOTS)
    for part in tl.range(0, 1 + needs_subchunks * (CHUNK // PART - 1), disable_licm=True):
        mine = there & in_pass(line, part, needs_subchunks)
        border = tl.load(borders + (block_head * (CHUNK // PART) + part) * SLOTS + tl.arange(0, SLOTS))
        dfall = _collect(
            queries,
            qs_t,
            qs_h,
            keys,
            ks_t,
            key_scores + saved * (CHUNK + SLOTS),
            sink_scores + saved * S,
            border,
            dk_slot + to * D,
            dslot_key + place * M * D,
            dsinks + place * S * (D + DV),
            mine,
            there,
            part,
            heads,
            groups,
            tl.zeros([CHUNK, SLOTS], tl.float32),
            M,
            D,
            S,
            SLOTS,
            KEY,
            SINKS,
            CHUNK,
            DTYPE,
            GATED,
            PRECISION,
        )
        dfall = _collect(
            grads,
            query_heads * DV,
            DV,
            values,
            v_t,
            value_scores + saved * (CHUNK + SLOTS),
            sink_weights + saved * S,
            border,
            dv + to * DV,
            dslot_value + place * M * DV,
            dsinks + place * S * (D + DV) + S * D,
            mine,
            there,
            part,
            heads,
            groups,
            dfall,
            M,
            DV,
            S,
            SLOTS,
            VALUE,
            SINKS,
            CHUNK,
            DTYPE,
            GATED,
            PRECISION,
        )
        gate = load_gates(log_gate + row * g_b + token0 * g_t + far(head, g_h), line * g_t, there, M, SLOTS)
        dshare = dfall * share_of(gate, part, needs_subchunks, CHUNK)
        change = -taken(gate, DTYPE) * dshare
        for group in range(0, groups):
            rise_at = rise_grads + (saved + group * CHUNK) * SLOTS
            change += load_rows(rise_at, line * SLOTS, mine, SLOTS, SLOTS).to(tl.float32)
        change = sum_from(change, CHUNK, DTYPE) - tl.exp2(gate.to(tl.float32) * LOG2_E) * dshare
        if part > 0:
            change += load_rows(dgate + to * M, line * (heads * M), there, M, SLOTS).to(tl.float32)
            tl.debug_barrier()
        store_rows(dgate + to * M, line * (heads * M), there, change, M, SLOTS)
        tl.debug_barrier()


@triton.jit
def _collect(
    x,
    x_t,
    x_h,
    y,
    y_t,
    scores,
    sink_scores,
    border,
    dtoken,
    dslot,
    dsink,
    mine,
    there,
    part,
    heads,
    groups,
    dfall,
    M: tl.constexpr,
    DIM: tl.constexpr,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The keys' or the values' side of one pass: transposed scores times queries or gradients of outputs x.

    Returns dfall plus what `fall` [CHUNK, SLOTS] receives. After the first pass, adds to what is there.
    """
    line = tl.arange(0, CHUNK)
    seen = line[None, :] <= line[:, None]
    tokens = load_rows(y, line * y_t, there, DIM, WIDTH)
    dtokens = tl.zeros([CHUNK, WIDTH], tl.float32)
    dslots = tl.zeros([SLOTS, WIDTH], tl.float32)
    dsinks = tl.zeros([SINKS, WIDTH], tl.float32)
    for group in range(0, groups):
        rows = load_rows(x + far(group, x_h), line * x_t, mine, DIM, WIDTH)
        kept, at = scores + group * (CHUNK * (CHUNK + SLOTS)), line * (CHUNK + SLOTS)
        back = load_rows(kept, at, mine, CHUNK, CHUNK)
        score = load_rows(kept + CHUNK, at, mine, SLOTS, SLOTS)
        dtokens += matmul(tl.trans(back), rows, DTYPE, PRECISION)
        dslots += matmul(tl.trans(score), rows, GATED, PRECISION)
        dots = tl.where(seen, matmul(rows, tl.trans(tokens), DTYPE, PRECISION), 0.0).to(GATED)
        dfall += matmul(tl.trans(dots), score, GATED, PRECISION)
        if S > 0:
            sink_score = load_rows(sink_scores + group * (CHUNK * S), line * S, mine, S, SINKS)
            dsinks += matmul(tl.trans(sink_score), rows, DTYPE, PRECISION)
    dslots *= border[:, None]
    if part > 0:
        dtokens += load_rows(dtoken, line * (heads * DIM), there, DIM, WIDTH).to(tl.float32)
        dslots += load_slots(dslot, True, M, SLOTS, DIM, WIDTH).to(tl.float32)
        if S > 0:
            dsinks += load_slots(dsink, True, S, SINKS, DIM, WIDTH)
        tl.debug_barrier()
    store_rows(dtoken, line * (heads * DIM), there, dtokens, DIM, WIDTH)
    store_slots(dslot, dslots, M, SLOTS, DIM, WIDTH)
    if S > 0:
        store_slots(dsink, dsinks, S, SINKS, DIM, WIDTH)
    return dfall
