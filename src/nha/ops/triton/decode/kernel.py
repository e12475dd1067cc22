"""Decode 1 to 16 tokens in one launch: write what leaves the window to the slots, attend, and update the window.

Tokens. Of the `num_tokens` tokens so far the window cache holds the last W by age: age 0 is token num_tokens - W, if it
exists. A segment has `count` new tokens. New token i writes the token of age i (from age W on: new token i - W) to the
slots and then reads the slots and the tokens of ages i + 1 .. i + W. In a ring buffer of W + R places, token t is
stored at t mod (W + R). With R > 0 (`rollback`) tokens stay out of the stored slots until they are R older than the
window: those of ages below 0 that are not in them are written first, and only some of them for good.

Programs. What the queries of a KV head see is split: into blocks of slots, and into splits of the window. A program
takes one split, so that many run on every multiprocessor, and stores a softmax over its split alone. The last program
of a head to finish, whichever it is, combines the splits in their order; only then, when all have read, do the new
tokens overwrite those that left. The last head of a sequence counts its tokens. No result depends on which program was
the last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.state import MAX_NEW
from nha.ops.triton.decode.slots import ring_start, update_slots
from nha.ops.triton.primitives import load_rows, matmul, online_softmax, store_rows

NEW = tl.constexpr(MAX_NEW)  # the most tokens of a segment
SPLITS = tl.constexpr(8)  # splits that are combined at a time


@triton.jit
def attend_window(
    query,
    new,
    cached,
    splits,
    counts,
    scale,
    i_window_split,
    i_block,
    slot_splits,
    tiles,
    queries,
    groups,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    RING: tl.constexpr,
    ROLLBACK: tl.constexpr,
):
    """Store the softmax of a block of queries over a split of the window; the first split begins with the new tokens.

    `new` and `cached` are (key, value pointers, their token strides); `splits` as `split` in `attend_slots`, the rest
    as in `update_slots`.
    """
    p_q, q_t, q_h = query
    num_tokens, count, window, rollback = counts
    p_new_k, p_new_v, new_k_t, new_v_t = new
    p_k, p_v, k_t, v_t = cached
    p_acc, p_max, p_sum = splits
    o_row = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_i, o_g = o_row // groups, o_row % groups
    m_row = o_i < count
    b_q = load_rows(p_q, o_i * q_t + o_g * q_h, m_row, D, BLOCK_D)
    o_new = tl.arange(0, NEW)
    m_new = (o_new < count) & (i_window_split == 0)
    b_k = load_rows(p_new_k, o_new * new_k_t, m_new, D, BLOCK_D)
    b_v = load_rows(p_new_v, o_new * new_v_t, m_new, DV, BLOCK_DV)
    b_s = matmul(b_q, tl.trans(b_k), DTYPE, PRECISION) * scale
    distance = o_i[:, None] - o_new[None, :]
    b_s = tl.where(m_new[None, :] & (distance >= 0) & (distance < window), b_s, float("-inf"))
    b_p, _, m_i = online_softmax(b_s, tl.full([BLOCK_Q], float("-inf"), tl.float32))
    l_i = tl.sum(b_p, 1)
    b_acc = matmul(b_p, b_v, DTYPE, PRECISION)
    start, filled = ring_start(num_tokens, window, rollback, RING), tl.minimum(num_tokens, window).to(tl.int32)
    places = window + rollback
    stop = tl.minimum((i_window_split + 1) * tiles * BLOCK_N, places)
    for first in range(i_window_split * tiles * BLOCK_N, stop, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        age = tl.where(o_n < start, o_n - start + places, o_n - start)  # from W on older than the window, or free
        m_n = (o_n < places) & (age >= window - filled)
        if ROLLBACK:
            m_n = m_n & (age < window)
        b_key = load_rows(p_k, o_n * k_t, o_n < places, D, BLOCK_D)
        b_value = load_rows(p_v, o_n * v_t, m_n, DV, BLOCK_DV)
        b_score = matmul(b_q, tl.trans(b_key), DTYPE, PRECISION) * scale
        b_score = tl.where(m_n[None, :] & (age[None, :] > o_i[:, None]), b_score, float("-inf"))
        b_weight, alpha, m_i = online_softmax(b_score, m_i)
        l_i = l_i * alpha + tl.sum(b_weight, 1)
        b_acc = b_acc * alpha[:, None] + matmul(b_weight, b_value, DTYPE, PRECISION)
    o_split = (slot_splits + i_window_split) * queries + o_row
    store_rows(p_acc, o_split * DV, m_row, b_acc, DV, BLOCK_DV)
    tl.store(p_max + o_split, m_i, mask=m_row)
    tl.store(p_sum + o_split, l_i, mask=m_row)


@triton.jit
def combine_splits(
    splits,
    p_out,
    p_mass,
    out_t,
    begin,
    count,
    length,
    slot_splits,
    num_splits,
    queries,
    groups,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The outputs of a head from its splits; padding, moved behind the real tokens, gets zeros."""
    p_acc, p_max, p_sum = splits
    o_d = tl.arange(0, BLOCK_DV)
    for first_query in range(0, queries, BLOCK_C):
        o_row = first_query + tl.arange(0, BLOCK_C)
        o_i, o_g = o_row // groups, o_row % groups
        m_i = tl.full([BLOCK_C], float("-inf"), tl.float32)
        l_i, l_slots = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
        b_acc = tl.zeros([BLOCK_C, BLOCK_DV], tl.float32)
        for first in range(0, num_splits, SPLITS):
            o_split = first + tl.arange(0, SPLITS)
            mask = (o_split < num_splits)[:, None] & (o_i < count)[None, :]
            o_stored = o_split[:, None] * queries + o_row[None, :]
            # Other programs wrote these: do not look for them in this multiprocessor's own cache.
            split_max = tl.load(p_max + o_stored, mask=mask, other=float("-inf"), cache_modifier=".cg")
            split_sum = tl.load(p_sum + o_stored, mask=mask, other=0.0, cache_modifier=".cg")
            m_acc = mask[:, :, None] & (o_d < DV)[None, None, :]
            o_acc = o_stored[:, :, None] * DV + o_d[None, None, :]
            split_acc = tl.load(p_acc + o_acc, mask=m_acc, other=0.0, cache_modifier=".cg")
            m_new = tl.maximum(m_i, tl.max(split_max, 0))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight, alpha = tl.exp2(split_max - m_safe[None, :]), tl.exp2(m_i - m_safe)
            split_sum *= weight
            l_i = l_i * alpha + tl.sum(split_sum, 0)
            l_slots = l_slots * alpha + tl.sum(tl.where((o_split < slot_splits)[:, None], split_sum, 0.0), 0)
            b_acc = b_acc * alpha[:, None] + tl.sum(split_acc * weight[:, :, None], 0)
            m_i = m_new
        o_out = (begin + o_i) % length * out_t + o_g
        l_i = tl.where(l_i > 0, l_i, 1.0)
        store_rows(p_out, o_out * DV, o_row < queries, b_acc / l_i[:, None], DV, BLOCK_DV)
        tl.store(p_mass + o_out, l_slots / l_i, mask=o_row < queries)


