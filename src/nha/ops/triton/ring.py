"""The ring of a state after a prompt, from the prompt's last tokens, in one launch."""

# Triton's types give a launch the signature of the kernel, without the options of the compiler.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nha.ops.state import RingState
from nha.ops.triton.chunk.tiling import device_guard

BLOCK = 1024  # numbers that a program copies at a time


@triton.jit
def copy_token(p_x, p_out, x_h, is_token, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_X: tl.constexpr):
    """A token [HEADS, DIM], with a stride of heads, to contiguous memory; zeros where it is none."""
    for first in range(0, HEADS * DIM, BLOCK_X):
        o_x = first + tl.arange(0, BLOCK_X)
        m_x = o_x < HEADS * DIM
        b_x = tl.load(p_x + o_x // DIM * x_h + o_x % DIM, mask=m_x & is_token, other=0.0)
        tl.store(p_out + o_x, b_x, mask=m_x)


@triton.jit(do_not_specialize=["length"])
def ring_kernel(
    p_k,
    p_v,
    p_slot_key,
    p_gate,
    p_out_key,
    p_out_value,
    p_out_slot_key,
    p_out_gate,
    p_num_tokens,
    p_counter,
    p_length,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    s_b,
    s_t,
    s_h,
    g_b,
    g_t,
    g_h,
    length,
    W: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    M: tl.constexpr,
    HAS_SLOT_KEY: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Window cache [B, W, H, ...] with token t at index t mod W, counts of tokens and zeros; programs (index, B).

    A sequence has `length` tokens, or as many as there are at `p_length` [B]; padding follows them. Where they are
    fewer than W, the other entries are zeros.
    """
    i_w, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    count = length.to(tl.int64)
    if p_length is not None:
        count = tl.load(p_length + i_b)
    if i_w == 0:
        tl.store(p_num_tokens + i_b, count)
        o_h = tl.arange(0, BLOCK_H)
        tl.store(p_counter + i_b * (H + 1) + o_h, tl.zeros([BLOCK_H], tl.int32), mask=o_h < H + 1)
    if W > 0:
        newest = count - 1
        is_token = i_w <= newest
        token = newest - (newest - i_w) % W
        place = (i_b * W + i_w) * H
        copy_token(p_k + i_b * k_b + token * k_t, p_out_key + place * D, k_h, is_token, H, D, BLOCK_X)
        copy_token(p_v + i_b * v_b + token * v_t, p_out_value + place * DV, v_h, is_token, H, DV, BLOCK_X)
        copy_token(p_gate + i_b * g_b + token * g_t, p_out_gate + place * M, g_h, is_token, H, M, BLOCK_X)
        if HAS_SLOT_KEY:
            copy_token(p_slot_key + i_b * s_b + token * s_t, p_out_slot_key + place * D, s_h, is_token, H, D, BLOCK_X)


def ring_after_prompt(
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    k_slot: Tensor | None,
    slots: tuple[Tensor, Tensor],
    window: int,
    num_tokens: Tensor | None = None,
) -> RingState:
    """The state after a first segment of T >= W tokens: k, k_slot [B, T, H, D], v [B, T, H, Dv], log_gate
    [B, T, H, M], and the slots after it, which it keeps. The last dimensions are contiguous. `num_tokens` [B] int64
    are the tokens before padding on the right, of which there may be fewer than W."""
    batch, length, heads, dim = k.shape
    value_dim, count = v.shape[3], log_gate.shape[3]
    key, value = k.new_empty(batch, window, heads, dim), v.new_empty(batch, window, heads, value_dim)
    slot_key = None if k_slot is None else k_slot.new_empty(batch, window, heads, dim)
    gate = log_gate.new_empty(batch, window, heads, count)
    given, num_tokens = num_tokens, torch.empty(batch, dtype=torch.int64, device=k.device)
    counter = torch.empty(batch, heads + 1, dtype=torch.int32, device=k.device)
    read = (k, v, k if k_slot is None else k_slot, log_gate)
    if batch:
        with device_guard(k):
            ring_kernel[(max(window, 1), batch)](
                *read,
                key,
                value,
                key if slot_key is None else slot_key,
                gate,
                num_tokens,
                counter,
                given,
                *(stride for x in read for stride in x.stride()[:3]),
                length,
                W=window,
                H=heads,
                D=dim,
                DV=value_dim,
                M=count,
                HAS_SLOT_KEY=k_slot is not None,
                BLOCK_X=BLOCK,
                BLOCK_H=triton.next_power_of_2(heads + 1),
                num_warps=4,
            )
    return RingState(
        window_size=window,
        slot_key=slots[0],
        slot_value=slots[1],
        key=key,
        value=value,
        window_slot_key=slot_key,
        window_log_gate=gate,
        num_tokens=num_tokens,
        arrival_counter=counter,
    )
