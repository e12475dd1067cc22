"""Gradients of one chunk of keys, values and gates: from its own queries, through later slots and the window."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import (
    LOG2_E,
    clamp_gate,
    decay_to_end,
    exclusive_cumsum,
    load_gates,
    load_rows,
    load_slots,
    locate_program,
    matmul,
    offset_i64,
    one_minus_exp,
    round_down,
    sequence_bounds,
    skip_inner,
    store_rows,
)


@triton.jit
def dkv_of_queries(
    b_k,
    b_v,
    b_dk,
    b_dv,
    p_q,
    p_do,
    p_lse,
    p_delta,
    q_b,
    q_t,
    q_h,
    i_b,
    q_start,
    length,
    offset,
    seqlen,
    u_start,
    i_hq,
    q_heads,
    o_token,
    window,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(b_dk, b_dv) plus what the BLOCK_N queries of one head from `u_start` on contribute.

    MASKED: only queries that exist, each to the keys of its own window; `o_token` are the keys' tokens.
    """
    o_n = tl.arange(0, BLOCK_N)
    query0 = q_start + u_start + offset
    m_q = u_start + o_n < seqlen - offset if MASKED else None
    p_q_row = p_q + i_b * q_b + query0 * q_t + offset_i64(i_hq, q_h)
    b_q = load_rows(p_q_row, o_n * q_t, m_q, D, BLOCK_D)
    o_out = (i_b * length + query0) * q_heads + i_hq
    b_do = load_rows(p_do + o_out * DV, o_n * (q_heads * DV), m_q, DV, BLOCK_DV)
    if MASKED:
        b_lse = tl.load(p_lse + o_out + o_n * q_heads, mask=m_q, other=float("inf"))
        b_delta = tl.load(p_delta + o_out + o_n * q_heads, mask=m_q, other=0.0)
    else:
        b_lse = tl.load(p_lse + o_out + o_n * q_heads)
        b_delta = tl.load(p_delta + o_out + o_n * q_heads)
    b_s = matmul(b_k, tl.trans(b_q), DTYPE, PRECISION) * (scale * LOG2_E) - b_lse[None, :]
    if MASKED:
        m_window = (o_token[:, None] - (u_start + 1 + o_n)[None, :]).to(tl.uint32) < window.to(tl.uint32)
        b_s = tl.where(m_window, b_s, float("-inf"))
    b_p = tl.exp2(b_s)
    b_dv += matmul(b_p, b_do, DTYPE, PRECISION)
    b_ds = b_p * (matmul(b_v, tl.trans(b_do), DTYPE, PRECISION) - b_delta[None, :])
    b_dk += matmul(b_ds, b_q, DTYPE, PRECISION)
    return b_dk, b_dv


