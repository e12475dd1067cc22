"""Where the states of a layer's heads are in vLLM's blocks: every process has the same number of places. No vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nha.models.config import FULL
from nha.ops.heads import HeadGroup, Window, head_groups, per_head


@dataclass(frozen=True)
class Room:
    """The part of a layer's states that belongs to heads of one window.

    Attributes:
        group: the heads, counted from the first of this process, and their window.
        slots: where they are among the slots of all heads.
        places: where their window is among the places of all windows; oldest tokens first, heads side by side.
    """

    group: HeadGroup
    slots: slice
    places: slice


@dataclass(frozen=True)
class HeadPlan:
    """The KV heads of one process in one layer.

    Attributes:
        rooms: of the heads with slots.
        places: tokens in all windows, at least as many as the rooms have: the same in every layer and process.
        full: heads with full attention.
        has_full: whether any process has some in this layer: vLLM plans the same caches for all.
    """

    rooms: tuple[Room, ...]
    places: int
    full: tuple[int, ...] = ()
    has_full: bool = False


def own_heads(heads: int, rank: int, processes: int) -> range:
    """The KV heads of a process. With fewer heads than processes, several hold the same head.

    >>> own_heads(4, 1, 2), own_heads(2, 3, 4)
    (range(2, 4), range(1, 2))
    """
    first = rank * heads // processes
    return range(first, first + max(1, heads // processes))


def own_windows(window: Window, heads: int, rank: int, processes: int) -> list[int]:
    """The windows of a process's KV heads in a layer.

    >>> own_windows([8, 16, -1, 0], 4, 1, 2), own_windows(8, 4, 1, 2)
    ([-1, 0], [8, 8])
    """
    windows = per_head(window, heads)
    return [windows[head] for head in own_heads(heads, rank, processes)]


def places_of(windows: Sequence[int]) -> int:
    """Tokens in the windows of all heads that have slots.

    >>> places_of([8, -1, 16])
    24
    """
    return sum(max(window, 0) for window in windows)


def max_places(windows: Sequence[Window], heads: int, processes: int) -> int:
    """Tokens in all windows of the layer and process that have the most of them; at least 1, since no state is empty.

    >>> max_places([8, [-1, 32]], heads=2, processes=1), max_places([8, [-1, 32]], heads=2, processes=2)
    (32, 32)
    """
    found = [own_windows(window, heads, rank, processes) for window in windows for rank in range(processes)]
    return max(1, *map(places_of, found))


def plan_heads(windows: Sequence[Window], layer: int, heads: int, rank: int, processes: int) -> HeadPlan:
    """Where the states of a process's KV heads are in a layer.

    >>> plan = plan_heads([[8, 32, 8]], 0, heads=3, rank=0, processes=1)
    >>> [(room.group.heads, room.slots, room.places) for room in plan.rooms]
    [((0, 2), slice(0, 2, None), slice(0, 16, None)), ((1,), slice(2, 3, None), slice(16, 48, None))]
    """
    own, rooms, head, place = own_windows(windows[layer], heads, rank, processes), [], 0, 0
    for group in head_groups(own):
        if group.window_size == FULL:
            continue
        next_head = head + len(group.heads)
        next_place = place + group.window_size * len(group.heads)
        rooms.append(Room(group, slice(head, next_head), slice(place, next_place)))
        head, place = next_head, next_place
    full = tuple(index for index, window in enumerate(own) if window == FULL)
    has_full = FULL in per_head(windows[layer], heads)
    return HeadPlan(tuple(rooms), max_places(windows, heads, processes), full, has_full)
