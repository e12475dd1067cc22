"""Time a whole model with full attention and as a hybrid: prompts (model.csv), and decoding (decode.csv).

Llama-3-8B's shape with random weights in bf16. The hybrid keeps full attention in 4 of 32 layers; the other layers have
a window of 64 and 64 slots. "full" is the model as transformers runs it. "full-kernels" has full attention in every
layer too, on this library's decoding kernels. `task` and `how`:

prefill     reading a prompt of T tokens into a cache: in one call, or in segments; ms and the peak of memory, weights
            included
decode      one more token of one sequence after T: eager (a cache that grows), graph (a static cache, replayed as a
            CUDA graph), compiled (torch.compile of the step), both (a CUDA graph of the compiled step)
throughput  one more token of as many sequences of T tokens as fit into the memory; B is their number
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nha.bench.timing import CUDA, DEVICE, Table, captured, median_ms, require_gpu, stamp, synchronize

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
    """One measurement of a model: "hybrid", "full" or "full-kernels"."""

    model: str
    task: str
    how: str
    length: int

    def __str__(self) -> str:
        return f"{self.model} {self.task} {self.how} T{self.length}"


def prompt_rows(tiny: bool) -> list[Row]:
    """Rows of prompts, the most important first, with few changes of the model."""
    lengths = [n * 1024 for n in (2, 8, 32, 128, 64)] if not tiny else [20, 30]
    found = [Row("hybrid", "prefill", "one call", n) for n in lengths]
    found += [Row("hybrid", "prefill", "segments", lengths[3] if not tiny else 30)]
    return found + [Row("full", "prefill", "one call", n) for n in lengths]


def decode_rows(tiny: bool) -> list[Row]:
    """Rows of decoding, the most important first, with few changes of the model."""
    near, middle, far = (2048, 32768, 131072) if not tiny else (10, 20, 30)
    found = [Row("hybrid", "decode", "graph", n) for n in (middle, far)]
    found += [Row("hybrid", "throughput", how, middle) for how in ("graph", "eager")]
    found += [Row("hybrid", "decode", how, n) for how, n in (("both", middle), ("eager", near))]
    found += [Row("full-kernels", "decode", "graph", n) for n in (middle, far)]
    found += [Row("full-kernels", "throughput", "graph", middle)]
    found += [Row("full", "throughput", how, middle) for how in ("eager", "graph")]
    found += [Row("full", "decode", how, n) for how, n in (("graph", middle), ("eager", near), ("both", middle))]
    found += [Row("full", "decode", "compiled", middle)]
    last = (("compiled", middle), ("both", far), ("compiled", far))
    return found + [Row("hybrid", "decode", how, n) for how, n in last]


def model_config(tiny: bool) -> Any:
    """Llama-3-8B's config with a context of 256K, or a tiny one."""
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
    """A model with random weights, made on the device."""
    from transformers import AutoModelForCausalLM

    from nha.models.adapter import to_hybrid

    config, dtype = model_config(tiny), torch.float32 if tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        if name != "full":
            layers = range(config.num_hidden_layers)
            full = layers if name == "full-kernels" else FULL_LAYERS if not tiny else (1,)
            window, slots = (WINDOW, SLOTS) if not tiny else (8, 6)
            to_hybrid(model, [-1 if i in full else window for i in layers], num_slots=slots)
    return model.to(DEVICE).requires_grad_(False)


def random_ids(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(length)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator, device=DEVICE)


def peak_gib() -> float | None:
    return round(torch.cuda.max_memory_allocated() / GIB, 2) if CUDA else None


def prefill(model: Any, row: Row, segment: int) -> dict[str, Any]:
    """Time and peak of reading a prompt into an empty cache."""
    from transformers import DynamicCache

    prompt, size = random_ids(model, 1, row.length), segment if row.how == "segments" else row.length

    def read() -> None:
        cache = DynamicCache(config=model.config)
        for start in range(0, row.length, size):
            model(prompt[:, start : start + size], past_key_values=cache, use_cache=True, logits_to_keep=1)

    read()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    ms = median_ms(read, seconds=1, min_calls=3, host_ahead=False)
    return {"B": 1, "ms": ms, "tokens_s": row.length / ms * 1e3, "peak_gib": peak_gib()}


def grown_cache(model: Any, batch: int, length: int) -> Any:
    """A growing cache after `length` tokens of each sequence; keys and values of full layers are random."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    prompt = random_ids(model, batch, WINDOW + 8)
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
    """A cache of fixed addresses after `length` random tokens of each sequence."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length + 64)
    model(random_ids(model, batch, WINDOW + 8), past_key_values=cache, use_cache=True, logits_to_keep=1)
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


