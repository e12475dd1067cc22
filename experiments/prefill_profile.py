"""The time of a prompt, the part of it that the host takes, and the number of kernels, of a model and its hybrids.

Some layers of Llama-3-8B's shape suffice: times are also given for all 32. For each length and variant the table holds

ms       one prompt, from call to result
host_ms  until the calls return, with the GPU still at work: where it equals `ms`, the prompt waits for the host
gpu_ms   the time of all kernels together
kernels  launched in one layer

"called" variants are computed by the family's code, "fused" ones in fewer launches, "graph" ones as a CUDA graph of
those.

`python3 experiments/prefill_profile.py OUT` writes OUT/prefill.json, and where the host spends its time as text.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nha.bench.model_measure import random_ids
from nha.bench.shapes import Variants, shape_config
from nha.bench.timing import CUDA, DEVICE, captured, stamp, synchronize
from nha.io import write_atomically
from nha.models.fused_step import fusing

LENGTHS = (256, 512, 1024, 2048, 4096)
ALL_LAYERS = 32
NAMES = ("original", "hybrid-1", "hybrid-0")
WAYS = [(name, "called") for name in NAMES] + [("hybrid-1", "fused"), ("hybrid-0", "fused"), ("hybrid-1", "graph")]


def build(layers: int, tiny: bool) -> Variants:
    """The variants of a model of a few layers with random weights."""
    from transformers import AutoModelForCausalLM

    config = shape_config("llama-3-8b", tiny)
    config.num_hidden_layers = layers
    if not tiny:
        config.vocab_size = 1024  # the head is no part of a layer
    with torch.device(DEVICE):
        dtype = torch.bfloat16 if CUDA else torch.float32
        made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return Variants(made.eval().requires_grad_(False), *((8, 6) if tiny else ()))


def reader(model: Any, length: int) -> Callable[[], object]:
    """A function that reads a prompt into an empty cache."""
    from transformers import DynamicCache

    prompt = random_ids(model, 1, length)

    @torch.no_grad()
    def read() -> object:
        cache = DynamicCache(config=model.config)
        return model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return read


def timed(read: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds (from call to result, until the calls return)."""
    whole, host = [], []
    for _ in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        read()
        host.append(1e3 * (time.perf_counter() - start))
        synchronize()
        whole.append(1e3 * (time.perf_counter() - start))
    return statistics.median(whole[2:]), statistics.median(host[2:])


def kernels(read: Callable[[], object]) -> tuple[float, int]:
    """(milliseconds of all kernels, their number) of one call; operators of the CPU without a GPU."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if CUDA else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        read()
        synchronize()
    wanted = DeviceType.CUDA if CUDA else DeviceType.CPU
    events = [event for event in found.events() or [] if event.device_type == wanted]
    times = (event.device_time if CUDA else event.self_cpu_time_total for event in events)
    return sum(times) / 1e3, len(events)


def host_functions(read: Callable[[], object], repeats: int) -> str:
    """Functions of Python by the time that they take themselves."""
    profiler = cProfile.Profile()
    for _ in range(repeats):
        synchronize()
        profiler.enable()
        read()
        profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(40)
    return text.getvalue()


def measure(variants: Variants, name: str, way: str, length: int, layers: int, repeats: int) -> dict[str, Any]:
    """One row; a kernel's share outside the layers counts as theirs."""
    row: dict[str, Any] = {"variant": name, "way": way, "T": length}
    with fusing(way != "called"):
        start = time.perf_counter()
        try:
            read = reader(variants.get(name), length)
            if way == "graph":
                read = captured(read)
            else:
                read()
            synchronize()
            first = time.perf_counter() - start
            ms, host_ms = timed(read, repeats)
            gpu_ms, count = kernels(read)
        except Exception as error:
            return row | {"error": f"{type(error).__name__}: {error}"[:300]}
    scale = ALL_LAYERS / layers
    found = {"ms": ms, "host_ms": host_ms, "gpu_ms": gpu_ms, "ms_all_layers": ms * scale, "first_s": first}
    return row | {n: round(x, 3) for n, x in found.items()} | {"kernels_per_layer": round(count / layers, 1)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory of the results")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--repeats", type=int, default=20, help="calls of each row")
    parser.add_argument("--budget-s", type=float, default=240, help="start no row after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which need no GPU")
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.budget_s
    chosen.output.mkdir(parents=True, exist_ok=True)
    variants, rows = build(chosen.layers, chosen.tiny), []
    for length in LENGTHS if not chosen.tiny else (20, 40):
        for name, way in WAYS:
            if time.monotonic() < deadline:
                rows.append(measure(variants, name, way, length, chosen.layers, chosen.repeats))
                print(json.dumps(rows[-1]), flush=True)
    about = stamp("torch", "transformers", "triton", "nha") | {"layers": chosen.layers}
    write_atomically(chosen.output / "prefill.json", json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    for name in NAMES:
        text = host_functions(reader(variants.get(name), LENGTHS[0] if not chosen.tiny else 20), 10)
        write_atomically(chosen.output / f"host-{name}.txt", text)
        print(name, *text.splitlines()[:30], sep="\n", flush=True)


if __name__ == "__main__":
    main()
