"""Check the kernels on a GPU against the float64 definition, then time them beside scaled_dot_product_attention.

    PYTHONPATH=src python benchmarks/gpu.py --check --bench --out DIR

Writes DIR/check.csv and DIR/ops.csv, each row as soon as it is known, the most important ones first. A shape that fails
is written with its error and does not stop the rest. The bound of a check is the one of the laws: twice the error of
the reference run in the low precision, plus what rounding costs there. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nha import NHAOutput, nha_attention

CHECK_COLUMNS = ("dtype", "window", "sinks", "layout", "tensor", "error", "bound", "result")
COLUMNS = (
    "impl", "pass", "B", "T", "HQ", "H", "D", "M", "W", "dtype", "ms", "extra_bytes", "first_call_s", "gpu", "torch",
    "triton", "date", "error",
)  # fmt: skip
BACKENDS = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}


class Shape(NamedTuple):
    """Sizes of one timed call; W is -1 for full attention."""

    B: int
    T: int
    W: int
    M: int = 64
    HQ: int = 32
    H: int = 8
    D: int = 128
    dtype: str = "bfloat16"


class Table:
    """A CSV file that holds every row as soon as it is written."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.columns, self.file = columns, path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, columns)
        self.writer.writeheader()

    def add(self, **row: object) -> None:
        self.writer.writerow(row)
        self.file.flush()
        print(*(f"{n}={row[n]}" for n in self.columns if row.get(n) not in (None, "")), flush=True)


def one_line(error: Exception) -> str:
    """The type and the first 200 characters of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# --- checks -----------------------------------------------------------------------------------------------------------


def check_inputs(dtype: torch.dtype, batch: int, length: int, dim: int, slots: int, sinks: int) -> dict[str, Tensor]:
    """Leaf tensors with two query heads per KV head and slot queries and keys of their own."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = {"q": (4, dim), "k": (2, dim), "v": (2, dim), "q_slot": (4, dim), "k_slot": (2, dim)}
    flat = {name: normal(batch, length, *size) for name, size in sizes.items()}
    flat["log_gate"] = -(normal(batch, length, 2, slots) ** 2)
    if sinks:
        flat |= {"sink_key": normal(2, sinks, dim), "sink_value": normal(2, sinks, dim)}
    return {name: x.to("cuda", dtype).requires_grad_() for name, x in flat.items()}


def run_whole(flat: dict[str, Tensor], impl: str, **options) -> dict[str, Tensor]:
    """Outputs, final slots, and the gradients of a random linear function of both."""
    inputs = dict(flat)
    sink = (inputs.pop("sink_key"), inputs.pop("sink_value")) if "sink_key" in inputs else None
    output: NHAOutput = nha_attention(
        **inputs, sink=sink, impl=impl, return_state=True, return_slot_mass=True, **options
    )
    assert output.state is not None and output.slot_mass is not None
    found = {"out": output.out, "mass": output.slot_mass}
    found |= {"slot_key": output.state.slot_key, "slot_value": output.state.slot_value}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device="cuda")
    for x in found.values():
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        loss = loss + (x * weight).sum().double()
    grads = torch.autograd.grad(loss, list(flat.values()))
    return {n: x.detach() for n, x in found.items()} | {"d" + n: g for n, g in zip(flat, grads, strict=True)}


