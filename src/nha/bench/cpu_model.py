"""Time a model of SmolLM2-135M's shape on the CPU, as hybrids and with full attention, in turn.

Random weights. One hybrid keeps full attention in 4 of 30 layers, the other layers have a window of 64; one has windows
per KV head as the distilled hybrid that ships, none full. Both have 64 slots. Where hybrids multiply in float32 with
oneDNN (`nha.models.linear`), the original is timed with its products in oneDNN too. Columns: `task` prefill is the time
of a prompt of T tokens, decode that of one more token after them; `cpu_ms` is the processor's time, all threads
together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from nha.bench.cpu import about_machine, timed
from nha.bench.resumable import Outcome, complete
from nha.convert.head_ranks import searched_heads
from nha.distill.recipes import recipe_settings
from nha.models.embedded import EMBEDDED_ID
from nha.models.linear import prefers_onednn
from nha.models.smollm2 import KV_HEADS, LAYERS
from nha.ops.heads import Window

COLUMNS = ("model", "task", "T", "dtype", "ms", "cpu_ms", "threads", "machine", "torch", "transformers", "date")
DTYPES = ("float32", "bfloat16")
FULL_LAYERS = (8, 18, 20, 23)
LENGTHS = (256, 512, 1024, 2048, 4096)
HYBRIDS = ("hybrid", "hybrid, heads")
ONEDNN = "full, oneDNN"  # full attention, and linear layers as hybrids multiply them
TOKENS = 8  # decoded in each round


@dataclass(frozen=True)
class Size:
    """The shape of the model and of its hybrids, `head_windows` that of the one with windows per KV head."""

    config: dict[str, int]
    full_layers: tuple[int, ...]
    window: int
    slots: int
    head_windows: tuple[Window, ...]


def shipped_windows() -> tuple[Window, ...]:
    """The windows of SmolLM2-135M's heads in the recipe `constant`, which the hybrid that ships has.

    >>> shipped_windows()[7]
    (64, 64, 1088)
    """
    ranks = searched_heads(EMBEDDED_ID, [KV_HEADS] * LAYERS)
    windows = recipe_settings("constant", LAYERS, EMBEDDED_ID, ranks=ranks).window_size
    assert isinstance(windows, tuple)
    return windows


SMOLLM2 = Size(
    {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    },
    FULL_LAYERS,
    64,
    64,
    shipped_windows(),
)
TINY = Size(
    {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    (1,),
    8,
    6,
    ((4, 8), 4),
)


def build(size: Size, name: str, dtype: str = "float32") -> Any:
    """A model with random weights: "full", `ONEDNN` or one of `HYBRIDS`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from nha.models.adapter import to_hybrid
    from nha.models.linear import replace_linears

    torch.manual_seed(0)
    options: dict[str, Any] = {**size.config, "tie_word_embeddings": True}
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**options), dtype=torch.float32).eval()
    if name == "hybrid":
        layers = range(model.config.num_hidden_layers)
        to_hybrid(model, [-1 if i in size.full_layers else size.window for i in layers], num_slots=size.slots)
    elif name in HYBRIDS:
        to_hybrid(model, size.head_windows, num_slots=size.slots)
    elif name == ONEDNN:
        replace_linears(model)
    return model.requires_grad_(False).to(getattr(torch, dtype))


def names(dtype: str) -> list[str]:
    """The models to time in a number format."""
    return ["full", *([ONEDNN] if dtype == "float32" and prefers_onednn() else []), *HYBRIDS]


Times = tuple[float, float]  # milliseconds, and those of the processor


@torch.no_grad()
def once(model: Any, length: int) -> tuple[Times, list[Times]]:
    """The times of a prompt of `length` tokens, and of each of TOKENS tokens after it."""
    from transformers import DynamicCache

    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    cache = DynamicCache(config=model.config)
    prompt = timed(lambda: model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1))
    return prompt, [timed(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True)) for _ in range(TOKENS)]


