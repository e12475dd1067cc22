"""Window and sink without slots for packed sequences, in batched matrix products: what ablations are trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nha.ops.state import slot_dtype


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, q_slot: Tensor, sink: tuple[Tensor, Tensor] | None, *, window_size: int,
    cu_seqlens: Tensor, scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """`nha_attention` with M = 0 of sequences packed into one row, [1, T, HQ, Dv]; no shape depends on their lengths.

    q, q_slot [1, T, HQ, D], k [1, T, H, D], v [1, T, H, Dv], sink (key [H, S, D], value [H, S, Dv]); `window_size` of
    at least 1. Queries go in blocks of a window, each of which sees its own and the block before; memory is
    T x HQ x 2 W scores.
    """
    length, heads = q.shape[1], k.shape[2]
    block, device = min(window_size, length), q.device
    count = -(-length // block)
    spare = count * block - length
    token = torch.arange(count * block, device=device)
    text = torch.searchsorted(cu_seqlens[1:].contiguous(), token.to(cu_seqlens.dtype), right=True)
    position = token - F.pad(cu_seqlens, (0, 1), value=length)[text.clamp_max(cu_seqlens.shape[0])]

    def queries(x: Tensor) -> Tensor:  # [n, H, G * block, D]
        x = F.pad(x[0], (0, 0, 0, 0, 0, spare)).view(count, block, heads, -1, x.shape[3])
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def keys(x: Tensor) -> Tensor:  # [n, H, 2 * block, D]
        x = F.pad(x[0], (0, 0, 0, 0, 0, spare)).view(count, block, heads, x.shape[3]).transpose(1, 2)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], x], 2)

    def scores(x: Tensor) -> Tensor:
        x = x.to(slot_dtype(x.dtype)) * scale
        return x if softcap is None else softcap * torch.tanh(x / softcap)

    groups = q.shape[2] // heads
    seen = scores(queries(q) @ keys(k).mT).unflatten(2, (groups, block))
    own = token.view(count, 1, block, 1)
    other = own[:, :, :1] - block + torch.arange(2 * block, device=device)
    distance = own - other
    visible = (text[own] == text[other.clamp_min(0)]) & (other >= 0) & (distance >= 0) & (distance < window_size)
    parts = [seen.masked_fill(~visible[:, :, None], float("-inf"))]
    if sink is not None and sink[0].shape[1]:
        live = (position >= window_size).view(count, 1, 1, block, 1)
        drawn = scores(queries(q_slot) @ sink[0].mT.to(q.dtype)).unflatten(2, (groups, block))
        parts.append(drawn.masked_fill(~live, float("-inf")))
    weights = torch.cat(parts, -1).softmax(-1).to(v.dtype)
    out = weights[..., : 2 * block].flatten(2, 3) @ keys(v)
    if sink is not None and sink[0].shape[1]:
        out = out + weights[..., 2 * block :].flatten(2, 3) @ sink[1].to(v.dtype)
    out = out.unflatten(2, (groups, block)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
    return out[None, :length]
