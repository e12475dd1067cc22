"""Where the time of a decoding step goes: its kernels, and how fast it is with other means.

Eight layers of Llama-3-8B's shape, one of them full, one sequence after 2,048 tokens, as a CUDA graph. The output holds

kernels   the kernels of one step, summed by name: number and microseconds a layer
products  a layer's products alone: microseconds of cuBLAS and of the kernels for one token in several tiles, each with
          weights that no cache holds, and the time that reading them takes
steps     milliseconds of a step, also for all 32 layers and the head, for each way to compute it:
          "plain" the families' code, "compiled" every layer compiled, "fused ..." `nha.models.fused_step` in some
          tiles; `errors` are those of logits against the same model in float32: mean and largest over the mean size

`python3 experiments/decode_profile.py OUT` writes OUT/decode.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.prefill_profile import build
from nha.bench.model_measure import _layers, random_ids, static_cache
from nha.bench.timing import CUDA, DEVICE, captured, ceilings, median_ms, stamp, synchronize
from nha.io import write_atomically
from nha.models.fused_step import fusing
from nha.models.windows import decoder
from nha.ops.triton import token

ALL_LAYERS = 32
LENGTH = 2048
TILES = [(4, 1024, 4), (4, 512, 4), (2, 1024, 4), (8, 512, 4), (8, 512, 8), (8, 1024, 8)]


def step_of(model: Any, context: Callable[[], Any]) -> Callable[[], object]:
    """A recorded step of a model, within a context."""
    token, position = random_ids(model, 1, 1), torch.full((1, 1), LENGTH, device=DEVICE)
    cache = static_cache(model, 1, LENGTH)
    counts = [x.length if hasattr(x, "state") else x.cumulative_length for x in _layers(cache)]
    options = {"past_key_values": cache, "use_cache": True, "position_ids": position}

    @torch.no_grad()
    def step() -> Tensor:
        for count in counts:
            count.fill_(LENGTH)
        return model(token, **options).logits

    with context():
        run = captured(step)
    return run


def kernels(run: Callable[[], object], layers: int) -> list[dict[str, Any]]:
    """The kernels of one replay, by name: number and microseconds of a layer."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as found:
        run()
        synchronize()
    wanted = DeviceType.CUDA if CUDA else DeviceType.CPU
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in found.events() or []:
        if event.device_type == wanted:
            entry = sums[event.name[:90]]
            entry[0] += 1
            entry[1] += event.device_time if CUDA else event.self_cpu_time_total
    rows = [{"kernel": n, "number": c / layers, "us": round(us / layers, 2)} for n, (c, us) in sums.items()]
    return sorted(rows, key=lambda row: -row["us"])


def graph_ms(function: Callable[[], object], number: int) -> float:
    """Milliseconds of one of the `number` launches of a function, as a graph."""
    return median_ms(captured(function), seconds=0.1, host_ahead=False) / number


