"""Outputs of one block of queries: sink, slots and window under one online softmax.

Sink and slots are the first key block of the online softmax, the window's keys the following ones; nothing of size
T x M or T x W is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import (
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
    window_tile,
)


@triton.jit
def kept_rows(b_kept, p_base, o_row, m_row, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows that are kept, or where those are None rows from memory, as `load_rows`."""
    if b_kept is None:
        return load_rows(p_base, o_row, m_row, DIM, WIDTH)
    else:
        return b_kept


@triton.jit
def attend_chunk(
    b_q,
    b_qk,
    b_window,
    b_v,
    b_v_next,
    p_v_next,
    v_t,
    m_next,
    b_slot_k,
    b_slot_v,
    b_q_decay,
    b_k_decay,
    p_sink_k,
    p_sink_v,
    m_chunk,
    m_causal,
    u,
    first_active,
    scale,
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
    HAS_PREFIX_MASK: tl.constexpr,
    WINDOW_IN_TILE: tl.constexpr,
):
    """(m_i, l_i, l_slots, b_acc) of the softmax over sink, slots and the window keys whose scores are b_window, if any.

    The slots are read in two parts, without materialising one per query: those before the chunk, and the chunk's own
    tokens up to the query's, whose scores b_qk has. WINDOW_IN_TILE: b_window is that of two chunks, and
    the chunk may be one without slots. b_v_next, or None: the values of the next chunk, which are read late then.
    """
    b_s = matmul(b_q, tl.trans(b_slot_k), GATE_DTYPE, PRECISION)
    b_s += matmul(tl.where(m_causal, b_qk, 0.0), b_k_decay, GATE_DTYPE, PRECISION)
    if WINDOW_IN_TILE:
        b_s = b_s * b_q_decay + tl.where(m_chunk, 0.0, float("-inf"))
    else:
        b_s *= b_q_decay
    if M < BLOCK_M:
        b_s = tl.where((tl.arange(0, BLOCK_M) < M)[None, :], b_s, float("-inf"))
    if HAS_PREFIX_MASK:
        b_s = tl.where((u >= first_active)[:, None], b_s, float("-inf"))
    m_i = tl.max(b_s, 1)
    if b_window is not None:
        m_i = tl.maximum(m_i, tl.max(b_window, 1))
    if S > 0:
        b_sink = load_slots(p_sink_k, m_chunk, S, BLOCK_S, D, BLOCK_D)
        b_sink_s = matmul(b_q, tl.trans(b_sink), DTYPE, PRECISION)
        b_sink_s = tl.where(((tl.arange(0, BLOCK_S) < S) & m_chunk)[None, :], b_sink_s, float("-inf"))
        if HAS_PREFIX_MASK:
            b_sink_s = tl.where((u >= first_active)[:, None], b_sink_s, float("-inf"))
        m_i = tl.maximum(m_i, tl.max(b_sink_s, 1))
    m_scaled = (tl.where(m_i == float("-inf"), 0.0, m_i) if HAS_PREFIX_MASK else m_i) * scale
    b_p = tl.exp2(b_s * scale - m_scaled[:, None])
    l_slots = tl.sum(b_p, 1)
    b_acc = tl.zeros([b_q.shape[0], BLOCK_DV], tl.float32)
    if S > 0:
        b_sink_p = tl.exp2(b_sink_s * scale - m_scaled[:, None])
        l_slots += tl.sum(b_sink_p, 1)
        b_sink = load_slots(p_sink_v, m_chunk, S, BLOCK_S, DV, BLOCK_DV)
        b_acc = matmul(b_sink_p, b_sink, DTYPE, PRECISION)
    if WINDOW_IN_TILE:
        b_v_next = kept_rows(b_v_next, p_v_next, tl.arange(0, CHUNK) * v_t, m_next, DV, BLOCK_DV)
    b_p_decayed = (b_p * b_q_decay).to(GATE_DTYPE)
    b_acc += matmul(b_p_decayed, b_slot_v, GATE_DTYPE, PRECISION)
    b_p_token = matmul(b_p_decayed, tl.trans(b_k_decay), GATE_DTYPE, PRECISION)
    l_i = l_slots
    if b_window is not None:
        b_p = tl.exp2(b_window * scale - m_scaled[:, None])
        l_i += tl.sum(b_p, 1)
        b_p_token = tl.where(m_causal, b_p_token, b_p)
    else:
        b_p_token = tl.where(m_causal, b_p_token, 0.0)
    b_acc += matmul(b_p_token, b_v, DTYPE, PRECISION)
    if WINDOW_IN_TILE:
        b_acc += matmul(tl.where(m_causal, b_p, 0.0), b_v_next, DTYPE, PRECISION)
    return m_i, l_i, l_slots, b_acc


