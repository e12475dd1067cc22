"""A layer whose KV heads have windows of their own: one call for each group of heads with the same window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nha.models.cache import HeadGroupsCacheLayer, NHACacheLayer
from nha.models.config import FULL, smallest_window
from nha.models.int8_cache import Int8CacheLayer
from nha.models.segment import Reading, Segment, attend
from nha.ops.heads import HeadGroup, head_groups, join_heads, take_heads

LayerCache = NHACacheLayer | HeadGroupsCacheLayer
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, HQ, T, D], [B, H, Tk, D], [B, H, Tk, Dv] to [B, T, HQ, Dv]


def read_segment(segment: Segment, reading: Reading, cache: LayerCache | None) -> Tensor:
    """Read a segment, [B, T, HQ, Dv], with what a cache layer remembers, if there is one."""
    assert not isinstance(cache, HeadGroupsCacheLayer)
    out = attend(segment, reading)[0] if cache is None else cache.attend(segment, reading)
    packed = segment.cu_seqlens is not None and not out.is_cuda  # one by one, each perhaps within the window
    short = packed or segment.length <= reading.window_size
    return keep_in_graph(out, (segment.log_gate, *(reading.sink or ()))) if short else out


def read_heads(
    segment: Segment, reading: Reading, windows: Sequence[int], cache: LayerCache | None, full: Attention
) -> Tensor:
    """Read a segment, [B, T, HQ, Dv], with a window for each KV head.

    Args:
        segment: all heads of the layer.
        reading: how they are read; its window does not count.
        windows: one per KV head, -1 for full attention.
        cache: has one part per group of heads.
        full: attention to every key, for heads whose window is -1.

    Raises:
        ValueError: the layer has another number of KV heads, as under tensor parallelism.
    """
    count = segment.key.shape[2]
    if count != len(windows):
        raise ValueError(f"expected a layer of {len(windows)} KV heads, one per window, got {count} of them")
    groups = head_groups(windows)
    parts = [None] * len(groups) if cache is None else cache.parts  # type: ignore[union-attr]
    mass = GroupMass(groups)
    within = base_of_all(segment, reading, windows, cache)
    outs = []
    for group, part in zip(groups, parts, strict=True):
        own, base = segment.take_heads(group.heads), reading.base
        if within is not None:
            base = partial(_given, take_heads(within, group.heads, 2, count))
        if group.window_size == FULL:
            query, key, value = own.by_head
            key, value = (key, value) if part is None else part.update(key, value)
            outs.append(full(query, key, value) if within is None or base is None else base(query, key, value))
            continue
        observer = None if reading.observe_mass is None else partial(mass.add, group)
        changes = {"window_size": group.window_size, "base": base, "observe_mass": observer}
        outs.append(read_segment(own, reading.take_heads(group.heads, count, **changes), part))
    if reading.observe_mass is not None:
        mass.report(reading.observe_mass, segment.query)
    return join_heads(outs, groups, 2)


def base_of_all(segment: Segment, reading: Reading, windows: Sequence[int], cache: LayerCache | None) -> Tensor | None:
    """The output of the unconverted layer, [B, T, HQ, Dv], for a first segment that the window of every head holds.

    One call for all heads gives the same bits as the unconverted layer. None for other segments, and where the cache
    rounds keys and values.
    """
    if isinstance(cache, HeadGroupsCacheLayer) and any(isinstance(part, Int8CacheLayer) for part in cache.parts):
        return None
    first = (cache is None or cache.state is None) and segment.cu_seqlens is None and reading.initial is None
    if not first or reading.base is None or segment.length > smallest_window([windows]):
        return None
    return reading.base(*segment.by_head)


def _given(out: Tensor, *_: Tensor) -> Tensor:
    return out


@dataclass
class GroupMass:
    """Gathers the attention mass of slots and sink, [B, T, HQ] each, which groups of heads report one by one."""

    groups: list[HeadGroup]
    found: dict[HeadGroup, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, group: HeadGroup, slots: Tensor, sink: Tensor) -> None:
        """Keep the mass of one group, [B, T, query heads of the group] each."""
        self.found[group] = slots, sink

    def report(self, observer: Callable[[Tensor, Tensor], None], query: Tensor) -> None:
        """Call `observer` with the mass of all heads of `query` [B, T, HQ, D]: 0 for groups that reported none."""
        if not self.found:
            return
        heads = sum(len(group.heads) for group in self.groups)
        like = next(iter(self.found.values()))[0]
        none = {g: like.new_zeros(*query.shape[:2], query.shape[2] // heads * len(g.heads)) for g in self.groups}
        pairs = [self.found.get(group, (none[group], none[group])) for group in self.groups]
        slots, sink = (join_heads(parts, self.groups, 2) for parts in zip(*pairs, strict=True))
        observer(slots, sink)


def keep_in_graph(out: Tensor, unused: tuple[Tensor, ...]) -> Tensor:
    """`out`, of which `unused` tensors that ask for gradients get zeros.

    Data-parallel training waits for the gradient of every parameter, also of slots that a short sequence does not read.
    """
    if not torch.is_grad_enabled():
        return out
    for x in unused:
        out = out + x.flatten()[:0].sum().to(out.dtype) if x.requires_grad else out
    return out
