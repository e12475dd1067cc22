"""Tokens that `generate()` writes with and without fused layers and a recorded step, and how long they take.

`python3 experiments/generate_tokens.py OUT [GGUF]` writes OUT/generate.json: for the given SmolLM2-135M the number of
tokens that agree with the family's code from the first on, and how far logits of a prompt are apart; for 8B's
shape with random weights milliseconds of a token by `generate()` (64 and 256 tokens), seconds until the first tokens of
the process, milliseconds until the first token of calls one after another (the very first loads kernels and records
the lengths of prompts, later ones are replayed), time and peak memory of a prompt of 131,072 tokens in pieces of some
sizes, milliseconds of a token in turns of a conversation ("turns": by plain `generate()`, with its cache returned, and
with a cache that is handed in, the original beside it), and milliseconds until the first token after prompts of given
lengths, all of them recorded before ("lengths": calls of the original and the hybrid in turn).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from nha.bench.model_measure import clear, peak_gib, random_ids, reset_peak
from nha.bench.shapes import Variants, load_original
from nha.bench.timing import DEVICE, stamp, synchronize
from nha.io import write_atomically
from nha.models import prompt
from nha.models.conversation import cache_keyword
from nha.models.delta import apply_delta
from nha.models.fused_step import fusing
from nha.models.prompt_graph import warm_up
from nha.models.smollm2 import DELTA, forget_gguf

OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PARTS = ["real", "tokens", "long", "prompts", "lengths", "turns"]
NEW = 60  # tokens that are compared
LENGTHS = (1300, 700, 1100, 1500, 1900, 256, 512, 1024, 2048)
TURNS = (2048, 40, 300)  # tokens of text before each answer of a conversation
RECORDED = 4  # tokens of an answer until its step is recorded
TEXT = "The lighthouse keeper wrote down every ship that passed. On the first day he saw three of them, and "


def real_model(path: str, tiny: bool) -> dict[str, Any]:
    """How far tokens and logits of a small real model agree, and milliseconds of (original, hybrid) until a token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(path)
    hybrid: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = tokenizer(TEXT * (4 if tiny else 12), return_tensors="pt").input_ids.to(DEVICE)
    forget_gguf(hybrid)
    hybrid = hybrid.to(DEVICE, torch.bfloat16).eval()
    found: dict[str, Any] = {"prompt": ids.shape[1]}
    times = {n: min(first_tokens(hybrid, n)[3:]) for n in ((100,) if tiny else (256, 1024, 4096))}
    apply_delta(hybrid, DELTA)
    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype)] = agreement(hybrid.to(DEVICE, dtype).eval().requires_grad_(False), ids)
    found["first_token_ms"] = {n: (x, min(first_tokens(hybrid, n)[3:])) for n, x in times.items()}
    return found


def agreement(hybrid: Any, ids: torch.Tensor) -> dict[str, Any]:
    """How far logits of a prompt are apart, and how many tokens are those of the family's code, call by call."""
    length = ids.shape[1]
    with torch.no_grad():
        fast = hybrid(ids).logits.float()
        with fusing(False):
            slow = hybrid(ids).logits.float()
            plain = hybrid.generate(ids, max_new_tokens=NEW, disable_compile=True, **OPTIONS)[0, length:]
        calls = [hybrid.generate(ids, max_new_tokens=NEW, **OPTIONS)[0, length:] for _ in range(3)]
    return {
        "logits_error": float((fast - slow).abs().mean() / slow.abs().mean()),
        "top_1_agreement": float((fast.argmax(-1) == slow.argmax(-1)).float().mean()),
        "equal_tokens": [int((plain == again).long().cumprod(0).sum()) for again in calls],
    }


def seconds(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **OPTIONS)
    synchronize()
    return time.perf_counter() - start


def first_tokens(model: Any, length: int, **options: Any) -> list[float]:
    """Milliseconds until `generate` gives one token after a prompt, for one call after another."""
    prompt = random_ids(model, 1, length)

    def ms() -> float:
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=1, **OPTIONS, **options)
        synchronize()
        return round(1e3 * (time.perf_counter() - start), 2)

    return [ms() for _ in range(6)]


def prompts_of_length(variants: Variants, name: str, length: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds until the first token after a prompt: medians of two halves of the calls, the models in turn."""
    found: dict[str, list[float]] = {name: [], "original": []}
    models = {each: variants.get(each) for each in found}
    prompt = random_ids(models[name], 1, length)
    for model in models.values():
        seconds(model, prompt, 1)
    for _ in range(repeats):
        for each, times in found.items():
            times.append(1e3 * seconds(models[each], prompt, 1))
    return {
        each: [round(statistics.median(half), 2) for half in (times[: repeats // 2], times[repeats // 2 :])]
        for each, times in found.items()
    }


class TokenTimes:
    """A streamer that notes when each token comes: a token is copied to the CPU, so that the GPU has finished it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""

    def medians(self) -> dict[str, float]:
        """Milliseconds of a token: the median once steps are recorded, and the mean from the first token on."""
        times = self.times[1:]  # the first is the prompt's
        between = [1e3 * (after - before) for before, after in itertools.pairwise(times)]
        return {
            "median_ms": round(statistics.median(between[RECORDED:]), 3),
            "mean_ms": round(statistics.mean(between), 3),
        }


def turns_of(model: Any, way: str, lengths: tuple[int, ...], new: int, **options: Any) -> tuple[torch.Tensor, list]:
    """The tokens of a conversation, and the times of each turn's tokens.

    `way` is "plain" (every call reads all again), "returned" (so does it, and returns its cache) or "handed in".
    """
    from transformers import DynamicCache

    cache = {cache_keyword(model): DynamicCache(config=model.config)} if way == "handed in" else {}
    returned = {} if way == "plain" else {"return_dict_in_generate": True}
    ids, rows = random_ids(model, 1, 0), []
    for seed, length in enumerate(lengths):
        torch.manual_seed(seed)
        text = torch.randint(model.config.vocab_size, (1, length), device=ids.device)
        ids, streamer = torch.cat([ids, text], 1), TokenTimes()
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "streamer": streamer}
        limits = {"max_new_tokens": new, "min_new_tokens": new}
        out = model.generate(ids, **given, **limits, **OPTIONS, **cache, **returned, **options)
        ids = out if way == "plain" else out.sequences
        rows.append(streamer.medians())
    return ids, rows


