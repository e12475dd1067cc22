"""Rows of keys or values rounded to 8 bits and written into a cache in one launch, with the bits of `Int8Rows.of`."""

# Triton's types give a launch the signature of the kernel, without the options of the compiler.
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nha.ops.packed_state import MAX_INT8, SMALLEST
from nha.ops.triton.chunk.tiling import device_guard

MAX_NUMBER = tl.constexpr(float(MAX_INT8))
LEAST = tl.constexpr(SMALLEST)
ROUNDER = tl.constexpr(1.5 * 2**23)  # added and taken away again it leaves the nearest integer, the even one of two


@triton.jit(do_not_specialize=["length"])
def write_rows_kernel(
    p_x,
    p_numbers,
    p_scale,
    p_start,
    x_b,
    x_h,
    x_t,
    numbers_b,
    numbers_h,
    numbers_t,
    scale_b,
    scale_h,
    scale_t,
    heads,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of x [B, H, T, D] for each program (sequence, head, token)."""
    i_row, i_t = (tl.program_id(0) // length).to(tl.int64), (tl.program_id(0) % length).to(tl.int64)
    i_b, i_h = i_row // heads, i_row % heads
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = tl.load(p_x + i_b * x_b + i_h * x_h + i_t * x_t + o_d, mask=m_d, other=0.0).to(tl.float32)
    size = tl.maximum(tl.div_rn(tl.max(tl.abs(b_x)), MAX_NUMBER + 0.5), LEAST)
    exponent = size.to(tl.int32, bitcast=True) & 0x7F800000
    scale = exponent.to(tl.float32, bitcast=True) * 2
    inverse = ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    b_n = (b_x * inverse + ROUNDER) - ROUNDER
    b_n = tl.minimum(tl.maximum(b_n, -MAX_NUMBER), MAX_NUMBER)
    place = tl.load(p_start) + i_t
    p_numbers += i_b * numbers_b + i_h * numbers_h + place * numbers_t
    tl.store(p_numbers + o_d, b_n.to(tl.int8), mask=m_d)
    tl.store(p_scale + i_b * scale_b + i_h * scale_h + place * scale_t, scale)


def write_rows(x: Tensor, numbers: Tensor, scale: Tensor, start: Tensor) -> None:
    """`nha.ops.int8_rows.write_rows`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    with device_guard(x):
        write_rows_kernel[(batch * heads * length,)](
            x,
            numbers,
            scale,
            start,
            *x.stride()[:3],
            *numbers.stride()[:3],
            *scale.stride()[:3],
            heads,
            length,
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            num_warps=1,
        )
