"""Measure alone what each part of a distillation step brings: python experiments/rent.py [--tiny] [--only PATTERN].

Shape: SmolLM2-135M with random weights, 16 sequences of 2,048 tokens (2 of them recall text), windows of 64, layers
8, 18, 20 and 23 full, the teacher's forward pass included. Each variant lacks or replaces one part of the baseline; its
steps alternate with the baseline's in one process (baseline, variant, variant, baseline), so that a drifting clock
counts for both.

Prints a row as soon as it is known and writes all rows to $OUT/rent.json (default: the current directory). A variant
that fails prints its error, and the rest goes on. `--tiny` runs a toy on any machine, which measures nothing of use.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib.metadata
import json
import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nha.data.packing import pack
from nha.distill.cuda_graphs import CudaGraphs, Recorder
from nha.distill.student import Distillation
from nha.distill.trainer import combine
from nha.io import write_atomically
from nha.models.adapter import to_hybrid

Batches = list[tuple[str, dict[str, Tensor]]]
Gradients = dict[str, list[Tensor | None]]
DOCUMENT = 800  # tokens of a document, on average


@dataclass(frozen=True)
class Shape:
    """The model and the batch; tokens of a step are `batch_size * seq_len`."""

    num_layers: int = 30
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_heads: int = 9
    num_kv_heads: int = 3
    vocab_size: int = 49152
    seq_len: int = 2048
    batch_size: int = 16
    recall: int = 2
    window_size: int = 64
    num_slots: int = 64
    full_layers: tuple[int, ...] = (8, 18, 20, 23)


TINY = Shape(3, 32, 48, 4, 2, 200, 96, 4, 1, 16, 8, (1,))


@dataclass
class Bench:
    """One way of training: a student, its optimizer, and a function that makes the gradients of a step."""

    student: Distillation
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    gradients: Callable[[Batches], Gradients] | None = None
    state_bytes: int = 0

    def step(self, batches: Batches) -> None:
        """One optimizer step."""
        assert self.gradients is not None
        combine(self.gradients(batches), self.parameters, "normalise", 1.0, 0.5)
        self.optimizer.step()


@dataclass
class Settings:
    """What all variants share."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    backend: dict[str, Any]
    batches: list[Batches] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def make_batches(shape: Shape, cuda: bool, count: int = 4) -> list[Batches]:
    """Packed text and recall text of some steps, in pinned memory where a GPU reads it."""
    generator = np.random.default_rng(0)

    def sequence(recall: bool) -> tuple[np.ndarray, list[int], np.ndarray]:
        ids = generator.integers(3, shape.vocab_size, shape.seq_len)
        places = 0 if recall else max(1, shape.seq_len // DOCUMENT)
        starts = [0, *sorted({int(x) for x in generator.integers(1, shape.seq_len, places)})]
        return ids, starts, generator.random(shape.seq_len) < (0.1 if recall else 0.0)

    def batch(size: int, recall: bool) -> dict[str, Tensor]:
        made = pack([sequence(recall) for _ in range(size)])
        made["by_divergence"] = made["follows"] / np.float32(shape.batch_size * shape.seq_len)
        made["by_cross_entropy"] = made["by_divergence"] / np.float32(2)
        tensors = {name: torch.from_numpy(x) for name, x in made.items()}
        return {name: x.pin_memory() for name, x in tensors.items()} if cuda else tensors

    text, recall = shape.batch_size - shape.recall, shape.recall
    return [[("text", batch(text, False)), ("recall", batch(recall, True))] for _ in range(count)]


def build(settings: Settings, *, fused: bool = True, **compile_options: Any) -> Bench:
    """A student with compiled layers and its optimizer."""
    shape = settings.shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(settings.device, settings.dtype)
    windows = [-1 if i in shape.full_layers else shape.window_size for i in range(shape.num_layers)]
    to_hybrid(model, windows, num_slots=shape.num_slots)
    model.to(settings.device)
    student = Distillation(model).train()
    if fused:
        student.join_layers()
    student.compile_layers(**settings.backend, **compile_options)
    student.beside = settings.cuda
    optimizer = torch.optim.AdamW(
        student.groups(1e-5, 1e-5, 1e-5), betas=(0.9, 0.95), weight_decay=0.0, fused=settings.cuda
    )
    parameters = [p for p in student.parameters() if p.requires_grad]
    sizes = [p.numel() * p.element_size() for p in student.parameters()]
    state = sum(sizes) + 2 * sum(p.numel() * 4 for p in parameters)
    return Bench(student, parameters, optimizer, state_bytes=state)


def with_runner(bench: Bench, settings: Settings, graphs: bool = True) -> Bench:
    """Gradients by our own CUDA graphs, or by the same passes launched one by one."""
    runner = Recorder(bench.student, bench.parameters, CudaGraphs() if graphs and settings.cuda else None)

    def gradients(batches: Batches) -> Gradients:
        passes = runner(batches, settings.shape.seq_len)
        return {name: grads for (name, _), (_, _, grads) in zip(batches, passes, strict=True)}

    bench.gradients = gradients
    return bench


class LossOf(nn.Module):
    """The forward pass of a student as a module whose arguments are all tensors, for `make_graphed_callables`."""

    def __init__(self, student: Distillation, names: list[str], seq_len: int):
        super().__init__()
        self.student, self.names, self.seq_len = student, names, seq_len

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.student(**dict(zip(self.names, tensors, strict=True)), longest=self.seq_len)[0]


def with_graphed_callables(bench: Bench, settings: Settings) -> Bench:
    """Gradients by `torch.cuda.make_graphed_callables`, text and recall text on streams of their own."""
    graphed: dict[str, Any] = {}
    streams: dict[str, Any] = {}

    def gradients(batches: Batches) -> Gradients:
        found: Gradients = {}
        for name, batch in batches:
            inputs = [x.to(settings.device, non_blocking=True) for x in batch.values()]
            if name not in graphed:
                module = LossOf(bench.student, list(batch), settings.shape.seq_len).train()
                sample = tuple(x.clone() for x in inputs)
                graphed[name] = torch.cuda.make_graphed_callables(module, sample, allow_unused_input=True)
                streams[name] = torch.cuda.Stream()
            stream = streams[name]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = graphed[name](*inputs)
                found[name] = list(torch.autograd.grad(loss, bench.parameters, allow_unused=True))
        for stream in streams.values():
            torch.cuda.current_stream().wait_stream(stream)
        return found

    bench.gradients = gradients
    return bench


def copy_of(bench: Bench) -> Bench:
    """The same student and optimizer, to be run in another way."""
    return Bench(bench.student, bench.parameters, bench.optimizer, state_bytes=bench.state_bytes)


def variants(base: Bench, settings: Settings) -> dict[str, Callable[[], Bench]]:
    """Each variant by name; the one that hung once comes last."""

    def reduce_overhead() -> Bench:
        options = {} if settings.backend else {"mode": "reduce-overhead"}
        bench = with_runner(build(settings, **options), settings, graphs=False)
        bench.student.beside = False
        inner = bench.gradients
        assert inner is not None

        def gradients(batches: Batches) -> Gradients:
            parts: Gradients = {}
            for one in batches:  # a graph's outputs are overwritten by its next replay
                torch.compiler.cudagraph_mark_step_begin()
                for name, grads in inner([one]).items():
                    parts[name] = [None if g is None else g.clone() for g in grads]
            return parts

        bench.gradients = gradients
        return bench

    return {
        "no fused linear layers": lambda: with_runner(build(settings, fused=False), settings),
        "torch.compile(mode='reduce-overhead')": reduce_overhead,
        "no CUDA graphs": lambda: with_runner(copy_of(base), settings, graphs=False),
        "make_graphed_callables": lambda: with_graphed_callables(copy_of(base), settings),
    }


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Within the context show where Python is after most of the time, raise TimeoutError after all of it, and end the
    process if it hangs where no exception arrives."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(0.7 * seconds, exit=False)
    killer = threading.Timer(seconds + 15, os._exit, (3,))
    killer.daemon = True
    killer.start()
    try:
        yield
    finally:
        killer.cancel()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronize(settings: Settings) -> None:
    """Wait for the device."""
    if settings.cuda:
        torch.cuda.synchronize()


def sample(bench: Bench, settings: Settings, steps: int) -> float:
    """Milliseconds a step, over some steps."""
    synchronize(settings)
    started = time.perf_counter()
    for step in range(steps):
        bench.step(settings.batches[step % len(settings.batches)])
    synchronize(settings)
    return 1e3 * (time.perf_counter() - started) / steps


def prepare(make: Callable[[], Bench], settings: Settings) -> tuple[Bench, dict[str, float]]:
    """Build a variant and run it until it is warm: its first step, and all that came before it was ready."""
    started = time.perf_counter()
    bench = make()
    bench.step(settings.batches[0])
    synchronize(settings)
    first = time.perf_counter() - started
    for batches in [*settings.batches, *settings.batches]:
        bench.step(batches)
    synchronize(settings)
    return bench, {"first_step_s": round(first, 1), "ready_s": round(time.perf_counter() - started, 1)}


def stamp(settings: Settings) -> dict[str, Any]:
    """GPU, versions and date."""
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(0) if settings.cuda else None}
    for name in ("torch", "triton", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"date": date.today().isoformat()}


