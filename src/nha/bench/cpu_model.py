"""Time a model of SmolLM2-135M's shape on the CPU, as a hybrid and with full attention, in turn.

Random weights in float32. The hybrid keeps full attention in 4 of 30 layers; the other layers have a window of 64 and
64 slots. Columns: `task` prefill is the time of a prompt of T tokens, decode that of one more token after them.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from nha.bench.timing import Table

COLUMNS = ("model", "task", "T", "ms", "threads", "machine", "torch", "transformers", "date")
FULL_LAYERS = (8, 18, 20, 23)
LENGTHS = (256, 512, 1024, 2048, 4096)
TOKENS = 8  # decoded in each round


@dataclass(frozen=True)
class Size:
    """The shape of the model, and where the hybrid keeps full attention."""

    config: dict[str, int]
    full_layers: tuple[int, ...]
    window: int
    slots: int


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
)


def build(size: Size, hybrid: bool) -> Any:
    """The model with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from nha.models.adapter import to_hybrid

    torch.manual_seed(0)
    options: dict[str, Any] = {**size.config, "tie_word_embeddings": True}
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**options), dtype=torch.float32).eval()
    if hybrid:
        layers = range(model.config.num_hidden_layers)
        to_hybrid(model, [-1 if i in size.full_layers else size.window for i in layers], num_slots=size.slots)
    return model.requires_grad_(False)


@torch.no_grad()
def once(model: Any, length: int) -> tuple[float, list[float]]:
    """Milliseconds of a prompt of `length` tokens, and of each of TOKENS tokens after it."""
    from transformers import DynamicCache

    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    cache = DynamicCache(config=model.config)
    start = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    prompt = 1e3 * (time.perf_counter() - start)
    times = []
    for _ in range(TOKENS):
        start = time.perf_counter()
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        times.append(1e3 * (time.perf_counter() - start))
    return prompt, times


def run(path: Path, rounds: int = 3, tiny: bool = False, log: Callable[[str], None] = print) -> None:
    """Time both models in turn, `rounds` times at each length, into the table at `path`."""
    import transformers

    size, lengths = (SMOLLM2, LENGTHS) if not tiny else (TINY, (20, 30))
    about: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }
    models = {"hybrid": build(size, True), "full": build(size, False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with Table(path, COLUMNS) as table:
        for length in lengths:
            found: dict[tuple[str, str], list[float]] = {}
            for turn in range(rounds + 1):
                for name in sorted(models, reverse=turn % 2 == 0):
                    prompt, tokens = once(models[name], length)
                    if turn:  # the first round is the warm-up
                        found.setdefault((name, "prefill"), []).append(prompt)
                        found.setdefault((name, "decode"), []).extend(tokens)
            ms = {key: round(statistics.median(times), 2) for key, times in found.items()}
            for (name, task), value in sorted(ms.items()):
                table.add({"model": name, "task": task, "T": length, "ms": value} | about)
            log(
                f"T {length}: prompt {ms['hybrid', 'prefill']:.0f} ms, full {ms['full', 'prefill']:.0f}; "
                f"token {ms['hybrid', 'decode']:.1f} ms, full {ms['full', 'decode']:.1f}"
            )
    log(f"{len(table.rows)} rows in {path}")