def decoding_step(model: Any, how: str, batch: int, length: int) -> Callable[[], object]:
    """A function that decodes one token of every sequence; it resets a static cache first, so that none overflows."""
    token, position = random_ids(model, batch, 1), torch.full((batch, 1), length, device=DEVICE)
    if how == "eager":
        cache = grown_cache(model, batch, length)
        options = {"past_key_values": cache, "use_cache": True}
        return lambda: model(token, **options).logits
    cache = static_cache(model, batch, length)
    options = {"past_key_values": cache, "use_cache": True, "position_ids": position}
    run = model
    if how in ("compiled", "both"):
        mode = "reduce-overhead" if how == "compiled" else "default"
        compiling: dict[str, Any] = {"mode": mode} if CUDA else {"backend": "aot_eager"}
        run = torch.compile(model, fullgraph=True, **compiling)
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


def cache_bytes(model: Any, length: int) -> int:
    """Bytes of a cache for one sequence of `length` tokens."""
    config = model.config
    windows = getattr(config, "window_sizes", [-1] * config.num_hidden_layers)
    size = model.dtype.itemsize
    wide = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    of_window = 2 * wide * (length + 64) * size
    of_slots = 2 * wide * (SLOTS * 4 + 2 * WINDOW * size)
    return sum(of_window if window < 0 else of_slots for window in windows)


def decode(model: Any, row: Row) -> dict[str, Any]:
    """Time and peak of one token of one sequence, or of as many as fit."""
    batch = 1
    if row.task == "throughput":
        free = (
            torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() if CUDA else 0
        )
        batch = max(int((free - SPARE * GIB) / cache_bytes(model, row.length)), 1) if CUDA else 2
    step: Callable[[], object] | None = None
    while True:
        try:
            step = decoding_step(model, row.how, batch, row.length)
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            ms = median_ms(step, seconds=1, max_calls=30, host_ahead=False)
            return {"B": batch, "ms": ms, "tokens_s": batch / ms * 1e3, "peak_gib": peak_gib()}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch, step = max(int(batch * 0.8), 1), None  # free the cache that did not fit
        clear()


def clear() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


@torch.no_grad()
def measure(model: Any, row: Row, tiny: bool) -> dict[str, Any]:
    """The columns of a row."""
    found = prefill(model, row, SEGMENT if not tiny else 12) if row.task == "prefill" else decode(model, row)
    found |= {"ms": round(found["ms"], 3), "tokens_s": round(found["tokens_s"], 1)}
    return {"model": row.model, "task": row.task, "how": row.how, "T": row.length, **found}


def run(wanted: list[Row], path: Path, budget_s: float, tiny: bool, log: Callable[[str], None] = print) -> int:
    """Measure rows into the table at `path`, starting none after `budget_s`; the number of rows that failed.

    Raises ValueError without a GPU, unless `tiny`.
    """
    require_gpu(tiny)
    deadline = time.monotonic() + budget_s
    about, failed, unrun = stamp("torch", "transformers", "triton"), 0, 0
    model, current = None, None
    path.parent.mkdir(parents=True, exist_ok=True)
    with Table(path, COLUMNS) as table:
        for row in wanted:
            if time.monotonic() > deadline:
                unrun += 1
                continue
            if row.model != current:
                model = None
                clear()
                start = time.perf_counter()
                model, current = build(row.model, tiny), row.model
                synchronize()
                log(f"model {current} made in {time.perf_counter() - start:.0f} s")
            try:
                table.add(measure(model, row, tiny) | about)
                log(_line(row, table.rows[-1]))
            except Exception as error:
                failed += 1
                log(f"failed: {row}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            torch._dynamo.reset()
            clear()
    log(comparison(table.rows))
    log(f"{len(table.rows)} rows in {path}, {failed} failed, {unrun} not started for lack of time")
    return failed


def _line(row: Row, found: dict[str, Any]) -> str:
    columns = f"{found['ms']:>10.2f} ms {found['tokens_s']:>10.0f} tokens/s {found['peak_gib'] or 0:>6.1f} GiB"
    return f"{columns}  {row} B{found['B']}"


def comparison(found: list[dict[str, Any]]) -> str:
    """The hybrid beside full attention, where both were measured."""

    def of(hybrid: bool, task: str) -> list[dict[str, Any]]:
        return [r for r in found if (r["model"] == "hybrid") == hybrid and r["task"] == task]

    lines = []
    for ours in of(True, "prefill"):
        theirs = [r for r in of(False, "prefill") if r["T"] == ours["T"]]
        text = f"prompt of {ours['T']:,} tokens, {ours['how']}: {ours['ms'] / 1e3:.2f} s, peak {ours['peak_gib']} GiB"
        lines.append(text + "".join(f"; {r['model']} {r['ms'] / 1e3:.2f} s, {r['peak_gib']} GiB" for r in theirs))
    for task, unit in (("decode", "ms"), ("throughput", "tokens_s")):
        for ours in of(True, task):
            theirs = [f"{r['model']}, {r['how']}: {r[unit]}" for r in of(False, task) if r["T"] == ours["T"]]
            text = f"{task} after {ours['T']:,} tokens, {ours['how']}: {ours[unit]} {unit}, B {ours['B']}; "
            lines.append(text + ", ".join(theirs))
    return "\n".join(lines)
