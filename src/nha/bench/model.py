"""Time a whole model with full attention and as a hybrid: `PYTHONPATH=src python3 -m nha.bench.model`.

    --out DIR        where model.csv goes (default: benchmarks/results)
    --budget-s N     start no new row after so long (default 500); rows come in order of importance
    --only PATTERN   only rows whose line (see --list) has this regular expression in it, such as "^hybrid decode"
    --list           print the rows and stop
    --tiny           the same paths on a tiny model, on a CPU (times mean nothing)

Llama-3-8B's shape with random weights in bf16; the hybrid keeps full attention in 4 of 32 layers, the others have a
window of 64 and 64 slots. Rows are written as soon as they are known. `task` and `how`:

prefill     reading a prompt of T tokens into a cache: in one call, or in segments; ms and the peak of memory, weights
            included
decode      one more token of one text after T: eager (a cache that grows), graph (a static cache, replayed as a CUDA
            graph), compiled (torch.compile of the step), both (a CUDA graph of the compiled step)
throughput  one more token of as many texts of T tokens as fit into the memory; B is how many
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nha.bench.timing import CUDA, DEVICE, Table, captured, median_ms, stamp, synchronize, timing

COLUMNS = (
    "model",
    "task",
    "how",
    "B",
    "T",
    "ms",
    "tokens_s",
    "peak_gib",
    "gpu",
    "torch",
    "transformers",
    "triton",
    "date",
)
FULL_LAYERS = (3, 11, 19, 27)
WINDOW, SLOTS = 64, 64
SEGMENT = 16384
GIB = 2**30
SPARE = 3  # GiB that throughput leaves free for activations


@dataclass(frozen=True)
class Row:
    """One measurement of a model, "full" or "hybrid"."""

    model: str
    task: str
    how: str
    length: int

    def __str__(self) -> str:
        return f"{self.model} {self.task} {self.how} T{self.length}"


def rows(tiny: bool) -> list[Row]:
    """Every row, the most important first, and few changes of the model."""
    scale = 1024 if not tiny else 1
    lengths = [n * scale for n in ((2, 8, 32, 128, 64) if not tiny else (20, 30))]
    far, long = (32 * scale, 128 * scale) if not tiny else (20, 30)
    found = [Row("hybrid", "prefill", "one call", n) for n in lengths] + [Row("hybrid", "prefill", "segments", long)]
    found += [Row("hybrid", "decode", "graph", n) for n in (far, long)] + [Row("hybrid", "decode", "both", far)]
    found += [Row("hybrid", "throughput", how, far) for how in ("graph", "eager")]
    found += [Row("hybrid", "decode", "eager", lengths[0])]
    found += [Row("full", "prefill", "one call", n) for n in lengths]
    found += [Row("full", "throughput", how, far) for how in ("eager", "graph")]
    found += [Row("full", "decode", "eager", n) for n in lengths[:2]]
    found += [Row("full", "decode", how, far) for how in ("graph", "both", "compiled")]
    last = (("compiled", far), ("both", long), ("compiled", long))
    return found + [Row("hybrid", "decode", how, n) for how, n in last]


def shape(tiny: bool) -> Any:
    from transformers import LlamaConfig

    if tiny:
        return LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
        )
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 18,
        tie_word_embeddings=False,
    )


def build(name: str, tiny: bool) -> Any:
    """The model, made where it runs."""
    from transformers import AutoModelForCausalLM

    from nha.models.auto import to_hybrid

    config, dtype = shape(tiny), torch.float32 if tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        if name == "hybrid":
            full = FULL_LAYERS if not tiny else (1,)
            window, slots = (WINDOW, SLOTS) if not tiny else (8, 6)
            windows = [-1 if i in full else window for i in range(config.num_hidden_layers)]
            to_hybrid(model, windows, num_slots=slots)
    return model.to(DEVICE).requires_grad_(False)


def ids(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(length)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator, device=DEVICE)


def peak_gib() -> float | None:
    return round(torch.cuda.max_memory_allocated() / GIB, 2) if CUDA else None


def prefill(model: Any, row: Row, segment: int) -> dict[str, Any]:
    """Read a prompt into an empty cache."""
    from transformers import DynamicCache

    prompt, size = ids(model, 1, row.length), segment if row.how == "segments" else row.length

    def read() -> None:
        cache = DynamicCache(config=model.config)
        for start in range(0, row.length, size):
            model(prompt[:, start : start + size], past_key_values=cache, use_cache=True, logits_to_keep=1)

    read()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    ms = median_ms(read, seconds=1, least=3, hidden=False)
    return {"B": 1, "ms": ms, "tokens_s": row.length / ms * 1e3, "peak_gib": peak_gib()}


def grown_cache(model: Any, batch: int, length: int) -> Any:
    """A cache that grows, as if `length` tokens of each text had been read: those of full layers are random."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    prompt = ids(model, batch, WINDOW + 8)
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = cache.layers
    for layer in layers:
        if hasattr(layer, "state"):
            layer.length = length
            layer.state.num_tokens.fill_(length)
        else:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                setattr(layer, name, None)
                setattr(
                    layer,
                    name,
                    torch.empty(*old.shape[:2], length, old.shape[3], dtype=old.dtype, device=old.device).normal_(),
                )
    return cache