@triton.jit
def copy_rows(p_from, o_from, p_to, o_to, m_row, DIM: tl.constexpr, WIDTH: tl.constexpr):
    store_rows(p_to, o_to, m_row, load_rows(p_from, o_from, m_row, DIM, WIDTH), DIM, WIDTH)


@triton.jit
def update_window(
    o_new,
    new,
    cached,
    counts,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SLOT_QK: tl.constexpr,
):
    """Store the new tokens in the ring buffer. `new`, `cached`: pointers and token strides of k, v, gate, k_slot."""
    p_new_k, p_new_v, p_new_gate, p_new_k_slot, new_k_t, new_v_t, new_g_t, new_ks_t = new
    p_k, p_v, p_gate, p_k_slot, k_t, v_t, g_t, ks_t = cached
    num_tokens, count, window, rollback = counts
    places = window + rollback
    m_new = (o_new < count) & (o_new >= count - places)
    o_ring = (ring_start(num_tokens, window, rollback, True) + window + o_new) % places
    copy_rows(p_new_k, o_new * new_k_t, p_k, o_ring * k_t, m_new, D, BLOCK_D)
    copy_rows(p_new_v, o_new * new_v_t, p_v, o_ring * v_t, m_new, DV, BLOCK_DV)
    copy_rows(p_new_gate, o_new * new_g_t, p_gate, o_ring * g_t, m_new, M, BLOCK_G)
    if HAS_SLOT_QK:
        copy_rows(p_new_k_slot, o_new * new_ks_t, p_k_slot, o_ring * ks_t, m_new, D, BLOCK_D)


