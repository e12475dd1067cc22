"""Windows per KV head: heads of one window form a group, which the operator reads in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import torch
from torch import Tensor

Window = int | Sequence[int]  # of a layer: one for all of its KV heads, or one each


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of a layer that share a window, in ascending order."""

    window_size: int
    heads: tuple[int, ...]

    @cached_property
    def index(self) -> slice | list[int]:
        """An index of the heads in a dimension of KV heads: a slice, which gives a view, where they lie evenly.

        >>> HeadGroup(24, (0, 2)).index, HeadGroup(24, (0, 1, 3)).index
        (slice(0, 3, 2), [0, 1, 3])
        """
        steps = {after - before for before, after in pairwise(self.heads)} or {1}
        return slice(self.heads[0], self.heads[-1] + 1, steps.pop()) if len(steps) == 1 else list(self.heads)


def head_groups(windows: Sequence[int]) -> list[HeadGroup]:
    """The groups of a layer with one window per KV head, in the order of their first heads.

    >>> head_groups([24, 256, 24])
    [HeadGroup(window_size=24, heads=(0, 2)), HeadGroup(window_size=256, heads=(1,))]
    """
    heads: dict[int, list[int]] = {}
    for head, window in enumerate(windows):
        heads.setdefault(window, []).append(head)
    return [HeadGroup(window, tuple(own)) for window, own in heads.items()]


def window_of(window: Window) -> int | tuple[int, ...]:
    """A layer's window in its shortest form: an int where all heads have the same.

    >>> window_of([8, 8]), window_of([8, 4]), window_of(8)
    (8, (8, 4), 8)
    """
    if isinstance(window, int):
        return window
    return window[0] if len(set(window)) == 1 else tuple(window)


def all_windows(windows: Iterable[Window]) -> list[int]:
    """The windows of all heads of all layers; a layer of one window counts once.

    >>> all_windows([64, [24, -1]])
    [64, 24, -1]
    """
    return [own for window in windows for own in ([window] if isinstance(window, int) else window)]


def map_window(function: Callable[[int], int], window: Window) -> int | tuple[int, ...]:
    """A layer's window with a function applied to that of every head.

    >>> map_window(lambda w: w // 4, (256, 24)), map_window(lambda w: 0, (256, 24))
    ((64, 6), 0)
    """
    return function(window) if isinstance(window, int) else window_of([function(own) for own in window])


def per_head(window: Window, heads: int) -> list[int]:
    """A layer's window for each of its KV heads.

    >>> per_head(8, 2), per_head((8, 4), 2)
    ([8, 8], [8, 4])
    """
    return [window] * heads if isinstance(window, int) else list(window)


def take_heads(x: Tensor, heads: Sequence[int], dim: int, count: int) -> Tensor:
    """The part of `x` that belongs to some of `count` KV heads, in their order.

    Dimension `dim` holds the KV heads, or the query heads of each in turn. Evenly spaced heads are a view, unless
    several query heads read each; others are joined from views, since an index tensor could not be part of a CUDA
    graph.

    >>> take_heads(torch.arange(6), (0, 2), 0, 3).tolist()
    [0, 1, 4, 5]
    """
    size = x.shape[dim] // count
    steps = {after - before for before, after in pairwise(heads)}
    if steps <= {1}:
        return x.narrow(dim, heads[0] * size, len(heads) * size)
    if size == 1 and len(steps) == 1:
        index = [slice(None)] * (dim % x.dim()) + [slice(heads[0], heads[-1] + 1, steps.pop())]
        return x[tuple(index)]
    return torch.cat([x.narrow(dim, first * size, length * size) for first, length in _runs(heads)], dim)


def join_heads(parts: Sequence[Tensor], groups: Sequence[HeadGroup], dim: int) -> Tensor:
    """The inverse of `take_heads`: the parts of all groups, joined in the order of the KV heads.

    >>> join_heads([torch.tensor([0, 2]), torch.tensor([1])], head_groups([8, 4, 8]), 0).tolist()
    [0, 1, 2]
    """
    found: dict[int, Tensor] = {}
    for part, group in zip(parts, groups, strict=True):
        found |= dict(zip(group.heads, part.chunk(len(group.heads), dim), strict=True))
    return torch.cat([found[head] for head in range(len(found))], dim)


def _runs(heads: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive heads as (first, how many)."""
    for _, run in groupby(enumerate(heads), lambda pair: pair[1] - pair[0]):
        own = [head for _, head in run]
        yield own[0], len(own)
