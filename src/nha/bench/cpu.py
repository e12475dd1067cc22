"""Time the PyTorch implementation on the CPU beside full causal attention (SDPA), in one run.

    python src/nha/bench/cpu.py [--quick] [--out benchmarks/results/cpu.csv]

Medians in milliseconds; one row per shape. With --lengths the cost per token from 2K to 64K tokens.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from nha import nha_attention
from nha.io import atomic_write

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
Shape = tuple[int, int, int, int]  # T, HQ, H, W
D, M = 64, 64


def inputs(length: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    """q, k, v and log-gates like those of a converted model: a token overwrites a few slots, and leaves the rest."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, length, heads, D, generator=generator)
    k, v = (torch.randn(1, length, kv_heads, D, generator=generator) for _ in range(2))
    gate = F.logsigmoid(6 + 6 * torch.randn(1, length, kv_heads, M, generator=generator)) / 8
    return [q, k, v, gate]


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `repeats` calls after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def time_both(call: Callable[..., torch.Tensor], tensors: list[torch.Tensor], repeats: int) -> tuple[float, float]:
    """(forward, forward and backward) in milliseconds."""
    with torch.no_grad():
        forward = median_ms(lambda: call(*tensors), repeats)
    leaves = [x.detach().requires_grad_() for x in tensors]
    gradient = torch.randn_like(call(*tensors))

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, gradient, allow_unused=True)

    return forward, median_ms(both, repeats)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Full causal attention on the same tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def main() -> None:
    """Run the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repetition, no long sequences")
    parser.add_argument("--lengths", action="store_true", help="only the cost per token against length")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu.csv"))
    arguments = parser.parse_args()
    repeats = 1 if arguments.quick else 5
    shapes: list[Shape] = [(8192, 9, 3, w) for w in (64, 0, 512, -1)] + [(8192, 9, 9, 64)]
    if arguments.lengths:
        shapes = [(2**n, 9, 3, 64) for n in range(11, 15 if arguments.quick else 17)]
    stamp = {
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    rows = []
    print(f"{'impl':8} {'T':>6} {'HQ':>3} {'H':>3} {'W':>5} {'fwd ms':>9} {'fwd+bwd ms':>11} {'us/token':>9}")
    for length, heads, kv_heads, window in shapes:
        tensors = inputs(length, heads, kv_heads)
        peers: dict[str, Callable[..., torch.Tensor]] = {
            "nha": lambda *x, w=window: nha_attention(*x, window_size=w, impl="chunked").out
        }
        if window == 64 and length <= 8192:
            peers["sdpa"] = sdpa
        for name, call in peers.items():
            timed = time_both(call, tensors, repeats if name == "nha" else min(repeats, 2))
            print(
                f"{name:8} {length:6} {heads:3} {kv_heads:3} {window:5} {timed[0]:9.1f} {timed[1]:11.1f} "
                f"{1000 * timed[1] / length:9.2f}",
                flush=True,
            )
            for kind, ms in zip(("fwd", "fwd+bwd"), timed, strict=True):
                shape = {"B": 1, "T": length, "HQ": heads, "H": kv_heads, "D": D, "M": M, "W": window}
                row = {"impl": name, "pass": kind, **shape, "dtype": "fp32", "ms": round(ms, 2)}
                rows.append(row | {"ns_per_token": round(1e6 * ms / length)} | stamp)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.out) as work, work.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
