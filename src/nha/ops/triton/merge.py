"""Attention to one part of the keys merged with that to other parts, in one launch and in place."""

# Triton's types give a launch the signature of the kernel, without the options of the compiler.
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nha.ops.triton.chunk.tiling import device_guard
from nha.ops.triton.primitives import load_rows, store_rows

BLOCK_T = 16  # queries of a program


@triton.jit(do_not_specialize=["heads", "length"])
def merge_kernel(
    p_out,
    p_total,
    p_part,
    p_lse,
    out_b,
    out_h,
    out_t,
    part_b,
    part_h,
    part_t,
    heads,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """out and part [B, H, T, D], log-sum-exps total and lse [B, H, T]; programs (sequence and head, queries)."""
    i_bh, o_t = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_b, i_h = i_bh // heads, i_bh % heads
    m_t = o_t < length
    total = tl.load(p_total + i_bh * length + o_t, mask=m_t, other=0.0)
    lse = tl.load(p_lse + i_bh * length + o_t, mask=m_t, other=0.0)
    larger = tl.maximum(total, lse)
    old, new = tl.exp(total - larger), tl.exp(lse - larger)
    tl.store(p_total + i_bh * length + o_t, larger + tl.log(old + new), mask=m_t)
    weight = (new / (old + new))[:, None]
    p_out += i_b * out_b + i_h * out_h
    p_part += i_b * part_b + i_h * part_h
    o_t = o_t.to(tl.int64)
    b_out = load_rows(p_out, o_t * out_t, m_t, D, BLOCK_D)
    b_part = load_rows(p_part, o_t * part_t, m_t, D, BLOCK_D).to(tl.float32)
    store_rows(p_out, o_t * out_t, m_t, b_out + weight * (b_part - b_out), D, BLOCK_D)


def merge(out: Tensor, total: Tensor, part: Tensor, lse: Tensor) -> None:
    """Let out [B, H, T, D] and total [B, H, T, 1], both float32, also hold part [B, H, T, D] with lse [B, H, T, 1]."""
    batch, heads, length, dim = out.shape
    with device_guard(out):
        merge_kernel[(batch * heads, triton.cdiv(length, BLOCK_T))](
            out,
            total,
            part,
            lse.contiguous(),
            *out.stride()[:3],
            *part.stride()[:3],
            heads,
            length,
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_T=BLOCK_T,
            num_warps=4,
        )
