"""The slots of a decoding step: what leaves the window is written to them, and every new token attends to them.

Terms are those of the kernel's own file.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import LOG2_E, clamp_gate, load_rows, matmul, one_minus_exp, online_softmax, store_rows

QUERIES = tl.constexpr(16)  # queries that read a block of slots at a time


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
def ring_start(num_tokens, window, rollback, RING: tl.constexpr):
    """The index of age 0 in the window cache."""
    return ((num_tokens + rollback) % (window + rollback)).to(tl.int32) if RING else 0


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
    ROLLBACK: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
):
    """A block of slots, keys [BLOCK_D, slots] and values [BLOCK_DV, slots], after the token of age i was written to it.

    `new` and `cached` are (key, value, gate pointers, their token strides) of the new tokens and of the window cache;
    `counts` is (num_tokens, count, window, rollback).
    """
    p_new_k, p_new_v, p_new_gate, new_k_t, new_v_t, new_g_t = new
    p_k, p_v, p_gate, k_t, v_t, g_t = cached
    num_tokens, count, window, rollback = counts
    m_m, i_new, places = o_m < M, i - window, window + rollback
    # Where nothing is written the gate is 0, which leaves the slots as they are.
    if HAS_WINDOW or ROLLBACK:
        m_cached = (num_tokens + i_new >= 0) & (i_new < 0) & (i < count)
        start = ring_start(num_tokens, window, rollback, RING)
        i_cached = tl.where(start + i < places, start + i, start + i - places)
        if ROLLBACK:
            i_cached = tl.where(start + i < 0, start + i + places, i_cached)
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
def write_older(
    b_k,
    b_v,
    first,
    stop,
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
):
    """A block of slots after the tokens of ages first .. stop - 1 (below 0) were written to it, as in `write_token`."""
    for i in tl.range(first, stop, num_stages=1):
        b_k, b_v = write_token(
            b_k, b_v, i, new, cached, o_m, counts, M, D, DV, BLOCK_D, BLOCK_DV, HAS_WINDOW, RING, True, True
        )
    return b_k, b_v


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
    num_written,
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
    ROLLBACK: tl.constexpr,
    SINGLE_TOKEN: tl.constexpr,
):
    """Write the tokens one by one to a block of slots, and attend to it after each (in block 0 to the sink too).

    `slots` and `after` are (key, value) pointers before and after the segment; `new`, `cached`, `counts` as in
    `write_token`; `query` is (pointer, token stride, head stride). ROLLBACK: the stored slots hold `num_written`
    tokens and become those before the token of age `i_store`.
    """
    p_q, q_t, q_h = query
    p_acc, p_max, p_sum = split
    num_tokens, count, window, rollback = counts
    o_m = i_split * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    p_k, m_k = slot_pointers(slots[0], o_m, M, D, BLOCK_D)
    p_v, m_v = slot_pointers(slots[1], o_m, M, DV, BLOCK_DV)
    b_k, b_v = tl.load(p_k, mask=m_k, other=0.0), tl.load(p_v, mask=m_v, other=0.0)
    p_after_k, _ = slot_pointers(after[0], o_m, M, D, BLOCK_D)
    p_after_v, _ = slot_pointers(after[1], o_m, M, DV, BLOCK_DV)
    if ROLLBACK:
        i_first = tl.minimum(num_written - (num_tokens - window), 0).to(tl.int32)
        i_store = tl.maximum(i_first, count - rollback)
        b_k, b_v = write_older(
            b_k, b_v, i_first, i_store, new, cached, o_m, counts, M, D, DV, BLOCK_D, BLOCK_DV, HAS_WINDOW, RING
        )
        tl.store(p_after_k, b_k, mask=m_k)
        tl.store(p_after_v, b_v, mask=m_v)
        b_k, b_v = write_older(
            b_k, b_v, i_store, 0, new, cached, o_m, counts, M, D, DV, BLOCK_D, BLOCK_DV, HAS_WINDOW, RING
        )
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
            ROLLBACK,
            SINGLE_TOKEN,
        )
        if STORE_STATE and SINGLE_TOKEN and not ROLLBACK:
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
    if STORE_STATE and not SINGLE_TOKEN and not ROLLBACK:
        tl.store(p_after_k, b_k, mask=m_k)
        tl.store(p_after_v, b_v, mask=m_v)
