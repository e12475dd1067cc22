"""Full attention for one token: a PyTorch operator that reads keys and values once, in place.

The query heads of a KV head are the rows of one matrix. Where there are few KV heads the keys are split, one program
per split, and a second kernel combines the splits. Split i takes blocks i, i + splits, i + 2 splits, ...: a mask that
hides the end of a cache, or the padding at its start, then takes as much from each. Masked keys are not read. Keys and
values in 8 bits are read as they are: their scales multiply scores and weights.
"""

# Triton's types give a launch the signature of the kernel, without the options of the compiler.
# pyright: reportCallIssue=false

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nha.ops.backends import shared_memory
from nha.ops.triton.chunk.tiling import DTYPES, device_guard, padded_width
from nha.ops.triton.primitives import LOG2_E, load_rows, matmul, online_softmax, store_rows
from nha.ops.validation import MAX_GROUPS

PROGRAMS = 528  # limit of programs for a small batch: four per multiprocessor, which holds two at a time
MIN_BLOCKS = 4  # blocks of keys that are worth a program
LARGE_BATCH = 64  # (row, KV head) pairs whose programs do not end together: the last ones would leave a GPU half idle
MANY_PROGRAMS = 4224  # of a large batch: 16 waves of 264
LONG_SPLIT = 32  # blocks of keys that are worth a program of a large batch
TILE_BYTES = 2**15  # keys and values of a block
WIDE_MEMORY = 200 << 10  # bytes of shared memory of a GPU that holds two programs of wide blocks


@triton.jit(do_not_specialize=["mask_b", "length", "num_splits", "heads", "groups"])
def full_decode_kernel(
    p_q,
    p_k,
    p_v,
    p_k_scale,
    p_v_scale,
    p_mask,
    p_acc,
    p_max,
    p_sum,
    p_out,
    q_b,
    q_h,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    scale_b,
    scale_h,
    mask_b,
    mask_t,
    scale,
    length,
    num_splits,
    heads,
    groups,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SINGLE_SPLIT: tl.constexpr,
):
    """Attention of the query heads of a KV head over a split of its keys; programs (row, KV head, split) in one axis.

    q [B, HQ, D], k [B, H, Tk, D], v [B, H, Tk, DV], mask [B, Tk]; `scale` includes log2(e). Keys and values with scales
    [B, H, Tk] are int8. SINGLE_SPLIT: the result is out [B, HQ, DV]. Else each split stores a softmax in acc [B * H,
    splits, HQ / H, DV], max and sum [B * H, splits, HQ / H].
    """
    i_bh, i_split = (tl.program_id(0) // num_splits).to(tl.int64), tl.program_id(0) % num_splits
    i_b, i_h = i_bh // heads, i_bh % heads
    o_g, o_n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_N)
    m_g = o_g < groups
    b_q = load_rows(p_q + i_b * q_b + i_h * groups * q_h, o_g * q_h, m_g, D, BLOCK_D)
    p_k, p_v = p_k + i_b * k_b + i_h * k_h, p_v + i_b * v_b + i_h * v_h
    o_scale = i_b * scale_b + i_h * scale_h
    m_i, l_i = tl.full([BLOCK_G], float("-inf"), tl.float32), tl.zeros([BLOCK_G], tl.float32)
    b_acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for i_block in tl.range(i_split, tl.cdiv(length, BLOCK_N), num_splits):
        first = tl.cast(i_block, tl.int64) * BLOCK_N
        m_n = first + o_n < length
        if HAS_MASK:
            m_n = m_n & (tl.load(p_mask + i_b * mask_b + first * mask_t + o_n * mask_t, mask=m_n, other=0) != 0)
        b_k = load_rows(p_k + first * k_t, o_n * k_t, m_n, D, BLOCK_D)
        b_v = load_rows(p_v + first * v_t, o_n * v_t, m_n, DV, BLOCK_DV)
        b_s = matmul(b_q, tl.trans(b_k.to(DTYPE)), DTYPE, PRECISION) * scale
        if p_k_scale is not None:
            b_s *= tl.load(p_k_scale + o_scale + first + o_n, mask=m_n, other=0.0)[None, :]
        b_p, alpha, m_i = online_softmax(tl.where(m_n[None, :], b_s, float("-inf")), m_i)
        l_i = l_i * alpha + tl.sum(b_p, 1)
        if p_v_scale is not None:
            b_p *= tl.load(p_v_scale + o_scale + first + o_n, mask=m_n, other=0.0)[None, :]
        b_acc = b_acc * alpha[:, None] + matmul(b_p, b_v, DTYPE, PRECISION)
    if SINGLE_SPLIT:
        b_acc /= tl.where(l_i > 0, l_i, 1.0)[:, None]
        store_rows(p_out + i_bh * groups * DV, o_g * DV, m_g, b_acc, DV, BLOCK_DV)
    else:
        o_split = (i_bh * num_splits + i_split) * groups
        store_rows(p_acc + o_split * DV, o_g * DV, m_g, b_acc, DV, BLOCK_DV)
        tl.store(p_max + o_split + o_g, m_i, mask=m_g)
        tl.store(p_sum + o_split + o_g, l_i, mask=m_g)


