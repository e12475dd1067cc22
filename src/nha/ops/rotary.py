"""Rotary positions (arXiv 2104.09864): applied, undone, and undone for the slots, which see keys without positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops import backends
from nha.ops.padding import readable
from nha.ops.state import slot_dtype
from nha.ops.validation import KERNEL_DTYPES

MAX_KEPT = 1 << 20  # elements of a table that is kept for the next layer
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
        rotated = interleave(rotate(deinterleave(x[..., :size]), cos, sin))
        return torch.cat([rotated, x[..., size:]], -1)
    rotary, rest = x[..., :size], x[..., size:]
    first, second = rotary.chunk(2, -1)
    orthogonal = torch.cat([-second, first], -1)
    out = (rotary * cos.unsqueeze(2) + orthogonal * sin.unsqueeze(2)).to(x.dtype)
    return torch.cat([out, rest], -1) if rest.shape[-1] else out


def without_scale(cos: Tensor, sin: Tensor) -> Tables:
    """The tables in float32 or float64 with their scale divided out: some families (YaRN, LongRoPE) scale theirs."""
    cos, sin = (table.to(slot_dtype(table.dtype)) for table in (cos, sin))
    norm = torch.rsqrt(cos.square() + sin.square())
    return cos * norm, sin * norm


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Undo the rotation of x [B, T, heads, D] by tables [B, T, R]; a scale of the tables stays in x.

    >>> x, (cos, sin) = torch.tensor([[[[3.0, 4.0]]]]), (torch.full((1, 1, 2), a) for a in (0.6, 0.8))
    >>> unrotate(rotate(x, cos, sin), cos, sin).flatten().tolist()
    [3.0, 4.0]
    """
    cos, sin = without_scale(cos, sin)
    return rotate(x, cos, -sin, interleaved=interleaved)


