"""Tokens that `generate()` writes with and without fused layers and a recorded step, and how long they take.

`python3 experiments/generate_tokens.py OUT [GGUF]` writes OUT/generate.json: for the given SmolLM2-135M the number of
tokens that agree with the family's code from the first on, and how far logits of a prompt are apart; for 8B's
shape with random weights milliseconds of a token by `generate()` (64 and 256 tokens), seconds until the first tokens of
the process, milliseconds until the first token of calls one after another (the very first loads kernels and records
the lengths of prompts, later ones are replayed), and time and peak memory of a prompt of 131,072 tokens in pieces of
some sizes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from nha.bench.model_measure import clear, peak_gib, random_ids, reset_peak
from nha.bench.shapes import Variants, load_original
from nha.bench.timing import DEVICE, stamp, synchronize
from nha.io import write_atomically
from nha.models import prompt
from nha.models.delta import apply_delta
from nha.models.fused_step import fusing
from nha.models.smollm2 import DELTA, forget_gguf

OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PARTS = ["real", "tokens", "long", "prompts"]
NEW = 60  # tokens that are compared
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
    parser.add_argument("out", type=Path, help="directory of the results")
    parser.add_argument("model", nargs="?", help="a GGUF file of SmolLM2-135M")
    parser.add_argument("--parts", type=parts_of, default=PARTS, help="what to measure, separated by commas")
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
    model = variants.get("hybrid-1" if chosen.tiny else "hybrid-4")
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
