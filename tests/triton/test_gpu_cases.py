"""The cases of tests/gpu without a GPU: correct results pass, errors are named, and the kernels pass in small.

Triton's interpreter runs the kernels; tests of the comparison put the PyTorch implementation in their place.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.gpu import cases, grid
from tests.gpu.cases import GATES, KernelCase, check, first_state, make, outputs, place
from tests.gpu.setting import expect_none, poisoned_memory

SMALL = KernelCase(dtype="fp32", dim=8, value_dim=6, slots=5, window=7, length=40, heads=1, groups=2)
results = cases.results


def stand_in(monkeypatch, change=lambda found: found):
    """Let the PyTorch implementation stand in for the kernels, with a change of what it gives."""

    def ours(case, flat, impl):
        return change(results(case, flat, "chunked")) if impl == "triton" else results(case, flat, impl)

    monkeypatch.setattr(cases, "results", ours)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 0},
        {"window": -1},
        {"kind": "left", "batch": 2},
        {"kind": "packed", "start": "filled", "sinks": 1},
        {"kind": "right", "start": "slots"},
        {"start": "filled", "batch": 2, "separate": True},
        {"layout": "odd"},
        {"dtype": "bf16", "wide_gates": True},
        {"dtype": "fp16", "layout": "sliced"},
        {"layout": "heads-first"},
        {"window": 0, "start": "filled", "batch": 2},
        {"kind": "steps", "start": "filled"},
    ],
    ids=str,
)
def test_right_results_pass(monkeypatch, changes):
    stand_in(monkeypatch)
    assert check(replace(SMALL, **changes), 3, "cpu")[0] == []


@pytest.mark.parametrize("gates", GATES)
def test_every_kind_of_gate_has_a_bound_that_right_results_keep(monkeypatch, gates):
    stand_in(monkeypatch)
    assert check(replace(SMALL, gates=gates, length=110), 3, "cpu")[0] == []
    assert check(replace(SMALL, gates=gates, query_scale=grid.LARGE_SCORES), 3, "cpu") == ([], 0.0)


def spoiled(name, how):
    return lambda found: found | {name: how(found[name])}


@pytest.mark.parametrize("name", ["out", "mass", "slot_key", "dq", "dk", "dv", "dlog_gate"])
def test_a_small_error_is_named(monkeypatch, name):
    stand_in(monkeypatch, spoiled(name, lambda x: x * (1 + 1e-3)))
    wrong, largest = check(SMALL, 3, "cpu")
    assert any(x.startswith(f"{name} rms error") for x in wrong) and largest <= 1


def test_one_wrong_entry_fails(monkeypatch):
    def one(x):
        x = x.clone()
        x[0, -1, 0, 0] += 0.1
        return x

    stand_in(monkeypatch, spoiled("dv", one))
    assert any(x.startswith("dv ") for x in check(SMALL, 3, "cpu")[0])


def test_an_unwritten_entry_fails(monkeypatch):
    def unwritten(x):
        x = x.clone()
        x[0, 5] = float("nan")
        return x

    stand_in(monkeypatch, spoiled("out", unwritten))
    assert "out is not finite" in check(SMALL, 3, "cpu")[0]
    assert "out is not finite" in check(replace(SMALL, query_scale=grid.LARGE_SCORES), 3, "cpu")[0]


def test_results_that_change_between_runs_fail(monkeypatch):
    runs = itertools.count()
    stand_in(monkeypatch, spoiled("dk", lambda x: x + 1e-9 * next(runs)))
    assert "dk differs between two runs" in check(SMALL, 3, "cpu")[0]


def test_a_refusal_is_raised(monkeypatch):
    def refuse(found):
        raise NotImplementedError("head dims 512 and 512: the kernels go up to 256")

    stand_in(monkeypatch, refuse)
    with pytest.raises(NotImplementedError, match="512.*256"):
        check(SMALL, 3, "cpu")


def test_layouts_hold_the_same_numbers_and_nan_around_them():
    flat = make(replace(SMALL, separate=True), 1)
    for layout in ("heads-first", "sliced", "odd"):
        placed = place(flat, "cpu", layout)
        for name, x in flat.items():
            assert torch.equal(placed[name], x)
        assert placed["q"].stride() != flat["q"].stride()
    assert place(flat, "cpu", "odd")["k"].data_ptr() % 16
    around = place(flat, "cpu", "sliced")["v"]
    assert around.as_strided((1,), (1,), 0).isnan()


def test_a_filled_state_is_full_in_every_row_but_the_last():
    case = replace(SMALL, start="filled", batch=3)
    state = first_state(case, make(case, 1))
    assert state is not None
    assert state.num_tokens.tolist() == [10, 11, 3]
    assert state.slot_key[:2].all() and not state.slot_key[2].any()
    assert not state.key[2, :4].any() and state.key[2, 4:].all()


def test_steps_and_segments_are_cut_for_the_kernels_alone():
    flat = make(SMALL, 1)
    for kind in ("segments", "steps", "ring"):
        case = replace(SMALL, kind=kind)
        assert cases._cuts(case, "reference") == [0, 40]
        assert {1, 15} & {b - a for a, b in itertools.pairwise(cases._cuts(case, "triton"))}
        whole = outputs(SMALL, flat, "chunked")["out"]
        assert torch.equal(whole, outputs(case, flat, "chunked")["out"])


def test_any_two_settings_of_the_grid_meet():
    found = grid.gpu_cases()["grid"]
    assert len(found) < 100
    free = {n: v for n, v in grid.AXES.items() if n not in ("heads", "batch", "start")}  # long windows limit these
    for (a, xs), (b, ys) in itertools.combinations(free.items(), 2):
        assert {(getattr(c, a), getattr(c, b)) for c in found} == set(itertools.product(xs, ys)), (a, b)


def test_the_cases_fit_the_contract_and_the_reference():
    """Packed sequences are one row, and no row is longer than the reference can bear."""
    every = [case for found in grid.gpu_cases().values() for case in found]
    assert len(every) > 150
    assert {c.groups for c in every} == set(range(1, 10)) and {c.window for c in every} >= {-1, 0, 1, 4096}
    assert {c.kind for c in every} == set(grid.AXES["kind"])
    assert all(c.batch == 1 for c in every if c.kind == "packed")
    assert all(c.length <= 60 for c in every if c.window > 1000 and c.length < 1000)


@pytest.mark.parametrize("case", [case for found in grid.interpreter_cases().values() for case in found], ids=str)
def test_the_kernels_equal_the_reference(case):
    with poisoned_memory():
        expect_none(check(case, 5, "cpu")[0])
