"""Time the operator at W 64 beside FlexAttention's window alone and cuDNN's full attention, and profile its kernels.

    python -m experiments.operator_speed --output results/operator_speed --budget-s 120

Rows go to OUT/ops.csv, with the columns of `nha bench op`: 32,768 tokens in sequences of 1,024 to 32,768, and 131,072
in one sequence and in many. OUT/kernels.json holds the milliseconds of each kernel of a forward and backward pass; the
340M model has slot queries and keys of their own. Ratios are printed last: to the window alone, to full attention, and
of one sequence to the same tokens in sequences of 2,048.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nha import nha_attention
from nha.bench.op import LLAMA, QWEN, SMOLLM, Row, make_row, run
from nha.bench.timing import DEVICE

PASSES = ("fwd", "fwd+bwd")
WINDOW, REPEATS = 64, 3
MODEL_340M = {"HQ": 8, "H": 8, "D": 128, "M": 64}
TINY = {"HQ": 2, "H": 1, "D": 16, "M": 4}


def wanted_rows(tiny: bool) -> list[Row]:
    """The rows to time, the most important first."""
    if tiny:
        wanted = [(TINY, [(1, 80), (2, 40)], ("triton",))]
    else:
        wanted = [
            (LLAMA, [(16, 2048), (32, 1024), (1, 32768)], ("triton",)),
            (SMOLLM, [(16, 2048), (1, 32768)], ("triton",)),
            (LLAMA, [(32, 1024), (16, 2048)], ("sdpa-cudnn", "flex-window")),
            (SMOLLM, [(16, 2048), (32, 1024)], ("flex-window", "sdpa-cudnn")),
            (LLAMA, [(64, 2048), (1, 131072)], ("triton",)),
            (LLAMA, [(8, 4096), (4, 8192), (2, 16384)], ("triton",)),
            (SMOLLM, [(32, 1024), (8, 4096), (4, 8192), (2, 16384)], ("triton",)),
            (LLAMA, [(1, 32768)], ("flex-window",)),
            (SMOLLM, [(1, 32768)], ("flex-window",)),
            (LLAMA, [(4, 8192), (8, 4096), (2, 16384)], ("flex-window",)),
            (SMOLLM, [(4, 8192), (8, 4096), (2, 16384)], ("flex-window",)),
            (QWEN, [(16, 2048), (32, 1024)], ("triton", "flex-window", "sdpa-cudnn")),
            (QWEN, [(1, 32768)], ("triton", "flex-window")),
            (LLAMA, [(1, 131072)], ("flex-window",)),
            (SMOLLM, [(1, 131072)], ("triton", "flex-window")),
        ]
    return [
        make_row(impl, kind, sizes, batch, length, 8 if tiny else WINDOW)
        for sizes, shapes, impls in wanted
        for batch, length in shapes
        for impl in impls
        for kind in PASSES
    ]


def profile_kernels(sizes: dict[str, int], batch: int, length: int, separate: bool) -> dict[str, float]:
    """Milliseconds of each kernel of the operator in a forward and backward pass."""
    shape = {"q": sizes["HQ"], "k": sizes["H"], "v": sizes["H"]}
    if separate:
        shape |= {"q_slot": sizes["HQ"], "k_slot": sizes["H"]}

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(batch, length, heads, width, device=DEVICE, dtype=torch.bfloat16)

    flat = {name: normal(heads, sizes["D"]).requires_grad_() for name, heads in shape.items()}
    flat["log_gate"] = (F.logsigmoid(normal(sizes["H"], sizes["M"])) / 8).requires_grad_()
    grad = normal(sizes["HQ"], sizes["D"])

    def both() -> None:
        out = nha_attention(**flat, window_size=WINDOW, impl="triton").out  # type: ignore[arg-type]
        torch.autograd.grad(out, list(flat.values()), grad)

    both()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(REPEATS):
            both()
        torch.cuda.synchronize()
    return {
        event.key: round(event.self_device_time_total / REPEATS / 1e3, 4)
        for event in found.key_averages()
        if event.key.startswith("nha_")
    }


def ratios(table: list[dict[str, str]]) -> list[str]:
    """A line per shape and pass of the operator: milliseconds, and its ratio to every row that it is compared with.

    >>> row = {"pass": "fwd", "B": "16", "T": "2048", "HQ": "32", "H": "8", "D": "128", "M": "64"}
    >>> ratios([row | {"impl": "triton", "ms": "0.6"}, row | {"impl": "flex-window", "ms": "0.8"}])
    ['HQ 32 H 8 D 128 B 16 T 2048 fwd: 0.600 ms, 0.75 of flex-window']
    """
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in table:
        key = tuple(row[name] for name in ("HQ", "H", "D", "B", "T", "pass"))
        found.setdefault(key, {})[row["impl"]] = float(row["ms"])
    lines = []
    for (hq, h, d, b, t, kind), times in found.items():
        if "triton" not in times:
            continue
        own = times["triton"]
        parts = [f"{own / ms:.2f} of {impl}" for impl, ms in times.items() if impl != "triton"]
        many = found.get((hq, h, d, str(int(b) * int(t) // 2048), "2048", kind), {}).get("triton")
        if many is not None and t != "2048":
            parts.append(f"{own / many:.3f} of sequences of 2048")
        lines.append(f"HQ {hq} H {h} D {d} B {b} T {t} {kind}: {', '.join([f'{own:.3f} ms', *parts])}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=120.0, help="no row is started after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="a few small rows, without a GPU too")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        kernels = {
            "llama 16 x 2048": profile_kernels(LLAMA, 16, 2048, False),
            "llama 1 x 32768": profile_kernels(LLAMA, 1, 32768, False),
            "340m 16 x 2048": profile_kernels(MODEL_340M, 16, 2048, True),
            "smollm2 16 x 2048": profile_kernels(SMOLLM, 16, 2048, False),
        }
        (options.output / "kernels.json").write_text(json.dumps(kernels, indent=1) + "\n")
        print(json.dumps(kernels, indent=1), flush=True)
    failed = run(
        wanted_rows(options.tiny), options.output, options.budget_s - (time.monotonic() - begun), options.tiny, print
    )
    table = options.output / "ops.csv"
    if not table.exists():
        print(f"no row was measured within {options.budget_s:g} s: name a larger --budget-s", file=sys.stderr)
        return 1
    with table.open() as file:
        print("\n".join(ratios(list(csv.DictReader(file)))))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
