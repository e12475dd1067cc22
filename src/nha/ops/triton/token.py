"""The linear layers of one token: weights are read once, and what stands before and after a product is part of it.

A decoder layer of one token of one sequence waits for its weights; every small kernel between two products adds a gap
to that. Here the norm is computed where its output is read, and rotary positions, the gate, SiLU and the residual where
a product is stored, so that a layer is four launches besides attention.

Programs. One takes `BLOCK_N` rows of a weight matrix, or twice as many where two outputs meet: the halves of a head
that a rotation mixes, or gate and up projection. Sums are float32; what is stored is rounded once. The norm is rounded
as the family's code does.
"""

# Triton's types give a launch the signature of the kernel, without the options of the compiler.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nha.ops.triton.chunk.tiling import device_guard
from nha.ops.triton.primitives import LOG2_E


@triton.jit
def inverse_norm(p_x, eps, K: tl.constexpr, BLOCK_X: tl.constexpr):
    """1 / sqrt(mean(x ** 2) + eps) of x [K]."""
    o_k = tl.arange(0, BLOCK_X)
    b_x = tl.load(p_x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(b_x * b_x) / K + eps)


@triton.jit
def load_token(p_x, p_norm, r_norm, o_k, m_k):
    """Elements [BLOCK_N, BLOCK_K] of x, the same in every row, times the norm's weight if there is one; float32."""
    b_x = tl.load(p_x + o_k, mask=m_k, other=0.0)
    if p_norm is not None:
        b_weight = tl.load(p_norm + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_normed = (b_x.to(tl.float32) * r_norm).to(b_x.dtype).to(tl.float32)
        b_x = (b_normed * b_weight).to(b_x.dtype)
    return b_x.to(tl.float32)


@triton.jit
def dot(p_x, p_norm, r_norm, p_w, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Float32 [BLOCK_N] of the rows of a weight [., K] from `p_w` on."""
    o_row = tl.arange(0, BLOCK_N)[:, None] * K
    b_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)[None, :] + o_row * 0
        m_k = o_k < K
        b_w = tl.load(p_w + o_row + o_k, mask=m_k, other=0.0, eviction_policy="evict_first")
        b_sum += b_w.to(tl.float32) * load_token(p_x, p_norm, r_norm, o_k, m_k)
    return tl.sum(b_sum, 1)


@triton.jit
def dot_pair(
    p_x,
    p_norm,
    r_norm,
    p_first,
    p_second,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`dot` of two blocks of rows, which share what is read of x."""
    o_row = tl.arange(0, BLOCK_N)[:, None] * K
    b_one = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    b_two = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)[None, :] + o_row * 0
        m_k = o_k < K
        b_w_one = tl.load(p_first + o_row + o_k, mask=m_k, other=0.0, eviction_policy="evict_first")
        b_w_two = tl.load(p_second + o_row + o_k, mask=m_k, other=0.0, eviction_policy="evict_first")
        b_x = load_token(p_x, p_norm, r_norm, o_k, m_k)
        b_one += b_w_one.to(tl.float32) * b_x
        b_two += b_w_two.to(tl.float32) * b_x
    return tl.sum(b_one, 1), tl.sum(b_two, 1)


@triton.jit
def add_bias(b_one, b_two, p_bias, o_one, o_two):
    """Two blocks of outputs plus their bias, if there is one."""
    if p_bias is not None:
        b_one += tl.load(p_bias + o_one).to(tl.float32)
        b_two += tl.load(p_bias + o_two).to(tl.float32)
    return b_one, b_two


@triton.jit
def store_pair(p_out, o_one, o_two, b_one, b_two):
    """Two blocks of outputs, rounded."""
    tl.store(p_out + o_one, b_one.to(p_out.dtype.element_ty))
    tl.store(p_out + o_two, b_two.to(p_out.dtype.element_ty))


@triton.jit
def rotate_pair(p_out, o_one, o_two, b_one, b_two, b_cos_one, b_cos_two, b_sin_one, b_sin_two):
    """The halves of a head, rotated."""
    store_pair(p_out, o_one, o_two, b_one * b_cos_one - b_two * b_sin_one, b_two * b_cos_two + b_one * b_sin_two)


@triton.jit
def log_gate(b_logit, dtype: tl.constexpr):
    """logsigmoid(logit) / 8, rounded where PyTorch's operators round."""
    b_x = b_logit.to(dtype).to(tl.float32)
    b_log = tl.minimum(b_x, 0.0) - tl.log2(1 + tl.exp2(-tl.abs(b_x) * LOG2_E)) / LOG2_E
    return b_log.to(dtype).to(tl.float32) / 8


@triton.jit
def token_inputs_kernel(
    p_x,
    p_norm,
    p_w_q,
    p_w_k,
    p_w_v,
    p_w_gate,
    p_bias_q,
    p_bias_k,
    p_bias_v,
    p_bias_gate,
    p_cos,
    p_sin,
    p_slot_cos,
    p_slot_sin,
    p_q,
    p_k,
    p_v,
    p_gate,
    p_q_slot,
    p_k_slot,
    p_num_tokens,
    eps,
    K: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    HQ: tl.constexpr,
    H: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """Queries [HQ, D], keys and values [H, D], log-gates [H, M] of a token x [K]; rotated, and as the slots see them.

    A program computes BLOCK_N elements of one half of a head and their partners in the other half. HAS_SLOTS: there are
    gates, and queries and keys for the slots.
    """
    r_norm = inverse_norm(p_x, eps, K, BLOCK_X)
    IN_HEAD: tl.constexpr = D // (2 * BLOCK_N)
    i, i_part = tl.program_id(0) // IN_HEAD, tl.program_id(0) % IN_HEAD
    o_half = i_part * BLOCK_N + tl.arange(0, BLOCK_N)
    if i < HQ + H:
        b_cos_one, b_cos_two = tl.load(p_cos + o_half).to(tl.float32), tl.load(p_cos + D // 2 + o_half).to(tl.float32)
        b_sin_one, b_sin_two = tl.load(p_sin + o_half).to(tl.float32), tl.load(p_sin + D // 2 + o_half).to(tl.float32)
        b_scale = tl.sqrt(b_cos_one * b_cos_one + b_sin_one * b_sin_one)  # some families scale their tables
        if i < HQ:
            first = i * D + i_part * BLOCK_N
            b_one, b_two = dot_pair(
                p_x, p_norm, r_norm, p_w_q + first * K, p_w_q + (first + D // 2) * K, K, BLOCK_N, BLOCK_K
            )
            o_one, o_two = i * D + o_half, i * D + D // 2 + o_half
            b_one, b_two = add_bias(b_one, b_two, p_bias_q, o_one, o_two)
            rotate_pair(p_q, o_one, o_two, b_one, b_two, b_cos_one, b_cos_two, b_sin_one, b_sin_two)
            if HAS_SLOTS:
                b_cos = tl.load(p_slot_cos + o_half).to(tl.float32)
                b_sin = tl.load(p_slot_sin + o_half).to(tl.float32)
                b_scale *= tl.rsqrt(b_cos * b_cos + b_sin * b_sin)
                b_cos, b_sin = b_cos * b_scale, b_sin * b_scale
                rotate_pair(p_q_slot, o_one, o_two, b_one, b_two, b_cos, b_cos, b_sin, b_sin)
        else:
            i_h = i - HQ
            first = i_h * D + i_part * BLOCK_N
            b_one, b_two = dot_pair(
                p_x, p_norm, r_norm, p_w_k + first * K, p_w_k + (first + D // 2) * K, K, BLOCK_N, BLOCK_K
            )
            o_one, o_two = i_h * D + o_half, i_h * D + D // 2 + o_half
            b_one, b_two = add_bias(b_one, b_two, p_bias_k, o_one, o_two)
            rotate_pair(p_k, o_one, o_two, b_one, b_two, b_cos_one, b_cos_two, b_sin_one, b_sin_two)
            if HAS_SLOTS:
                store_pair(p_k_slot, o_one, o_two, b_one * b_scale, b_two * b_scale)
    elif i < HQ + 2 * H:
        i_h = i - HQ - H
        first = i_h * D + i_part * BLOCK_N
        b_one, b_two = dot_pair(
            p_x, p_norm, r_norm, p_w_v + first * K, p_w_v + (first + D // 2) * K, K, BLOCK_N, BLOCK_K
        )
        o_one, o_two = i_h * D + o_half, i_h * D + D // 2 + o_half
        b_one, b_two = add_bias(b_one, b_two, p_bias_v, o_one, o_two)
        store_pair(p_v, o_one, o_two, b_one, b_two)
    elif HAS_SLOTS:
        first = (tl.program_id(0) - (HQ + 2 * H) * IN_HEAD) * 2 * BLOCK_N
        b_one, b_two = dot_pair(
            p_x, p_norm, r_norm, p_w_gate + first * K, p_w_gate + (first + BLOCK_N) * K, K, BLOCK_N, BLOCK_K
        )
        o_one = first + tl.arange(0, BLOCK_N)
        b_one, b_two = add_bias(b_one, b_two, p_bias_gate, o_one, o_one + BLOCK_N)
        dtype: tl.constexpr = p_gate.dtype.element_ty
        b_one, b_two = log_gate(b_one, dtype), log_gate(b_two, dtype)
        if p_num_tokens is not None:
            m_later = tl.load(p_num_tokens) > 0
            b_one, b_two = tl.where(m_later, b_one, 0.0), tl.where(m_later, b_two, 0.0)
        store_pair(p_gate, o_one, o_one + BLOCK_N, b_one, b_two)


@triton.jit
def token_mlp_kernel(
    p_x,
    p_norm,
    p_w_gate,
    p_w_up,
    p_out,
    eps,
    K: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """silu(gate(x)) * up(x) [N] of a token x [K], normalised; a program computes BLOCK_N of them."""
    r_norm = inverse_norm(p_x, eps, K, BLOCK_X)
    first = tl.program_id(0) * BLOCK_N
    b_gate, b_up = dot_pair(p_x, p_norm, r_norm, p_w_gate + first * K, p_w_up + first * K, K, BLOCK_N, BLOCK_K)
    dtype: tl.constexpr = p_out.dtype.element_ty
    b_gate = b_gate.to(dtype).to(tl.float32)
    b_silu = (b_gate / (1 + tl.exp2(-b_gate * LOG2_E))).to(dtype).to(tl.float32)
    tl.store(p_out + first + tl.arange(0, BLOCK_N), (b_silu * b_up.to(dtype).to(tl.float32)).to(dtype))


@triton.jit
def token_linear_kernel(
    p_x,
    p_norm,
    p_w,
    p_residual,
    p_out,
    eps,
    K: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x [K] times a weight [N, K], plus the residual [N] if there is one; x is normalised if there is a norm."""
    r_norm = 0.0
    if p_norm is not None:
        r_norm = inverse_norm(p_x, eps, K, BLOCK_X)
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N
    b_out = dot(p_x, p_norm, r_norm, p_w + first * K, K, BLOCK_N, BLOCK_K)
    o_n = first + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = p_out.dtype.element_ty
    if p_residual is not None:
        b_out = b_out.to(dtype).to(tl.float32) + tl.load(p_residual + o_n).to(tl.float32)
    tl.store(p_out + o_n, b_out.to(dtype))


ROWS = 8  # rows of a weight, and elements of a head, come in multiples of it


class Tiles(NamedTuple):
    """Sizes the kernels are compiled for."""

    block_n: int = 4  # rows of a weight
    block_k: int = 1024
    warps: int = 4


TILES = Tiles()


class Norm(NamedTuple):
    """An RMS norm: weight [K] and what is added to the mean square."""

    weight: Tensor
    eps: float


class TokenInputs(NamedTuple):
    """Inputs of attention for one token, [1, 1, heads, dim] each; the last three are None without slots."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_gate: Tensor | None
    q_slot: Tensor | None
    k_slot: Tensor | None


Linear = tuple[Tensor, Tensor | None]  # weight [N, K], bias [N]


def _constants(size: int, tiles: Tiles) -> dict[str, Any]:
    return {
        "K": size,
        "BLOCK_X": triton.next_power_of_2(size),
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "num_warps": tiles.warps,
    }


def token_inputs(
    x: Tensor,
    norm: Norm,
    projections: tuple[Linear, Linear, Linear],
    gate: Linear | None,
    tables: tuple[Tensor, Tensor],
    slot_tables: tuple[Tensor, Tensor],
    *,
    head_dim: int,
    num_slots: int,
    num_tokens: Tensor | None = None,
    tiles: Tiles | None = None,
) -> TokenInputs:
    """Queries, keys, values, gates of a token x [1, 1, K] from its layer's norm and projections (of q, k and v).

    `tables` are cosines and sines [1, 1, D] of its position, `slot_tables` those of the distance to the slots. Without
    a `gate` there is nothing for the slots. The gate of the first of `num_tokens` [1] is 0: a sink stands in for it.
    """
    tiles, (q, k, v) = tiles or TILES, projections
    heads = [weight.shape[0] // head_dim for weight, _ in projections]
    q_out, k_out, v_out = (x.new_empty(1, 1, count, head_dim) for count in heads)
    log_gate, q_slot, k_slot = None, None, None
    programs = sum(heads) * head_dim // (2 * tiles.block_n)
    if gate is not None:
        log_gate = x.new_empty(1, 1, heads[1], num_slots)
        q_slot, k_slot = torch.empty_like(q_out), torch.empty_like(k_out)
        programs += gate[0].shape[0] // (2 * tiles.block_n)
    gate_weight, gate_bias = gate or (None, None)
    with device_guard(x):
        token_inputs_kernel[(programs,)](
            x,
            norm.weight,
            q[0],
            k[0],
            v[0],
            gate_weight,
            q[1],
            k[1],
            v[1],
            gate_bias,
            *tables,
            *slot_tables,
            q_out,
            k_out,
            v_out,
            log_gate,
            q_slot,
            k_slot,
            num_tokens,
            norm.eps,
            D=head_dim,
            M=num_slots,
            HQ=heads[0],
            H=heads[1],
            HAS_SLOTS=gate is not None,
            **_constants(x.shape[-1], tiles),
        )
    return TokenInputs(q_out, k_out, v_out, log_gate, q_slot, k_slot)


def token_mlp(x: Tensor, norm: Norm, gate: Tensor, up: Tensor, tiles: Tiles | None = None) -> Tensor:
    """silu(gate(x)) * up(x), [1, 1, N], of a token x [1, 1, K] after its norm; weights [N, K]."""
    out, tiles = x.new_empty(1, 1, gate.shape[0]), tiles or TILES
    with device_guard(x):
        token_mlp_kernel[(gate.shape[0] // tiles.block_n,)](
            x, norm.weight, gate, up, out, norm.eps, **_constants(x.shape[-1], tiles)
        )
    return out


def token_linear(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """x [1, 1, K] times a weight [N, K], [1, 1, N], plus a residual; x is normalised first if there is a norm."""
    out, tiles = x.new_empty(1, 1, weight.shape[0]), tiles or TILES
    with device_guard(x):
        token_linear_kernel[(weight.shape[0] // tiles.block_n,)](
            x,
            None if norm is None else norm.weight,
            weight,
            residual,
            out,
            0.0 if norm is None else norm.eps,
            **_constants(x.shape[-1], tiles),
        )
    return out