@triton.jit
def attend_keys(
    b_q,
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
    m_i,
    l_i,
    l_slots,
    b_acc,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SHARED_QK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(m_i, l_i, l_slots, b_acc) after the BLOCK_N window keys from token `i_token` on.

    MASKED: keys from `stop` on do not exist, and each query sees only the keys of its own window. SHARED_QK: none of
    the keys comes before a query's window.
    """
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_token + o_n < stop if MASKED else None
    b_k = load_rows(p_k + (k_start + i_token) * k_t, o_n * k_t, m_n, D, BLOCK_D)
    b_v = load_rows(p_v + (k_start + i_token) * v_t, o_n * v_t, m_n, DV, BLOCK_DV)
    b_s = matmul(b_q, tl.trans(b_k), DTYPE, PRECISION)
    if MASKED:
        # A window's last key is that of a token which exists: keys from `stop` on need no mask of their own.
        m_window = (i_token + o_n)[None, :] <= (u + window)[:, None]
        if not SHARED_QK:
            m_window &= (i_token + o_n)[None, :] > u[:, None]
        b_s = tl.where(m_window, b_s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(b_s, 1))
    m_scaled = (tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new) * scale
    alpha = tl.exp2(m_i * scale - m_scaled)
    b_p = tl.exp2(b_s * scale - m_scaled[:, None])
    l_i = l_i * alpha + tl.sum(b_p, 1)
    l_slots *= alpha
    b_acc = b_acc * alpha[:, None] + matmul(b_p, b_v, DTYPE, PRECISION)
    return m_new, l_i, l_slots, b_acc


@triton.jit
def attend_window(
    b_q,
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
    m_i,
    l_i,
    l_slots,
    b_acc,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SHARED_QK: tl.constexpr,
    SPLIT_INNER_LOOP: tl.constexpr,
):
    """(m_i, l_i, l_slots, b_acc) after all window keys of a block of queries; SHARED_QK: all but those of its chunk."""
    # The first keys that no query has behind its window.
    LEAD: tl.constexpr = 0 if SHARED_QK else CHUNK
    start = tl.maximum(u_start + 1 if LEAD else u_start + CHUNK, first_key)
    stop = tl.minimum(u_start + CHUNK + window, seq_keys)
    inner = 0
    if SPLIT_INNER_LOOP:
        # Up to the first query's last key all queries see all.
        inner = round_down(start + LEAD, u_start + 1 + window, BLOCK_N)
        for i_token in tl.range(start + LEAD, start + LEAD + inner, BLOCK_N, num_stages=STAGES):
            m_i, l_i, l_slots, b_acc = attend_keys(
                b_q,
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
                m_i,
                l_i,
                l_slots,
                b_acc,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_N,
                DTYPE,
                PRECISION,
                SHARED_QK,
                MASKED=False,
            )
    for i_outer in tl.range(start, stop - inner, BLOCK_N, num_stages=STAGES):
        i_token = skip_inner(i_outer, start + LEAD, inner) if SPLIT_INNER_LOOP else i_outer
        m_i, l_i, l_slots, b_acc = attend_keys(
            b_q,
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
            m_i,
            l_i,
            l_slots,
            b_acc,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_N,
            DTYPE,
            PRECISION,
            SHARED_QK,
            MASKED=True,
        )
    return m_i, l_i, l_slots, b_acc


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks"])
def nha_chunk_fwd_kernel(
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
    SHARED_QK: tl.constexpr,
    COVERS_CHUNK: tl.constexpr,
    WINDOW_IN_TILE: tl.constexpr,
    HAS_SLOT_QK: tl.constexpr,
    SPLIT_INNER_LOOP: tl.constexpr,
):
    """out [T, HQ, DV], mass [T, HQ], lse [T, HQ] (base 2) of one block; programs (block, KV head).

    `scale` includes log2(e). HAS_PREFIX_MASK: keys before `first` are empty, and queries before it see no slots unless
    SLOTS_ACTIVE. SHARED_QK: there is a window, and slots see its queries and keys. COVERS_CHUNK: a query's window holds
    all later tokens of its chunk. WINDOW_IN_TILE: the window is no longer than a chunk, and its scores are one tile.
    HAS_SLOT_QK: q_slot is not q. SPLIT_INNER_LOOP: window keys that all queries of the block see have a loop without
    masks. STAGES: loads of window keys in flight.
    """
    ROWS: tl.constexpr = BLOCK_H * CHUNK
    # All heads read the same keys and values: once, where shared memory has room to keep them beside another block.
    # Beside heads of 128 that are the next chunk's keys; beside heads of 64 all, and mostly the next head's queries.
    KEEP_ALL: tl.constexpr = WINDOW_IN_TILE and BLOCK_D + BLOCK_DV <= 128
    KEEP_KEYS: tl.constexpr = WINDOW_IN_TILE and SHARED_QK and S == 0
    HEAD_STAGES: tl.constexpr = 2 if KEEP_ALL and (SHARED_QK or S == 0) else 1
    i_n, i_block = locate_program(tl.program_id(0), p_table, blocks, PACKED)
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
    m_t = m_chunk & (u_start + o_t < seqlen - offset)
    i_state = (chunk_base + i_chunk) * heads + i_h
    token0, query0 = k_start + u_start, q_start + u_start + offset
    p_k, p_v = p_k + i_b * k_b + offset_i64(i_h, k_h), p_v + i_b * v_b + offset_i64(i_h, v_h)
    b_gate = load_gates(p_gate + i_b * g_b + token0 * g_t + offset_i64(i_h, g_h), o_t * g_t, m_t, M, BLOCK_M)
    p_k_slot = p_k_slot + i_b * ks_b + token0 * ks_t + offset_i64(i_h, ks_h)
    # The window's tokens reach beyond those written. Those that nobody sees are moved below every window.
    m_seen = m_chunk & (u_start + o_t < past + seqlen)
    o_seen = tl.where(m_seen & (u_start + o_t >= first_key), u_start + o_t, -window - CHUNK)
    m_causal = o_t[None, :] <= o_row[:, None]
    m_next = u_start + CHUNK + o_t < past + seqlen
    b_k = load_rows(p_k_slot, o_t * ks_t, m_seen, D, BLOCK_D)
    b_v = load_rows(p_v + token0 * v_t, o_t * v_t, m_seen, DV, BLOCK_DV)
    b_decay, needs_subchunks = load_decay(p_decay + i_state * M, m_chunk, M, BLOCK_M)
    passes = 1 + needs_subchunks * (CHUNK // SUBCHUNK - 1)
    for i_sub in tl.range(0, passes, disable_licm=True):
        if i_sub < passes:  # always true, see `primitives`
            m_sub = m_q & in_subchunk(o_row, i_sub, needs_subchunks)
            if WINDOW_IN_TILE:
                b_q_decay, b_chunk_decay, b_k_decay = gate_factors(b_gate, b_decay, i_sub, needs_subchunks, CHUNK)
            else:
                b_q_decay = q_decay(b_gate, i_sub, needs_subchunks, CHUNK, BLOCK_H)
                b_chunk_decay = chunk_decay(b_gate, i_sub, needs_subchunks, CHUNK)
            b_slot_k = load_decayed_slots(p_slot_k + i_state * M * D, b_chunk_decay, m_chunk, M, BLOCK_M, D, BLOCK_D)
            b_slot_k = b_slot_k.to(GATE_DTYPE)
            b_slot_v = load_decayed_slots(p_slot_v + i_state * M * DV, b_chunk_decay, m_chunk, M, BLOCK_M, DV, BLOCK_DV)
            b_slot_v = b_slot_v.to(GATE_DTYPE)
            if not WINDOW_IN_TILE:
                b_k_decay = token_decay(b_gate, i_sub, needs_subchunks, CHUNK)
            b_k_decay = (b_k_decay * one_minus_exp(b_gate, DTYPE)).to(GATE_DTYPE)
            p_k_own, p_k_next, p_v_next = p_k + token0 * k_t, p_k + (token0 + CHUNK) * k_t, p_v + (token0 + CHUNK) * v_t
            b_k_own = load_rows(p_k_own, o_t * k_t, m_seen, D, BLOCK_D) if KEEP_ALL and not SHARED_QK else None
            b_k_next = load_rows(p_k_next, o_t * k_t, m_next, D, BLOCK_D) if KEEP_ALL or KEEP_KEYS else None
            b_v_next = load_rows(p_v_next, o_t * v_t, m_next, DV, BLOCK_DV) if KEEP_ALL else None
            for i_g in tl.range(0, groups, BLOCK_H, num_stages=HEAD_STAGES, disable_licm=True):
                m_row = m_sub & (i_g + o_h < groups)
                i_hq = i_h * groups + i_g
                p_q_row = p_q + i_b * q_b + query0 * q_t + offset_i64(i_hq, q_h)
                p_q_slot_row = p_q_slot + i_b * qs_b + query0 * qs_t + offset_i64(i_hq, qs_h)
                if WINDOW_IN_TILE and not SHARED_QK:
                    b_q = load_rows(p_q_row, o_row * q_t + o_h * q_h, m_row, D, BLOCK_D)
                    b_key = kept_rows(b_k_own, p_k_own, o_t * k_t, m_seen, D, BLOCK_D)
                    b_own = matmul(b_q, tl.trans(b_key), DTYPE, PRECISION)
                    b_key = kept_rows(b_k_next, p_k_next, o_t * k_t, m_next, D, BLOCK_D)
                    b_next = matmul(b_q, tl.trans(b_key), DTYPE, PRECISION)
                b_q = load_rows(p_q_slot_row, o_row * qs_t + o_h * qs_h, m_row, D, BLOCK_D)
                m_i = tl.full([ROWS], float("-inf"), tl.float32)
                l_i = tl.zeros([ROWS], tl.float32)
                l_slots = tl.zeros([ROWS], tl.float32)
                b_acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
                if WINDOW_IN_TILE or m_chunk:
                    b_qk = matmul(b_q, tl.trans(b_k), DTYPE, PRECISION)
                    b_window = None
                    if SHARED_QK:
                        b_own = b_qk
                        if WINDOW_IN_TILE:
                            b_key = kept_rows(b_k_next, p_k_next, o_t * k_t, m_next, D, BLOCK_D)
                            b_next = matmul(b_q, tl.trans(b_key), DTYPE, PRECISION)
                    if WINDOW_IN_TILE or SHARED_QK:
                        b_window = window_tile(
                            b_own,
                            b_next if WINDOW_IN_TILE else None,
                            m_causal,
                            u_start,
                            u,
                            o_seen,
                            first_key,
                            window,
                            m_chunk,
                            CHUNK,
                            HAS_PREFIX_MASK,
                            COVERS_CHUNK,
                        )
                    m_i, l_i, l_slots, b_acc = attend_chunk(
                        b_q,
                        b_qk,
                        b_window,
                        b_v,
                        b_v_next,
                        p_v_next,
                        v_t,
                        m_next,
                        b_slot_k,
                        b_slot_v,
                        b_q_decay,
                        b_k_decay,
                        p_sink_k + i_h * S * D if S > 0 else None,
                        p_sink_v + i_h * S * DV if S > 0 else None,
                        m_chunk,
                        m_causal,
                        u,
                        first_active,
                        scale,
                        M,
                        D,
                        DV,
                        S,
                        BLOCK_M,
                        BLOCK_D,
                        BLOCK_DV,
                        BLOCK_S,
                        CHUNK,
                        DTYPE,
                        GATE_DTYPE,
                        PRECISION,
                        HAS_PREFIX_MASK,
                        WINDOW_IN_TILE,
                    )
                if HAS_WINDOW and not WINDOW_IN_TILE:
                    if HAS_SLOT_QK:
                        b_q = load_rows(p_q_row, o_row * q_t + o_h * q_h, m_row, D, BLOCK_D)
                    m_i, l_i, l_slots, b_acc = attend_window(
                        b_q,
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
                        m_i,
                        l_i,
                        l_slots,
                        b_acc,
                        D,
                        DV,
                        BLOCK_D,
                        BLOCK_DV,
                        BLOCK_N,
                        CHUNK,
                        STAGES,
                        DTYPE,
                        PRECISION,
                        SHARED_QK,
                        SPLIT_INNER_LOOP,
                    )
                o_out = (i_b * length + query0) * q_heads + i_hq
                o_out_row = o_row * q_heads + o_h
                l_i = tl.where(l_i > 0, l_i, 1.0)
                store_rows(p_out + o_out * DV, o_out_row * DV, m_row, b_acc * (1 / l_i)[:, None], DV, BLOCK_DV)
                tl.store(p_lse + o_out + o_out_row, m_i * scale + tl.log2(l_i), mask=m_row)
                tl.store(p_mass + o_out + o_out_row, l_slots / l_i, mask=m_row)
