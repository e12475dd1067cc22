"""The operations between the matrix products of a decoder layer in one launch each, rounded as PyTorch rounds them.

A short prompt waits for the host, which launches some forty small kernels a layer; a long one for their passes over
memory. Nothing here has gradients.
"""

# Triton's types give a launch the signature of the kernel, without the options of the compiler.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nha.ops.triton.chunk.tiling import device_guard, padded_width
from nha.ops.triton.primitives import LOG2_E
from nha.ops.triton.token import log_gate

BLOCK_T = 16  # tokens of a program that rotates
BLOCK = 1024  # elements of a program that multiplies


@triton.jit
def add_norm_kernel(p_x, p_residual, p_weight, p_sum, p_out, eps, K: tl.constexpr, BLOCK_X: tl.constexpr):
    """sum = x + residual and out = its RMS norm times a weight, [rows, K]; without a residual x is the sum."""
    o_k = tl.arange(0, BLOCK_X)
    m_k = o_k < K
    first = tl.program_id(0).to(tl.int64) * K
    b_x = tl.load(p_x + first + o_k, mask=m_k, other=0.0)
    dtype: tl.constexpr = b_x.dtype
    b_x = b_x.to(tl.float32)
    if p_residual is not None:
        b_x = (b_x + tl.load(p_residual + first + o_k, mask=m_k, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        tl.store(p_sum + first + o_k, b_x.to(dtype), mask=m_k)
    b_out = (b_x * tl.rsqrt(tl.sum(b_x * b_x) / K + eps)).to(dtype).to(tl.float32)
    b_weight = tl.load(p_weight + o_k, mask=m_k, other=0.0).to(tl.float32)
    tl.store(p_out + first + o_k, (b_out * b_weight).to(dtype), mask=m_k)


@triton.jit
def silu_product_kernel(p_gate, p_up, size, BLOCK: tl.constexpr):
    """silu(gate) * up of `size` elements, in the place of gate."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < size
    b_gate = tl.load(p_gate + o_x, mask=m_x, other=0.0)
    dtype: tl.constexpr = b_gate.dtype
    b_gate = b_gate.to(tl.float32)
    b_silu = (b_gate / (1 + tl.exp2(-b_gate * LOG2_E))).to(dtype).to(tl.float32)
    b_up = tl.load(p_up + o_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_gate + o_x, (b_silu * b_up).to(dtype), mask=m_x)


@triton.jit
def rotate_half(b_x, b_pair, b_cos, b_sin, dtype: tl.constexpr):
    """x * cos + pair * sin, each rounded."""
    return (b_x * b_cos).to(dtype).to(tl.float32) + (b_pair * b_sin).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["length", "cos_b", "cos_t"])
def attention_inputs_kernel(
    p_q,
    p_k,
    p_logit,
    p_cos,
    p_sin,
    p_slot_cos,
    p_slot_sin,
    p_out_q,
    p_out_k,
    p_gate,
    p_q_slot,
    p_k_slot,
    cos_b,
    cos_t,
    length,
    HQ: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """Rotated queries and keys, those of the slots, and log-gates [B, T, heads, .] of a head of a block of tokens.

    Programs (block, HQ query heads, H KV heads and H rows of gates, B). HAS_SLOTS: there are gates and slots.
    """
    i_b, i_h = tl.program_id(2).to(tl.int64), tl.program_id(1)
    token0, o_t = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.arange(0, BLOCK_T)
    row = i_b * length + token0
    m_t = (token0 + o_t < length)[:, None]
    if i_h < HQ + H:
        o_d = tl.arange(0, BLOCK_D)
        m_d = m_t & (o_d < D // 2)[None, :]
        p_table = i_b * cos_b + token0 * cos_t + o_t[:, None] * cos_t + o_d[None, :]
        b_cos_one = tl.load(p_cos + p_table, m_d, 1.0).to(tl.float32)
        b_cos_two = tl.load(p_cos + p_table + D // 2, m_d, 1.0).to(tl.float32)
        b_sin_one = tl.load(p_sin + p_table, m_d, 0.0).to(tl.float32)
        b_sin_two = tl.load(p_sin + p_table + D // 2, m_d, 0.0).to(tl.float32)
        b_scale = tl.sqrt(b_cos_one * b_cos_one + b_sin_one * b_sin_one)
        if i_h < HQ:
            o_x = (row + o_t[:, None]) * (HQ * D) + i_h * D + o_d[None, :]
            p_x, p_out, p_slot = p_q + o_x, p_out_q + o_x, (p_q_slot if HAS_SLOTS else p_out_q) + o_x
            b_slot_cos = tl.load(p_slot_cos + o_d, o_d < D // 2, 1.0).to(tl.float32)[None, :]
            b_slot_sin = tl.load(p_slot_sin + o_d, o_d < D // 2, 0.0).to(tl.float32)[None, :]
        else:
            o_x = (row + o_t[:, None]) * (H * D) + (i_h - HQ) * D + o_d[None, :]
            p_x, p_out, p_slot = p_k + o_x, p_out_k + o_x, (p_k_slot if HAS_SLOTS else p_out_k) + o_x
            b_slot_cos = tl.full([1, BLOCK_D], 1.0, tl.float32)
            b_slot_sin = tl.zeros([1, BLOCK_D], tl.float32)
        dtype: tl.constexpr = p_out_q.dtype.element_ty
        b_one = tl.load(p_x, m_d, 0.0).to(tl.float32)
        b_two = tl.load(p_x + D // 2, m_d, 0.0).to(tl.float32)
        tl.store(p_out, rotate_half(b_one, -b_two, b_cos_one, b_sin_one, dtype).to(dtype), mask=m_d)
        tl.store(p_out + D // 2, rotate_half(b_two, b_one, b_cos_two, b_sin_two, dtype).to(dtype), mask=m_d)
        if HAS_SLOTS:
            b_scale *= tl.rsqrt(b_slot_cos * b_slot_cos + b_slot_sin * b_slot_sin)
            tl.store(p_slot, ((b_one * b_slot_cos - b_two * b_slot_sin) * b_scale).to(dtype), mask=m_d)
            tl.store(p_slot + D // 2, ((b_two * b_slot_cos + b_one * b_slot_sin) * b_scale).to(dtype), mask=m_d)
    elif HAS_SLOTS:
        o_m = tl.arange(0, BLOCK_M)
        o_gate = (row + o_t[:, None]) * (H * M) + (i_h - HQ - H) * M + o_m[None, :]
        m_gate = m_t & (o_m < M)[None, :]
        gate_dtype: tl.constexpr = p_gate.dtype.element_ty
        b_logit = tl.load(p_logit + o_gate, m_gate, 0.0).to(tl.float32)
        tl.store(p_gate + o_gate, log_gate(b_logit, gate_dtype).to(gate_dtype), mask=m_gate)


def add_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x + residual, its RMS norm times a weight [K]) of x [B, T, K]; without a residual the first is x itself."""
    x = x.contiguous()
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    if x.numel():
        size = x.shape[-1]
        with device_guard(x):
            add_norm_kernel[(x.numel() // size,)](
                x, residual, weight, total, out, eps, K=size, BLOCK_X=triton.next_power_of_2(size), num_warps=4
            )
    return total, out


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of contiguous tensors of one shape, in the place of `gate`: a third tensor would be the peak of
    a long prompt's memory."""
    if gate.numel():
        with device_guard(gate):
            silu_product_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, gate.numel(), BLOCK=BLOCK, num_warps=4)
    return gate


def attention_inputs(
    q: Tensor, k: Tensor, logits: Tensor | None, tables: tuple[Tensor, Tensor], slot_tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Rotated q [B, T, HQ, D] and k [B, T, H, D], log-gates, and queries and keys as the slots see them.

    `logits` [B, T, H, M] are those of the gates; without them the last three are None. `tables` [B or 1, T, D] are
    cosines and sines of the positions, `slot_tables` [1, 1, D] those of the distance to the slots.
    """
    batch, length, query_heads, dim = q.shape
    heads, slots = k.shape[2], 0 if logits is None else logits.shape[3]
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    gate, q_slot, k_slot = (
        None if logits is None else torch.empty_like(x) for x in (k if logits is None else logits, q, k)
    )
    cos, sin = (x.contiguous() for x in tables)
    block_t = BLOCK_T if length > 1 else 1
    with device_guard(q):
        attention_inputs_kernel[(triton.cdiv(length, block_t), query_heads + heads + (heads if slots else 0), batch)](
            q,
            k,
            logits,
            cos,
            sin,
            *slot_tables,
            out_q,
            out_k,
            gate,
            q_slot,
            k_slot,
            0 if cos.shape[0] == 1 else cos.stride(0),
            cos.stride(1),
            length,
            HQ=query_heads,
            H=heads,
            D=dim,
            M=max(slots, 1),
            BLOCK_D=triton.next_power_of_2(dim // 2),
            BLOCK_M=padded_width(max(slots, 1)),
            BLOCK_T=block_t,
            HAS_SLOTS=logits is not None,
            num_warps=4 if length > 1 else 1,
        )
    return out_q, out_k, gate, q_slot, k_slot
