"""The check's judge passes what is right and names what is not; its grid lets any two settings meet."""

from __future__ import annotations

import doctest
import itertools
from dataclasses import replace

import pytest
import torch

from nha.bench import grid, plots, roofline
from tests.gpu import cases as problems
from tests.gpu.cases import GATES, Problem, check, first_state, make, outputs, place

SMALL = Problem(dtype="fp32", dim=8, value_dim=6, slots=5, window=7, length=40, heads=1, groups=2)
results = problems.results


def stand_in(monkeypatch, change=lambda found: found):
    """Let the PyTorch implementation stand in for the kernels, with a change of what it gives."""

    def ours(problem, flat, impl):
        return change(results(problem, flat, "chunked")) if impl == "triton" else results(problem, flat, impl)

    monkeypatch.setattr(problems, "results", ours)


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
def test_what_is_right_passes(monkeypatch, changes):
    stand_in(monkeypatch)
    assert check(replace(SMALL, **changes), 3, "cpu").startswith("pass ")


@pytest.mark.parametrize("gates", GATES)
def test_every_kind_of_gate_has_a_bound_that_right_results_keep(monkeypatch, gates):
    stand_in(monkeypatch)
    assert check(replace(SMALL, gates=gates, length=110), 3, "cpu").startswith("pass ")
    assert check(replace(SMALL, gates=gates, spread=grid.SCORES), 3, "cpu") == "pass finite"


def spoiled(name, how):
    return lambda found: found | {name: how(found[name])}


@pytest.mark.parametrize("name", ["out", "mass", "slot_key", "dq", "dk", "dv", "dlog_gate"])
def test_what_is_a_little_off_fails_by_name(monkeypatch, name):
    stand_in(monkeypatch, spoiled(name, lambda x: x * (1 + 1e-3)))
    assert f"{name} rms error" in check(SMALL, 3, "cpu")


def test_one_wrong_entry_fails(monkeypatch):
    def one(x):
        x = x.clone()
        x[0, -1, 0, 0] += 0.1
        return x

    stand_in(monkeypatch, spoiled("dv", one))
    assert check(SMALL, 3, "cpu").startswith("FAIL ")


def test_an_entry_that_nothing_wrote_fails(monkeypatch):
    def unwritten(x):
        x = x.clone()
        x[0, 5] = float("nan")
        return x

    stand_in(monkeypatch, spoiled("out", unwritten))
    assert "out is not finite" in check(SMALL, 3, "cpu")
    assert "out is not finite" in check(replace(SMALL, spread=grid.SCORES), 3, "cpu")


def test_results_that_change_between_runs_fail(monkeypatch):
    runs = itertools.count()
    stand_in(monkeypatch, spoiled("dk", lambda x: x + 1e-9 * next(runs)))
    assert "dk differs between two runs" in check(SMALL, 3, "cpu")


def test_a_refusal_is_told_as_such(monkeypatch):
    def refuse(found):
        raise NotImplementedError("head dims 512 and 512: the kernels go up to 256")

    stand_in(monkeypatch, refuse)
    assert check(SMALL, 3, "cpu") == "refused: head dims 512 and 512: the kernels go up to 256"


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
    problem = replace(SMALL, start="filled", batch=3)
    state = first_state(problem, make(problem, 1))
    assert state is not None
    assert state.num_tokens.tolist() == [10, 11, 3]
    assert state.slot_key[:2].all() and not state.slot_key[2].any()
    assert not state.key[2, :4].any() and state.key[2, 4:].all()


def test_steps_and_segments_are_cut_for_the_kernels_alone():
    flat = make(SMALL, 1)
    for kind in ("segments", "steps", "ring"):
        problem = replace(SMALL, kind=kind)
        assert problems._cuts(problem, "reference") == [0, 40]
        assert {1, 15} & {b - a for a, b in itertools.pairwise(problems._cuts(problem, "triton"))}
        whole = outputs(SMALL, flat, "chunked")["out"]
        assert torch.equal(whole, outputs(problem, flat, "chunked")["out"])


def test_any_two_settings_of_the_grid_meet():
    found = [task.problems[0] for task in grid.tasks(tiny=False) if task.name == "grid"]
    assert len(found) < 100
    free = {n: v for n, v in grid.AXES.items() if n not in ("heads", "batch", "start")}  # long windows limit these
    for (a, xs), (b, ys) in itertools.combinations(free.items(), 2):
        assert {(getattr(p, a), getattr(p, b)) for p in found} == set(itertools.product(xs, ys)), (a, b)
    every = [p for task in grid.tasks(tiny=False) for p in task.problems]
    assert {p.groups for p in every} == set(range(1, 10)) and {p.window for p in every} >= {-1, 0, 1, 4096}


def test_examples_in_docstrings_run():
    for module in (grid, plots, roofline):
        assert doctest.testmod(module).failed == 0


def test_every_problem_of_the_grid_fits_the_contract():
    """Packed texts are one row, and no row is longer than the judge can bear."""
    problems = [p for task in grid.tasks(tiny=False) for p in task.problems]
    assert len(problems) > 150
    assert {p.kind for p in problems} == set(grid.AXES["kind"])
    assert all(p.batch == 1 for p in problems if p.kind == "packed")
    assert all(p.length <= 60 for p in problems if p.window > 1000 and p.length < 1000)
