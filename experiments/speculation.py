"""Time a verification step of drafts against a step of one token, with a rollback and with a copy of the state.

    python3 -m experiments.speculation --output DIR [--shape llama-8b] [--full-layers 4] [--context 4096] [--drafts 8]

A random hybrid reads a context; then steps are timed in turn, by the wall clock, without CUDA graphs: one token; K
tokens of which half are taken back, from a cache that can take back K; the same from one that copies its state and
reads again what was accepted. On a GPU the time of all kernels of a step is noted beside, which does not depend on the
host, with the family's code and with fused kernels; and the operator is timed, replayed as a CUDA graph. DIR gets
speculation.json. Without --shape a GPU takes llama-8b and a CPU smollm2-135m; --shape tiny tries the script.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from experiments.prefill_profile import kernels
from experiments.shapes import build, model_options, synchronize
from nha.io import write_atomically
from nha.models.cache import allow_rollback
from nha.models.conversation import cache_keyword
from nha.models.fused_step import fusing
from nha.ops import NHAState, RingState, nha_decode
from nha.report.results import to_json


def median_ms(steps: dict[str, Callable[[], None]], device: str, rounds: int, seconds: float) -> dict[str, float]:
    """The median of each step's milliseconds, timed in turn until `rounds` or the time are over; and the least."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for turn in range(rounds + 2):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
        if turn >= 4 and time.perf_counter() > end:
            break
    medians = {name: round(statistics.median(found), 3) for name, found in times.items()}
    return medians | {f"{name}, least": round(min(found), 3) for name, found in times.items()}


def model_steps(model: Any, context: int, drafts: int) -> dict[str, Callable[[], None]]:
    """Steps that leave their cache at the length at which they found it, or one or half the drafts further on."""
    ids = torch.randint(model.config.vocab_size, (1, context + drafts), device=model.device)
    name = cache_keyword(model)

    def filled(max_rollback: int, records: bool) -> Any:
        cache = DynamicCache(config=model.config)
        allow_rollback(cache, max_rollback)
        for start in range(0, context, 16384):
            read(cache, ids[:, start : min(start + 16384, context)])
        if records:
            cache.activate_past_recording()
        return cache

    @torch.no_grad()
    def read(cache: Any, part: torch.Tensor) -> None:
        model(part, use_cache=True, logits_to_keep=part.shape[1] if part.shape[1] <= drafts else 1, **{name: cache})

    def verify(cache: Any) -> None:
        read(cache, ids[:, -drafts:])
        cache.crop(-(drafts // 2))

    def fused(step: Callable[[], None]) -> None:
        with fusing("all"):
            step()

    plain, ring, copied = filled(0, False), filled(drafts, True), filled(0, True)
    return {
        "one token": lambda: read(plain, ids[:, -1:]),
        "verify with rollback": lambda: verify(ring),
        "verify with a copy": lambda: verify(copied),
        "one token, fused": lambda: fused(lambda: read(plain, ids[:, -1:])),
        "verify with rollback, fused": lambda: fused(lambda: verify(ring)),
    }


def operator_steps(model: Any, context: int, drafts: int) -> dict[str, Callable[[], None]]:
    """One layer's kernel for one token and for a verification, each as a CUDA graph."""
    config = model.config
    heads, slots, window = config.num_key_value_heads, config.num_slots, max(config.window_sizes)
    options = {"device": model.device, "dtype": model.dtype}

    def inputs(length: int) -> dict[str, torch.Tensor]:
        sizes = {"q": config.num_attention_heads, "k": heads, "v": heads}
        found = {n: torch.randn(1, length, h, config.head_dim, **options) for n, h in sizes.items()}
        gate = -torch.rand(1, length, heads, slots, device=model.device)
        return found | {"log_gate": gate, "q_slot": found["q"].clone(), "k_slot": found["k"].clone()}

    def graph(length: int, max_rollback: int) -> Callable[[], None]:
        step = inputs(length)
        like = {"key": step["k"], "value": step["v"], "log_gate": step["log_gate"], "shared": False}
        state = NHAState.empty(window, **like).padded()  # type: ignore[arg-type]
        state.num_tokens += context
        ring = RingState.of(state, max_rollback)

        def run() -> None:
            nha_decode(**step, state=ring)  # pyright: ignore[reportArgumentType]
            if max_rollback:
                ring.rollback(length // 2)

        run()
        torch.cuda.synchronize()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            for _ in range(20):
                run()
        return recorded.replay

    with torch.no_grad():
        return {"operator x20: one token": graph(1, 0), f"operator x20: verify {drafts}": graph(drafts, drafts)}


def main() -> None:
    parser, device = model_options(__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--budget-s", type=float, default=60.0)
    options = parser.parse_args()
    model = build(options.shape, options.full_layers, device)
    found: dict[str, Any] = {
        "shape": options.shape,
        "full_layers": options.full_layers,
        "context": options.context,
        "drafts": options.drafts,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    steps = model_steps(model, options.context, options.drafts)
    ms = median_ms(steps, device, options.rounds, options.budget_s / 2)
    found["ms"] = ms
    for least in ("", ", least"):
        ratio = ms[f"verify with rollback{least}"] / ms[f"one token{least}"]
        found[f"verify over one token{least}"] = round(ratio, 3)
    if device == "cuda":
        gpu = {name: [kernels(step) for _ in range(3)] for name, step in steps.items()}
        found["ms of all kernels"] = {name: round(statistics.median(ms for ms, _ in x), 3) for name, x in gpu.items()}
        found["kernels"] = {name: x[0][1] for name, x in gpu.items()}
        found["operator ms"] = median_ms(
            operator_steps(model, options.context, options.drafts), device, options.rounds, options.budget_s / 2
        )
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "speculation.json", to_json(found))
    print(to_json(found))


if __name__ == "__main__":
    main()
