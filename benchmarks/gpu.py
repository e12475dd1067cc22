"""Check the GPU kernels against the definition and time them against SDPA: `PYTHONPATH=src python benchmarks/gpu.py`.

    --check        outputs and gradients against the float64 reference, bounded by the reference in the same precision
    --bench        median times, forward, forward + backward, decode; peers: SDPA's cuDNN and FlashAttention kernels
    --out DIR      where check.csv and ops.csv go (default: the working directory)
    --seconds N    stop starting new work after so long (default 420)

Every row is written at once. A shape that fails is reported with its error and does not stop the others.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nha import nha_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = ["impl", "pass", "B", "T", "HQ", "H", "D", "M", "W", "dtype", "ms", "extra_bytes", "first_call_s", "gpu",
           "torch", "triton", "date"]  # fmt: skip
CHECKS = ["dtype", "B", "T", "HQ", "H", "D", "M", "W", "sinks", "what", "error", "bound", "passed"]


def make(shape: dict, dtype: torch.dtype, separate: bool = False, sinks: int = 0) -> dict[str, Tensor]:
    """Random leaf tensors of one shape."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda").to(dtype)

    b, t, hq, h, d, m = (shape[n] for n in ("B", "T", "HQ", "H", "D", "M"))
    flat = {"q": normal(b, t, hq, d), "k": normal(b, t, h, d), "v": normal(b, t, h, d)}
    flat["log_gate"] = F.logsigmoid(normal(b, t, h, m).float()) / 8
    if separate:
        flat |= {"q_slot": normal(b, t, hq, d), "k_slot": normal(b, t, h, d)}
    if sinks:
        flat |= {"sink_key": normal(h, sinks, d), "sink_value": normal(h, sinks, d)}
    return {n: x.requires_grad_() for n, x in flat.items()}


def call(flat: dict[str, Tensor], **options):
    flat = dict(flat)
    sink = (flat.pop("sink_key"), flat.pop("sink_value")) if "sink_key" in flat else None
    return nha_attention(**flat, sink=sink, **options)  # type: ignore[arg-type]


def results(flat: dict[str, Tensor], window: int, impl: str) -> dict[str, Tensor]:
    """Everything that comes back, and the gradients of a random linear function of it."""
    output = call(flat, window_size=window, impl=impl, return_state=True, return_slot_mass=True)
    assert output.state is not None and output.slot_mass is not None
    found = {"out": output.out, "mass": output.slot_mass}
    found |= {"slot_key": output.state.slot_key, "slot_value": output.state.slot_value}
    generator = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, device="cuda") for x in found.values()]
    loss = sum((x * w.to(x)).sum().double() for x, w in zip(found.values(), weights, strict=True))
    grads = torch.autograd.grad(loss, list(flat.values()), allow_unused=True)
    return found | {"d" + n: g for n, g in zip(flat, grads, strict=True) if g is not None}


def bound_of(name: str, shape: dict, flat: dict, exact: dict, reference: dict) -> float:
    """Twice the error of the reference in the same precision and its rounding band (as tests/laws has it)."""
    gate = F.pad(flat["log_gate"].detach().double().clamp(-5, 0), (0, 0, 0, 0, 0, 15))
    exponent = 1 + gate.unfold(1, 16, 1).sum(-1).abs().max().item() / 2
    pairs = [(x.double() * exact["d" + n]).abs().sum(-1).max() for n, x in flat.items()
             if n != "log_gate" and "d" + n in exact]  # fmt: skip
    key, value = (flat[n].detach().double().abs().max() for n in ("k_slot" if "k_slot" in flat else "k", "v"))
    terms_behind = {"out": value, "slot_key": key, "slot_value": value, "dlog_gate": torch.stack(pairs).max()}
    size = max(exact[name].abs().max().item(), float(terms_behind.get(name, 0.0)))
    terms = shape["T"] * shape["HQ"] if name.startswith("d") else 1
    eps = torch.finfo(flat["q"].dtype).eps
    band = max(exponent * torch.finfo(torch.float32).eps, eps) * terms**0.5 * size
    return 2 * ((reference[name].double() - exact[name]).abs().max().item() + band)


def check(writer, clock: Callable[[], float]) -> None:
    """Small shapes of every kind against the reference in float64."""
    kinds = [
        ({"B": 2, "T": 150, "HQ": 8, "H": 2, "D": 128, "M": 64, "W": 64}, 1, False),
        ({"B": 2, "T": 150, "HQ": 8, "H": 2, "D": 64, "M": 64, "W": 0}, 0, True),
        ({"B": 1, "T": 200, "HQ": 3, "H": 1, "D": 64, "M": 32, "W": 17}, 2, True),
        ({"B": 1, "T": 100, "HQ": 2, "H": 2, "D": 96, "M": 20, "W": 33}, 0, False),
        ({"B": 1, "T": 90, "HQ": 8, "H": 1, "D": 128, "M": 128, "W": 16}, 0, False),
        ({"B": 1, "T": 90, "HQ": 4, "H": 1, "D": 256, "M": 64, "W": 16}, 0, False),
    ]
    for shape, sinks, separate in kinds:
        for label, dtype in DTYPES.items():
            if clock() < 0:
                return
            row = {**{n: shape[n] for n in CHECKS if n in shape}, "dtype": label, "sinks": sinks}
            try:
                flat = make(shape, dtype, separate, sinks)
                double = {n: x.detach().double().requires_grad_() for n, x in flat.items()}
                exact = results(double, shape["W"], "reference")
                reference = results(flat, shape["W"], "reference")
                for name, got in results(flat, shape["W"], "triton").items():
                    found = (got.double() - exact[name]).abs().max().item()
                    bound = bound_of(name, shape, flat, exact, reference)
                    writer(row | {"what": name, "error": found, "bound": bound, "passed": found <= bound})
            except Exception as error:
                writer(row | {"what": "error", "error": " ".join(str(error).split())[:300], "passed": False})


