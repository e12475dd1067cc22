"""Decode 1 to 16 tokens in one launch: write what leaves the window to the slots, attend, and update the window.

Tokens. Of the `num_tokens` tokens so far the window cache holds the last W by age: age 0 is token num_tokens - W, if it
exists. A segment has `count` new tokens. New token i writes the token of age i (from age W on: new token i - W) to the
slots and then reads the slots and the tokens of ages i + 1 .. i + W. In a ring buffer, token t is stored at t mod W.

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
from nha.ops.triton.primitives import LOG2_E, clamp_gate, load_rows, matmul, one_minus_exp, online_softmax, store_rows

NEW = tl.constexpr(MAX_NEW)  # the most tokens of a segment
QUERIES = tl.constexpr(16)  # queries that read a block of slots at a time
SPLITS = tl.constexpr(8)  # splits that are combined at a time


@triton.jit
def load_vector(p_x, m, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH] numbers at `p_x` in float32; zero from DIM on and where the scalar `m` is False."""
    o_d = tl.arange(0, WIDTH)
    return tl.load(p_x + o_d, mask=(o_d < DIM) & m, other=0.0).to(tl.float32)


@triton.jit
def slot_pointers(p_slots, o_m, M: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(pointers, mask) of some slots of [M, DIM], as [WIDTH, slots].

    Transposed like this, Triton gives them a layout for float32, not the one of a 16-bit tile of equal shape.
    """
    o_d = tl.arange(0, WIDTH)
    return p_slots + o_m[None, :] * DIM + o_d[:, None], (o_m < M)[None, :] & (o_d < DIM)[:, None]


@triton.jit
def ring_start(num_tokens, window, RING: tl.constexpr):
    """The index of age 0 in the window cache."""
    return (num_tokens % window).to(tl.int32) if RING else 0


@triton.jit
def write_token(
    b_k,
    b_v,
    i,
    new,
    cached,
    o_m,
    counts,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    RING: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
):
    """A block of slots, keys [BLOCK_D, slots] and values [BLOCK_DV, slots], after new token i has written to it.

    `new` and `cached` are (key, value, gate pointers, their token strides) of the new tokens and of the window cache;
    `counts` is (num_tokens, count, window).
    """
    p_new_k, p_new_v, p_new_gate, new_k_t, new_v_t, new_g_t = new
    p_k, p_v, p_gate, k_t, v_t, g_t = cached
    num_tokens, count, window = counts
    m_m, i_new = o_m < M, i - window
    # Where nothing is written the gate is 0, which leaves the slots as they are.
    if HAS_WINDOW:
        m_cached, start = (num_tokens + i_new >= 0) & (i_new < 0) & (i < count), ring_start(num_tokens, window, RING)
        i_cached = tl.where(start + i_new < 0, start + i, start + i_new)
        b_gate = clamp_gate(tl.load(p_gate + i_cached * g_t + o_m, mask=m_m & m_cached, other=0.0))
        b_key = load_vector(p_k + i_cached * k_t, m_cached, D, BLOCK_D)
        b_value = load_vector(p_v + i_cached * v_t, m_cached, DV, BLOCK_DV)
    else:
        b_gate = tl.zeros_like(o_m).to(tl.float32)
        b_key, b_value = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_DV], tl.float32)
    if not (HAS_WINDOW and SINGLE_TOKEN):
        m_new = (i_new >= 0) & (i < count)
        b_gate += clamp_gate(tl.load(p_new_gate + i_new * new_g_t + o_m, mask=m_m & m_new, other=0.0))
        b_key += load_vector(p_new_k + i_new * new_k_t, m_new, D, BLOCK_D)
        b_value += load_vector(p_new_v + i_new * new_v_t, m_new, DV, BLOCK_DV)
    b_decay, b_write = tl.exp2(b_gate * LOG2_E)[None, :], one_minus_exp(b_gate, tl.float32)[None, :]
    return b_k * b_decay + b_key[:, None] * b_write, b_v * b_decay + b_value[:, None] * b_write


@triton.jit
def attend_slots(
    b_k,
    b_v,
    m_m,
    p_q,
    q_h,
    sink,
    m_sink,
    split,
    groups,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the softmax of one token's queries over a block of slots, and the sink, to `split` (acc, max, sum)."""
    p_acc, p_max, p_sum = split
    for i_g in tl.range(0, groups, QUERIES, num_stages=1):
        o_g = i_g + tl.arange(0, QUERIES)
        m_g = o_g < groups
        b_q = load_rows(p_q, o_g * q_h, m_g, D, BLOCK_D)
        b_s = matmul(b_q, b_k, DTYPE, PRECISION) * scale
        m_i = tl.full([QUERIES], float("-inf"), tl.float32)
        b_p, _, m_i = online_softmax(tl.where(m_m[None, :], b_s, float("-inf")), m_i)
        l_i = tl.sum(b_p, 1)
        b_acc = matmul(b_p, tl.trans(b_v), DTYPE, PRECISION)
        if S > 0:
            o_s = tl.arange(0, BLOCK_S)
            m_s = (o_s < S) & m_sink
            b_sink = load_rows(sink[0], o_s * D, m_s, D, BLOCK_D)
            b_s = matmul(b_q, tl.trans(b_sink), DTYPE, PRECISION) * scale
            b_p, alpha, m_i = online_softmax(tl.where(m_s[None, :], b_s, float("-inf")), m_i)
            b_sink = load_rows(sink[1], o_s * DV, m_s, DV, BLOCK_DV)
            l_i = l_i * alpha + tl.sum(b_p, 1)
            b_acc = b_acc * alpha[:, None] + matmul(b_p, b_sink, DTYPE, PRECISION)
        store_rows(p_acc, o_g * DV, m_g, b_acc, DV, BLOCK_DV)
        tl.store(p_max + o_g, m_i, mask=m_g)
        tl.store(p_sum + o_g, l_i, mask=m_g)


@triton.jit
def update_slots(
    slots,
    after,
    new,
    cached,
    query,
    sink,
    split,
    counts,
    scale,
    i_split,
    groups,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    RING: tl.constexpr,
    STORE_STATE: tl.constexpr,
    SLOTS_ACTIVE: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
):
    """Write the tokens one by one to a block of slots, and attend to it after each (in block 0 to the sink too).

    `slots` and `after` are (key, value) pointers before and after the segment; `new`, `cached`, `counts` as in
    `write_token`; `query` is (pointer, token stride, head stride).
    """
    p_q, q_t, q_h = query
    p_acc, p_max, p_sum = split
    num_tokens, count, window = counts
    o_m = i_split * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    p_k, m_k = slot_pointers(slots[0], o_m, M, D, BLOCK_D)
    p_v, m_v = slot_pointers(slots[1], o_m, M, DV, BLOCK_DV)
    b_k, b_v = tl.load(p_k, mask=m_k, other=0.0), tl.load(p_v, mask=m_v, other=0.0)
    p_after_k, _ = slot_pointers(after[0], o_m, M, D, BLOCK_D)
    p_after_v, _ = slot_pointers(after[1], o_m, M, DV, BLOCK_DV)
    for i in tl.range(0, 1 if SINGLE_TOKEN else count, num_stages=1):
        b_k, b_v = write_token(
            b_k,
            b_v,
            i,
            new,
            cached,
            o_m,
            counts,
            M,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            HAS_WINDOW,
            RING,
            SINGLE_TOKEN,
        )
        if STORE_STATE and SINGLE_TOKEN:
            tl.store(p_after_k, b_k, mask=m_k)
            tl.store(p_after_v, b_v, mask=m_v)
        active = SLOTS_ACTIVE or num_tokens + i >= window
        attend_slots(
            b_k,
            b_v,
            m_m & active,
            p_q + i * q_t,
            q_h,
            sink,
            active & (i_split == 0),
            (p_acc + i * groups * DV, p_max + i * groups, p_sum + i * groups),
            groups,
            scale,
            D,
            DV,
            S,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_S,
            DTYPE,
            PRECISION,
        )
    if STORE_STATE and not SINGLE_TOKEN:
        tl.store(p_after_k, b_k, mask=m_k)
        tl.store(p_after_v, b_v, mask=m_v)


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
):
    """Store the softmax of a block of queries over a split of the window; the first split begins with the new tokens.

    `new` and `cached` are (key, value pointers, their token strides); `splits` as `split` in `attend_slots`, the rest
    as in `update_slots`.
    """
    p_q, q_t, q_h = query
    num_tokens, count, window = counts
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
    start, filled = ring_start(num_tokens, window, RING), tl.minimum(num_tokens, window).to(tl.int32)
    stop = tl.minimum((i_window_split + 1) * tiles * BLOCK_N, window)
    for first in range(i_window_split * tiles * BLOCK_N, stop, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        age = tl.where(o_n < start, o_n - start + window, o_n - start)
        m_n = (o_n < window) & (age >= window - filled)
        b_key = load_rows(p_k, o_n * k_t, o_n < window, D, BLOCK_D)
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
    num_tokens, count, window = counts
    m_new = (o_new < count) & (o_new >= count - window)
    o_ring = (ring_start(num_tokens, window, True) + o_new) % window
    copy_rows(p_new_k, o_new * new_k_t, p_k, o_ring * k_t, m_new, D, BLOCK_D)
    copy_rows(p_new_v, o_new * new_v_t, p_v, o_ring * v_t, m_new, DV, BLOCK_DV)
    copy_rows(p_new_gate, o_new * new_g_t, p_gate, o_ring * g_t, m_new, M, BLOCK_G)
    if HAS_SLOT_QK:
        copy_rows(p_new_k_slot, o_new * new_ks_t, p_k_slot, o_ring * ks_t, m_new, D, BLOCK_D)


@triton.jit(do_not_specialize=["length", "window", "window_splits", "tiles", "heads", "groups"])
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
    SINGLE_TOKEN: tl.constexpr,
):
    """out [B, T, HQ, DV] and mass [B, T, HQ] of T <= NEW tokens, and the state after them.

    Programs: (sequence, head, split) in one axis. STORE_STATE: slots go from slot_* to after_*, which may be the same.
    RING: the window cache window_* [B, W, H, ...] is a ring buffer, gets the new tokens, and `num_tokens` counts them;
    else it is oldest first and is not changed. HAS_SLOT_QK: slots have keys of their own. The window is cut into
    `window_splits` of `tiles` blocks of tokens; `scale` includes log2(e). SINGLE_TOKEN: T is 1.
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
    counts = (num_tokens, count, window)
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
            if HAS_WINDOW:
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
                tl.store(p_arrivals + heads, 0)