@triton.jit
def dkv_of_window(
    b_k,
    b_v,
    b_dk,
    b_dv,
    p_q,
    p_do,
    p_lse,
    p_delta,
    q_b,
    q_t,
    q_h,
    i_b,
    q_start,
    length,
    offset,
    seqlen,
    j_start,
    i_h,
    q_heads,
    first_key,
    window,
    scale,
    groups,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_PREFIX_MASK: tl.constexpr,
    SPLIT_INNER_LOOP: tl.constexpr,
):
    """(dk, dv) of the chunk from token `j_start` on, from all queries whose window holds one of its keys."""
    o_token = j_start + tl.arange(0, CHUNK)
    # Nobody sees tokens before `first_key`: moved below every window, they are masked like any other.
    o_token = tl.where(o_token >= first_key, o_token, -window - CHUNK) if HAS_PREFIX_MASK else o_token
    u_first, u_stop = tl.maximum(j_start - window, -offset), tl.minimum(j_start + CHUNK - 1, seqlen - offset)
    inner = 0
    if SPLIT_INNER_LOOP:
        # The windows of these queries hold all keys of the chunk, none of which may then lie before `first_key`.
        inner_stop = tl.minimum(j_start, seqlen - offset)
        if HAS_PREFIX_MASK:
            inner_stop = tl.where(j_start < first_key, u_first, inner_stop)
        inner = round_down(u_first + CHUNK, inner_stop, BLOCK_N)
    steps = tl.maximum(u_stop - inner - u_first + BLOCK_N - 1, 0) // BLOCK_N
    if SPLIT_INNER_LOOP:
        for step in range(0, inner // BLOCK_N * groups):
            u_start = u_first + CHUNK + step // groups * BLOCK_N
            b_dk, b_dv = dkv_of_queries(
                b_k,
                b_v,
                b_dk,
                b_dv,
                p_q,
                p_do,
                p_lse,
                p_delta,
                q_b,
                q_t,
                q_h,
                i_b,
                q_start,
                length,
                offset,
                seqlen,
                u_start,
                i_h * groups + step % groups,
                q_heads,
                o_token,
                window,
                scale,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_N,
                DTYPE,
                PRECISION,
                MASKED=False,
            )
    for step in range(0, steps * groups):
        u_outer = u_first + step // groups * BLOCK_N
        u_start = skip_inner(u_outer, u_first + CHUNK, inner) if SPLIT_INNER_LOOP else u_outer
        b_dk, b_dv = dkv_of_queries(
            b_k,
            b_v,
            b_dk,
            b_dv,
            p_q,
            p_do,
            p_lse,
            p_delta,
            q_b,
            q_t,
            q_h,
            i_b,
            q_start,
            length,
            offset,
            seqlen,
            u_start,
            i_h * groups + step % groups,
            q_heads,
            o_token,
            window,
            scale,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_N,
            DTYPE,
            PRECISION,
            MASKED=True,
        )
    return b_dk, b_dv


@triton.jit
def dgate_of_chunk(
    p_gate,
    p_dgate,
    p_dend,
    g_t,
    o_token,
    i_end,
    b_dweight,
    m_written,
    heads,
    parts,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradients of a chunk's raw log-gates [CHUNK, BLOCK_M]; zero where the clamp cut them off.

    b_dweight is the gradient of the weight with which each token enters the slots after the chunk.
    """
    o_t, o_m = tl.arange(0, CHUNK), tl.arange(0, BLOCK_M)
    b_raw = load_rows(p_gate, o_t * g_t, m_written, M, BLOCK_M)
    b_gate = clamp_gate(b_raw)
    # The sum over the chunk gains weight * dweight of every token; each token's own running sum loses it again.
    b_dweight *= decay_to_end(b_gate.to(b_raw.dtype), CHUNK)
    b_dgate = exclusive_cumsum(one_minus_exp(b_gate, DTYPE) * b_dweight, CHUNK, DTYPE)
    b_dgate -= tl.exp2(b_gate * LOG2_E) * b_dweight
    for i_part in range(0, parts):
        b_dgate += tl.load(p_dend + (i_end + i_part) * M + o_m, mask=o_m < M, other=0.0)[None, :]
    b_dgate += load_rows(p_dgate + o_token * M, o_t * heads * M, m_written, M, BLOCK_M).to(tl.float32)
    return tl.where((b_gate == b_raw.to(tl.float32)) & m_written[:, None], b_dgate, 0.0)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks", "key_length"])
def nha_chunk_bwd_kernel_dkv(
    p_q,
    p_k,
    p_v,
    p_k_slot,
    p_gate,
    p_dslot_k,
    p_dslot_v,
    p_dend,
    p_do,
    p_lse,
    p_delta,
    p_first,
    p_cu,
    p_chunk_base,
    p_table,
    p_dk,
    p_dk_slot,
    p_dv,
    p_dgate,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
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
    key_length,
    heads,
    groups,
    parts,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_PREFIX_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SLOT_QK: tl.constexpr,
    SPLIT_INNER_LOOP: tl.constexpr,
):
    """dk, dv [past + T, H, ...] and dgate [past + T, H, M] of one chunk of keys; programs (chunk, KV head).

    Adds up three contributions: all queries whose window holds the keys; what `nha_chunk_bwd_kernel_dstate` stored in
    dk_slot, dv and dgate; and the slots after the chunk, whose gradients are `dslot_*` and whose inner products with
    the slots that decay into them are `dend` [chunks, H, parts, M]. HAS_SLOT_QK: the slots' part of the keys stays in
    dk_slot. SPLIT_INNER_LOOP: queries whose windows hold the whole chunk have a loop without masks.
    """
    i_n, i_chunk = locate_program(tl.program_id(0), p_table, blocks, PACKED)
    if i_n < 0:
        return
    i_h = tl.program_id(1)
    i_b, q_start, k_start, seqlen, chunk_base = sequence_bounds(i_n, p_cu, p_chunk_base, length, past, chunks, PACKED)
    offset = window - past
    written = seqlen - offset
    first_key = 0
    if HAS_PREFIX_MASK:
        first_key = tl.load(p_first + i_n).to(tl.int32)
    j_start = i_chunk * CHUNK
    o_t = tl.arange(0, CHUNK)
    m_t = j_start + o_t < past + seqlen
    token0, q_heads = k_start + j_start, heads * groups
    b_v = load_rows(p_v + i_b * v_b + token0 * v_t + offset_i64(i_h, v_h), o_t * v_t, m_t, DV, BLOCK_DV)
    o_token = (i_b * key_length + token0) * heads + i_h
    o_row = o_t * heads
    b_dk = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    b_dv = tl.zeros([CHUNK, BLOCK_DV], tl.float32)
    if HAS_WINDOW:
        b_k = load_rows(p_k + i_b * k_b + token0 * k_t + offset_i64(i_h, k_h), o_t * k_t, m_t, D, BLOCK_D)
        b_dk, b_dv = dkv_of_window(
            b_k,
            b_v,
            b_dk,
            b_dv,
            p_q,
            p_do,
            p_lse,
            p_delta,
            q_b,
            q_t,
            q_h,
            i_b,
            q_start,
            length,
            offset,
            seqlen,
            j_start,
            i_h,
            q_heads,
            first_key,
            window,
            scale,
            groups,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            CHUNK,
            BLOCK_N,
            DTYPE,
            PRECISION,
            HAS_PREFIX_MASK,
            SPLIT_INNER_LOOP,
        )
        b_dk *= scale
    if HAS_SLOT_QK and HAS_WINDOW:
        store_rows(p_dk + o_token * D, o_row * D, m_t, b_dk, D, BLOCK_D)
        b_dk = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    b_dgate = tl.zeros([CHUNK, BLOCK_M], tl.float32)
    if j_start < written:
        m_written = j_start + o_t < written
        p_gate = p_gate + i_b * g_b + token0 * g_t + offset_i64(i_h, g_h)
        i_state = (chunk_base + i_chunk) * heads + i_h
        b_gate = load_gates(p_gate, o_t * g_t, m_written, M, BLOCK_M)
        b_weight = (decay_to_end(b_gate, CHUNK) * one_minus_exp(b_gate, DTYPE)).to(DTYPE)
        b_dslot = load_slots(p_dslot_v + i_state * M * DV, True, M, BLOCK_M, DV, BLOCK_DV)
        b_dv += load_rows(p_dv + o_token * DV, o_row * DV, m_written, DV, BLOCK_DV).to(tl.float32)
        b_dv += matmul(b_weight, b_dslot, DTYPE, PRECISION)
        b_dweight = matmul(b_v, tl.trans(b_dslot), DTYPE, PRECISION)
        store_rows(p_dv + o_token * DV, o_row * DV, m_t, b_dv, DV, BLOCK_DV)
        b_dslot = load_slots(p_dslot_k + i_state * M * D, True, M, BLOCK_M, D, BLOCK_D)
        b_dk += load_rows(p_dk_slot + o_token * D, o_row * D, m_written, D, BLOCK_D).to(tl.float32)
        b_dk += matmul(b_weight, b_dslot, DTYPE, PRECISION)
        store_rows(p_dk_slot + o_token * D, o_row * D, m_t, b_dk, D, BLOCK_D)
        p_k_slot = p_k_slot + i_b * ks_b + token0 * ks_t + offset_i64(i_h, ks_h)
        b_k_slot = load_rows(p_k_slot, o_t * ks_t, m_written, D, BLOCK_D)
        b_dweight += matmul(b_k_slot, tl.trans(b_dslot), DTYPE, PRECISION)
        b_dgate = dgate_of_chunk(
            p_gate,
            p_dgate,
            p_dend,
            g_t,
            o_token,
            i_state * parts,
            b_dweight,
            m_written,
            heads,
            parts,
            M,
            BLOCK_M,
            CHUNK,
            DTYPE,
        )
    else:
        store_rows(p_dk_slot + o_token * D, o_row * D, m_t, b_dk, D, BLOCK_D)
        store_rows(p_dv + o_token * DV, o_row * DV, m_t, b_dv, DV, BLOCK_DV)
    store_rows(p_dgate + o_token * M, o_row * M, m_t, b_dgate, M, BLOCK_M)
