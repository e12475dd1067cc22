"""Kernels of one training step of the 340M model at 2K, beside those of the same model with full attention.

    python -m experiments.train_profile --output results/train_profile

Compiled layers, bfloat16 and the optimizer are those of `nha train`; tokens are random. Kernels go to OUT/CASE.json
with their time and number of launches in a step, and the longest are printed; `idle_ms` is what lies between them.
Milliseconds of a step are taken without the profiler. A case "nha+graph" runs forward and backward pass as one CUDA
graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.train_speed import BACKENDS, STEP_TOKENS, VOCABULARY, Case, settings_of
from nha.distill.cuda_graphs import CUDAGraphs
from nha.models.nha import NHAForCausalLM
from nha.train.loss import LanguageModel
from nha.train.optimizers import make_optimizer
from nha.train.presets import model_config

CASES = ("nha", "full-cudnn")
WARMUP_STEPS, TIMED_STEPS, SHOWN = 4, 8, 40
GRAPH = "+graph"
GROUPS = {  # the first whose word is part of a kernel's name
    "attention": ("nha_", "cudnn", "fmha", "flash", "sdpa"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "xmma"),
    "fused": ("triton_",),
    "optimizer": ("multi_tensor", "adam"),
}


def group_of(name: str) -> str:
    """The group of a kernel.

    >>> group_of("triton_red_fused_add_mul"), group_of("Memcpy HtoD")
    ('fused', 'other')
    """
    return next((group for group, words in GROUPS.items() if any(w in name.lower() for w in words)), "other")


def idle_ms(intervals: list[tuple[float, float]]) -> float:
    """Milliseconds between the first start and the last end, in microseconds, in which nothing runs.

    >>> idle_ms([(0.0, 1000.0), (500.0, 2000.0), (5000.0, 6000.0)])
    3.0
    """
    idle, ends = 0.0, min((start for start, _ in intervals), default=0.0)
    for start, end in sorted(intervals):
        idle, ends = idle + max(0.0, start - ends), max(ends, end)
    return idle / 1e3


def make_step(case: Case, options: argparse.Namespace, graph: bool) -> Callable[[], None]:
    """One step of training on random tokens; forward and backward pass become one CUDA graph after `WARMUP_STEPS`."""
    settings = settings_of(case, options, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    causal: Any = NHAForCausalLM(model_config(settings, VOCABULARY))
    model = LanguageModel(causal.to(device), dtype).train()
    if device.type == "cuda":
        model.compile_layers()
    optimizer = make_optimizer(model, settings, device.type == "cuda")
    shape = (settings.batch_size, case.seq_len)
    ids, targets = (torch.randint(VOCABULARY, shape, device=device) for _ in range(2))

    def forward_backward() -> Any:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(ids, targets)
        loss.backward()

    steps, replay = 0, None

    def step() -> None:
        nonlocal steps, replay
        steps += 1
        if graph and steps == WARMUP_STEPS and device.type == "cuda":
            replay = CUDAGraphs()("step", forward_backward)[1]
        (replay or forward_backward)()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        if replay is None:  # a graph writes over its gradients
            optimizer.zero_grad()

    return step


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(step: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of a step, of the host alone, and kernels by time."""
    begun = time.perf_counter()
    for _ in range(WARMUP_STEPS):
        step()
    wait()
    prepared, begun = time.perf_counter() - begun, time.perf_counter()
    for _ in range(TIMED_STEPS):
        step()
    host = time.perf_counter() - begun
    wait()
    taken = time.perf_counter() - begun
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        step()
        wait()
    events = [e for e in found.events() or () if e.device_type.name == "CUDA"]
    kernels = [
        {"name": e.key, "ms": (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3, "count": e.count}
        for e in found.key_averages()
    ]
    kernels.sort(key=lambda kernel: -kernel["ms"])
    groups: dict[str, float] = {}
    for kernel in kernels:
        group = group_of(kernel["name"])
        groups[group] = groups.get(group, 0.0) + kernel["ms"]
    return {
        "step_ms": round(1e3 * taken / TIMED_STEPS, 3),
        "host_ms": round(1e3 * host / TIMED_STEPS, 3),
        "prepare_s": round(prepared, 1),
        "kernels_ms": round(sum(kernel["ms"] for kernel in kernels), 3),
        "launches": len(events),
        "idle_ms": round(idle_ms([(e.time_range.start, e.time_range.end) for e in events]), 3),
        "groups": {name: round(ms, 3) for name, ms in groups.items()},
        "kernels": kernels,
    }


def show(name: str, found: dict[str, Any]) -> None:
    """Print what took longest."""
    print(f"{name}: " + json.dumps({key: value for key, value in found.items() if key != "kernels"}))
    for kernel in found["kernels"][:SHOWN]:
        print(f"{kernel['ms']:9.3f} ms {kernel['count']:5d} x {kernel['name'][:130]}")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Profile the cases. Returns 0, or 3 where time was short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "results/train_profile")))
    parser.add_argument("--preset", default="340m")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS)
    parser.add_argument("--cases", default=",".join(CASES), help="cases of experiments/train_speed.py")
    parser.add_argument("--budget-s", type=float, default=60.0)
    options = parser.parse_args(arguments)
    options.steps, options.tiny, options.parallel, options.compile = 40, options.preset == "tiny", "ddp", "auto"
    options.output.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + options.budget_s
    for name in options.cases.split(","):
        base = name.removesuffix(GRAPH)
        case, backend = Case(base, options.seq_len), BACKENDS.get(base)
        if time.monotonic() > ends:
            print(f"{name}: no time left")
            return 3
        use_backend = backend is not None and torch.cuda.is_available()
        with torch.nn.attention.sdpa_kernel(backend) if use_backend and backend is not None else nullcontext():
            found = measure(make_step(case, options, base != name))
        (options.output / f"{name}-{options.seq_len}.json").write_text(json.dumps(found, indent=1) + "\n")
        show(name, found)
        torch._dynamo.reset()
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
