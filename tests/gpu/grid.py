"""The cases that are run on a GPU: every path through the kernels, long ones, extreme gates, and a pairwise grid."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.gpu.cases import GATES, KernelCase

SIZES = (32, 64, 80, 96, 128, 256)
AXES: dict[str, tuple] = {
    "dtype": ("bf16", "fp16", "fp32"),
    "dim": SIZES,
    "value_dim": SIZES,
    "slots": (16, 32, 64, 128),
    "window": (0, 1, 32, 64, 37, 512, 4096),
    "groups": tuple(range(1, 10)),
    "heads": (1, 2, 3),
    "batch": (1, 2, 3),
    "kind": ("whole", "left", "right", "packed", "segments", "steps", "ring"),
    "start": ("fresh", "filled", "slots"),
    "sinks": (0, 1, 4),
    "separate": (False, True),
    "gates": ("random", "learned", "needs_subchunks", "mixed", "floor", "zero", "alternating"),
    "wide_gates": (False, True),
    "layout": ("plain", "heads-first", "sliced", "odd"),
}
LARGE_SCORES = 3e3  # a scale of queries with which scores reach 1e4


def pairwise(axes: dict[str, tuple], seed: int = 3, tries: int = 80) -> Iterator[dict[str, Any]]:
    """Settings in which every two values of two axes meet at least once; the same for the same seed.

    Greedy: of `tries` random settings the one with the most new pairs comes next.

    >>> found = list(pairwise({"a": (1, 2), "b": (3, 4), "c": (5, 6)}))
    >>> len(found) < 8, {(x["a"], x["b"]) for x in found} == {(1, 3), (1, 4), (2, 3), (2, 4)}
    (True, True)
    """
    draw, names = random.Random(seed), list(axes)
    couples = list(itertools.combinations(names, 2))
    missing = {(a, x, b, y) for a, b in couples for x in axes[a] for y in axes[b]}

    def new(setting: dict[str, Any]) -> set:
        return {(a, setting[a], b, setting[b]) for a, b in couples} & missing

    while missing:
        best, gain = {}, set()
        wanted = sorted(missing, key=str)
        for _ in range(tries):
            a, x, b, y = draw.choice(wanted)
            setting = {n: draw.choice(axes[n]) for n in names} | {a: x, b: y}
            if len(new(setting)) > len(gain):
                best, gain = setting, new(setting)
        missing -= gain
        yield best


def sized(setting: dict[str, Any], draw: random.Random) -> KernelCase:
    """A case of a setting: long enough for tokens to leave the window, short enough for the reference."""
    window, length = setting["window"], draw.randrange(130, 200)
    if setting["kind"] == "packed":
        setting = setting | {"batch": 1}
    if window > 1000:
        setting = setting | {"start": "filled", "heads": 1, "batch": 1}
        length = 60
    elif window > 100:
        setting = setting | {"heads": 1, "batch": min(setting["batch"], 2)}
        length += window if setting["start"] == "fresh" else 0
    return KernelCase(**setting, length=length)


def path_cases(**sizes: Any) -> list[KernelCase]:
    """One case for every path through the kernels."""
    base = KernelCase(**sizes)
    return [
        base,
        replace(base, window=0),
        replace(base, sinks=1, separate=True),
        replace(base, gates="needs_subchunks", length=300),
        replace(base, window=0, sinks=2, separate=True, batch=2),
        replace(base, kind="segments", length=140),
        replace(base, kind="steps", sinks=1),
        replace(base, kind="ring", batch=3, separate=True),
        replace(base, batch=2, kind="left"),
        replace(base, kind="packed"),
        replace(base, start="slots"),
        replace(base, window=0, gates="needs_subchunks", length=300, separate=True),
        replace(base, window=1),
        replace(base, window=32, groups=3, heads=1),
        replace(base, window=65, gates="learned"),
        replace(base, window=512, length=600, heads=1),
        replace(base, length=700, heads=1, slots=32),  # several segments of chunks
        replace(base, window=16, length=17, groups=1),
        replace(base, batch=2, kind="right", window=0),
        replace(base, kind="packed", start="filled", window=32),
        replace(base, kind="packed", window=0, start="slots"),
        replace(base, kind="segments", window=0, sinks=1),
        replace(base, kind="steps", start="filled", batch=3, groups=7),
        replace(base, kind="ring", window=0, start="filled", sinks=1),
        replace(base, start="slots", window=0, separate=True),
        replace(base, layout="odd", separate=True),
        replace(base, groups=3, heads=3, slots=32, window=32),
        replace(base, groups=9, heads=1, slots=16, window=5),
        replace(base, slots=128, groups=1),
        replace(base, window=-1),
    ]


def long() -> list[KernelCase]:
    """Long enough for all the ways to cut a sequence among multiprocessors, and for a window of 4,096."""
    return [
        KernelCase(length=8200, heads=1, gates="needs_subchunks", sinks=1),
        KernelCase(length=20011, heads=1, window=0, dim=64, value_dim=64, dtype="fp32", gates="mixed"),
        KernelCase(length=4400, heads=1, groups=2, window=4096, dim=64, value_dim=64),
        KernelCase(length=5000, heads=2, groups=2, window=512, kind="packed", start="filled"),
        KernelCase(length=900, heads=1, batch=2, groups=3, window=300, kind="left", sinks=1),
        KernelCase(length=1100, heads=1, groups=2, window=260, dim=64, value_dim=64, dtype="fp16", separate=True),
        KernelCase(length=1500, heads=1, groups=4, window=512, kind="segments", start="filled"),
        KernelCase(length=700, groups=3, dim=64, value_dim=64, kind="packed", start="slots", separate=True),
        KernelCase(length=3000, heads=1, batch=3, slots=128, dim=256, value_dim=256, dtype="fp16", kind="left"),
    ]


def extremes(dtype: str, window: int, **sizes: Any) -> list[KernelCase]:
    """Every kind of gate, with ordinary scores and with scores of 1e4."""
    base = KernelCase(dtype=dtype, window=window, sinks=1, length=160, **sizes)
    gates = [replace(base, gates=name) for name in GATES]
    return gates + [replace(case, query_scale=LARGE_SCORES) for case in gates]


def gpu_cases() -> dict[str, list[KernelCase]]:
    """Every case by group; those of a group "extremes ..." compile the same kernels."""
    found = {"paths": path_cases() + path_cases(dtype="fp32", dim=64, value_dim=64), "long": long()}
    for window in (64, 0):
        for dtype in ("bf16", "fp16", "fp32"):
            found[f"extremes {dtype} W{window}"] = extremes(dtype, window, dim=64, value_dim=64)
    draw = random.Random(1)
    return found | {"grid": [sized(setting, draw) for setting in pairwise(AXES)]}


def interpreter_cases() -> dict[str, list[KernelCase]]:
    """The same paths in a size for Triton's interpreter."""
    windows = {64: 7, 65: 8, 32: 5, 512: 20, 16: 3}
    sizes: dict[str, Any] = {"dtype": "fp32", "dim": 8, "value_dim": 6, "slots": 5}
    paths = [
        replace(
            case,
            window=windows.get(case.window, case.window),
            length=min(case.length, 26),
            groups=min(case.groups, 2),
            **sizes,
        )
        for case in path_cases()
    ]
    hard = [replace(c, length=80, heads=1, groups=2) for c in extremes("fp32", 7, dim=8, value_dim=8, slots=5)]
    return {"paths": paths, "extremes": hard[2::5]}
