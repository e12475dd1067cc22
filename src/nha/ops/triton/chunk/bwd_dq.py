"""Gradients of one block of queries: sink, slots and window again, from the saved log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import (
    LOG2_E,
    SUBCHUNK,
    chunk_decay,
    chunk_of_block,
    first_tokens,
    gate_factors,
    in_subchunk,
    load_decay,
    load_decayed_slots,
    load_gates,
    load_rows,
    load_slots,
    locate_program,
    matmul,
    offset_i64,
    one_minus_exp,
    q_decay,
    round_down,
    sequence_bounds,
    skip_inner,
    store_rows,
    token_decay,
)


@triton.jit
def dq_of_keys(
    b_q,
    b_do,
    p_k,
    p_v,
    k_t,
    v_t,
    k_start,
    i_token,
    stop,
    u,
    window,
    scale,
    b_lse,
    b_delta,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dq from the BLOCK_N window keys from token `i_token` on; MASKED as in `attend_keys`."""
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_token + o_n < stop if MASKED else None
    b_k = load_rows(p_k + (k_start + i_token) * k_t, o_n * k_t, m_n, D, BLOCK_D)
    b_v = load_rows(p_v + (k_start + i_token) * v_t, o_n * v_t, m_n, DV, BLOCK_DV)
    b_s = matmul(b_q, tl.trans(b_k), DTYPE, PRECISION) * (scale * LOG2_E) - b_lse[:, None]
    if MASKED:
        m_window = ((i_token + o_n)[None, :] - (u + 1)[:, None]).to(tl.uint32) < window.to(tl.uint32)
        b_s = tl.where(m_window, b_s, float("-inf"))
    b_p = tl.exp2(b_s)
    b_dp = matmul(b_do, tl.trans(b_v), DTYPE, PRECISION) - b_delta[:, None]
    return matmul(b_p * (b_dp * scale), b_k, DTYPE, PRECISION)


@triton.jit
def dq_of_window(
    b_q,
    b_do,
    p_k,
    p_v,
    k_t,
    v_t,
    k_start,
    first_key,
    seq_keys,
    u_start,
    u,
    window,
    scale,
    b_lse,
    b_delta,
    b_dq,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT_INNER_LOOP: tl.constexpr,
):
    """b_dq plus dq from all window keys of a block of queries; loops as in `attend_window`."""
    stop = tl.minimum(u_start + CHUNK + window, seq_keys)
    start = tl.maximum(u_start + 1, first_key)
    inner = 0
    if SPLIT_INNER_LOOP:
        inner = round_down(start + CHUNK, u_start + 1 + window, BLOCK_N)
        for i_token in tl.range(start + CHUNK, start + CHUNK + inner, BLOCK_N, num_stages=STAGES):
            b_dq += dq_of_keys(
                b_q,
                b_do,
                p_k,
                p_v,
                k_t,
                v_t,
                k_start,
                i_token,
                stop,
                u,
                window,
                scale,
                b_lse,
                b_delta,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_N,
                DTYPE,
                PRECISION,
                MASKED=False,
            )
    for i_outer in tl.range(start, stop - inner, BLOCK_N, num_stages=STAGES):
        i_token = skip_inner(i_outer, start + CHUNK, inner) if SPLIT_INNER_LOOP else i_outer
        b_dq += dq_of_keys(
            b_q,
            b_do,
            p_k,
            p_v,
            k_t,
            v_t,
            k_start,
            i_token,
            stop,
            u,
            window,
            scale,
            b_lse,
            b_delta,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_N,
            DTYPE,
            PRECISION,
            MASKED=True,
        )
    return b_dq


