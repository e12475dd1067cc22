"""Gradients of one block of queries: sink, slots and window again, from the saved log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import (
    LOG2_E,
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
def attended(
    query,
    grad,
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
    total,
    taken_off,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the queries' gradients gain from the BLOCK window keys from token `step` on; MASKED as in `attend`."""
    near = tl.arange(0, BLOCK)
    there = step + near < high if MASKED else None
    keys = load_rows(near_key + (key_start + step) * k_t, near * k_t, there, D, KEY)
    values = load_rows(near_value + (key_start + step) * v_t, near * v_t, there, DV, VALUE)
    score = matmul(query, tl.trans(keys), DTYPE, PRECISION) * (scale * LOG2_E) - total[:, None]
    if MASKED:
        inside = ((step + near)[None, :] - (u + 1)[:, None]).to(tl.uint32) < window.to(tl.uint32)
        score = tl.where(inside, score, float("-inf"))
    weight = tl.exp2(score)
    dscore = matmul(grad, tl.trans(values), DTYPE, PRECISION) - taken_off[:, None]
    return matmul(weight * (dscore * scale), keys, DTYPE, PRECISION)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block"])
def query_kernel(
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
    grad_out,
    grad_mass,
    delta,
    dq,
    dq_slot,
    key_scores,
    value_scores,
    rise_grads,
    sink_scores,
    sink_weights,
    borders,
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
    first_block,
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
    WEIGHED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dq [T, HQ, D] and delta [T, HQ] of one block; programs and options as in `forward_kernel`.

    delta = out . grad_out + mass * grad_mass is what the softmax takes off every score's gradient. SEPARATE: the part
    through the slots goes to dq_slot. WEIGHED: there is a grad_mass.

    For `slots_kernel`, of the blocks from first_block on: key_scores [blocks, HQ, CHUNK, CHUNK + SLOTS] is what
    multiplies the chunk's tokens, and the slots before it times `border`, in the gradient of a query; value_scores is
    the same for values and outputs; sink_scores, sink_weights [blocks, HQ, CHUNK, S] are the same for the sinks.
    rise_grads [blocks, HQ, CHUNK, SLOTS]: gradients of L_i. borders [blocks, H, passes, SLOTS]: `border` of every pass.
    """
    rows: tl.constexpr = HEADS * CHUNK
    sequence, block = locate(first_block + tl.program_id(0), table, blocks, PACKED)
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
    token0, query0 = key_start + u0, start + u0 + offset
    near_key, near_value = k + row * k_b + far(head, k_h), v + row * v_b + far(head, v_h)
    place, block_head = (base + chunk) * heads + head, tl.program_id(0).to(tl.int64) * heads + head
    committed = here & (u0 + token < count - offset)
    gate_at = log_gate + row * g_b + token0 * g_t + far(head, g_h)
    seen = token[None, :] <= line[:, None]
    needs_subchunks = is_harsh(decay + place * M, here, M, SLOTS)
    for part in tl.range(0, 1 + needs_subchunks * (CHUNK // PART - 1), disable_licm=True):
        mine = real & in_pass(line, part, needs_subchunks)
        gate = load_gates(gate_at, token * g_t, committed, M, SLOTS)
        rise = rise_of(gate, part, needs_subchunks, CHUNK, HEADS)
        border = border_of(gate, part, needs_subchunks, CHUNK)
        held_key = load_held(slot_key + place * M * D, border, here, M, SLOTS, D, KEY).to(GATED)
        held_value = load_held(slot_value + place * M * DV, border, here, M, SLOTS, DV, VALUE).to(GATED)
        border_at = borders + (block_head * (CHUNK // PART) + part) * SLOTS
        tl.store(border_at + tl.arange(0, SLOTS), border)
        fall = (share_of(gate, part, needs_subchunks, CHUNK) * taken(gate, DTYPE)).to(GATED)
        for group in tl.range(0, groups, HEADS, disable_licm=True):
            shown = mine & (group + member < groups)
            query_head = head * groups + group
            to = (row * length + query0) * query_heads + query_head
            to_line = line * query_heads + member
            grad = load_rows(grad_out + to * DV, to_line * DV, shown, DV, VALUE)
            result = load_rows(out + to * DV, to_line * DV, shown, DV, VALUE)
            taken_off = tl.sum(result.to(tl.float32) * grad.to(tl.float32), 1)
            off_slots = taken_off
            if WEIGHED:
                off_mass = tl.load(grad_mass + to + to_line, mask=shown, other=0.0).to(tl.float32)
                taken_off += tl.load(mass + to + to_line, mask=shown, other=0.0) * off_mass
                off_slots = taken_off - off_mass
            tl.store(delta + to + to_line, taken_off, mask=shown)
            total = tl.load(lse + to + to_line, mask=shown, other=float("inf"))
            query_at = q_slot + row * qs_b + query0 * qs_t + far(query_head, qs_h)
            query = load_rows(query_at, line * qs_t + member * qs_h, shown, D, KEY)
            acc = tl.zeros([rows, KEY], tl.float32)
            if here:
                saved = (block_head * groups + group) * CHUNK
                kept_line = tl.arange(0, rows)
                key_at = k_slot + row * ks_b + token0 * ks_t + far(head, ks_h)
                keys = load_rows(key_at, token * ks_t, committed, D, KEY)
                dots = tl.where(seen, matmul(query, tl.trans(keys), DTYPE, PRECISION), 0.0)
                score = matmul(query, tl.trans(held_key), GATED, PRECISION) + matmul(dots, fall, GATED, PRECISION)
                score *= rise * scale
                weight = tl.exp2(score * LOG2_E - total[:, None])
                if M < SLOTS:
                    weight = tl.where((tl.arange(0, SLOTS) < M)[None, :], weight, 0.0)
                if LATE:
                    weight = tl.where((u >= live_from)[:, None], weight, 0.0)
                values = load_rows(near_value + token0 * v_t, token * v_t, committed, DV, VALUE)
                reach = tl.where(seen, matmul(grad, tl.trans(values), DTYPE, PRECISION), 0.0)
                dspread = matmul(grad, tl.trans(held_value), GATED, PRECISION) + matmul(reach, fall, GATED, PRECISION)
                dspread *= rise
                dscore = weight * (dspread - off_slots[:, None])
                change = dscore * score + weight * dspread
                store_rows(rise_grads + saved * SLOTS, kept_line * SLOTS, shown, change, SLOTS, SLOTS)

                at = kept_line * (CHUNK + SLOTS)
                kept = value_scores + saved * (CHUNK + SLOTS)
                spread = (weight * rise).to(GATED)
                store_rows(kept + CHUNK, at, shown, spread, SLOTS, SLOTS)
                back = tl.where(seen, matmul(spread, tl.trans(fall), GATED, PRECISION), 0.0)
                store_rows(kept, at, shown, back, CHUNK, CHUNK)
                kept = key_scores + saved * (CHUNK + SLOTS)
                spread = (dscore * (rise * scale)).to(GATED)
                store_rows(kept + CHUNK, at, shown, spread, SLOTS, SLOTS)
                back = tl.where(seen, matmul(spread, tl.trans(fall), GATED, PRECISION), 0.0)
                store_rows(kept, at, shown, back, CHUNK, CHUNK)
                acc = matmul(back, keys, DTYPE, PRECISION) + matmul(spread, held_key, GATED, PRECISION)
                if S > 0:
                    sink = load_slots(sink_key + head * S * D, here, S, SINKS, D, KEY)
                    score = matmul(query, tl.trans(sink), DTYPE, PRECISION) * (scale * LOG2_E) - total[:, None]
                    weight = tl.where((tl.arange(0, SINKS) < S)[None, :], tl.exp2(score), 0.0)
                    if LATE:
                        weight = tl.where((u >= live_from)[:, None], weight, 0.0)
                    other = load_slots(sink_value + head * S * DV, here, S, SINKS, DV, VALUE)
                    dsink = (matmul(grad, tl.trans(other), DTYPE, PRECISION) - off_slots[:, None]) * weight * scale
                    store_rows(sink_scores + saved * S, kept_line * S, shown, dsink, S, SINKS)
                    store_rows(sink_weights + saved * S, kept_line * S, shown, weight, S, SINKS)
                    acc += matmul(dsink, sink, DTYPE, PRECISION)
            if SEPARATE:
                store_rows(dq_slot + to * D, to_line * D, shown, acc, D, KEY)
                acc = tl.zeros([rows, KEY], tl.float32)
                query_at = q + row * q_b + query0 * q_t + far(query_head, q_h)
                query = load_rows(query_at, line * q_t + member * q_h, shown, D, KEY)
            if WINDOWED:
                high = tl.minimum(u0 + CHUNK + window, past + count)
                low = tl.maximum(u0 + 1, begin)
                inner = 0
                if WIDE:
                    # Between the first CHUNK keys and those beyond the first query's window all queries see all.
                    inner = whole_blocks(low + CHUNK, u0 + 1 + window, BLOCK)
                    for step in tl.range(low + CHUNK, low + CHUNK + inner, BLOCK, num_stages=STAGES):
                        acc += attended(
                            query,
                            grad,
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
                            total,
                            taken_off,
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
                    acc += attended(
                        query,
                        grad,
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
                        total,
                        taken_off,
                        D,
                        DV,
                        KEY,
                        VALUE,
                        BLOCK,
                        DTYPE,
                        PRECISION,
                        MASKED=True,
                    )
            store_rows(dq + to * D, to_line * D, shown, acc, D, KEY)
