"""Divergence, cross-entropy and their gradient from a chunk's logits, each read twice and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nha.ops.triton.launcher import launch
from nha.ops.triton.primitives import LOG2_E

BLOCK, STAGES, WARPS = 2048, 3, 8  # logits that a program holds at a time, loads under way


@triton.jit
def bent(raw, scale, cap, CAPPED: tl.constexpr):
    """Logits: `raw * scale`, with a cap `cap * tanh(raw * scale / cap)`."""
    x = raw.to(tl.float32) * scale
    return cap * (2 * tl.sigmoid(2 * x / cap) - 1) if CAPPED else x


@triton.jit
def grown(x, top, total):
    """The largest value so far, the sum of exponentials relative to it without `x`, and the factor that took."""
    more = tl.maximum(top, x)
    shrink = tl.exp2((top - more) * LOG2_E)
    return more, total * shrink, shrink


@triton.jit
def whole(top, total):
    """Maximum and log-sum-exp of a row, from those of its lanes."""
    most = tl.max(top, 0)
    return most, most + tl.log(tl.sum(total * tl.exp2((top - most) * LOG2_E), 0))


@triton.jit(do_not_specialize=["scale", "cap"])
def loss_kernel(
    student,
    teacher,
    target,
    by_divergence,
    by_cross_entropy,
    divergence,
    cross_entropy,
    hit,
    scale,
    cap,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    TAUGHT: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Replaces the student's raw logits [n, V] by the gradient with respect to them. Programs: rows."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    student += row * V
    teacher += row * V
    low = -1e30  # not infinite: a lane may have seen nothing yet, and its difference to that must be a number
    top, total = tl.full([BLOCK], low, tl.float32), tl.zeros([BLOCK], tl.float32)
    other_top, other_total, apart = top, total, total
    for first in tl.range(0, V, BLOCK, num_stages=STAGES):
        inside = first + lane < V
        x = bent(tl.load(student + first + lane, inside, 0.0), scale, cap, CAPPED)
        x = tl.where(inside, x, low)
        top, total, _ = grown(x, top, total)
        total += tl.where(inside, tl.exp2((x - top) * LOG2_E), 0.0)
        if TAUGHT:
            y = bent(tl.load(teacher + first + lane, inside, 0.0), scale, cap, CAPPED)
            y = tl.where(inside, y, low)
            other_top, other_total, shrink = grown(y, other_top, other_total)
            share = tl.where(inside, tl.exp2((y - other_top) * LOG2_E), 0.0)
            other_total += share
            apart = apart * shrink + share * (y - x)
    most, sum_exp = whole(top, total)
    wanted = tl.load(target + row)
    own = bent(tl.load(student + wanted), scale, cap, CAPPED)
    tl.store(cross_entropy + row, sum_exp - own)
    tl.store(hit + row, own >= most)
    to_divergence, to_cross = tl.load(by_divergence + row), tl.load(by_cross_entropy + row)
    other_sum_exp = sum_exp
    if TAUGHT:
        _, other_sum_exp = whole(other_top, other_total)
        # Sum of p (y - x): lanes are relative to their own maximum, like the sum of exponentials they share.
        mean = tl.sum(apart * tl.exp2((other_top - other_sum_exp) * LOG2_E), 0)
        tl.store(divergence + row, mean - other_sum_exp + sum_exp)
    else:
        tl.store(divergence + row, 0.0)
        to_divergence = 0.0
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    for back in tl.range(0, blocks, num_stages=STAGES):  # from the end, which may still be in the cache
        first = (blocks - 1 - back) * BLOCK
        inside = first + lane < V
        x = bent(tl.load(student + first + lane, inside, 0.0), scale, cap, CAPPED)
        grad = (to_divergence + to_cross) * tl.exp2((x - sum_exp) * LOG2_E)
        if TAUGHT:
            y = bent(tl.load(teacher + first + lane, inside, 0.0), scale, cap, CAPPED)
            grad -= to_divergence * tl.exp2((y - other_sum_exp) * LOG2_E)
        grad -= tl.where(first + lane == wanted, to_cross, 0.0)
        if CAPPED:
            grad *= 1 - (x / cap) * (x / cap)
        tl.store(student + first + lane, (grad * scale).to(student.dtype.element_ty), inside)


def chunk_loss(
    student: Tensor,
    teacher: Tensor | None,
    weight: Tensor,
    target: Tensor,
    by_divergence: Tensor,
    by_cross_entropy: Tensor,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `nha.distill.loss.chunk_loss`, in float32."""
    count = student.shape[0]
    logits = student @ weight.T
    other = logits if teacher is None else teacher @ weight.T
    divergence, cross_entropy = logits.new_empty(2, count, dtype=torch.float32)
    hit = target.new_empty(count, dtype=torch.bool)
    weights = (x.float().contiguous() for x in (by_divergence, by_cross_entropy))
    if count:
        launch(
            loss_kernel,
            (count,),
            (logits.dtype, logits.device),
            logits,
            other,
            target.contiguous(),
            *weights,
            divergence,
            cross_entropy,
            hit,
            scale,
            cap or 1.0,
            V=logits.shape[1],
            BLOCK=BLOCK,
            STAGES=STAGES,
            TAUGHT=teacher is not None,
            CAPPED=cap is not None,
            num_warps=WARPS,
        )
    return divergence, cross_entropy, hit, logits @ weight
