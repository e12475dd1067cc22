"""What slots see of rotated queries and keys, in one launch; and as a PyTorch operator with gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nha.ops.triton.chunk.tiling import width
from nha.ops.triton.launcher import launch

BLOCK = 16  # tokens of a program, where there are several


@triton.jit(do_not_specialize=["length"])
def slot_view_kernel(
    q,
    k,
    cos,
    sin,
    far_cos,
    far_sin,
    out_q,
    out_k,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    c_b,
    c_t,
    s_b,
    s_t,
    length,
    query_heads,
    heads,
    D: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BACK: tl.constexpr,
):
    """out_q [B, T, HQ, D], out_k [B, T, H, D] of one head of a block of tokens; programs (block, HQ + H, B).

    BACK turns the other way: that is the gradient, since a rotation's inverse is its transpose.
    """
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    token0, near = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    there = (token0 + near < length)[:, None]
    column = tl.arange(0, WIDTH)
    turning = (column < R)[None, :]
    other = tl.where(column < R // 2, column + R // 2, column - R // 2)
    c = tl.load(cos + row * c_b + token0 * c_t + near[:, None] * c_t + column[None, :], there & turning, 1.0)
    s = tl.load(sin + row * s_b + token0 * s_t + near[:, None] * s_t + column[None, :], there & turning, 0.0)
    c, s = c.to(tl.float32), s.to(tl.float32)
    far_c = tl.load(far_cos + column[None, :], turning, 1.0).to(tl.float32)
    far_s = tl.load(far_sin + column[None, :], turning, 0.0).to(tl.float32)
    scale = tl.rsqrt(c * c + s * s)
    if head < query_heads:
        scale *= tl.rsqrt(far_c * far_c + far_s * far_s)
        x = q + row * q_b + token0 * q_t + head * q_h
        to = out_q + ((row * length + token0) * query_heads + head) * D
        x_t, to_t = q_t, query_heads * D
    else:
        head -= query_heads
        far_c, far_s = far_c * 0 + 1, far_s * 0
        x = k + row * k_b + token0 * k_t + head * k_h
        to = out_k + ((row * length + token0) * heads + head) * D
        x_t, to_t = k_t, heads * D
    inside = there & (column < D)[None, :]
    at = near[:, None] * x_t
    own = tl.load(x + at + column[None, :], inside, 0.0).to(tl.float32)
    turned = tl.load(x + at + other[None, :], there & turning, 0.0).to(tl.float32)
    turned = tl.where((column < R // 2)[None, :], -turned, turned)
    sine = far_s * c - far_c * s
    value = (own * (far_c * c + far_s * s) + turned * (-sine if BACK else sine)) * scale
    tl.store(to + near[:, None] * to_t + column[None, :], value.to(out_q.dtype.element_ty), inside)


@torch.library.custom_op("nha::unrotate_for_slots", mutates_args=())
def unrotate_for_slots(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, far_cos: Tensor, far_sin: Tensor, back: bool = False
) -> tuple[Tensor, Tensor]:
    """As `nha.ops.rotary.unrotate_for_slots`; `back` gives its gradients instead, from those of what it returns."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    far_cos, far_sin = far_cos.contiguous(), far_sin.contiguous()
    batch, length, query_heads, dim = q.shape
    heads, size = k.shape[2], cos.shape[-1]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    block = BLOCK if length > 1 else 1
    tables = [0 if x.shape[0] == 1 else x.stride(0) for x in (cos, sin)]
    strides = (*q.stride()[:3], *k.stride()[:3], tables[0], cos.stride(1), tables[1], sin.stride(1))
    kind = (strides, query_heads, heads, q.device, *(x.dtype for x in (q, cos, sin, far_cos, far_sin)))
    if outs[0].numel():
        launch(
            slot_view_kernel,
            (-(-length // block), query_heads + heads, batch),
            kind,
            q,
            k,
            cos,
            sin,
            far_cos,
            far_sin,
            *outs,
            *strides,
            length,
            query_heads,
            heads,
            D=dim,
            R=size,
            WIDTH=width(dim),
            BLOCK=block,
            BACK=back,
            num_warps=4 if length > 1 else 1,
        )
    return outs[0], outs[1]


@unrotate_for_slots.register_fake
def _(q, k, cos, sin, far_cos, far_sin, back=False):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:6])
    ctx.back = inputs[6]


def _backward(ctx, grad_q, grad_k):
    return *unrotate_for_slots(grad_q, grad_k, *ctx.saved_tensors, not ctx.back), None, None, None, None, None


unrotate_for_slots.register_autograd(_backward, setup_context=_setup)
