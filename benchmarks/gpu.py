"""Check the GPU kernels against the definition and time them beside SDPA: `PYTHONPATH=src python benchmarks/gpu.py`.

    --check        outputs, states and gradients against the float64 reference -> DIR/checks.txt
    --bench        median times: forward, forward + backward, decode (called, and as a CUDA graph) -> DIR/ops.csv
    --out DIR      where the two files go (default: the working directory)
    --budget-s N   start no new case after so long (default 300); with both, checks get half of it
    --only GROUP   only one group of checks, such as bf16-128
    --tiny         the same paths on tiny float32 shapes; on a CPU under TRITON_INTERPRET=1 (times mean nothing)

A line is written as soon as it is known. A case that fails is reported with its error and does not stop the others.
Groups of checks run in processes of their own, so that kernels compile side by side and a broken one harms no other.
Exit status: 1 if a check failed or did not run, else 0.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.deterministic
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nha import NHAState, nha_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
COLUMNS = ["impl", "pass", "B", "T", "HQ", "H", "D", "M", "W", "dtype", "ms", "extra_bytes", "first_call_s", "gpu",
           "torch", "triton", "date"]  # fmt: skip
TOKENWISE = ("q", "k", "v", "log_gate", "q_slot", "k_slot")
BACKENDS = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---------------------------------------------------------------------------------------------------------------------
# Checks: the laws of tests/laws on the GPU. pytest and hypothesis are not needed here.


@dataclass(frozen=True)
class Case:
    """One input. `kind` is a function of KINDS; `gate` fills the log-gates, `spread` scales queries."""

    kind: str = "whole"
    batch: int = 1
    length: int = 150
    query_heads: int = 8
    heads: int = 2
    slots: int = 64
    window: int = 64
    sinks: int = 0
    separate: bool = False
    gate: float | None = None
    spread: float = 1.0

    def __str__(self) -> str:
        text = (
            f"{self.kind} B{self.batch} T{self.length} HQ{self.query_heads} H{self.heads} M{self.slots} W{self.window}"
        )
        text += f" S{self.sinks}" * (self.sinks > 0) + " own-slot-keys" * self.separate
        return text + ("" if self.gate is None else f" gate{self.gate:g}") + f" q*{self.spread:g}" * (self.spread != 1)


def make(case: Case, dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random leaf tensors of one case."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    b, t, hq, h, m, s = case.batch, case.length, case.query_heads, case.heads, case.slots, case.sinks
    flat = {"q": normal(b, t, hq, dim) * case.spread, "k": normal(b, t, h, dim), "v": normal(b, t, h, dim)}
    flat["log_gate"] = -(normal(b, t, h, m) ** 2)
    if case.gate is not None:
        flat["log_gate"] = torch.full_like(flat["log_gate"], case.gate)
    if case.separate:
        flat |= {"q_slot": normal(b, t, hq, dim) * case.spread, "k_slot": normal(b, t, h, dim)}
    if s:
        flat |= {"sink_key": normal(h, s, dim), "sink_value": normal(h, s, dim)}
    if case.kind == "slots":
        flat |= {"slot_key": normal(b, h, m, dim), "slot_value": normal(b, h, m, dim)}
    return {n: x.to(DEVICE, dtype).requires_grad_() for n, x in flat.items()}


def call(flat: dict[str, Tensor], window: int, impl: str, **options):
    flat = {n: x for n, x in flat.items() if n not in ("slot_key", "slot_value")}
    sink = (flat.pop("sink_key"), flat.pop("sink_value")) if "sink_key" in flat else None
    options = {"return_state": True, "return_slot_mass": True} | options
    return nha_attention(**flat, sink=sink, window_size=window, impl=impl, **options)  # type: ignore[arg-type]


def cut(flat: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {n: x[:, start:stop] if n in TOKENWISE else x for n, x in flat.items()}


def whole(case: Case, flat: dict[str, Tensor], impl: str, **options) -> dict[str, Tensor]:
    output = call(flat, case.window, impl, **options)
    assert output.state is not None and output.slot_mass is not None
    return {"out": output.out, "mass": output.slot_mass, **output.state.tensors()}


def padded(case: Case, flat: dict[str, Tensor], impl: str, left: bool) -> dict[str, Tensor]:
    mask = torch.ones(case.batch, case.length, dtype=torch.bool, device=DEVICE)
    mask[-1, slice(0, case.length // 3) if left else slice(-(case.length // 3), None)] = False
    return whole(case, flat, impl, attention_mask=mask)


def boundaries(*cuts: int) -> Tensor:
    return torch.tensor(cuts, dtype=torch.int32, device=DEVICE)


def packed(case: Case, flat: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    n = case.length
    return whole(case, flat, impl, cu_seqlens=boundaries(0, 3, 3, n * 2 // 3, n))


def packed_twice(case: Case, flat: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """Packed sequences that go on from the state of packed sequences."""
    half = case.length // 2
    first = call(cut(flat, 0, half), case.window, impl, cu_seqlens=boundaries(0, 3, half))
    rest = cut(flat, half, case.length)
    cuts = boundaries(0, half // 3, case.length - half)
    return whole(case, rest, impl, cu_seqlens=cuts, state=first.state)


def segments(case: Case, flat: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """Cut for the kernels, in one call for the reference."""
    n = case.length
    stops = [n] if impl == "reference" else sorted({3, 4, n // 2, n // 2 + 1, n})
    outputs, state, start = [], None, 0
    for stop in stops:
        outputs.append(call(cut(flat, start, stop), case.window, impl, state=state))
        state, start = outputs[-1].state, stop
    found = {"out": torch.cat([o.out for o in outputs], 1), "mass": torch.cat([o.slot_mass for o in outputs], 1)}
    assert state is not None
    return found | state.tensors()


def given_slots(case: Case, flat: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    state = NHAState.from_slots(
        flat["slot_key"], flat["slot_value"], case.window, dtype=flat["q"].dtype, shared_keys=not case.separate
    )
    return whole(case, flat, impl, state=state)


KINDS = {
    "whole": whole, "left": partial(padded, left=True), "right": partial(padded, left=False), "packed": packed,
    "packed-state": packed_twice, "segments": segments, "slots": given_slots,
}  # fmt: skip


def results(case: Case, flat: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """Everything that comes back, and the gradients of a random linear function of it."""
    found = KINDS[case.kind](case, flat, impl)
    found = {n: x for n, x in found.items() if x.is_floating_point()}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for x in found.values():
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x * weight.to(x)).sum().to(loss.dtype)
    grads = torch.autograd.grad(loss, list(flat.values()), allow_unused=True)
    grads = {"d" + n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(flat.items(), grads, strict=True)}
    return {n: x.detach() for n, x in (found | grads).items()}


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    if actual.numel() == 0:
        return 0.0
    worst = (actual.double() - exact.double()).abs().max().item()
    return float("inf") if worst != worst else worst


def rms(x: Tensor) -> float:
    """Root mean square; NaN counts as infinite."""
    value = x.double().square().mean().sqrt().item() if x.numel() else 0.0
    return float("inf") if value != value else value


def mean_bounds(case: Case, flat: dict[str, Tensor], exact: dict[str, Tensor], reference: dict[str, Tensor]) -> dict:
    """The same law for root mean squares, where no room is needed for the worst of many sums of rounded terms."""
    eps = rounding(flat)
    key, value = (rms(flat[n].detach()) for n in ("k_slot" if case.separate else "k", "v"))
    behind = {"out": value, "slot_key": key, "slot_value": value}
    sizes = {n: max(rms(x), behind.get(n, 0.0)) for n, x in exact.items()}
    pairs = [(x.double() * exact["d" + n]).square().sum(-1).mean().sqrt() for n, x in flat.items() if n != "log_gate"]
    sizes["dlog_gate"] = max(sizes["dlog_gate"], torch.stack(pairs).max().item())
    return {n: 2 * (rms(reference[n].double() - x.double()) + eps * sizes[n]) for n, x in exact.items()}


def rounding(flat: dict[str, Tensor]) -> float:
    """A unit in the last place of the dtype, or what exp() of the largest running sum of 16 log-gates errs by."""
    gate = F.pad(flat["log_gate"].detach().double().clamp(-5, 0), (0, 0, 0, 0, 0, 15))
    exponent = 1 + gate.unfold(1, 16, 1).sum(-1).abs().max().item() / 2
    return max(exponent * torch.finfo(torch.float32).eps, torch.finfo(flat["q"].dtype).eps)


def bounds(case: Case, flat: dict[str, Tensor], exact: dict[str, Tensor], reference: dict[str, Tensor]) -> dict:
    """Twice the error of the reference in the same precision and its rounding band, as tests/laws has it."""
    eps = rounding(flat)
    pairs = [(x.double() * exact["d" + n]).abs().sum(-1).max() for n, x in flat.items() if n != "log_gate"]
    key, value = (flat[n].detach().double().abs().max() for n in ("k_slot" if case.separate else "k", "v"))
    behind = {"out": value, "slot_key": key, "slot_value": value, "dlog_gate": torch.stack(pairs).max()}
    found = {}
    for name, x in exact.items():
        size = max(x.abs().max().item() if x.numel() else 0.0, float(behind.get(name, 0.0)))
        terms = case.length * case.query_heads if name.startswith("d") else 1
        found[name] = 2 * (error(reference[name], x) + eps * terms**0.5 * size)
    return found


def check(case: Case, dim: int, label: str) -> str:
    """One line: the verdict, the largest error as a share of its bound, and what is beyond its bound."""
    flat = make(case, dim, DTYPES[label])
    got = results(case, flat, "triton")
    again = results(case, flat, "triton")
    differ = [f"{n} differs between two runs" for n, x in got.items() if not torch.equal(x, again[n])]
    exact = results(case, {n: x.detach().double().requires_grad_() for n, x in flat.items()}, "reference")
    if case.gate is not None or case.spread != 1:
        # Rounding has no useful bound here: the law is that whatever the dtype can hold stays finite.
        bad = [f"{n} is not finite" for n, x in got.items() if (~x.isfinite() & exact[n].to(x.dtype).isfinite()).any()]
        return f"{'FAIL' if bad + differ else 'pass'} {'; '.join(bad + differ)}"
    reference = results(case, flat, "reference")
    bad, worst = [], []
    for what, measure_of, limits in (("max", error, bounds), ("rms", lambda a, b: rms(a.double() - b), mean_bounds)):
        limit = limits(case, flat, exact, reference)
        errors = {n: measure_of(got[n], x) for n, x in exact.items()}
        bad += [f"{n} {what} error {e:.2e} > {limit[n]:.2e}" for n, e in errors.items() if not e <= limit[n]]
        share, name = max((e / limit[n], n) for n, e in errors.items() if limit[n])
        worst.append(f"{share:.2f} {what} {name}")
    return f"{'FAIL' if bad + differ else 'pass'} {' '.join(worst)} {'; '.join(bad + differ)}"


def cases(tiny: bool) -> list[Case]:
    """The most telling first."""
    base = Case()
    found = [
        base,
        replace(base, window=0),
        replace(base, sinks=1, separate=True),
        replace(base, window=0, sinks=2, separate=True, batch=2),
        replace(base, batch=2, kind="left"),
        replace(base, kind="segments", length=140),
        replace(base, kind="packed"),
        replace(base, kind="slots"),
        replace(base, window=1),
        replace(base, window=32, query_heads=3, heads=1),
        replace(base, window=65),
        replace(base, window=512, length=600, heads=1, query_heads=4),
        replace(base, length=700, heads=1, query_heads=4, slots=32),  # several segments of chunks
        replace(base, window=16, length=17, query_heads=2),
        replace(base, batch=2, kind="right", window=0),
        replace(base, kind="packed-state", window=32),
        replace(base, kind="packed", window=0),
        replace(base, kind="segments", window=0, sinks=1),
        replace(base, kind="slots", window=0, separate=True),
        *[replace(base, gate=g, spread=1e3, sinks=1, window=w) for g in (0.0, -1e4, 1e4) for w in (64, 0)],
        replace(base, query_heads=9, heads=3, slots=32, window=32),
        replace(base, query_heads=9, heads=1, slots=16, window=5),
        replace(base, query_heads=2, slots=128),
    ]
    if not tiny:
        return found
    small = {64: 7, 65: 8, 32: 5, 512: 20, 16: 3}
    return [replace(c, window=small.get(c.window, c.window), length=min(c.length, 26), slots=5, query_heads=2 * c.heads)
            for c in found]  # fmt: skip


def groups(tiny: bool) -> dict[str, tuple[str, int, int]]:
    """Name of a group of checks -> (dtype, head size, which third of the cases)."""
    if tiny:
        return {"fp32-8": ("fp32", 8, -1)}
    return {
        f"{label}-{dim}-{third}": (label, dim, third) for label in DTYPES for dim in (128, 64) for third in range(3)
    }


def run_group(name: str, file: Path, tiny: bool, deadline: float) -> None:
    """Append a line per case to `file` (lines of several processes do not mix: one short write each)."""
    warnings.simplefilter("ignore")
    # Memory that no kernel wrote shows as NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    label, dim, third = groups(tiny)[name]
    mine = cases(tiny) if third < 0 else cases(tiny)[third::3]
    for case in mine:
        if time.time() > deadline:
            verdict = "UNRUN: no time left"
        else:
            try:
                verdict = check(case, dim, label)
            except Exception as caught:
                verdict = "ERROR " + reason(caught)
        with file.open("a") as out:
            out.write(f"{verdict.strip()} | {label} D{dim} {case}\n")


def run_checks(out: Path, tiny: bool, only: str | None, seconds: float) -> bool:
    """All groups, side by side on a GPU; whether everything passed."""
    file, deadline = out / "checks.txt", time.time() + seconds
    file.write_text("")
    wanted = [n for n in groups(tiny) if only is None or n.startswith(only)]
    if tiny or len(wanted) == 1:
        for name in wanted:
            run_group(name, file, tiny, deadline)
    else:
        own = [sys.executable, __file__, "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        started = {n: subprocess.Popen([*own, "--group", n, "--until", str(deadline)], env=environment) for n in wanted}
        for name, process in started.items():
            try:
                status = process.wait(max(deadline - time.time(), 0) + 45)
            except subprocess.TimeoutExpired:
                process.kill()
                status = "killed: still running 45 s after the time was up"
            if status:
                with file.open("a") as handle:
                    handle.write(f"ERROR group ended early ({status}) | {name}\n")
    lines = sorted(file.read_text().splitlines(), key=lambda line: line.startswith("pass"))
    failed = [line for line in lines if not line.startswith("pass")]
    print("\n".join(line[:400] for line in failed))
    shares = [float(x.split()[i]) for x in lines if x.startswith("pass") and " rms " in x for i in (1, 4)]
    print(f"checks: {len(lines) - len(failed)} of {len(lines)} passed; largest error / bound of those that passed: "
          f"{max(shares, default=float('nan')):.2f}", flush=True)  # fmt: skip
    return not failed


# ---------------------------------------------------------------------------------------------------------------------
# Times.


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def median_ms(function: Callable[[], object], seconds: float = 0.6) -> float:
    """Median time of a call by the GPU's clock, with the L2 cache flushed between calls."""
    if not CUDA:
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    pairs, start = [], time.perf_counter()
    while len(pairs) < 5 or (len(pairs) < 60 and time.perf_counter() - start < seconds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        if len(pairs) % 5 == 4:
            torch.cuda.synchronize()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in pairs)
    return times[len(times) // 2]


def tensors(shape: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE, dtype=dtype)

    b, t, hq, h, d, m = (shape[n] for n in ("B", "T", "HQ", "H", "D", "M"))
    flat = {"q": normal(b, t, hq, d), "k": normal(b, t, h, d), "v": normal(b, t, h, d)}
    flat["log_gate"] = F.logsigmoid(normal(b, t, h, m)) / 8
    return {n: x.requires_grad_() for n, x in flat.items()}


def forward_of(name: str, kind: str, shape: dict, flat: dict[str, Tensor]) -> Callable[[], Tensor]:
    window = shape["W"]
    if name in BACKENDS:
        q, k, v = (flat[n].transpose(1, 2) for n in ("q", "k", "v"))

        def attend() -> Tensor:
            with sdpa_kernel(BACKENDS[name]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

        return attend
    if kind.startswith("decode"):
        state = call(cut(flat, 0, window + 1), window, name).state
        step = {n: x[:, -1:] for n, x in flat.items()}
        return lambda: call(step, window, name, state=state, return_slot_mass=False).out
    return lambda: call(flat, window, name, return_state=False, return_slot_mass=False).out


def measure(name: str, kind: str, shape: dict, label: str) -> dict:
    """ms, extra_bytes (beyond inputs, outputs and their gradients) and first_call_s of one row."""
    flat = tensors(shape, DTYPES[label])
    if kind.startswith("decode"):
        flat = {n: x.detach() for n, x in flat.items()}
    forward = forward_of(name, kind, shape, flat)
    leaves = [flat[n] for n in ("q", "k", "v")]
    if name not in BACKENDS and shape["W"] >= 0:
        leaves.append(flat["log_gate"])
    grad_out = torch.randn_like(flat["q"]).transpose(1, 2) if name in BACKENDS else torch.randn_like(flat["q"])

    def run() -> None:
        if kind == "fwd+bwd":
            torch.autograd.grad(forward(), leaves, grad_out, allow_unused=True)  # no gates where W >= T
        else:
            with torch.no_grad():
                forward()

    if kind == "decode-graph":
        run = captured(run)
    start = time.perf_counter()
    run()
    synchronize()
    row = {"first_call_s": round(time.perf_counter() - start, 3)}
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize()
        expected = flat["q"].nbytes if not kind.startswith("decode") else 0
        expected += sum(x.nbytes for x in leaves) if kind == "fwd+bwd" else 0
        row["extra_bytes"] = torch.cuda.max_memory_allocated() - before - expected
    return row | {"ms": round(median_ms(run), 4)}


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def rows(tiny: bool) -> list[tuple[str, str, dict, str]]:
    """(implementation, pass, shape, dtype), the most important first."""
    large, small = {"HQ": 32, "H": 8, "D": 128, "M": 64}, {"HQ": 9, "H": 3, "D": 64, "M": 64}
    short, middle, long = (16, 2048), (4, 8192), (1, 32768)
    label, near, far = "bf16", 64, 512
    if tiny:
        large, small = {"HQ": 2, "H": 1, "D": 8, "M": 4}, {"HQ": 3, "H": 1, "D": 4, "M": 4}
        short, middle, long, label, near, far = (2, 20), (1, 24), (1, 40), "fp32", 5, 9
    both, ours, all_three = ("fwd", "fwd+bwd"), ("triton",), ("triton", *BACKENDS)

    def block(names, sizes, where, windows, passes=both, dtype=label) -> list:
        return [(n, p, sizes | {"B": b, "T": t, "W": -1 if n in BACKENDS else w}, dtype)
                for b, t in where for w in windows for n in names for p in passes]  # fmt: skip

    found = block(all_three, large, [short], [near])
    found += block(ours, large, [long, middle], [near])
    found += block(ours, large, [short], [0, far, -1])
    found += block(tuple(BACKENDS), large, [long, middle], [-1])
    found += block(all_three, small, [short], [near]) + block(ours, small, [short], [0, far, -1])
    found += block(ours, large, [long, middle], [0, far, -1])
    found += block(ours, large, [(64, 80) if not tiny else (2, 80)], [near], ("decode", "decode-graph"))
    found += block(all_three, small, [long, middle], [near])
    found += block(ours, large, [(1, 131072) if not tiny else (1, 50)], [near])
    found += block(ours, large, [short], [near], dtype="fp16" if not tiny else label)
    found += block(ours, small, [short], [near], dtype="fp32") + block(("chunked",), large, [short], [near])
    return found


def run_bench(out: Path, tiny: bool, deadline: float) -> None:
    """Every row at once into ops.csv, and a table at the end."""
    # Kernels compile anew, so that first_call_s is that of a cold cache.
    triton.knobs.cache.dir = tempfile.mkdtemp(prefix="triton-cold-")
    device = {"gpu": torch.cuda.get_device_name() if CUDA else "none", "torch": torch.__version__,
              "triton": triton.__version__, "date": date.today().isoformat()}  # fmt: skip
    done, skipped = [], 0
    with (out / "ops.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for name, kind, shape, label in rows(tiny):
            if time.time() > deadline:
                skipped += 1
                continue
            row = {"impl": name, "pass": kind, **shape, "dtype": label}
            try:
                row |= measure(name, kind, shape, label)
                writer.writerow(row | device)
                file.flush()
                done.append(row)
            except Exception as caught:
                print("failed:", " ".join(f"{n}={x}" for n, x in row.items()), reason(caught), flush=True)
            if CUDA:
                torch.cuda.empty_cache()
    print(table(done), f"\nrows not started for lack of time: {skipped}" if skipped else "", sep="")


def table(done: list[dict]) -> str:
    """One line per implementation and shape: forward, forward + backward (ms; extra MiB; first call)."""
    lines: dict[tuple, dict] = {}
    for row in done:
        key = tuple(row[n] for n in ("HQ", "H", "D", "dtype", "B", "T", "impl", "W"))
        lines.setdefault(key, {})[row["pass"]] = row
    text = [f"{'shape':<34}{'impl':<12}{'W':>5}   pass: ms (extra MiB, first call s)"]
    for (hq, h, d, label, b, t, name, window), passes in lines.items():
        cells = [f"{kind} {r['ms']:.3f} ({r.get('extra_bytes', 0) / 2**20:.0f}, {r['first_call_s']:.1f})"
                 for kind, r in passes.items()]  # fmt: skip
        text.append(f"{f'{label} HQ{hq} H{h} D{d} B{b} T{t}':<34}{name:<12}{window:>5}   {'   '.join(cells)}")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", metavar="GROUP")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--budget-s", type=float, default=300)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not CUDA and not (options.tiny and triton.knobs.runtime.interpret):
        sys.exit("expected a CUDA device, or --tiny with TRITON_INTERPRET=1; found neither")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.group:
        run_group(options.group, options.out / "checks.txt", options.tiny, options.until)
        return 0
    deadline, passed = time.time() + options.budget_s, True
    if options.check:
        share = 0.5 if options.bench else 1.0
        passed = run_checks(options.out, options.tiny, options.only, share * options.budget_s)
    if options.bench:
        run_bench(options.out, options.tiny, deadline)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
