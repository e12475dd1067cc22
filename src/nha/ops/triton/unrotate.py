"""Undo rotary positions of queries and keys for the slots, in one launch; a PyTorch operator with gradients."""

# Triton's types give a launch the signature of the kernel, without the options of the compiler.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nha.ops.backends import can_skip_dispatch
from nha.ops.triton.chunk.tiling import device_guard, padded_width

BLOCK_T = 16  # tokens of a program, where there are several


@triton.jit(do_not_specialize=["length"])
def unrotate_kernel(
    p_q,
    p_k,
    p_cos,
    p_sin,
    p_slot_cos,
    p_slot_sin,
    p_out_q,
    p_out_k,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
    length,
    query_heads,
    heads,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """out_q [B, T, HQ, D], out_k [B, T, H, D] of one head of a block of tokens; programs (block, HQ + H, B).

    The rotation is undone, and queries get that of the distance to the slots. BACKWARD rotates the other way, which is
    the gradient: a rotation's inverse is its transpose.
    """
    i_b, i_h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    token0, o_t = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.arange(0, BLOCK_T)
    m_t = (token0 + o_t < length)[:, None]
    o_d = tl.arange(0, BLOCK_D)
    m_r = (o_d < R)[None, :]
    o_pair = tl.where(o_d < R // 2, o_d + R // 2, o_d - R // 2)
    b_cos = tl.load(p_cos + i_b * cos_b + token0 * cos_t + o_t[:, None] * cos_t + o_d[None, :], m_t & m_r, 1.0)
    b_sin = tl.load(p_sin + i_b * sin_b + token0 * sin_t + o_t[:, None] * sin_t + o_d[None, :], m_t & m_r, 0.0)
    b_cos, b_sin = b_cos.to(tl.float32), b_sin.to(tl.float32)
    b_slot_cos = tl.load(p_slot_cos + o_d[None, :], m_r, 1.0).to(tl.float32)
    b_slot_sin = tl.load(p_slot_sin + o_d[None, :], m_r, 0.0).to(tl.float32)
    b_scale = tl.rsqrt(b_cos * b_cos + b_sin * b_sin)
    if i_h < query_heads:
        b_scale *= tl.rsqrt(b_slot_cos * b_slot_cos + b_slot_sin * b_slot_sin)
        p_x = p_q + i_b * q_b + token0 * q_t + i_h * q_h
        p_out = p_out_q + ((i_b * length + token0) * query_heads + i_h) * D
        x_t, out_t = q_t, query_heads * D
    else:
        i_h -= query_heads
        b_slot_cos, b_slot_sin = b_slot_cos * 0 + 1, b_slot_sin * 0
        p_x = p_k + i_b * k_b + token0 * k_t + i_h * k_h
        p_out = p_out_k + ((i_b * length + token0) * heads + i_h) * D
        x_t, out_t = k_t, heads * D
    mask = m_t & (o_d < D)[None, :]
    o_x = o_t[:, None] * x_t
    b_x = tl.load(p_x + o_x + o_d[None, :], mask, 0.0).to(tl.float32)
    b_pair = tl.load(p_x + o_x + o_pair[None, :], m_t & m_r, 0.0).to(tl.float32)
    b_pair = tl.where((o_d < R // 2)[None, :], -b_pair, b_pair)
    b_sine = b_slot_sin * b_cos - b_slot_cos * b_sin
    b_cosine = b_slot_cos * b_cos + b_slot_sin * b_sin
    b_out = (b_x * b_cosine + b_pair * (-b_sine if BACKWARD else b_sine)) * b_scale
    tl.store(p_out + o_t[:, None] * out_t + o_d[None, :], b_out.to(p_out_q.dtype.element_ty), mask)


def unrotate_for_slots(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, slot_cos: Tensor, slot_sin: Tensor
) -> tuple[Tensor, Tensor]:
    """As `nha.ops.rotary.unrotate_for_slots`."""
    args = (q, k, cos, sin, slot_cos, slot_sin)
    return (_compute if can_skip_dispatch(args) else _unrotate)(*args)


def _compute(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, slot_cos: Tensor, slot_sin: Tensor, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """As `nha.ops.rotary.unrotate_for_slots`; with `backward`, its gradients from those of its outputs instead."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    slot_cos, slot_sin = slot_cos.contiguous(), slot_sin.contiguous()
    batch, length, query_heads, dim = q.shape
    heads, rotated = k.shape[2], cos.shape[-1]
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    block_t = BLOCK_T if length > 1 else 1
    cos_b, sin_b = (0 if x.shape[0] == 1 else x.stride(0) for x in (cos, sin))
    strides = (*q.stride()[:3], *k.stride()[:3], cos_b, cos.stride(1), sin_b, sin.stride(1))
    if not out_q.numel():
        return out_q, out_k
    with device_guard(q):
        unrotate_kernel[(-(-length // block_t), query_heads + heads, batch)](
            q,
            k,
            cos,
            sin,
            slot_cos,
            slot_sin,
            out_q,
            out_k,
            *strides,
            length,
            query_heads,
            heads,
            D=dim,
            R=rotated,
            BLOCK_D=padded_width(dim),
            BLOCK_T=block_t,
            BACKWARD=backward,
            num_warps=4 if length > 1 else 1,
        )
    return out_q, out_k


_unrotate = torch.library.custom_op("nha::unrotate_for_slots", _compute, mutates_args=())


@_unrotate.register_fake
def _(q, k, cos, sin, slot_cos, slot_sin, backward=False):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:6])
    ctx.inverse = inputs[6]


def _differentiate(ctx, dq, dk):
    return *_unrotate(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None, None, None


_unrotate.register_autograd(_differentiate, setup_context=_save)
