"""Sliding-window attention in PyTorch's fused kernel for CPUs: scores and weights stay in the cache.

The kernel also returns the logarithm of each query's sum of exponentials. A softmax over slots and this number gives
the weights of the slots, and that of the window's output.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 32  # queries that the kernel computes at a time
MIN_WINDOW = 128  # narrower ones take less time in products of many blocks at once


def has_fused_window(q: Tensor, v: Tensor, window: int, softcap: float) -> bool:
    """Whether `fused_window_attention` reads these inputs: wide windows on a CPU, heads of one size, no softcap."""
    return window >= MIN_WINDOW and q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and not softcap


def fused_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float, first: Tensor | None, out: Tensor
) -> Tensor:
    """Attention to the last `window` keys, written to `out` [B, T, HQ, D], and its log-sum-exp [B, T, HQ].

    q [B, T, HQ, D]; k, v [B, W + T, H, D] begin W tokens before the first query; `first` [B] is the first key position
    in use, None where all are. No input is copied: blocks of keys are views that overlap.
    """
    batch, length, heads = q.shape[0], q.shape[1], k.shape[2]
    log_sum = q.new_empty(q.shape[:3])
    grouped, outs, sums = (x.unflatten(2, (heads, -1)) for x in (q, out, log_sum))
    for start, stop, size in spans(length, window if first is not None else 0):
        mask = band(window, size, q)
        for row in range(batch):
            own = mask
            if first is not None and start < window:
                token = torch.arange(start, stop, size, device=q.device)[:, None]
                unused = token + torch.arange(window + size, device=q.device) < first[row]
                own = mask.masked_fill(unused[:, None, None], float("-inf"))
            key, value = (blocks(x[row, start : stop + window], window + size, size) for x in (k, v))
            for group in range(grouped.shape[3]):
                query = blocks(grouped[row, start:stop, :, group], size, size)
                part, sums_of_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query, key, value, attn_mask=own, scale=scale
                )
                outs[row, start:stop, :, group] = part.transpose(1, 2).flatten(0, 1)
                sums[row, start:stop, :, group] = sums_of_part.transpose(1, 2).flatten(0, 1)
    return log_sum


def spans(length: int, masked: int) -> Iterator[tuple[int, int, int]]:
    """Runs of blocks of one size as (start, stop, size): those of the first `masked` queries, others, a shorter one.

    >>> list(spans(100, 40))
    [(0, 64, 32), (64, 96, 32), (96, 100, 4)]
    """
    whole = length - length % BLOCK
    edge = min(-(-masked // BLOCK) * BLOCK, whole)
    for start, stop in ((0, edge), (edge, whole), (whole, length)):
        if start < stop:
            yield start, stop, min(BLOCK, stop - start)


def blocks(x: Tensor, size: int, step: int) -> Tensor:
    """Views [n, H, size, D] of x [T, H, D], one for every `step` tokens."""
    return x.unfold(0, size, step).mT


def band(window: int, size: int, like: Tensor) -> Tensor:
    """[1, 1, size, window + size] of 0 and -inf: query i of a block sees keys i + 1 to i + window."""
    distance = torch.arange(window + size, device=like.device) - torch.arange(size, device=like.device)[:, None]
    visible = (distance > 0) & (distance <= window)
    return like.new_zeros(1, 1, *visible.shape).masked_fill_(~visible, float("-inf"))
