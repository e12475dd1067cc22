"""Rotary positions (arXiv 2104.09864), put on and taken off, and what slots see of rotated queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from nha.ops import api
from nha.ops.state import slot_dtype
from nha.ops.validation import DTYPES

Tables = tuple[Tensor, Tensor]  # cosines and sines [B, T, R] or [1, T, R]


def deinterleave(x: Tensor) -> Tensor:
    """Reorder the last dimension so that pairs (2 i, 2 i + 1) become (i, i + R / 2).

    >>> deinterleave(torch.tensor([1, 2, 3, 4])).tolist()
    [1, 3, 2, 4]
    """
    return x.unflatten(-1, (-1, 2)).mT.flatten(-2)


def interleave(x: Tensor) -> Tensor:
    """Undo `deinterleave`.

    >>> interleave(torch.tensor([1, 3, 2, 4])).tolist()
    [1, 2, 3, 4]
    """
    return x.unflatten(-1, (2, -1)).mT.flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first R dimensions of x [B, T, heads, D] by tables [B, T, R], pairing i with i + R / 2.

    Where x is `interleaved`, 2 i is paired with 2 i + 1; the tables stay as they are.

    >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)).flatten().tolist()
    [0.0, 1.0]
    """
    size = cos.shape[-1]
    if interleaved:
        turned = interleave(rotate(deinterleave(x[..., :size]), cos, sin))
        return torch.cat([turned, x[..., size:]], -1)
    turning, rest = x[..., :size], x[..., size:]
    first, second = turning.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    out = (turning * cos.unsqueeze(2) + turned * sin.unsqueeze(2)).to(x.dtype)
    return torch.cat([out, rest], -1) if rest.shape[-1] else out


def without_scale(cos: Tensor, sin: Tensor) -> Tables:
    """Tables in float32 or float64 that only rotate: some families (YaRN, LongRoPE) scale theirs."""
    cos, sin = (table.to(slot_dtype(table.dtype)) for table in (cos, sin))
    norm = torch.rsqrt(cos.square() + sin.square())
    return cos * norm, sin * norm


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Undo the rotation of x [B, T, heads, D] by tables [B, T, R]; a scale that they had stays in x.

    >>> x, (cos, sin) = torch.tensor([[[[3.0, 4.0]]]]), (torch.full((1, 1, 2), a) for a in (0.6, 0.8))
    >>> unrotate(rotate(x, cos, sin), cos, sin).flatten().tolist()
    [3.0, 4.0]
    """
    cos, sin = without_scale(cos, sin)
    return rotate(x, cos, -sin, interleaved=interleaved)


def unrotate_for_slots(
    q: Tensor, k: Tensor, tables: Tables, distance: Tables, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys as slots see them: keys without position, queries as if at a fixed distance.

    On a GPU one kernel reads and writes everything once. Tables are taken as constants there.

    Args:
        q: [B, T, HQ, D], rotated by `tables`.
        k: [B, T, H, D], likewise.
        tables: cosines and sines [B, T, R] or [1, T, R] of the positions.
        distance: those of the distance at which a query sees the slots, [1, 1, R].
        interleaved: pairs of dimensions are 2 i and 2 i + 1, not i and i + R / 2. No kernel serves that.

    Returns:
        queries and keys in their own dtypes.

    >>> q, tables = torch.tensor([[[[0.0, 1.0]]]]), (torch.zeros(1, 1, 2), torch.ones(1, 1, 2))  # turned by 90 degrees
    >>> [x.flatten().tolist() for x in unrotate_for_slots(q, q, tables, tables)]
    [[0.0, 1.0], [1.0, 0.0]]
    """
    if not interleaved and _has_kernel(q, k):
        from nha.ops.triton.unrotate import unrotate_for_slots as kernel

        return kernel(q, k, *tables, *distance)
    (cos, sin), (far_cos, far_sin) = without_scale(*tables), without_scale(*distance)
    back = far_cos * cos + far_sin * sin, far_sin * cos - far_cos * sin  # both rotations are one
    return rotate(q, *back, interleaved=interleaved), rotate(k, cos, -sin, interleaved=interleaved)


def _has_kernel(q: Tensor, k: Tensor) -> bool:
    return api.resolve_impl("auto", q.device) == "triton" and q.dtype == k.dtype and q.dtype in DTYPES
