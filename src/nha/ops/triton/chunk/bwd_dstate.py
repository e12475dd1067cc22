"""Gradients of a chunk's tokens, their gates and the slots before it from the chunk's own queries, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import (
    LOG2_E,
    SUBCHUNK,
    chunk_of_block,
    in_subchunk,
    load_decay,
    load_gates,
    load_rows,
    load_slots,
    locate_program,
    matmul,
    offset_i64,
    one_minus_exp,
    reverse_cumsum,
    sequence_bounds,
    store_rows,
    store_slots,
    token_decay,
)


@triton.jit
def accumulate_side(
    p_x,
    x_t,
    x_h,
    p_y,
    y_t,
    p_scores,
    p_sink_scores,
    b_chunk_decay,
    p_dtoken,
    p_dslot,
    p_dsink,
    m_sub,
    m_t,
    i_sub,
    heads,
    groups,
    b_dk_decay,
    M: tl.constexpr,
    DIM: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    GATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One side of a pass, keys or values: transposed scores times x, the queries or the gradients of the outputs.

    Returns b_dk_decay plus the gradient of `k_decay` [CHUNK, BLOCK_M]. From the second pass on, adds to what is stored.
    """
    o_t = tl.arange(0, CHUNK)
    m_causal = o_t[None, :] <= o_t[:, None]
    b_y = load_rows(p_y, o_t * y_t, m_t, DIM, WIDTH)
    b_dtoken = tl.zeros([CHUNK, WIDTH], tl.float32)
    b_dslot = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    b_dsink = tl.zeros([BLOCK_S, WIDTH], tl.float32)
    for i_g in range(0, groups):
        b_x = load_rows(p_x + offset_i64(i_g, x_h), o_t * x_t, m_sub, DIM, WIDTH)
        p_score, o_score = p_scores + i_g * (CHUNK * (CHUNK + BLOCK_M)), o_t * (CHUNK + BLOCK_M)
        b_token_score = load_rows(p_score, o_score, m_sub, CHUNK, CHUNK)
        b_slot_score = load_rows(p_score + CHUNK, o_score, m_sub, BLOCK_M, BLOCK_M)
        b_dtoken += matmul(tl.trans(b_token_score), b_x, DTYPE, PRECISION)
        b_dslot += matmul(tl.trans(b_slot_score), b_x, GATE_DTYPE, PRECISION)
        b_xy = tl.where(m_causal, matmul(b_x, tl.trans(b_y), DTYPE, PRECISION), 0.0).to(GATE_DTYPE)
        b_dk_decay += matmul(tl.trans(b_xy), b_slot_score, GATE_DTYPE, PRECISION)
        if S > 0:
            b_sink_score = load_rows(p_sink_scores + i_g * (CHUNK * S), o_t * S, m_sub, S, BLOCK_S)
            b_dsink += matmul(tl.trans(b_sink_score), b_x, DTYPE, PRECISION)
    b_dslot *= b_chunk_decay[:, None]
    if i_sub > 0:
        b_dtoken += load_rows(p_dtoken, o_t * (heads * DIM), m_t, DIM, WIDTH).to(tl.float32)
        b_dslot += load_slots(p_dslot, True, M, BLOCK_M, DIM, WIDTH).to(tl.float32)
        if S > 0:
            b_dsink += load_slots(p_dsink, True, S, BLOCK_S, DIM, WIDTH)
        tl.debug_barrier()
    store_rows(p_dtoken, o_t * (heads * DIM), m_t, b_dtoken, DIM, WIDTH)
    store_slots(p_dslot, b_dslot, M, BLOCK_M, DIM, WIDTH)
    if S > 0:
        store_slots(p_dsink, b_dsink, S, BLOCK_S, DIM, WIDTH)
    return b_dk_decay


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "first_block", "key_length"])
def nha_chunk_bwd_kernel_dstate(
    p_v,
    p_q_slot,
    p_k_slot,
    p_gate,
    p_decay,
    p_do,
    p_key_scores,
    p_value_scores,
    p_q_decay_grads,
    p_sink_scores,
    p_sink_weights,
    p_chunk_decays,
    p_cu,
    p_chunk_base,
    p_table,
    p_dk_slot,
    p_dv,
    p_dslot_k,
    p_dslot_v,
    p_dsinks,
    p_dgate,
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
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    GATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    GATE_STAGES: tl.constexpr,
):
    """dk_slot, dv [past + T, H, ...] and dgate [past + T, H, M] of one chunk's tokens, dslot_* [chunks, H, M, ...] of
    the slots before it and dsinks [chunks, H, S D + S DV] float32, keys before values, from the scores that
    `nha_chunk_bwd_kernel_dq` stored. Programs: (block, KV head).

    A log-gate reaches the scores through the running sums in `q_decay` and `k_decay`. A sum over later tokens of the
    chunk turns the gradients of those sums into the gradient of the gates. GATE_STAGES: loads of q_decay_grads
    in flight.
    """
    i_n, i_block = locate_program(first_block + tl.program_id(0), p_table, blocks, PACKED)
    if i_n < 0:
        return
    offset = window - past
    i_chunk = chunk_of_block(i_block, offset, CHUNK)
    i_h, q_heads = tl.program_id(1), heads * groups
    i_b, q_start, k_start, seqlen, chunk_base = sequence_bounds(i_n, p_cu, p_chunk_base, length, past, chunks, PACKED)
    u_start = i_chunk * CHUNK
    written = seqlen - offset - u_start
    if (i_chunk < 0) | (written <= 0):
        return
    o_t = tl.arange(0, CHUNK)
    m_t = o_t < written
    token0, query0 = k_start + u_start, q_start + u_start + offset
    i_state, i_bh = (chunk_base + i_chunk) * heads + i_h, tl.program_id(0).to(tl.int64) * heads + i_h
    o_token, i_hq = (i_b * key_length + token0) * heads + i_h, i_h * groups
    p_k_slot = p_k_slot + i_b * ks_b + token0 * ks_t + offset_i64(i_h, ks_h)
    p_v = p_v + i_b * v_b + token0 * v_t + offset_i64(i_h, v_h)
    p_q_slot = p_q_slot + i_b * qs_b + query0 * qs_t + offset_i64(i_hq, qs_h)
    p_do = p_do + ((i_b * length + query0) * q_heads + i_hq) * DV
    i_saved = i_bh * groups * CHUNK
    _, needs_subchunks = load_decay(p_decay + i_state * M, True, M, BLOCK_M)
    passes = 1 + needs_subchunks * (CHUNK // SUBCHUNK - 1)
    for i_sub in tl.range(0, passes, disable_licm=True):
        if i_sub < passes:  # always true, see `primitives`
            m_sub = m_t & in_subchunk(o_t, i_sub, needs_subchunks)
            i_pass = i_bh * (CHUNK // SUBCHUNK) + i_sub
            b_chunk_decay = tl.load(p_chunk_decays + i_pass * BLOCK_M + tl.arange(0, BLOCK_M))
            b_dk_decay = accumulate_side(
                p_q_slot,
                qs_t,
                qs_h,
                p_k_slot,
                ks_t,
                p_key_scores + i_saved * (CHUNK + BLOCK_M),
                p_sink_scores + i_saved * S,
                b_chunk_decay,
                p_dk_slot + o_token * D,
                p_dslot_k + i_state * M * D,
                p_dsinks + i_state * S * (D + DV),
                m_sub,
                m_t,
                i_sub,
                heads,
                groups,
                tl.zeros([CHUNK, BLOCK_M], tl.float32),
                M,
                D,
                S,
                BLOCK_M,
                BLOCK_D,
                BLOCK_S,
                CHUNK,
                DTYPE,
                GATE_DTYPE,
                PRECISION,
            )
            b_dk_decay = accumulate_side(
                p_do,
                q_heads * DV,
                DV,
                p_v,
                v_t,
                p_value_scores + i_saved * (CHUNK + BLOCK_M),
                p_sink_weights + i_saved * S,
                b_chunk_decay,
                p_dv + o_token * DV,
                p_dslot_v + i_state * M * DV,
                p_dsinks + i_state * S * (D + DV) + S * D,
                m_sub,
                m_t,
                i_sub,
                heads,
                groups,
                b_dk_decay,
                M,
                DV,
                S,
                BLOCK_M,
                BLOCK_DV,
                BLOCK_S,
                CHUNK,
                DTYPE,
                GATE_DTYPE,
                PRECISION,
            )
            b_gate = load_gates(p_gate + i_b * g_b + token0 * g_t + offset_i64(i_h, g_h), o_t * g_t, m_t, M, BLOCK_M)
            b_dweight = b_dk_decay * token_decay(b_gate, i_sub, needs_subchunks, CHUNK)
            b_dgate = -one_minus_exp(b_gate, DTYPE) * b_dweight
            for i_g in tl.range(0, groups, num_stages=GATE_STAGES):
                p_grad = p_q_decay_grads + (i_saved + i_g * CHUNK) * BLOCK_M
                b_dgate += load_rows(p_grad, o_t * BLOCK_M, m_sub, BLOCK_M, BLOCK_M).to(tl.float32)
            b_dgate = reverse_cumsum(b_dgate, CHUNK, DTYPE) - tl.exp2(b_gate.to(tl.float32) * LOG2_E) * b_dweight
            if i_sub > 0:
                b_dgate += load_rows(p_dgate + o_token * M, o_t * (heads * M), m_t, M, BLOCK_M).to(tl.float32)
                tl.debug_barrier()
            store_rows(p_dgate + o_token * M, o_t * (heads * M), m_t, b_dgate, M, BLOCK_M)
            tl.debug_barrier()
