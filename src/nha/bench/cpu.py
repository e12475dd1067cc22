"""Time the PyTorch implementation on the CPU beside full causal attention (SDPA), in one run."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nha import nha_attention
from nha.bench.timing import Table

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


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `repeats` calls after a warm-up call."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def time_both(call: Callable[..., Tensor], tensors: list[Tensor], repeats: int) -> tuple[float, float]:
    """(forward, forward and backward) in milliseconds."""
    with torch.no_grad():
        forward = median_ms(lambda: call(*tensors), repeats)
    leaves = [x.detach().requires_grad_() for x in tensors]
    gradient = torch.randn_like(call(*tensors))

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, gradient, allow_unused=True)

    return forward, median_ms(both, repeats)


def sdpa(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Full causal attention on the same tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def measure(row: Row, repeats: int) -> tuple[float, float]:
    """Milliseconds (forward, forward and backward) of a row."""
    tensors = inputs(row.length, row.query_heads, row.heads)
    if row.impl == "sdpa":
        return time_both(sdpa, tensors, min(repeats, 2))
    return time_both(lambda *x: nha_attention(*x, window_size=row.window, impl="chunked").out, tensors, repeats)


def run(wanted: list[Row], path: Path, repeats: int = 5, log: Callable[[str], None] = print) -> None:
    """Measure rows into the table at `path`."""
    about: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with Table(path, COLUMNS) as table:
        for row in wanted:
            times = measure(row, repeats)
            log(f"{times[0]:>9.1f} ms forward {times[1]:>9.1f} ms forward and backward  {row}")
            for kind, ms in zip(("fwd", "fwd+bwd"), times, strict=True):
                shape = {"B": 1, "T": row.length, "HQ": row.query_heads, "H": row.heads, "D": D, "M": M}
                found = {"impl": row.impl, "pass": kind, **shape, "W": row.window, "dtype": "fp32"}
                table.add(found | {"ms": round(ms, 2), "ns_per_token": round(1e6 * ms / row.length)} | about)
    log(f"{len(table.rows)} rows in {path}")