def memory(settings: Settings, held: int, shared: int) -> float | None:
    """Peak GiB of a variant: what was reserved since `held`, and what it shares with the baseline."""
    if not settings.cuda:
        return None
    return round((torch.cuda.max_memory_reserved() - held + shared) / 2**30, 2)


def reserved(settings: Settings) -> int:
    """Bytes reserved now, after all that can be is given back; the peak begins anew."""
    gc.collect()
    if not settings.cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()


def tell(row: dict[str, Any]) -> None:
    """Print a row on one line."""
    print(json.dumps(row), flush=True)


def compare(
    base: Bench, make: Callable[[], Bench], settings: Settings, options: argparse.Namespace
) -> dict[str, float | int | None]:
    """Steps of a variant between steps of the baseline."""
    held = reserved(settings)
    bench, seconds = prepare(make, settings)
    shared = base.state_bytes if bench.student is base.student else 0
    peak = memory(settings, held, shared)
    steps, base_steps = (max(2, round(1e3 * options.sample_s / sample(one, settings, 2))) for one in (bench, base))
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(options.repeats):
        ours.append(sample(base, settings, base_steps))
        theirs += [sample(bench, settings, steps) for _ in range(2)]
        ours.append(sample(base, settings, base_steps))
    before, after = statistics.median(ours), statistics.median(theirs)
    tokens = settings.shape.batch_size * settings.shape.seq_len
    return {
        "ms_a_step": round(after, 2),
        "tokens_per_s": round(1e3 * tokens / after),
        "baseline_ms": round(before, 2),
        "baseline_tokens_per_s": round(1e3 * tokens / before),
        "slower_by_percent": round(100 * (after / before - 1), 2),
        "spread_percent": round(100 * (max(ours) / min(ours) - 1), 2),
        "peak_gib": peak,
        **seconds,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure the baseline, then every variant beside it. Returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample-s", type=float, default=1.2, help="seconds of one sample")
    parser.add_argument("--budget-s", type=float, default=230.0, help="no variant begins after this many seconds")
    parser.add_argument("--variant-s", type=float, default=100.0, help="a variant is given up after this many seconds")
    parser.add_argument("--only", default="", help="a pattern: measure the variants whose name it matches")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = TINY if options.tiny else Shape()
    backend = {} if device.type == "cuda" else {"backend": "aot_eager"}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = Settings(shape, device, dtype, backend, make_batches(shape, device.type == "cuda"))
    file = Path(os.environ.get("OUT", ".")) / "rent.json"
    marks = stamp(settings)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row | marks | {"at_s": round(time.monotonic() - began, 1)})
        tell(rows[-1])
        write_atomically(file, json.dumps(rows, indent=1) + "\n")

    held = reserved(settings)
    base, seconds = prepare(lambda: with_runner(build(settings), settings), settings)
    peak = memory(settings, held, 0)
    steps = max(2, round(1e3 * options.sample_s / sample(base, settings, 2)))
    milliseconds = statistics.median(sample(base, settings, steps) for _ in range(2 * options.repeats))
    tokens = shape.batch_size * shape.seq_len
    speed = {"ms_a_step": round(milliseconds, 2), "tokens_per_s": round(1e3 * tokens / milliseconds)}
    keep({"variant": "baseline", **speed, "peak_gib": peak, **seconds})
    failed = 0
    for name, make in variants(base, settings).items():
        if not re.search(options.only, name):
            continue
        if time.monotonic() - began > options.budget_s:
            keep({"variant": name, "error": "no time left"})
            continue
        try:
            with watchdog(options.variant_s):
                row = compare(base, make, settings, options)
            keep({"variant": name, **row})
        except Exception as error:
            failed += 1
            keep({"variant": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
    return failed


if __name__ == "__main__":
    main()