@triton.jit
def dq_of_slots(
    b_q,
    b_do,
    p_k_slot,
    p_v,
    ks_t,
    v_t,
    token0,
    b_slot_k,
    b_slot_v,
    b_q_decay,
    b_k_decay,
    b_lse,
    b_delta,
    p_key_scores,
    p_value_scores,
    p_q_decay_grads,
    i_saved,
    m_causal,
    m_t,
    m_row,
    u,
    first_active,
    scale,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    GATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_PREFIX_MASK: tl.constexpr,
):
    """dq from the slots; stores the scores that `nha_chunk_bwd_kernel_dstate` needs."""
    o_t, o_state = tl.arange(0, CHUNK), tl.arange(0, b_q.shape[0])
    b_k = load_rows(p_k_slot, o_t * ks_t, m_t, D, BLOCK_D)
    b_qk = tl.where(m_causal, matmul(b_q, tl.trans(b_k), DTYPE, PRECISION), 0.0)
    b_s = matmul(b_q, tl.trans(b_slot_k), GATE_DTYPE, PRECISION) + matmul(b_qk, b_k_decay, GATE_DTYPE, PRECISION)
    b_s *= b_q_decay * scale
    b_p = tl.exp2(b_s * LOG2_E - b_lse[:, None])
    if M < BLOCK_M:
        b_p = tl.where((tl.arange(0, BLOCK_M) < M)[None, :], b_p, 0.0)
    if HAS_PREFIX_MASK:
        b_p = tl.where((u >= first_active)[:, None], b_p, 0.0)
    b_v = load_rows(p_v + token0 * v_t, o_t * v_t, m_t, DV, BLOCK_DV)
    b_dov = tl.where(m_causal, matmul(b_do, tl.trans(b_v), DTYPE, PRECISION), 0.0)
    b_dp = matmul(b_do, tl.trans(b_slot_v), GATE_DTYPE, PRECISION) + matmul(b_dov, b_k_decay, GATE_DTYPE, PRECISION)
    b_dp *= b_q_decay
    b_ds = b_p * (b_dp - b_delta[:, None])
    b_dq_decay = b_ds * b_s + b_p * b_dp
    store_rows(p_q_decay_grads + i_saved * BLOCK_M, o_state * BLOCK_M, m_row, b_dq_decay, BLOCK_M, BLOCK_M)

    o_score = o_state * (CHUNK + BLOCK_M)
    p_score = p_value_scores + i_saved * (CHUNK + BLOCK_M)
    b_slot_score = (b_p * b_q_decay).to(GATE_DTYPE)
    store_rows(p_score + CHUNK, o_score, m_row, b_slot_score, BLOCK_M, BLOCK_M)
    b_token_score = tl.where(m_causal, matmul(b_slot_score, tl.trans(b_k_decay), GATE_DTYPE, PRECISION), 0.0)
    store_rows(p_score, o_score, m_row, b_token_score, CHUNK, CHUNK)
    p_score = p_key_scores + i_saved * (CHUNK + BLOCK_M)
    b_slot_score = (b_ds * (b_q_decay * scale)).to(GATE_DTYPE)
    store_rows(p_score + CHUNK, o_score, m_row, b_slot_score, BLOCK_M, BLOCK_M)
    b_token_score = tl.where(m_causal, matmul(b_slot_score, tl.trans(b_k_decay), GATE_DTYPE, PRECISION), 0.0)
    store_rows(p_score, o_score, m_row, b_token_score, CHUNK, CHUNK)
    return matmul(b_token_score, b_k, DTYPE, PRECISION) + matmul(b_slot_score, b_slot_k, GATE_DTYPE, PRECISION)


@triton.jit
def dq_of_sink(
    b_q,
    b_do,
    p_sink_k,
    p_sink_v,
    b_lse,
    b_delta,
    p_sink_scores,
    p_sink_weights,
    i_saved,
    m_chunk,
    m_row,
    u,
    first_active,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_PREFIX_MASK: tl.constexpr,
):
    """dq from the sink; stores its weights and the gradients of its scores."""
    o_state = tl.arange(0, b_q.shape[0])
    b_sink_k = load_slots(p_sink_k, m_chunk, S, BLOCK_S, D, BLOCK_D)
    b_s = matmul(b_q, tl.trans(b_sink_k), DTYPE, PRECISION) * (scale * LOG2_E) - b_lse[:, None]
    b_p = tl.where((tl.arange(0, BLOCK_S) < S)[None, :], tl.exp2(b_s), 0.0)
    if HAS_PREFIX_MASK:
        b_p = tl.where((u >= first_active)[:, None], b_p, 0.0)
    b_sink_v = load_slots(p_sink_v, m_chunk, S, BLOCK_S, DV, BLOCK_DV)
    b_ds = (matmul(b_do, tl.trans(b_sink_v), DTYPE, PRECISION) - b_delta[:, None]) * b_p * scale
    store_rows(p_sink_scores + i_saved * S, o_state * S, m_row, b_ds, S, BLOCK_S)
    store_rows(p_sink_weights + i_saved * S, o_state * S, m_row, b_p, S, BLOCK_S)
    return matmul(b_ds, b_sink_k, DTYPE, PRECISION)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block"])