def static_cache(model: Any, batch: int, length: int) -> Any:
    """A cache of fixed addresses after `length` tokens of each text: what is in it does not matter for its time."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length + 64)
    model(ids(model, batch, WINDOW + 8), past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = cache.layers
    for layer in layers:
        if hasattr(layer, "state"):
            layer.length.fill_(length)
            layer.state.num_tokens.fill_(length)
        else:
            layer.cumulative_length.fill_(length)
            layer.keys.normal_()
            layer.values.normal_()
    return cache


def step_of(model: Any, how: str, batch: int, length: int) -> Callable[[], object]:
    """One more token of every text; a static cache is set back before each, so that it never runs over."""
    token, position = ids(model, batch, 1), torch.full((batch, 1), length, device=DEVICE)
    if how == "eager":
        cache = grown_cache(model, batch, length)
        options = {"past_key_values": cache, "use_cache": True}
        return lambda: model(token, **options).logits
    cache = static_cache(model, batch, length)
    options = {"past_key_values": cache, "use_cache": True, "position_ids": position}
    run = model
    if how in ("compiled", "both"):
        chosen: dict[str, Any] = {"mode": "reduce-overhead" if how == "compiled" else "default"}
        run = torch.compile(model, fullgraph=True, **chosen if CUDA else {"backend": "aot_eager"})
    counts = [x.length if hasattr(x, "state") else x.cumulative_length for x in cache.layers]

    def step() -> object:
        for count in counts:
            count.fill_(length)
        return run(token, **options).logits

    if how in ("graph", "both"):
        return captured(step)
    for _ in range(3):
        step()
    return step


def bytes_of_text(model: Any, length: int) -> int:
    """Bytes that one text of so many tokens takes in a cache."""
    config = model.config
    windows = getattr(config, "window_sizes", [-1] * config.num_hidden_layers)
    size = model.dtype.itemsize
    wide = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    of_window = 2 * wide * (length + 64) * size
    of_slots = 2 * wide * (SLOTS * 4 + 2 * WINDOW * size)
    return sum(of_window if window < 0 else of_slots for window in windows)


def decode(model: Any, row: Row) -> dict[str, Any]:
    """One token of one text, or of as many as fit."""
    batch = 1
    if row.task == "throughput":
        free = (
            torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() if CUDA else 0
        )
        batch = max(int((free - SPARE * GIB) / bytes_of_text(model, row.length)), 1) if CUDA else 2
    step: Callable[[], object] | None = None
    while True:
        try:
            step = step_of(model, row.how, batch, row.length)
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            ms = median_ms(step, seconds=1, most=30, hidden=False)
            return {"B": batch, "ms": ms, "tokens_s": batch / ms * 1e3, "peak_gib": peak_gib()}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch, step = max(int(batch * 0.8), 1), None  # what did not fit goes before the next try
        clear()


def clear() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


@torch.no_grad()
def measure(model: Any, row: Row, tiny: bool) -> dict[str, Any]:
    """A row's columns, rounded."""
    found = prefill(model, row, SEGMENT if not tiny else 12) if row.task == "prefill" else decode(model, row)
    found |= {"ms": round(found["ms"], 3), "tokens_s": round(found["tokens_s"], 1)}
    return {"model": row.model, "task": row.task, "how": row.how, "T": row.length, **found}


def run(wanted: list[Row], out: Path, deadline: float, tiny: bool) -> int:
    """Measure rows until the time is up; the number of rows that failed."""
    about, failed, unrun = stamp("torch", "transformers", "triton"), 0, 0
    model, current = None, None
    with Table(out / "model.csv", COLUMNS) as table:
        for row in wanted:
            if time.time() > deadline:
                unrun += 1
                continue
            if row.model != current:
                model = None
                clear()
                start = time.perf_counter()
                model, current = build(row.model, tiny), row.model
                synchronize()
                print(f"{current} model made in {time.perf_counter() - start:.0f} s", flush=True)
            try:
                table.add(measure(model, row, tiny) | about)
                one = table.rows[-1]
                print(
                    f"{one['ms']:>10.2f} ms {one['tokens_s']:>10.0f} tokens/s {one['peak_gib'] or 0:>6.1f} GiB  "
                    f"{row} B{one['B']}",
                    flush=True,
                )
            except Exception as failure:
                failed += 1
                print(f"failed: {row}: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}", flush=True)
            torch._dynamo.reset()
            clear()
    print(verdicts(table.rows))
    print(f"{len(table.rows)} rows in {out / 'model.csv'}, {failed} failed, {unrun} not started for lack of time")
    return failed


def verdicts(found: list[dict[str, Any]]) -> str:
    """The hybrid beside full attention, where both were measured."""

    def of(model: str, task: str) -> list[dict[str, Any]]:
        return [r for r in found if r["model"] == model and r["task"] == task]

    lines = []
    for mine in of("hybrid", "prefill"):
        theirs = [r for r in of("full", "prefill") if r["T"] == mine["T"]]
        text = f"prompt of {mine['T']:,} tokens, {mine['how']}: {mine['ms'] / 1e3:.2f} s, peak {mine['peak_gib']} GiB"
        lines.append(text + "".join(f"; full {r['ms'] / 1e3:.2f} s, {r['peak_gib']} GiB" for r in theirs))
    for task, unit in (("decode", "ms"), ("throughput", "tokens_s")):
        for mine in of("hybrid", task):
            theirs = [f"full, {r['how']}: {r[unit]}" for r in of("full", task) if r["T"] == mine["T"]]
            lines.append(
                f"{task} after {mine['T']:,} tokens, {mine['how']}: {mine[unit]} {unit}, B {mine['B']}; "
                + ", ".join(theirs)
            )
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    return timing(given, __doc__, rows, run, "--tiny")


if __name__ == "__main__":
    sys.exit(main())