def unrotate_for_slots(
    q: Tensor, k: Tensor, tables: Tables, distance: Tables, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """The slot queries and keys of rotated ones: keys without a position, queries at a fixed distance from all of them.

    On a GPU one kernel reads and writes everything once; it gives no gradients to the tables.

    Args:
        q: [B, T, HQ, D], rotated by `tables`.
        k: [B, T, H, D], likewise.
        tables: cosines and sines [B, T, R] or [1, T, R] of the positions.
        distance: cosines and sines [1, 1, R] of the distance from a query to the slots.
        interleaved: pairs of dimensions are 2 i and 2 i + 1, not i and i + R / 2. No kernel serves that.

    Returns:
        slot queries [B, T, HQ, D] and slot keys [B, T, H, D] in their own dtypes.

    >>> q, tables = torch.tensor([[[[0.0, 1.0]]]]), (torch.zeros(1, 1, 2), torch.ones(1, 1, 2))  # rotated by 90 degrees
    >>> [x.flatten().tolist() for x in unrotate_for_slots(q, q, tables, tables)]
    [[0.0, 1.0], [1.0, 0.0]]
    """
    if not interleaved and _has_kernel(q, k):
        from nha.ops.triton.unrotate import unrotate_for_slots as kernel

        return kernel(q, k, *tables, *distance)
    if readable(q) and not backends.needs_grad([q, k, *tables, *distance]):
        if q.shape[1] == 1:
            return unrotate_token(q, k, tables, distance, interleaved=interleaved)
        if not interleaved and q.shape[3] == k.shape[3] == tables[0].shape[2] and tables[0].numel() <= MAX_KEPT:
            back, forth = _kept_back_tables(tables, distance)
            return _rotated(q, *back), _rotated(k, *forth)
    back, forth = _back_tables(tables, distance)
    return rotate(q, *back, interleaved=interleaved), rotate(k, *forth, interleaved=interleaved)


def unrotate_token(
    q: Tensor, k: Tensor, tables: Tables, distance: Tables, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`unrotate_for_slots` of one token, in two products, without gradients.

    The dimensions between the first and the last may come in any order, in q those of the first as well.
    """
    query_matrix, key_matrix = _token_matrices(tables, distance, k.shape[3], interleaved)
    return _times(q, query_matrix), _times(k, key_matrix)


def _back_tables(tables: Tables, distance: Tables) -> tuple[Tables, Tables]:
    """Tables that make slot queries of rotated queries, and slot keys of rotated keys."""
    (cos, sin), (far_cos, far_sin) = without_scale(*tables), without_scale(*distance)
    back = far_cos * cos + far_sin * sin, far_sin * cos - far_cos * sin  # both rotations are one
    return back, (cos, -sin)


class _BackTables(NamedTuple):
    """`_back_tables` for `_rotated`, and what they were made of: the tables, and a copy of the distance."""

    tables: Tables
    versions: tuple[int, ...]
    distance: Tables
    back: Tables
    forth: Tables


_last_back: _BackTables | None = None


def _kept_back_tables(tables: Tables, distance: Tables) -> tuple[Tables, Tables]:
    """`_back_tables` [B, T, 1, R] without gradients; the last are kept, since all layers of a model share them."""
    global _last_back
    last = _last_back
    if last is None or not _unchanged(last.tables, last.versions, tables) or not _equal(last.distance, distance):
        back, forth = ((cos.unsqueeze(2), sin.unsqueeze(2)) for cos, sin in _back_tables(tables, distance))
        last = _last_back = _BackTables(tables, _versions(tables), shared_distance(distance), back, forth)
    return last.back, last.forth


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` of all dimensions of x [B, T, heads, D] by tables [B, T, 1, D], in fewer operations."""
    wide, half = x.to(cos.dtype), x.shape[3] // 2
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return out.to(x.dtype)


@dataclass(frozen=True)
class TokenRotation:
    """Rotations of a token as matrices [D, 2 D]: what the window sees, and beside it what the slots see.

    Queries come out scaled as the scores are. The layers of a model share the tables and so the matrices.
    """

    query: Tensor
    key: Tensor
    tables: Tables
    versions: tuple[int, ...]
    distance: Tables
    scale: float

    def made_of(self, tables: Tables, distance: Tables, scale: float) -> bool:
        same = _unchanged(self.tables, self.versions, tables)
        return same and self.distance is distance and self.scale == scale


_last_rotation: TokenRotation | None = None
_last_turns: tuple[Tables, tuple[Tensor, ...]] | None = None


def token_rotation(tables: Tables, distance: Tables, scale: float) -> TokenRotation:
    """The rotations, without gradients, of queries and keys of one token that are not rotated yet.

    Args:
        tables: cosines and sines [1, 1, D] of its position, for pairs of dimensions i and i + D / 2.
        distance: those of the distance from a query to the slots, from `shared_distance`.
        scale: that of the scores.

    >>> tables = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)  # by 90 degrees
    >>> rotation = token_rotation(tables, shared_distance(tables), 1.0)
    >>> (torch.tensor([1.0, 0.0]) @ rotation.key).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    global _last_rotation
    last = _last_rotation
    if last is None or not last.made_of(tables, distance, scale):
        unit, quarter, far = _turns(distance)
        cos, sin = (table[0].detach().to(unit.dtype) for table in tables)
        norm = torch.sqrt(cos.square() + sin.square()).mT  # the scale of the tables stays in what the slots see
        turn = torch.addcmul(unit * cos, quarter, sin)
        query, key = torch.cat((turn, far * norm), 1).mul_(scale), torch.cat((turn, unit * norm), 1)
        last = _last_rotation = TokenRotation(query, key, tables, _versions(tables), distance, scale)
    return last


def _turns(distance: Tables) -> tuple[Tensor, ...]:
    """Matrices [D, D]: the unit, a quarter turn, and the rotation by a distance."""
    global _last_turns
    last = _last_turns
    if last is None or last[0] is not distance:
        cos, sin = without_scale(*(x.detach() for x in distance))
        unit = torch.eye(cos.shape[2], dtype=cos.dtype)
        quarter = rotate(unit[None, None], torch.zeros_like(cos), torch.ones_like(sin))[0, 0]
        last = _last_turns = distance, (unit, quarter, rotate(unit[None, None], cos, sin)[0, 0])
    return last[1]


@dataclass(frozen=True)
class _TokenMatrices:
    """Rotations as matrices, for `_times`, and what they were made of: the tables, and a copy of the distance."""

    tables: Tables
    versions: tuple[int, ...]
    distance: Tables
    interleaved: bool
    matrices: tuple[Tensor, Tensor]

    def made_of(self, tables: Tables, distance: Tables, dim: int, interleaved: bool) -> bool:
        if not _unchanged(self.tables, self.versions, tables) or self.matrices[0].shape[-1] != dim:
            return False
        return self.interleaved == interleaved and _equal(self.distance, distance)


_last_matrices: _TokenMatrices | None = None
_last_distance: Tables | None = None


def _equal(one: Tables, other: Tables) -> bool:
    """Whether tables hold the same numbers in the same dtype."""
    return one is other or all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def shared_distance(distance: Tables) -> Tables:
    """A copy of these tables, the same object as long as they are equal: layers that share it need no comparison."""
    global _last_distance
    last = _last_distance
    if last is None or not _equal(last, distance):
        last = _last_distance = distance[0].clone(), distance[1].clone()
    return last


def _versions(tables: Tables) -> tuple[int, ...]:
    """The numbers of writes to tables; those of inference mode are not counted, and never written again."""
    cos, sin = tables
    return 0 if cos.is_inference() else cos._version, 0 if sin.is_inference() else sin._version


def _unchanged(held: Tables, versions: tuple[int, ...], tables: Tables) -> bool:
    """Whether these are the tables held since, and nobody wrote to them."""
    return held[0] is tables[0] and held[1] is tables[1] and versions == _versions(tables)


def _token_matrices(tables: Tables, distance: Tables, dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Matrices, for `_times`, of the queries and keys of one token.

    All layers of a model share their tables, so that the last matrices are kept: a product then takes the place of some
    thirty operations a layer.
    """
    global _last_matrices
    last = _last_matrices
    if last is None or not last.made_of(tables, distance, dim, interleaved):
        unit = torch.eye(dim, dtype=slot_dtype(tables[0].dtype)).expand(tables[0].shape[0], 1, dim, dim)
        query, key = (rotate(unit, *x, interleaved=interleaved).squeeze(1) for x in _back_tables(tables, distance))
        if query.shape[0] == 1:
            query, key = query[0], key[0]
        shared = shared_distance(distance)
        last = _last_matrices = _TokenMatrices(tables, _versions(tables), shared, interleaved, (query, key))
    return last.matrices


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x [B, ..., D] times one matrix [D, D], or one a sequence [B, D, D], in the dtype of x."""
    wide = x if x.dtype == matrix.dtype else x.to(matrix.dtype)
    if matrix.dim() == 3:
        out = torch.bmm(wide.reshape(matrix.shape[0], -1, x.shape[-1]), matrix).view(x.shape)
    else:
        out = torch.matmul(wide, matrix)
    return out if out.dtype == x.dtype else out.to(x.dtype)


def _has_kernel(q: Tensor, k: Tensor) -> bool:
    return backends.resolve_impl("auto", q.device) == "triton" and q.dtype == k.dtype and q.dtype in KERNEL_DTYPES