def products(tiny: bool) -> list[dict[str, Any]]:
    """The products of a layer, each with as many copies of its weights as no cache holds."""
    from nha.ops.triton.token import Norm, Tiles, token_linear, token_mlp

    hidden, inner, rows = (4096, 14336, []) if not tiny else (64, 96, [])
    dtype = torch.bfloat16 if CUDA else torch.float32

    def weights(n: int, k: int) -> list[Tensor]:
        copies = max((400 << 20) // (2 * n * k), 2) if CUDA else 2
        return [torch.randn(n, k, device=DEVICE, dtype=dtype) / k**0.5 for _ in range(copies)]

    def hidden_states(size: int) -> Tensor:
        return torch.randn(1, 1, size, device=DEVICE, dtype=dtype)

    norm = Norm(torch.ones(hidden, device=DEVICE, dtype=dtype), 1e-5)

    def add(name: str, how: str, run: Callable[[], object], matrices: list[Tensor], per: int = 1) -> None:
        try:
            ms = graph_ms(run, len(matrices) // per)
        except Exception as error:
            print(name, how, type(error).__name__, str(error)[:100])
            return
        size = per * matrices[0].numel() * matrices[0].element_size()
        rows.append({"product": name, "how": how, "us": round(1e3 * ms, 2), "tb_s": round(size / ms / 1e9, 3)})
        print(json.dumps(rows[-1]), flush=True)

    for name, n, k in (("o", hidden, hidden), ("down", hidden, inner), ("k", hidden // 4, hidden)):
        matrices, x = weights(n, k), hidden_states(k)
        add(name, "cublas", lambda x=x, m=matrices: [F.linear(x, w) for w in m], matrices)
        for tiles in TILES:
            own = Tiles(*tiles)
            add(name, str(tiles), lambda x=x, m=matrices, t=own: [token_linear(x, w, tiles=t) for w in m], matrices)
    matrices, x = weights(inner, hidden), hidden_states(hidden)
    matrices += weights(inner, hidden)
    matrices = matrices[: len(matrices) // 2 * 2]
    pairs = list(zip(matrices[::2], matrices[1::2], strict=True))
    add("mlp", "cublas", lambda: [F.silu(F.linear(x, g)) * F.linear(x, u) for g, u in pairs], matrices, 2)
    for tiles in TILES:
        own = Tiles(*tiles)
        add("mlp", str(tiles), lambda t=own: [token_mlp(x, norm, g, u, t) for g, u in pairs], matrices, 2)
    return rows


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """The layers of a model, compiled one by one, within the block."""
    layers = list(decoder(model).layers)
    with fusing(False):
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward
            torch._dynamo.reset()


@contextmanager
def tiled(tiles: Iterable[int]) -> Iterator[None]:
    """Other tiles of the kernels for one token within the block."""
    saved, token.TILES = token.TILES, token.Tiles(*tiles)
    try:
        yield
    finally:
        token.TILES = saved


def steps(model: Any, names: list[Any], layers: int, deadline: float, rows: list[dict[str, Any]]) -> None:
    """Time a step for each way to compute it ("plain", "compiled" or tiles), and compare its logits with float32."""
    exact = logits(copy.deepcopy(model).float(), partial(fusing, False))

    def context_of(way: Any) -> Callable[[], Any]:
        if isinstance(way, str):
            return partial(fusing, False) if way == "plain" else lambda: compiled(model)
        return lambda: tiled(way)

    for way in names:
        name, context = way if isinstance(way, str) else f"fused {way}", context_of(way)
        if time.monotonic() > deadline:
            return
        try:
            start = time.perf_counter()
            run = step_of(model, context)
            synchronize()
            made = time.perf_counter() - start
            ms = min(median_ms(run, seconds=0.2, max_calls=200, host_ahead=False) for _ in range(2))
            back = replays(run)
            row: dict[str, Any] = {"how": name, "ms": round(ms, 4), "ms_back_to_back": round(back, 4)}
            row |= {"ms_32_layers": round(back * ALL_LAYERS / layers, 3), "first_s": round(made, 1)}
            difference = (logits(model, context) - exact).abs() / exact.abs().mean()
            row["errors"] = [round(float(x), 6) for x in (difference.mean(), difference.max())]
            rows.append(row)
            print(json.dumps(row), flush=True)
            if name in ("plain", f"fused {TILES[0]}"):
                for entry in kernels(run, layers)[:25]:
                    print(f"    {entry['us']:8.2f} us {entry['number']:6.2f}  {entry['kernel']}")
                    rows.append({"of": name} | entry)
        except Exception as error:
            print(name, type(error).__name__, str(error)[:300], flush=True)


def replays(run: Callable[[], object], number: int = 50) -> float:
    """Milliseconds of one of many replays in a row: weights of 3.5 GB leave no cache warm."""
    run()
    synchronize()
    start = time.perf_counter()
    for _ in range(number):
        run()
    synchronize()
    return 1e3 * (time.perf_counter() - start) / number


@torch.no_grad()
def logits(model: Any, context: Callable[[], Any]) -> Tensor:
    """Logits of one token within a context, float32; keys and values of full layers are random."""
    cache, generator = static_cache(model, 1, LENGTH), torch.Generator(DEVICE).manual_seed(3)
    for layer in _layers(cache):
        if not hasattr(layer, "state"):
            for name in ("keys", "values"):
                old = getattr(layer, name)
                old.copy_(torch.randn(old.shape, generator=generator, device=DEVICE))
    with context():
        position = torch.full((1, 1), LENGTH, device=DEVICE)
        out = model(random_ids(model, 1, 1), past_key_values=cache, use_cache=True, position_ids=position)
    return out.logits.float()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory of the results")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--budget-s", type=float, default=90, help="start no step after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which need no GPU")
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.budget_s
    chosen.output.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = stamp("torch", "transformers", "triton", "nha") | {"layers": chosen.layers}
    found: dict[str, Any] = {"about": about | {"ceilings": ceilings()}, "steps": []}
    print(json.dumps(found["about"]), flush=True)

    def write() -> None:
        write_atomically(chosen.output / "decode.json", json.dumps(found, indent=1) + "\n")

    model = build(chosen.layers, chosen.tiny).get("hybrid-1")
    steps(model, ["plain", *TILES, "plain", "compiled"], chosen.layers, deadline - 25, found["steps"])
    write()
    found["products"] = products(chosen.tiny)
    write()


if __name__ == "__main__":
    main()
