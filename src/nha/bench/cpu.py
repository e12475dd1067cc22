"""Time the PyTorch implementation on the CPU beside full causal attention (SDPA), in turn.

Of each call both the milliseconds that it took and those of the processor are kept: on a machine that others use the
latter, of all threads together, says more.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nha import nha_attention
from nha.bench.resumable import Outcome, complete

COLUMNS = (
    "impl",
    "pass",
    "B",
    "T",
    "HQ",
    "H",
    "D",
    "M",
    "W",
    "dtype",
    "ms",
    "cpu_ms",
    "ns_per_token",
    "threads",
    "machine",
    "torch",
    "date",
)
D, M = 64, 64


@dataclass(frozen=True)
class Row:
    """One measurement, forward and forward with backward, of "nha" or "sdpa"."""

    impl: str
    length: int
    query_heads: int
    heads: int
    window: int

    def __str__(self) -> str:
        return f"{self.impl} T{self.length} HQ{self.query_heads} H{self.heads} W{self.window}"


def rows(lengths: bool, tiny: bool = False) -> list[Row]:
    """Windows and heads at 8,192 tokens beside SDPA, or with `lengths` 2,048 to 65,536 tokens at a window of 64."""
    if tiny:
        return [Row("nha", 40, 4, 2, 8), Row("sdpa", 40, 4, 2, -1)]
    if lengths:
        return [Row("nha", 2**n, 9, 3, 64) for n in range(11, 17)]
    found = [Row("nha", 8192, 9, 3, w) for w in (64, 0, 512, -1)] + [Row("sdpa", 8192, 9, 3, -1)]
    return [*found, Row("nha", 8192, 9, 9, 64), Row("sdpa", 8192, 9, 9, -1)]


def inputs(length: int, heads: int, kv_heads: int) -> list[Tensor]:
    """q, k, v and log-gates like a converted model's: a token overwrites a few slots and leaves the rest."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, length, heads, D, generator=generator)
    k, v = (torch.randn(1, length, kv_heads, D, generator=generator) for _ in range(2))
    gate = F.logsigmoid(6 + 6 * torch.randn(1, length, kv_heads, M, generator=generator)) / 8
    return [q, k, v, gate]


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of a call, and those of the processor, all threads together."""
    started, used = time.perf_counter(), time.process_time()
    function()
    return 1e3 * (time.perf_counter() - started), 1e3 * (time.process_time() - used)


def calls(call: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The calls to time, by the name of their pass."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    gradient = torch.randn_like(call(*tensors))

    def forward() -> None:
        with torch.no_grad():
            call(*tensors)

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, gradient, allow_unused=True)

    return {"fwd": forward, "fwd+bwd": both}


def sdpa(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Full causal attention on the same tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def function_of(row: Row) -> Callable[..., Tensor]:
    """The attention that a row times."""
    if row.impl == "sdpa":
        return sdpa
    return lambda *x: nha_attention(*x, window_size=row.window, impl="chunked").out


def measure(group: list[Row], repeats: int, about: dict[str, Any], log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Time rows that share their tensors, in turn, after a warm-up."""
    tensors = inputs(group[0].length, group[0].query_heads, group[0].heads)
    timings = {row: calls(function_of(row), tensors) for row in group}
    times: dict[tuple[Row, str], list[tuple[float, float]]] = {}
    for turn in range(repeats + 1):
        for row, own in timings.items():
            for kind, call in own.items():
                one = timed(call)
                if turn:
                    times.setdefault((row, kind), []).append(one)
    found = []
    for (row, kind), both in times.items():
        ms, cpu_ms = (round(statistics.median(values), 2) for values in zip(*both, strict=True))
        log(f"{ms:>9.1f} ms, {cpu_ms:>9.1f} of the processor, {kind:<7} {row}")
        shape = {"B": 1, "T": row.length, "HQ": row.query_heads, "H": row.heads, "D": D, "M": M, "W": row.window}
        numbers = {"dtype": "fp32", "ms": ms, "cpu_ms": cpu_ms, "ns_per_token": round(1e6 * ms / row.length)}
        found.append({"impl": row.impl, "pass": kind, **shape, **numbers, **about})
    return found


def about_machine() -> dict[str, Any]:
    """Threads, machine and versions, for every row."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {"threads": torch.get_num_threads(), "machine": machine, "torch": torch.__version__}


def groups(wanted: list[Row]) -> dict[str, list[Row]]:
    """Rows by the case that times them in turn: those that share their tensors."""
    found: dict[str, list[Row]] = {}
    for row in wanted:
        found.setdefault(f"T{row.length} HQ{row.query_heads} H{row.heads}", []).append(row)
    return found


def run(
    wanted: list[Row],
    path: Path,
    repeats: int = 5,
    budget_s: float = math.inf,
    log: Callable[[str], None] = print,
    only: str | None = None,
) -> Outcome:
    """Measure rows into the table at `path` (`nha.bench.resumable`)."""
    about = about_machine()
    dated = about | {"date": date.today().isoformat()}
    cases = {name: partial(measure, group, repeats, dated, log) for name, group in groups(wanted).items()}
    return complete(path, COLUMNS, cases, about, budget_s, log, only)