@triton.jit(do_not_specialize=["length", "window", "rollback", "window_splits", "tiles", "heads", "groups"])
def nha_decode_kernel(
    p_q,
    p_k,
    p_v,
    p_q_slot,
    p_k_slot,
    p_gate,
    p_slot_k,
    p_slot_v,
    p_after_k,
    p_after_v,
    p_window_k,
    p_window_v,
    p_window_k_slot,
    p_window_gate,
    p_num_tokens,
    p_num_written,
    p_arrival_counter,
    p_mask,
    p_sink_k,
    p_sink_v,
    p_acc,
    p_max,
    p_sum,
    p_out,
    p_mass,
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
    wk_b,
    wk_t,
    wk_h,
    wv_b,
    wv_t,
    wv_h,
    ws_b,
    ws_t,
    ws_h,
    wg_b,
    wg_t,
    wg_h,
    scale,
    length,
    window,
    rollback,
    window_splits,
    tiles,
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
    BLOCK_G: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    RING: tl.constexpr,
    STORE_STATE: tl.constexpr,
    SLOTS_ACTIVE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SLOT_QK: tl.constexpr,
    ROLLBACK: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
):
    """out [B, T, HQ, DV] and mass [B, T, HQ] of T <= NEW tokens, and the state after them.

    Programs: (sequence, head, split) in one axis. STORE_STATE: slots go from slot_* to after_*, which may be the same.
    RING: the window cache window_* [B, W + R, H, ...] is a ring buffer, gets the new tokens, and `num_tokens` counts
    them; else it is oldest first, with R of 0, and is not changed. ROLLBACK: R > 0, and T is at most R. HAS_SLOT_QK:
    slots have keys of their own. The window is cut into `window_splits` of `tiles` blocks of tokens; `scale` includes
    log2(e). SINGLE_TOKEN: T is 1.
    acc [B * H, splits, T * HQ / H, DV], max and sum [B * H, splits, T * HQ / H] are scratch memory of the splits.
    """
    SLOT_SPLITS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    queries = length * groups
    blocks = (queries + BLOCK_Q - 1) // BLOCK_Q
    programs, num_splits = SLOT_SPLITS + window_splits * blocks, SLOT_SPLITS + window_splits
    i_bh = (tl.program_id(0) // programs).to(tl.int64)
    i_task = tl.program_id(0) % programs
    i_b, i_h = i_bh // heads, (i_bh % heads).to(tl.int32)
    o_new = tl.arange(0, NEW)
    begin, count = 0, length
    if HAS_MASK and SINGLE_TOKEN:
        count = (tl.load(p_mask + i_b) != 0).to(tl.int32)
    elif HAS_MASK:
        m_new = (o_new < length) & (tl.load(p_mask + i_b * length + o_new, mask=o_new < length, other=0) != 0)
        begin, count = tl.min(tl.where(m_new, o_new, NEW), 0), tl.sum(m_new.to(tl.int32), 0)
    num_tokens = tl.load(p_num_tokens + i_b)
    # As a constant, 0 takes no register.
    counts = (num_tokens, count, window, rollback if ROLLBACK else 0)
    num_written = tl.load(p_num_written + i_b) if ROLLBACK else 0
    p_k = p_k + i_b * k_b + i_h * k_h + begin * k_t
    p_v = p_v + i_b * v_b + i_h * v_h + begin * v_t
    p_k_slot = p_k_slot + i_b * ks_b + i_h * ks_h + begin * ks_t
    p_gate = p_gate + i_b * g_b + i_h * g_h + begin * g_t
    p_window_k, p_window_v = p_window_k + i_b * wk_b + i_h * wk_h, p_window_v + i_b * wv_b + i_h * wv_h
    p_window_k_slot, p_window_gate = p_window_k_slot + i_b * ws_b + i_h * ws_h, p_window_gate + i_b * wg_b + i_h * wg_h
    size = num_splits * queries
    p_acc, p_max, p_sum = p_acc + i_bh * size * DV, p_max + i_bh * size, p_sum + i_bh * size

    if i_task < SLOT_SPLITS:
        update_slots(
            (p_slot_k + i_bh * M * D, p_slot_v + i_bh * M * DV),
            (p_after_k + i_bh * M * D, p_after_v + i_bh * M * DV),
            (p_k_slot, p_v, p_gate, ks_t, v_t, g_t),
            (p_window_k_slot, p_window_v, p_window_gate, ws_t, wv_t, wg_t),
            (p_q_slot + i_b * qs_b + begin * qs_t + i_h * groups * qs_h, qs_t, qs_h),
            (p_sink_k + i_h * S * D, p_sink_v + i_h * S * DV) if S > 0 else None,
            (p_acc + i_task * queries * DV, p_max + i_task * queries, p_sum + i_task * queries),
            counts,
            num_written,
            scale,
            i_task,
            groups,
            M,
            D,
            DV,
            S,
            BLOCK_M,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_S,
            DTYPE,
            PRECISION,
            HAS_WINDOW,
            RING,
            STORE_STATE,
            SLOTS_ACTIVE,
            ROLLBACK,
            SINGLE_TOKEN,
        )
    elif HAS_WINDOW:
        i_window_task = i_task - SLOT_SPLITS
        attend_window(
            (p_q + i_b * q_b + begin * q_t + i_h * groups * q_h, q_t, q_h),
            (p_k, p_v, k_t, v_t),
            (p_window_k, p_window_v, wk_t, wv_t),
            (p_acc, p_max, p_sum),
            counts,
            scale,
            i_window_task // blocks,
            i_window_task % blocks,
            SLOT_SPLITS,
            tiles,
            queries,
            groups,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_Q,
            BLOCK_N,
            DTYPE,
            PRECISION,
            RING,
            ROLLBACK,
        )

    # All threads of a program have stored their results before one of them increments the counter.
    tl.debug_barrier()
    p_arrivals = p_arrival_counter + i_b * (heads + 1)
    if tl.atomic_add(p_arrivals + i_h, 1, sem="acq_rel", scope="gpu") == programs - 1:
        o_out = i_b * length * heads * groups + i_h * groups
        combine_splits(
            (p_acc, p_max, p_sum),
            p_out + o_out * DV,
            p_mass + o_out,
            heads * groups,
            begin,
            count,
            length,
            SLOT_SPLITS,
            num_splits,
            queries,
            groups,
            DV,
            BLOCK_DV,
            BLOCK_C,
        )
        tl.store(p_arrivals + i_h, 0)
        if RING:
            if HAS_WINDOW or ROLLBACK:
                update_window(
                    o_new,
                    (p_k, p_v, p_gate, p_k_slot, k_t, v_t, g_t, ks_t),
                    (p_window_k, p_window_v, p_window_gate, p_window_k_slot, wk_t, wv_t, wg_t, ws_t),
                    counts,
                    M,
                    D,
                    DV,
                    BLOCK_G,
                    BLOCK_D,
                    BLOCK_DV,
                    HAS_SLOT_QK,
                )
            if tl.atomic_add(p_arrivals + heads, 1, sem="acq_rel", scope="gpu") == heads - 1:
                tl.store(p_num_tokens + i_b, num_tokens + count)
                if ROLLBACK:
                    tl.store(p_num_written + i_b, tl.maximum(num_written, num_tokens + count - window - rollback))
                tl.store(p_arrivals + heads, 0)
