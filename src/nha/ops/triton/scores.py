"""The slots' scores of one block of queries again, from the saved log-sum-exp, and their gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import (
    LOG2_E,
    PART,
    border_of,
    bounds,
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
)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block"])
def scores_kernel(
    v, q_slot, k_slot, log_gate, slot_key, slot_value, decay, sink_key, sink_value, first, cu, chunk_base, table,
    out, mass, lse, grad_out, grad_mass, delta, key_scores, value_scores, sink_scores, sink_weights, drise, borders,
    v_b, v_t, v_h, qs_b, qs_t, qs_h, ks_b, ks_t, ks_h, g_b, g_t, g_h,
    scale, length, past, window, chunks, blocks, first_block, heads, groups,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, SINKS: tl.constexpr,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, DTYPE: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, LATE: tl.constexpr, LIVE: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """delta [T, HQ] of one block, and for the blocks from first_block on, with programs (block, KV head):

    key_scores [blocks, HQ, CHUNK, CHUNK + SLOTS]: what multiplies the chunk's tokens, and the slots before it times
    `border`, in the gradient of a query; value_scores: the same for values and outputs.
    sink_scores, sink_weights [blocks, HQ, CHUNK, S]: what multiplies the sink in either.
    drise [blocks, H, CHUNK, SLOTS]: the gradient of L_i. borders [blocks, H, passes, SLOTS]: `border` of every pass.

    delta = out . grad_out + mass * grad_mass is what the softmax takes off every score's gradient. LATE and LIVE as in
    `forward_kernel`; WEIGHED: there is a grad_mass.
    """
    rows: tl.constexpr = HEADS * CHUNK
    sequence, block = locate(first_block + tl.program_id(0), table, blocks, PACKED)
    if sequence < 0:
        return
    head = tl.program_id(1)
    row, start, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    offset = window - past
    chunk = block - (offset + CHUNK - 1) // CHUNK
    here = chunk >= 0
    u0 = chunk * CHUNK
    token, line = tl.arange(0, CHUNK), tl.arange(0, rows) % CHUNK
    member = tl.arange(0, rows) // CHUNK
    real = (u0 + line + offset >= 0) & (u0 + line < count - offset)
    live_from = 0
    if LATE and not LIVE:
        live_from = tl.load(first + sequence).to(tl.int32)
    token0, query0, query_heads = key_start + u0, start + u0 + offset, heads * groups
    place = (base + chunk) * heads + head
    committed = here & (u0 + token < count - offset)
    gate_at = log_gate + row * g_b + token0 * g_t + head * g_h
    keys = load_rows(k_slot + row * ks_b + token0 * ks_t + head * ks_h, token * ks_t, committed, D, KEY)
    values = load_rows(v + row * v_b + token0 * v_t + head * v_h, token * v_t, committed, DV, VALUE)
    seen = token[None, :] <= line[:, None]
    block_head = tl.program_id(0).to(tl.int64) * heads + head
    harsh = is_harsh(decay + place * M, here, M, SLOTS)
    for part in tl.range(0, 1 + harsh * (CHUNK // PART - 1), disable_licm=True):
        mine = real & in_pass(line, part, harsh)
        gate = load_gates(gate_at, token * g_t, committed, M, SLOTS)
        rise = rise_of(gate, part, harsh, CHUNK, HEADS)
        border = border_of(gate, part, harsh, CHUNK)
        held_key = load_held(slot_key + place * M * D, border, here, M, SLOTS, D, KEY).to(GATED)
        held_value = load_held(slot_value + place * M * DV, border, here, M, SLOTS, DV, VALUE).to(GATED)
        border_at = borders + (block_head * (CHUNK // PART) + part) * SLOTS
        tl.store(border_at + tl.arange(0, SLOTS), border)
        fall = (share_of(gate, part, harsh, CHUNK) * taken(gate, DTYPE == tl.float32)).to(GATED)
        change = tl.zeros([rows, SLOTS], tl.float32)
        for group in tl.range(0, groups, HEADS, disable_licm=True):
            shown = mine & (group + member < groups)
            query_head = head * groups + group
            to = (row * length + query0) * query_heads + query_head
            to_line = line * query_heads + member
            grad = load_rows(grad_out + to * DV, to_line * DV, shown, DV, VALUE)
            result = load_rows(out + to * DV, to_line * DV, shown, DV, VALUE)
            taken_off = tl.sum(result.to(tl.float32) * grad.to(tl.float32), 1)
            off_mass = tl.zeros([rows], tl.float32)
            if WEIGHED:
                off_mass = tl.load(grad_mass + to + to_line, mask=shown, other=0.0).to(tl.float32)
                taken_off += tl.load(mass + to + to_line, mask=shown, other=0.0) * off_mass
            tl.store(delta + to + to_line, taken_off, mask=shown)
            if here:
                taken_off -= off_mass
                total = tl.load(lse + to + to_line, mask=shown, other=float("inf"))
                query_at = q_slot + row * qs_b + query0 * qs_t + query_head * qs_h
                query = load_rows(query_at, line * qs_t + member * qs_h, shown, D, KEY)
                saved = (block_head * groups + group) * CHUNK
                kept_line = tl.arange(0, rows)
                if S > 0:
                    sink = load_slots(sink_key + head * S * D, here, S, SINKS, D, KEY)
                    score = matmul(query, tl.trans(sink), DTYPE, PRECISION) * (scale * LOG2_E) - total[:, None]
                    weight = tl.where((tl.arange(0, SINKS) < S)[None, :], tl.exp2(score), 0.0)
                    if LATE:
                        weight = tl.where((u0 + line >= live_from)[:, None], weight, 0.0)
                    sink = load_slots(sink_value + head * S * DV, here, S, SINKS, DV, VALUE)
                    dscore = matmul(grad, tl.trans(sink), DTYPE, PRECISION) - taken_off[:, None]
                    store_rows(sink_scores + saved * S, kept_line * S, shown, dscore * weight * scale, S, SINKS)
                    store_rows(sink_weights + saved * S, kept_line * S, shown, weight, S, SINKS)
                dots = tl.where(seen, matmul(query, tl.trans(keys), DTYPE, PRECISION), 0.0)
                score = matmul(query, tl.trans(held_key), GATED, PRECISION) + matmul(dots, fall, GATED, PRECISION)
                score *= rise * scale
                weight = tl.exp2(score * LOG2_E - total[:, None])
                if M < SLOTS:
                    weight = tl.where((tl.arange(0, SLOTS) < M)[None, :], weight, 0.0)
                if LATE:
                    weight = tl.where((u0 + line >= live_from)[:, None], weight, 0.0)
                reach = tl.where(seen, matmul(grad, tl.trans(values), DTYPE, PRECISION), 0.0)
                dspread = matmul(grad, tl.trans(held_value), GATED, PRECISION) + matmul(reach, fall, GATED, PRECISION)
                dspread *= rise
                dscore = weight * (dspread - taken_off[:, None])
                change += dscore * score + weight * dspread

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
        summed = tl.sum(tl.reshape(change, [HEADS, CHUNK, SLOTS]), 0)
        own = committed & in_pass(token, part, harsh)
        store_rows(drise + block_head * (CHUNK * SLOTS), token * SLOTS, own, summed, SLOTS, SLOTS)