def conversations(variants: Variants, name: str, tiny: bool) -> Any:
    """Rows of the hybrid's and the original's turns in every way, and how many tokens of the hybrid are equal."""
    lengths, new = ((12, 9, 10), 12) if tiny else (TURNS, 64)
    first, rows = None, []
    for each, way, options in (
        (name, "plain", {}),
        (name, "handed in", {}),
        (name, "returned", {}),
        (name, "handed in", {"disable_compile": True}),
        ("original", "plain", {}),
        ("original", "handed in", {}),
    ):
        ids, times = turns_of(variants.get(each), way, lengths, new, **options)
        row: dict[str, Any] = {"variant": each, "way": way, "graphs": not options, "turns": times}
        if each == name:
            first = ids if first is None else first
            row["equal_tokens"] = int((ids == first).long().cumprod(1).sum())
        rows.append(row | {"tokens": ids.shape[1]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def long_prompt(model: Any, length: int, size: int) -> dict[str, float | None]:
    """Milliseconds and peak GiB of a long prompt in `generate`, in pieces of `size` times the default bytes."""
    saved, prompt.PIECE_BYTES = prompt.PIECE_BYTES, prompt.PIECE_BYTES * size
    try:
        ids = random_ids(model, 1, length)
        clear()
        reset_peak()
        times = [seconds(model, ids, 1) for _ in range(2)]
        return {"ms": round(1e3 * min(times), 1), "peak_gib": peak_gib()}
    finally:
        prompt.PIECE_BYTES = saved


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory of the results")
    parser.add_argument("model", nargs="?", help="a GGUF file of SmolLM2-135M")
    parser.add_argument("--parts", type=parts_of, default=PARTS, help="what to measure, separated by commas")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of the prompts of that part")
    parser.add_argument("--budget-s", type=float, default=60, help="start no measurement after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which need no GPU")
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.budget_s
    chosen.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"about": stamp("torch", "transformers", "triton", "nha")}

    def add(name: str, value: Any) -> None:
        found[name] = value
        print(json.dumps({name: value}), flush=True)
        write_atomically(chosen.output / "generate.json", json.dumps(found, indent=1) + "\n")

    if "real" in chosen.parts and chosen.model:
        add("real_model", real_model(chosen.model, chosen.tiny))
    variants = Variants(load_original("llama-3-8b", chosen.tiny), *((8, 6) if chosen.tiny else ()))
    name = "hybrid-1" if chosen.tiny else "hybrid-4"
    model = variants.get(name)
    if "lengths" in chosen.parts:
        start = time.perf_counter()
        warm_up(model)
        add("warm_up_s", time.perf_counter() - start)
        for length in chosen.lengths:
            if time.monotonic() < deadline:
                add(f"lengths_{length}_ms", prompts_of_length(variants, name, length, 4 if chosen.tiny else 10))
    if "turns" in chosen.parts and time.monotonic() < deadline:
        add("turns", conversations(variants, name, chosen.tiny))
    if "tokens" in chosen.parts:
        ids = random_ids(model, 1, 30 if chosen.tiny else 2048)
        add("first_call_s", seconds(model, ids, 10))
        for tokens in (64,) if chosen.tiny else (64, 256):
            one = min(seconds(model, ids, 1) for _ in range(2))
            add(f"generate_{tokens}_ms", 1e3 * (min(seconds(model, ids, tokens + 1) for _ in range(2)) - one) / tokens)
    long, pieces = (131072, (1, 2, 1 << 20)) if not chosen.tiny else (60, (1,))
    for size in pieces:
        if "long" in chosen.parts and time.monotonic() < deadline:
            add(f"prompt_{long}_in_pieces_{size}", long_prompt(model, long, size))
    for length in (2048, 256, 1024, 1500, 512) if not chosen.tiny else (30,):
        if "prompts" in chosen.parts and time.monotonic() < deadline:
            add(f"first_token_{length}_ms", first_tokens(model, length))
            with fusing(False):
                add(f"first_token_{length}_unfused_ms", first_tokens(model, length, disable_compile=True))
            add(f"first_token_{length}_original_ms", first_tokens(variants.original, length))


def parts_of(text: str) -> list[str]:
    """The measurements that a comma-separated text names."""
    found = text.split(",")
    if not set(found) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}, got {text}")
    return found


if __name__ == "__main__":
    main()