def distance(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference in float64; what is not finite counts as infinite."""
    worst = (actual.double() - exact.double()).abs().max().item()
    return worst if worst == worst else float("inf")


def bounds(flat: dict[str, Tensor], exact: dict[str, Tensor], reference: dict[str, Tensor], terms: int) -> dict:
    """Twice the error of the reference in the same precision and its rounding band, for every tensor."""
    dtype = flat["q"].dtype
    pairs = [(x.double() * exact["d" + n]).abs().sum(-1).max() for n, x in flat.items() if n != "log_gate"]
    key, value = flat["k_slot"].double().abs().max(), flat["v"].double().abs().max()
    sizes = {"out": value, "slot_key": key, "slot_value": value, "dlog_gate": torch.stack(pairs).max()}
    gate = F.pad(flat["log_gate"].detach().double().clamp(-5, 0), (0, 0, 0, 0, 0, 15))
    exponent = 1 + gate.unfold(1, 16, 1).sum(-1).abs().max().item() / 2
    found = {}
    for name, x in exact.items():
        size = max(sizes.get(name, x.new_zeros(())).item(), x.abs().max().item())
        root = terms**0.5 if name.startswith("d") else 1.0
        band = root * size * max(exponent * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps)
        found[name] = 2 * (distance(reference[name], x) + band)
    return found


def check(table: Table) -> bool:
    """Compare the kernels with the reference for dtypes, windows, sinks and layouts; True if every tensor is within."""
    good = True
    cu = torch.tensor([0, 3, 3, 150, 200], dtype=torch.int32, device="cuda")
    mask = torch.ones(2, 200, dtype=torch.bool, device="cuda")
    mask[1, :71] = False
    layouts = {
        "whole": (2, {}), "packed": (1, {"cu_seqlens": cu}), "left-padded": (2, {"attention_mask": mask}),
    }  # fmt: skip
    cases = [("bfloat16", 64, 64, 1, 128, "whole"), ("float32", 64, 64, 1, 128, "whole")]
    cases += [("float16", 64, 64, 1, 128, "whole"), ("float32", 0, 17, 0, 64, "whole")]
    cases += [("bfloat16", 0, 64, 0, 128, "packed"), ("float32", 33, 32, 2, 80, "packed")]
    cases += [("bfloat16", 16, 128, 1, 96, "left-padded"), ("bfloat16", 64, 64, 1, 256, "whole")]
    cases += [("float32", 64, 64, 1, 256, "whole"), ("bfloat16", 300, 64, 1, 128, "whole")]
    for dtype, window, slots, sinks, dim, layout in cases:
        row = {"dtype": dtype, "window": window, "sinks": sinks, "layout": f"{layout} D={dim} M={slots}"}
        batch, options = layouts[layout]
        options = {"window_size": window, **options}
        try:
            flat = check_inputs(getattr(torch, dtype), batch, 200, dim, slots, sinks)
            double = {n: x.detach().double().requires_grad_() for n, x in flat.items()}
            exact = run_whole(double, "reference", **options)
            bound = bounds(flat, exact, run_whole(flat, "reference", **options), 200 * 4)
            got = run_whole(flat, "triton", **options)
            again = run_whole(flat, "triton", **options)
        except Exception as error:
            good = False
            table.add(**row, result="error", tensor=one_line(error))
            continue
        for name, x in exact.items():
            far = distance(got[name], x)
            same = torch.equal(got[name], again[name])
            result = "ok" if far <= bound[name] and same else ("off" if same else "not deterministic")
            good &= result == "ok"
            table.add(**row, tensor=name, error=f"{far:.3e}", bound=f"{bound[name]:.3e}", result=result)
    return good


# --- times ------------------------------------------------------------------------------------------------------------


def median_ms(function: Callable[[], object], budget_s: float = 1.0) -> tuple[float, float]:
    """(median milliseconds, seconds of the first call); at least 5 runs, as many as fit into the budget."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    function()
    clear = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    stop = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 100):
        clear.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        function()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return statistics.median(times), first


def extra_bytes(function: Callable[[], object], results: Callable[[object], int]) -> int:
    """Peak memory of a call beyond what was there before and what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - results(made)


def held_bytes(made: object) -> int:
    """Bytes of the tensors in a result."""
    if isinstance(made, Tensor):
        return made.numel() * made.element_size()
    return sum(held_bytes(x) for x in made) if isinstance(made, (tuple, list)) else 0


def timed_inputs(shape: Shape) -> list[Tensor]:
    """q, k, v and the log-gates of a trained model's size, all leaves."""
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(shape.B, shape.T, heads, dim, generator=generator, device="cuda", dtype=dtype)

    gate = F.logsigmoid(normal(shape.H, shape.M)) / 8
    return [
        x.requires_grad_()
        for x in (normal(shape.HQ, shape.D), normal(shape.H, shape.D), normal(shape.H, shape.D), gate)
    ]


def attention(impl: str, shape: Shape) -> Callable[[list[Tensor]], Tensor]:
    """The output [B, T, HQ, D] of one implementation as a function of the inputs."""
    if impl in BACKENDS:

        def peer(inputs: list[Tensor]) -> Tensor:
            heads = [x.transpose(1, 2) for x in inputs[:3]]
            with sdpa_kernel(BACKENDS[impl]):
                return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

        return peer
    return lambda inputs: nha_attention(*inputs, window_size=shape.W, impl=impl.removeprefix("nha-")).out