def nha_chunk_bwd_kernel_dq(
    p_q,
    p_k,
    p_v,
    p_q_slot,
    p_k_slot,
    p_gate,
    p_slot_k,
    p_slot_v,
    p_decay,
    p_sink_k,
    p_sink_v,
    p_first,
    p_cu,
    p_chunk_base,
    p_table,
    p_out,
    p_mass,
    p_lse,
    p_do,
    p_dmass,
    p_delta,
    p_dq,
    p_dq_slot,
    p_key_scores,
    p_value_scores,
    p_q_decay_grads,
    p_sink_scores,
    p_sink_weights,
    p_chunk_decays,
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
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
    GATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_PREFIX_MASK: tl.constexpr,
    SLOTS_ACTIVE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SLOT_QK: tl.constexpr,
    HAS_DMASS: tl.constexpr,
    SPLIT_INNER_LOOP: tl.constexpr,
    ONE_GATE_SUM: tl.constexpr,
):
    """dq [T, HQ, D] and delta [T, HQ] of one block; programs and options as in `nha_chunk_fwd_kernel`.

    delta = out . do + mass * dmass is what the softmax subtracts from the gradient of every score. HAS_SLOT_QK: the
    part through the slots goes to dq_slot. HAS_DMASS: there is a dmass. ONE_GATE_SUM, with BLOCK_H 1: one sum gives all
    factors of the gates.

    For `nha_chunk_bwd_kernel_dstate`, from block `first_block` on: key_scores [blocks, HQ, CHUNK, CHUNK + BLOCK_M]
    multiplies the chunk's tokens, and the slots before it times `chunk_decay`, in the gradient of a query;
    value_scores is the same for values and outputs; sink_scores, sink_weights [blocks, HQ, CHUNK, S] are the same for
    the sinks. q_decay_grads [blocks, HQ, CHUNK, BLOCK_M]: gradients of L_i. chunk_decays [blocks, H, passes, BLOCK_M]:
    `chunk_decay` of every pass.
    """
    ROWS: tl.constexpr = BLOCK_H * CHUNK
    i_n, i_block = locate_program(first_block + tl.program_id(0), p_table, blocks, PACKED)
    if i_n < 0:
        return
    i_h, q_heads = tl.program_id(1), heads * groups
    i_b, q_start, k_start, seqlen, chunk_base = sequence_bounds(i_n, p_cu, p_chunk_base, length, past, chunks, PACKED)
    offset = window - past
    i_chunk = chunk_of_block(i_block, offset, CHUNK)
    m_chunk = i_chunk >= 0
    u_start = i_chunk * CHUNK
    o_t, o_row = tl.arange(0, CHUNK), tl.arange(0, ROWS) % CHUNK
    o_h = tl.arange(0, ROWS) // CHUNK
    u = u_start + o_row
    m_q = (u + offset >= 0) & (u < seqlen - offset)
    first_key, first_active = first_tokens(p_first, i_n, HAS_PREFIX_MASK, SLOTS_ACTIVE)
    token0, query0 = k_start + u_start, q_start + u_start + offset
    p_k, p_v = p_k + i_b * k_b + offset_i64(i_h, k_h), p_v + i_b * v_b + offset_i64(i_h, v_h)
    i_state, i_bh = (chunk_base + i_chunk) * heads + i_h, tl.program_id(0).to(tl.int64) * heads + i_h
    m_t = m_chunk & (u_start + o_t < seqlen - offset)
    p_gate = p_gate + i_b * g_b + token0 * g_t + offset_i64(i_h, g_h)
    m_causal = o_t[None, :] <= o_row[:, None]
    b_decay, needs_subchunks = load_decay(p_decay + i_state * M, m_chunk, M, BLOCK_M)
    passes = 1 + needs_subchunks * (CHUNK // SUBCHUNK - 1)
    for i_sub in tl.range(0, passes, disable_licm=True):
        if i_sub < passes:  # always true, see `primitives`
            m_sub = m_q & in_subchunk(o_row, i_sub, needs_subchunks)
            b_gate = load_gates(p_gate, o_t * g_t, m_t, M, BLOCK_M)
            if ONE_GATE_SUM:
                b_q_decay, b_chunk_decay, b_k_decay = gate_factors(b_gate, b_decay, i_sub, needs_subchunks, CHUNK)
            else:
                b_q_decay = q_decay(b_gate, i_sub, needs_subchunks, CHUNK, BLOCK_H)
                b_chunk_decay = chunk_decay(b_gate, i_sub, needs_subchunks, CHUNK)
            b_slot_k = load_decayed_slots(p_slot_k + i_state * M * D, b_chunk_decay, m_chunk, M, BLOCK_M, D, BLOCK_D)
            b_slot_k = b_slot_k.to(GATE_DTYPE)
            b_slot_v = load_decayed_slots(p_slot_v + i_state * M * DV, b_chunk_decay, m_chunk, M, BLOCK_M, DV, BLOCK_DV)
            b_slot_v = b_slot_v.to(GATE_DTYPE)
            i_pass = i_bh * (CHUNK // SUBCHUNK) + i_sub
            tl.store(p_chunk_decays + i_pass * BLOCK_M + tl.arange(0, BLOCK_M), b_chunk_decay)
            if not ONE_GATE_SUM:
                b_k_decay = token_decay(b_gate, i_sub, needs_subchunks, CHUNK)
            b_k_decay = (b_k_decay * one_minus_exp(b_gate, DTYPE)).to(GATE_DTYPE)
            for i_g in tl.range(0, groups, BLOCK_H, disable_licm=True):
                m_row = m_sub & (i_g + o_h < groups)
                i_hq = i_h * groups + i_g
                o_out = (i_b * length + query0) * q_heads + i_hq
                o_out_row = o_row * q_heads + o_h
                b_do = load_rows(p_do + o_out * DV, o_out_row * DV, m_row, DV, BLOCK_DV)
                b_out = load_rows(p_out + o_out * DV, o_out_row * DV, m_row, DV, BLOCK_DV)
                b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
                b_slot_delta = b_delta
                if HAS_DMASS:
                    b_dmass = tl.load(p_dmass + o_out + o_out_row, mask=m_row, other=0.0).to(tl.float32)
                    b_delta += tl.load(p_mass + o_out + o_out_row, mask=m_row, other=0.0) * b_dmass
                    b_slot_delta = b_delta - b_dmass
                tl.store(p_delta + o_out + o_out_row, b_delta, mask=m_row)
                b_lse = tl.load(p_lse + o_out + o_out_row, mask=m_row, other=float("inf"))
                p_q_row = p_q_slot + i_b * qs_b + query0 * qs_t + offset_i64(i_hq, qs_h)
                b_q = load_rows(p_q_row, o_row * qs_t + o_h * qs_h, m_row, D, BLOCK_D)
                b_dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
                if m_chunk:
                    i_saved = (i_bh * groups + i_g) * CHUNK
                    b_dq = dq_of_slots(
                        b_q,
                        b_do,
                        p_k_slot + i_b * ks_b + token0 * ks_t + offset_i64(i_h, ks_h),
                        p_v,
                        ks_t,
                        v_t,
                        token0,
                        b_slot_k,
                        b_slot_v,
                        b_q_decay,
                        b_k_decay,
                        b_lse,
                        b_slot_delta,
                        p_key_scores,
                        p_value_scores,
                        p_q_decay_grads,
                        i_saved,
                        m_causal,
                        m_t,
                        m_row,
                        u,
                        first_active,
                        scale,
                        M,
                        D,
                        DV,
                        BLOCK_M,
                        BLOCK_D,
                        BLOCK_DV,
                        CHUNK,
                        DTYPE,
                        GATE_DTYPE,
                        PRECISION,
                        HAS_PREFIX_MASK,
                    )
                    if S > 0:
                        b_dq += dq_of_sink(
                            b_q,
                            b_do,
                            p_sink_k + i_h * S * D,
                            p_sink_v + i_h * S * DV,
                            b_lse,
                            b_slot_delta,
                            p_sink_scores,
                            p_sink_weights,
                            i_saved,
                            m_chunk,
                            m_row,
                            u,
                            first_active,
                            scale,
                            D,
                            DV,
                            S,
                            BLOCK_D,
                            BLOCK_DV,
                            BLOCK_S,
                            DTYPE,
                            PRECISION,
                            HAS_PREFIX_MASK,
                        )
                if HAS_SLOT_QK:
                    store_rows(p_dq_slot + o_out * D, o_out_row * D, m_row, b_dq, D, BLOCK_D)
                    b_dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
                    p_q_row = p_q + i_b * q_b + query0 * q_t + offset_i64(i_hq, q_h)
                    b_q = load_rows(p_q_row, o_row * q_t + o_h * q_h, m_row, D, BLOCK_D)
                if HAS_WINDOW:
                    b_dq = dq_of_window(
                        b_q,
                        b_do,
                        p_k,
                        p_v,
                        k_t,
                        v_t,
                        k_start,
                        first_key,
                        past + seqlen,
                        u_start,
                        u,
                        window,
                        scale,
                        b_lse,
                        b_delta,
                        b_dq,
                        D,
                        DV,
                        BLOCK_D,
                        BLOCK_DV,
                        BLOCK_N,
                        CHUNK,
                        STAGES,
                        DTYPE,
                        PRECISION,
                        SPLIT_INNER_LOOP,
                    )
                store_rows(p_dq + o_out * D, o_out_row * D, m_row, b_dq, D, BLOCK_D)
