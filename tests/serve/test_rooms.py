"""Where the states of heads are in a block: no two share a place, and processes plan the same blocks."""

from __future__ import annotations

import pytest

from nha.serve.rooms import max_places, own_windows, places_of, plan_heads

WINDOWS = [8, -1, 0, [16, 4, 16, -1], [-1, -1, 8, 64], [-1, -1, -1, 0]]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rooms_are_side_by_side_and_hold_every_window(processes):
    for layer in range(len(WINDOWS)):
        for rank in range(processes):
            plan = plan_heads(WINDOWS, layer, 4, rank, processes)
            windows = own_windows(WINDOWS[layer], 4, rank, processes)
            heads = [head for room in plan.rooms for head in room.group.heads]
            assert sorted((*heads, *plan.full)) == list(range(4 // processes))
            ends = [(room.slots.stop, room.places.stop) for room in plan.rooms]
            starts = [(room.slots.start, room.places.start) for room in plan.rooms]
            assert starts == [(0, 0), *ends][: len(starts)]
            for room in plan.rooms:
                assert room.slots.stop - room.slots.start == len(room.group.heads)
                assert room.places.stop - room.places.start == places_of([windows[h] for h in room.group.heads])
            assert not ends or ends[-1][1] <= plan.places


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_all_processes_plan_blocks_of_one_size(processes):
    plans = [[plan_heads(WINDOWS, layer, 4, rank, processes) for rank in range(processes)] for layer in range(6)]
    assert {plan.places for layer in plans for plan in layer} == {max_places(WINDOWS, 4, processes)}
    assert [{plan.has_full for plan in layer} for layer in plans] == [
        {w} for w in (False, True, False, True, True, True)
    ]


def test_a_model_of_full_layers_has_a_place():
    assert max_places([-1, -1], heads=2, processes=1) == 1