def training_passes(impl: str, shape: Shape) -> dict[str, Callable[[], object]]:
    """The forward pass, and forward with backward."""
    inputs = timed_inputs(shape)
    function = attention(impl, shape)
    wanted = inputs[:3] if impl in BACKENDS or shape.W < 0 else inputs
    grad = torch.randn_like(inputs[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return function(inputs)

    return {"fwd": forward, "fwd+bwd": lambda: torch.autograd.grad(function(inputs), wanted, grad)}


def decode_pass(impl: str, shape: Shape) -> dict[str, Callable[[], object]]:
    """One token after a prompt; `T` is the prompt's length."""
    prompt = [x.detach() for x in timed_inputs(shape)]
    token = [x[:, :1] for x in prompt]
    if impl in BACKENDS:
        heads = [x.transpose(1, 2) for x in (token[0], *prompt[1:3])]

        def peer() -> Tensor:
            with torch.no_grad(), sdpa_kernel(BACKENDS[impl]):
                return F.scaled_dot_product_attention(*heads, enable_gqa=True)

        return {"decode": peer}
    name = impl.removeprefix("nha-")
    with torch.no_grad():
        state = nha_attention(*prompt, window_size=shape.W, impl=name, return_state=True).state

    def step() -> Tensor:
        with torch.no_grad():
            return nha_attention(*token, window_size=shape.W, impl=name, state=state, return_state=True).out

    return {"decode": step}


def bench(table: Table, seconds: float) -> None:
    """Time every shape until the time is up, the budgets' shapes first."""
    import triton

    stop = time.perf_counter() + seconds
    fixed = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    full = [Shape(16, 2048, -1)]
    plans = [("nha-triton", training_passes, Shape(16, 2048, 64))]
    plans += [(name, training_passes, s) for s in full for name in BACKENDS]
    plans += [("nha-triton", training_passes, Shape(1, 32768, 64)), ("nha-triton", decode_pass, Shape(64, 512, 64))]
    plans += [("nha-triton", training_passes, Shape(16, 2048, w)) for w in (512, 0, -1)]
    plans += [("sdpa-flash", decode_pass, Shape(64, 2048, -1)), ("sdpa-cudnn", training_passes, Shape(1, 32768, -1))]
    plans += [("nha-chunked", training_passes, Shape(16, 2048, 64)), ("nha-triton", decode_pass, Shape(1, 512, 64))]
    plans += [
        ("nha-triton", training_passes, Shape(1, 131072, 64)),
        ("nha-triton", training_passes, Shape(4, 8192, 64)),
    ]
    plans += [("nha-triton", training_passes, Shape(16, 2048, 64, M=32))]
    plans += [("nha-triton", training_passes, Shape(16, 2048, 64, D=64))]
    plans += [("nha-triton", training_passes, Shape(2, 2048, 64, dtype="float32"))]
    for impl, passes, shape in plans:
        row = {"impl": impl, **shape._asdict(), **fixed}
        if time.perf_counter() > stop:
            table.add(**row, error="not run: the time was up")
            continue
        try:
            functions = passes(impl, shape)
        except Exception as error:
            table.add(**row, error=one_line(error), date=datetime.datetime.now().isoformat(timespec="seconds"))
            continue
        for name, function in functions.items():
            row["date"] = datetime.datetime.now().isoformat(timespec="seconds")
            try:
                ms, first = median_ms(function)
                extra = extra_bytes(function, held_bytes)
                found = {"ms": f"{ms:.4f}", "extra_bytes": extra, "first_call_s": f"{first:.2f}"}
                table.add(**row, **{"pass": name}, **found)
            except Exception as error:
                table.add(**row, **{"pass": name}, error=one_line(error))
        del functions
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the float64 reference")
    parser.add_argument("--bench", action="store_true", help="time the shapes of the budgets")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of check.csv and ops.csv")
    parser.add_argument("--seconds", type=float, default=270, help="start no new shape after this long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    options.out.mkdir(parents=True, exist_ok=True)
    good = True
    if options.check:
        good = check(Table(options.out / "check.csv", CHECK_COLUMNS))
        print("every check is within its bound" if good else "SOME CHECKS FAILED", flush=True)
    if options.bench:
        bench(Table(options.out / "ops.csv", COLUMNS), options.seconds)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