def measure(
    models: dict[str, Any], dtype: str, length: int, rounds: int, about: dict[str, Any], log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time models in turn, `rounds` times after a warm-up."""
    found: dict[tuple[str, str], list[Times]] = {}
    for turn in range(rounds + 1):
        for name in sorted(models, reverse=turn % 2 == 0):
            prompt, tokens = once(models[name], length)
            if turn:
                found.setdefault((name, "prefill"), []).append(prompt)
                found.setdefault((name, "decode"), []).extend(tokens)
    rows = []
    for (name, task), times in sorted(found.items()):
        ms, cpu_ms = (round(statistics.median(values), 2) for values in zip(*times, strict=True))
        rows.append({"model": name, "task": task, "T": length, "dtype": dtype, "ms": ms, "cpu_ms": cpu_ms} | about)
    cpu = {(row["model"], row["task"]): row["cpu_ms"] for row in rows}
    for name in models:
        ratios = (f"{task} {cpu[name, task] / cpu['full', task]:.3f}" for task in ("prefill", "decode"))
        log(f"{dtype} T {length}: {name}, processor's time relative to full: {', '.join(ratios)}")
    return rows


def cases(tiny: bool = False) -> dict[str, tuple[str, int]]:
    """Number format and length of every case, by its name.

    >>> list(cases(tiny=True))
    ['float32 T20', 'float32 T30', 'bfloat16 T20', 'bfloat16 T30']
    """
    lengths = LENGTHS if not tiny else (20, 30)
    return {f"{dtype} T{length}": (dtype, length) for dtype in DTYPES for length in lengths}


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of times relative to the original's (`full`), and in float32 to those of its products in oneDNN.

    >>> row = {"task": "prefill", "T": 256, "dtype": "float32"}
    >>> print("\\n".join(summary([row | {"model": "full", "ms": 20.0}, row | {"model": "hybrid", "ms": 15.0}])))
    | tokens read | 256 |
    |---|---|
    | a prompt, float32, hybrid | **0.75** |
    """
    ms = {(row["model"], row["task"], row["dtype"], row["T"]): float(row["ms"]) for row in rows}
    lengths = sorted({row["T"] for row in rows})
    table = [f"| tokens read | {' | '.join(f'{length:,}' for length in lengths)} |", "|---" * (len(lengths) + 1) + "|"]
    for label, task in (("a token", "decode"), ("a prompt", "prefill")):
        for base, dtype, name in product(("full", ONEDNN), DTYPES, (*HYBRIDS, ONEDNN)):
            pairs = [(ms.get((name, task, dtype, n)), ms.get((base, task, dtype, n))) for n in lengths]
            if name == base or any(own is None or other is None for own, other in pairs):
                continue
            ratios = [f"{own / other:.2f}" for own, other in pairs if own is not None and other]
            cells = " | ".join(f"**{x}**" if float(x) < 1 else x for x in ratios)
            table.append(f"| {label}, {dtype}, {name}{'' if base == 'full' else f' (beside {base})'} | {cells} |")
    return table


def run(
    path: Path,
    rounds: int = 3,
    tiny: bool = False,
    budget_s: float = math.inf,
    log: Callable[[str], None] = print,
    only: str | None = None,
) -> Outcome:
    """Time all models at each length into the table at `path` (`nha.bench.resumable`)."""
    import transformers

    size = TINY if tiny else SMOLLM2
    about = about_machine() | {"transformers": transformers.__version__}
    dated = about | {"date": date.today().isoformat()}

    @cache
    def models(dtype: str) -> dict[str, Any]:
        return {name: build(size, name, dtype) for name in names(dtype)}

    def case(dtype: str, length: int) -> list[dict[str, Any]]:
        return measure(models(dtype), dtype, length, rounds, dated, log)

    measures = {name: partial(case, *about_case) for name, about_case in cases(tiny).items()}
    return complete(path, COLUMNS, measures, about, budget_s, log, only)