@triton.jit(do_not_specialize=["num_splits", "groups"])
def full_decode_combine_kernel(
    p_acc, p_max, p_sum, p_out, num_splits, groups, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out [B, HQ, DV] from the splits of a KV head; programs (row, query head). A row that sees no key gets zeros."""
    i_bhq = tl.program_id(0).to(tl.int64)
    o_first = i_bhq // groups * num_splits * groups + i_bhq % groups
    o_d = tl.arange(0, BLOCK_DV)
    m_i, l_i = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    b_acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, num_splits, BLOCK_C):
        o_split = first + tl.arange(0, BLOCK_C)
        mask = o_split < num_splits
        split_max = tl.load(p_max + o_first + o_split * groups, mask=mask, other=float("-inf"))
        weight, alpha, m_i = online_softmax(split_max[None, :], m_i)
        split_sum = tl.load(p_sum + o_first + o_split * groups, mask=mask, other=0.0)
        l_i = l_i * alpha + tl.sum(weight * split_sum[None, :], 1)
        split_acc = load_rows(p_acc + o_first * DV, o_split * groups * DV, mask, DV, BLOCK_DV)
        b_acc = b_acc * alpha + tl.sum(split_acc * tl.trans(weight), 0)
    b_acc /= tl.where(l_i > 0, l_i, 1.0)
    tl.store(p_out + i_bhq * DV + o_d, b_acc.to(p_out.dtype.element_ty), mask=o_d < DV)


class BlockSizes(NamedTuple):
    """Sizes the kernels are compiled for; nothing depends on the number of sequences or tokens."""

    block_d: int
    block_dv: int
    block_n: int  # keys of a block
    block_c: int  # splits that are combined at a time


@cache
def block_sizes(dtype: torch.dtype, dim: int, value_dim: int, wide: bool = False) -> BlockSizes:
    """Sizes within the registers and shared memory of a current GPU, also of one with 100 KB.

    `wide` is for numbers of 8 bits and heads of 128 on a GPU with more: twice the keys take 0.73 of the time there.
    """
    is_fp32 = dtype == torch.float32
    if wide and not is_fp32 and dim == value_dim == 128:
        return block_sizes(dtype, dim, value_dim)._replace(block_n=128)
    block_d, block_dv = (padded_width(d, 16 if is_fp32 else 64) for d in (dim, value_dim))  # see chunk/tiling.py
    block_n = 1 << (TILE_BYTES // ((block_d + block_dv) * dtype.itemsize)).bit_length() - 1
    return BlockSizes(block_d, block_dv, min(max(16, block_n), 64 if is_fp32 else 128), min(4096 // block_dv, 32))


def count_splits(length: int, pairs: int, block_n: int) -> int:
    """Into how many splits `length` keys of each of `pairs` (row, KV head) are cut.

    >>> count_splits(32768, 8, 64), count_splits(32768, 872, 64), count_splits(2048, 872, 64)
    (66, 5, 1)
    """
    blocks = -(-length // block_n)
    splits = min(PROGRAMS // pairs, blocks // MIN_BLOCKS)
    if pairs > LARGE_BATCH:
        splits = max(splits, min(-(-MANY_PROGRAMS // pairs), blocks // LONG_SPLIT))
    return max(splits, 1)


@torch.library.custom_op("nha::full_decode", mutates_args=())
def full_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """out [B, 1, HQ, Dv] of q [B, HQ, 1, D], k [B, H, Tk, D], v [B, H, Tk, Dv]; mask [B, 1, 1, Tk] bool.

    With scales [B, H, Tk, 1] float32, k and v are int8.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, query_heads, _, dim = q.shape
    heads, length, value_dim = k.shape[1], k.shape[2], v.shape[3]
    wide = k_scale is not None and shared_memory(q.device) >= WIDE_MEMORY
    groups, sizes = query_heads // heads, block_sizes(q.dtype, dim, value_dim, wide)
    num_splits = count_splits(length, batch * heads, sizes.block_n)
    if k_scale is not None and v_scale is not None and (k_scale.stride(2) != 1 or k_scale.stride() != v_scale.stride()):
        k_scale, v_scale = k_scale.contiguous(), v_scale.contiguous()
    out = q.new_empty(batch, 1, query_heads, value_dim)
    scratch = (batch * heads, num_splits, groups)
    single = num_splits == 1
    split_acc = out if single else q.new_empty(*scratch, value_dim, dtype=torch.float32)
    split_max, split_sum = (out if single else q.new_empty(scratch, dtype=torch.float32) for _ in range(2))
    bytes_mask = None if mask is None else mask.expand(batch, 1, 1, length).view(torch.int8)
    strides = (
        q.stride(0),
        q.stride(1),
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if k_scale is None else k_scale.stride()[:2]),
        *((0, 0) if bytes_mask is None else bytes_mask.stride()[::3]),
    )
    with device_guard(q):
        full_decode_kernel[(batch * heads * num_splits,)](
            q,
            k,
            v,
            k_scale,
            v_scale,
            bytes_mask,
            split_acc,
            split_max,
            split_sum,
            out,
            *strides,
            scale * LOG2_E.value,
            length,
            num_splits,
            heads,
            groups,
            D=dim,
            DV=value_dim,
            BLOCK_D=sizes.block_d,
            BLOCK_DV=sizes.block_dv,
            BLOCK_G=MAX_GROUPS,
            BLOCK_N=sizes.block_n,
            DTYPE=DTYPES[q.dtype],
            PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
            HAS_MASK=bytes_mask is not None,
            SINGLE_SPLIT=single,
            num_warps=4,
            num_stages=4 if k_scale is not None else 3,
        )
        if not single:
            full_decode_combine_kernel[(batch * query_heads,)](
                split_acc,
                split_max,
                split_sum,
                out,
                num_splits,
                groups,
                DV=value_dim,
                BLOCK_DV=sizes.block_dv,
                BLOCK_C=sizes.block_c,
                num_warps=4,
            )
    return out


@full_decode.register_fake
def _(q, k, v, mask, scale, k_scale=None, v_scale=None):
    return q.new_empty(q.shape[0], 1, q.shape[1], v.shape[3])
