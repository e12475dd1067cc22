"""Sliding-window attention with sinks and without slots, in batched matrix products: for ablations without slots."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from nha.ops.state import slot_dtype
from nha.ops.varlen import sequence_of

MIN_BLOCK, MAX_BLOCK = 16, 128  # queries of one matrix product, however short or long the window
GROUP_SCORES = {"cpu": 1 << 20}  # scores computed at a time: about what stays in the cache
GROUP_SCORES_ELSEWHERE = 1 << 25  # enough to fill a GPU, 128 MiB in float32

# torch >= 2.12 requires enable_gqa=True for grouped heads.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def has_window_kernel(q: Tensor, v: Tensor, sink: tuple[Tensor, Tensor] | None, softcap: float | None) -> bool:
    """Whether `windowed_kernel` reads inputs like these: on a GPU in 16 bits, without a sink or a cap."""
    dtypes = (torch.bfloat16, torch.float16)
    return q.is_cuda and q.dtype in dtypes and q.shape[3] == v.shape[3] and sink is None and softcap is None


def windowed_kernel(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, cu_seqlens: Tensor, max_seq_len: int, scale: float
) -> Tensor:
    """`sliding_window_attention` in PyTorch's kernel for packed sequences, which scores no key outside a window.

    Every token of q [1, T, HQ, D], k and v [1, T, H, D] must belong to a sequence: others get whatever memory held.
    """
    bounds = (cu_seqlens, cu_seqlens, max_seq_len, max_seq_len)
    out = varlen_attn(q[0], k[0], v[0], *bounds, scale=scale, window_size=(window_size - 1, 0), **GROUPED)
    assert isinstance(out, Tensor)
    return out[None]


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_slot: Tensor,
    sink: tuple[Tensor, Tensor] | None,
    *,
    window_size: int,
    cu_seqlens: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """`nha_attention` with M = 0 for sequences packed into one row, [1, T, HQ, Dv]; no shape depends on their lengths.

    q, q_slot [1, T, HQ, D], k [1, T, H, D], v [1, T, H, Dv], sink (key [H, S, D], value [H, S, Dv]); `window_size` of
    at least 1. Each block of queries attends to its own block of keys and to as many before it as the window reaches.
    Blocks are computed in groups of bounded size: memory grows with T, and with T x HQ x W where gradients are needed.
    """
    length, heads = q.shape[1], k.shape[2]
    block, device = min(max(window_size, MIN_BLOCK), MAX_BLOCK, length), q.device
    count = -(-length // block)
    spare = count * block - length
    blocks = min(1 - (1 - window_size) // block, count)  # key blocks that a block of queries attends to
    before, width = (blocks - 1) * block, blocks * block

    def queries(x: Tensor) -> Tensor:  # [n, H, G * block, D]
        x = F.pad(x[0], (0, 0, 0, 0, 0, spare)).view(count, block, heads, -1, x.shape[3])
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def keys(x: Tensor) -> Tensor:  # [n, H, blocks, block, D], a view in which blocks recur
        x = F.pad(x[0], (0, 0, 0, 0, before, spare)).unflatten(0, (-1, block))
        return x.unfold(0, blocks, 1).permute(0, 2, 4, 1, 3)

    def scores(x: Tensor) -> Tensor:  # [n, H, G, block, keys]
        x = x.to(slot_dtype(x.dtype)) * scale
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        return x.unflatten(2, (-1, block))

    # Padding behind the row is a sequence of its own, so that every query has a key.
    token = torch.arange(count * block, device=device)
    sequence = sequence_of(cu_seqlens, token)
    position = token - F.pad(cu_seqlens, (0, 1), value=length)[sequence]
    key_sequence = F.pad(sequence, (before, 0), value=-1).unfold(0, width, block)
    distance = token[:block, None] + before - torch.arange(width, device=device)
    band = (distance >= 0) & (distance < window_size)
    inputs = [queries(q), keys(k), keys(v), sequence.view(count, block), key_sequence]
    sink_key, sink_value = (None, None) if sink is None else (sink[0].mT.to(q.dtype), sink[1].to(v.dtype))
    if sink_key is not None:
        inputs += [queries(q_slot), (position < window_size).view(count, block)]

    def attend(q: Tensor, k: Tensor, v: Tensor, sequence: Tensor, key_sequence: Tensor, *for_sink: Tensor) -> Tensor:
        """Outputs [n, H, G * block, Dv] of n blocks; `for_sink`: slot queries, and where the sink is not active."""
        visible = (sequence[:, :, None] == key_sequence[:, None]) & band
        parts = [scores(q @ k.flatten(2, 3).mT).masked_fill(~visible[:, None, None], float("-inf"))]
        if sink_key is not None:
            slot_query, inactive = for_sink
            parts.append(scores(slot_query @ sink_key).masked_fill(inactive[:, None, None, :, None], float("-inf")))
        weights = torch.cat(parts, -1).softmax(-1).to(v.dtype).flatten(2, 3)
        out = weights[..., :width] @ v.flatten(2, 3)
        return out if sink_value is None else out + weights[..., width:] @ sink_value

    max_scores = GROUP_SCORES.get(device.type, GROUP_SCORES_ELSEWHERE)
    size = max(1, max_scores // (q.shape[2] * block * width))
    out = torch.cat([attend(*group) for group in zip(*(x.split(size) for x in inputs), strict=True)])
    out = out.unflatten(2, (-1, block)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
    return out[None, :length]