def median_ms(function: Callable[[], object], budget: float = 1.0) -> float:
    """Median time of a call by the GPU's clock, with the L2 cache flushed between calls."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    times = []
    while len(times) < 5 or (len(times) < 50 and time.perf_counter() - start < budget):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def peer(backend: SDPBackend, flat: dict[str, Tensor]) -> Callable[[], Tensor]:
    q, k, v = (flat[n].transpose(1, 2) for n in ("q", "k", "v"))

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return run


def measure(name: str, kind: str, shape: dict, label: str) -> dict:
    """One row of ops.csv; `kind` is "fwd", "fwd+bwd" or "decode"."""
    flat = make(shape, DTYPES[label])
    peers = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
    if kind == "decode":
        window = shape["W"]
        flat = {n: x.detach() for n, x in flat.items()}
        prompt = {n: x[:, : max(window, 1) + 1] for n, x in flat.items()}
        state = call(prompt, window_size=window, impl=name, return_state=True).state
        step = {n: x[:, :1] for n, x in flat.items()}

        def forward():
            return call(step, window_size=window, impl=name, state=state, return_state=True).out
    elif name in peers:
        forward = peer(peers[name], flat)
    else:

        def forward():
            return call(flat, window_size=shape["W"], impl=name).out

    def run() -> None:
        if kind == "fwd+bwd":
            out = forward()
            torch.autograd.grad(out, [flat[n] for n in ("q", "k", "v", "log_gate")], torch.ones_like(out),
                                allow_unused=True)  # fmt: skip
        else:
            with torch.no_grad():
                forward()

    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    needed = flat["q"].nbytes * (2 if kind == "fwd+bwd" else 1)  # out, and the gradient that comes in
    needed += sum(x.nbytes for x in flat.values()) if kind == "fwd+bwd" else 0
    extra = torch.cuda.max_memory_allocated() - before - needed
    return {"ms": round(median_ms(run), 4), "extra_bytes": extra, "first_call_s": round(first, 2)}


def bench(writer, clock: Callable[[], float]) -> None:
    """The most important rows first: the budgets of the design, then other lengths, windows and sizes."""
    large = {"HQ": 32, "H": 8, "D": 128, "M": 64}
    small = {"HQ": 9, "H": 3, "D": 64, "M": 64}
    ours = [(large | {"B": b, "T": t, "W": w}, "bf16") for b, t, w in
            [(16, 2048, 64), (1, 32768, 64), (16, 2048, 0), (16, 2048, 512), (1, 131072, 64), (4, 8192, 64)]]  # fmt: skip
    ours += [(small | {"B": 16, "T": 2048, "W": 64}, "bf16"), (large | {"B": 16, "T": 2048, "W": 64}, "fp16"),
             (small | {"B": 16, "T": 2048, "W": 64}, "fp32")]  # fmt: skip
    rows = []
    for shape, label in ours[:2]:
        for kind in ("fwd", "fwd+bwd"):
            rows += [(name, kind, shape, label) for name in ("triton", "sdpa-cudnn", "sdpa-flash")]
    rows += [("triton", "decode", large | {"B": 64, "T": 80, "W": 64}, "bf16")]
    rows += [("triton", kind, shape, label) for shape, label in ours[2:] for kind in ("fwd", "fwd+bwd")]
    rows += [("chunked", kind, *ours[0]) for kind in ("fwd", "fwd+bwd")]
    device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
              "date": date.today().isoformat()}  # fmt: skip
    for name, kind, shape, label in rows:
        if clock() < 0:
            return
        row = {"impl": name, "pass": kind, **shape, "dtype": label, **device}
        try:
            row |= measure(name, kind, shape, label)
        except Exception as error:
            row["ms"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        writer(row)
        torch.cuda.empty_cache()


def table(path: Path, columns: list[str]):
    """A function that appends one row to a CSV, prints it, and leaves both on disk at once."""
    file = path.open("w", newline="")
    writer = csv.DictWriter(file, columns)
    writer.writeheader()

    def write(row: dict) -> None:
        writer.writerow(row)
        file.flush()
        print(" ".join(f"{n}={row[n]}" for n in columns if n in row and n not in ("torch", "triton", "date", "gpu")))
        sys.stdout.flush()

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=420)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none")
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def clock(share: float = 1.0) -> float:
        return share * options.seconds - (time.perf_counter() - start)

    both = options.check and options.bench
    if options.check:
        check(table(options.out / "check.csv", CHECKS), lambda: clock(0.4 if both else 1.0))
    if options.bench:
        bench(table(options.out / "ops.csv", COLUMNS), clock)


if __name__ == "__main__":
    main()
