"""Window and sink without slots, in batched matrix products: what ablations are trained and measured with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nha.ops.state import slot_dtype
from nha.ops.varlen import sequence_of

LEAST_BLOCK, MOST_BLOCK = 16, 128  # queries of one matrix product, however short or long the window
GROUP_SCORES = {"cpu": 1 << 20}  # scores made at a time: about what stays in the cache
GROUP_SCORES_ELSEWHERE = 1 << 25  # enough to fill a GPU, 128 MiB in float32


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
    """`nha_attention` with M = 0 of sequences packed into one row, [1, T, HQ, Dv]; no shape depends on their lengths.

    q, q_slot [1, T, HQ, D], k [1, T, H, D], v [1, T, H, Dv], sink (key [H, S, D], value [H, S, Dv]); `window_size` of
    at least 1. Queries go in blocks, each of which sees its own and as many blocks before it as the window reaches.
    Blocks go in groups of bounded size: memory grows with T, and with T x HQ x W where gradients are asked for.
    """
    length, heads = q.shape[1], k.shape[2]
    block, device = min(max(window_size, LEAST_BLOCK), MOST_BLOCK, length), q.device
    count = -(-length // block)
    spare = count * block - length
    blocks = min(1 - (1 - window_size) // block, count)  # that a block of queries sees
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

    # What lies behind the row is a text of its own, so that every query sees a key.
    token = torch.arange(count * block, device=device)
    text = sequence_of(cu_seqlens, token)
    position = token - F.pad(cu_seqlens, (0, 1), value=length)[text]
    others = F.pad(text, (before, 0), value=-1).unfold(0, width, block)
    distance = token[:block, None] + before - torch.arange(width, device=device)
    band = (distance >= 0) & (distance < window_size)
    inputs = [queries(q), keys(k), keys(v), text.view(count, block), others]
    sink_key, sink_value = (None, None) if sink is None else (sink[0].mT.to(q.dtype), sink[1].to(v.dtype))
    if sink_key is not None:
        inputs += [queries(q_slot), (position < window_size).view(count, block)]

    def read(q: Tensor, k: Tensor, v: Tensor, text: Tensor, others: Tensor, *of_sink: Tensor) -> Tensor:
        """Outputs [n, H, G * block, Dv] of n blocks; `of_sink` holds their slot queries and where sinks are dead."""
        visible = (text[:, :, None] == others[:, None]) & band
        parts = [scores(q @ k.flatten(2, 3).mT).masked_fill(~visible[:, None, None], float("-inf"))]
        if sink_key is not None:
            slot_query, dead = of_sink
            parts.append(scores(slot_query @ sink_key).masked_fill(dead[:, None, None, :, None], float("-inf")))
        weights = torch.cat(parts, -1).softmax(-1).to(v.dtype).flatten(2, 3)
        out = weights[..., :width] @ v.flatten(2, 3)
        return out if sink_value is None else out + weights[..., width:] @ sink_value

    most = GROUP_SCORES.get(device.type, GROUP_SCORES_ELSEWHERE)
    size = max(1, most // (q.shape[2] * block * width))
    out = torch.cat([read(*group) for group in zip(*(x.split(size) for x in inputs), strict=True)])
    out = out.unflatten(2, (-1, block)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
    return out[None, :length]
