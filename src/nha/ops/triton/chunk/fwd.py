"""Outputs: sink, slots and window of one block of queries under one online softmax.

Sink and slots are the first key block of the online softmax, the window's keys the following ones; nothing of size
T x M or T x W is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import (
    PART,
    around,
    border_of,
    bounds,
    chunk_of,
    far,
    in_pass,
    is_harsh,
    load_gates,
    load_held,
    load_rows,
    load_slots,
    locate,
    matmul,
    rise_of,
    share_of,
    store_rows,
    taken,
    whole_blocks,
)


@triton.jit
def attend(
    query,
    near_key,
    near_value,
    k_t,
    v_t,
    key_start,
    step,
    high,
    u,
    window,
    scale,
    top,
    norm,
    old,
    acc,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(top, norm, old, acc) of the online softmax after the BLOCK window keys from token `step` on.

    MASKED: only those below `high` are there, and each query sees those of its own window.
    """
    near = tl.arange(0, BLOCK)
    there = step + near < high if MASKED else None
    other = load_rows(near_key + (key_start + step) * k_t, near * k_t, there, D, KEY)
    score = matmul(query, tl.trans(other), DTYPE, PRECISION) * scale
    if MASKED:
        # One unsigned comparison for 0 < step + near - u <= window.
        inside = ((step + near)[None, :] - (u + 1)[:, None]).to(tl.uint32) < window.to(tl.uint32)
        score = tl.where(inside, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    shrink = tl.exp2(top - safe)
    weight = tl.exp2(score - safe[:, None])
    norm = norm * shrink + tl.sum(weight, 1)
    old *= shrink
    other = load_rows(near_value + (key_start + step) * v_t, near * v_t, there, DV, VALUE)
    acc = acc * shrink[:, None] + matmul(weight, other, DTYPE, PRECISION)
    return higher, norm, old, acc


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks"])
def forward_kernel(
    q,
    k,
    v,
    q_slot,
    k_slot,
    log_gate,
    slot_key,
    slot_value,
    decay,
    sink_key,
    sink_value,
    first,
    cu,
    chunk_base,
    table,
    out,
    mass,
    lse,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
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
    scale,
    length,
    past,
    window,
    chunks,
    blocks,
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
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    LATE: tl.constexpr,
    LIVE: tl.constexpr,
    WINDOWED: tl.constexpr,
    SEPARATE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out [T, HQ, DV], mass [T, HQ], lse [T, HQ] (base 2) of one block; programs (block, KV head).

    `scale` includes log2(e). LATE: keys before `first` are blank, and queries before it see no slots unless they are
    LIVE. SEPARATE: q_slot is not q. WIDE: window keys that all queries of the block see have a loop without masks.
    STAGES: loads of window keys under way.
    """
    rows: tl.constexpr = HEADS * CHUNK
    sequence, block = locate(tl.program_id(0), table, blocks, PACKED)
    if sequence < 0:
        return
    head, query_heads = tl.program_id(1), heads * groups
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    offset = window - past
    chunk = chunk_of(block, offset, CHUNK)
    here = chunk >= 0
    u0 = chunk * CHUNK
    token, line = tl.arange(0, CHUNK), tl.arange(0, rows) % CHUNK
    member = tl.arange(0, rows) // CHUNK
    u = u0 + line
    real = (u + offset >= 0) & (u < count - offset)
    begin, live_from = 0, 0
    if LATE:
        begin = tl.load(first + sequence).to(tl.int32)
        if not LIVE:
            live_from = begin
    committed = here & (u0 + token < count - offset)
    place = (base + chunk) * heads + head
    token0, query0 = key_start + u0, start + u0 + offset
    near_key, near_value = k + row * k_b + far(head, k_h), v + row * v_b + far(head, v_h)
    gate = load_gates(log_gate + row * g_b + token0 * g_t + far(head, g_h), token * g_t, committed, M, SLOTS)
    keys = load_rows(k_slot + row * ks_b + token0 * ks_t + far(head, ks_h), token * ks_t, committed, D, KEY)
    values = load_rows(near_value + token0 * v_t, token * v_t, committed, DV, VALUE)
    seen = token[None, :] <= line[:, None]
    needs_subchunks = is_harsh(decay + place * M, here, M, SLOTS)
    for part in tl.range(0, 1 + needs_subchunks * (CHUNK // PART - 1), disable_licm=True):
        mine = real & in_pass(line, part, needs_subchunks)
        rise = rise_of(gate, part, needs_subchunks, CHUNK, HEADS)
        border = border_of(gate, part, needs_subchunks, CHUNK)
        held_key = load_held(slot_key + place * M * D, border, here, M, SLOTS, D, KEY).to(GATED)
        held_value = load_held(slot_value + place * M * DV, border, here, M, SLOTS, DV, VALUE).to(GATED)
        fall = (share_of(gate, part, needs_subchunks, CHUNK) * taken(gate, DTYPE)).to(GATED)
        for group in tl.range(0, groups, HEADS, disable_licm=True):
            shown = mine & (group + member < groups)
            query_head = head * groups + group
            query_at = q_slot + row * qs_b + query0 * qs_t + far(query_head, qs_h)
            query = load_rows(query_at, line * qs_t + member * qs_h, shown, D, KEY)
            top = tl.full([rows], float("-inf"), tl.float32)
            norm = tl.zeros([rows], tl.float32)
            old = tl.zeros([rows], tl.float32)
            acc = tl.zeros([rows, VALUE], tl.float32)
            if here:
                dots = tl.where(seen, matmul(query, tl.trans(keys), DTYPE, PRECISION), 0.0)
                score = matmul(query, tl.trans(held_key), GATED, PRECISION) + matmul(dots, fall, GATED, PRECISION)
                score *= rise * scale
                if M < SLOTS:
                    score = tl.where((tl.arange(0, SLOTS) < M)[None, :], score, float("-inf"))
                if LATE:
                    score = tl.where((u >= live_from)[:, None], score, float("-inf"))
                top = tl.max(score, 1)
                if S > 0:
                    sink = load_slots(sink_key + head * S * D, here, S, SINKS, D, KEY)
                    sink_score = matmul(query, tl.trans(sink), DTYPE, PRECISION) * scale
                    sink_score = tl.where((tl.arange(0, SINKS) < S)[None, :], sink_score, float("-inf"))
                    if LATE:
                        sink_score = tl.where((u >= live_from)[:, None], sink_score, float("-inf"))
                    top = tl.maximum(top, tl.max(sink_score, 1))
                safe = tl.where(u >= live_from, top, 0.0) if LATE else top
                weight = tl.exp2(score - safe[:, None])
                norm = tl.sum(weight, 1)
                if S > 0:
                    sink_weight = tl.exp2(sink_score - safe[:, None])
                    norm += tl.sum(sink_weight, 1)
                    sink = load_slots(sink_value + head * S * DV, here, S, SINKS, DV, VALUE)
                    acc = matmul(sink_weight, sink, DTYPE, PRECISION)
                old = norm
                spread = (weight * rise).to(GATED)
                acc += matmul(spread, held_value, GATED, PRECISION)
                read = tl.where(seen, matmul(spread, tl.trans(fall), GATED, PRECISION), 0.0)
                acc += matmul(read, values, DTYPE, PRECISION)
            if WINDOWED:
                if SEPARATE:
                    query_at = q + row * q_b + query0 * q_t + far(query_head, q_h)
                    query = load_rows(query_at, line * q_t + member * q_h, shown, D, KEY)
                high = tl.minimum(u0 + CHUNK + window, past + count)
                low = tl.maximum(u0 + 1, begin)
                inner = 0
                if WIDE:
                    # Between the first CHUNK keys and those beyond the first query's window all queries see all.
                    inner = whole_blocks(low + CHUNK, u0 + 1 + window, BLOCK)
                    for step in tl.range(low + CHUNK, low + CHUNK + inner, BLOCK, num_stages=STAGES):
                        top, norm, old, acc = attend(
                            query,
                            near_key,
                            near_value,
                            k_t,
                            v_t,
                            key_start,
                            step,
                            high,
                            u,
                            window,
                            scale,
                            top,
                            norm,
                            old,
                            acc,
                            D,
                            DV,
                            KEY,
                            VALUE,
                            BLOCK,
                            DTYPE,
                            PRECISION,
                            MASKED=False,
                        )
                for at in tl.range(low, high - inner, BLOCK, num_stages=STAGES):
                    step = around(at, low + CHUNK, inner) if WIDE else at
                    top, norm, old, acc = attend(
                        query,
                        near_key,
                        near_value,
                        k_t,
                        v_t,
                        key_start,
                        step,
                        high,
                        u,
                        window,
                        scale,
                        top,
                        norm,
                        old,
                        acc,
                        D,
                        DV,
                        KEY,
                        VALUE,
                        BLOCK,
                        DTYPE,
                        PRECISION,
                        MASKED=True,
                    )
            to = (row * length + query0) * query_heads + query_head
            to_line = line * query_heads + member
            norm = tl.where(norm > 0, norm, 1.0)
            store_rows(out + to * DV, to_line * DV, shown, acc * (1 / norm)[:, None], DV, VALUE)
            tl.store(lse + to + to_line, top + tl.log2(norm), mask=shown)
            tl.store(mass + to + to_line, old / norm, mask=shown)
