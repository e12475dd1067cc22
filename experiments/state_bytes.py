"""Measure what caches in fewer bytes cost in quality: perplexity and verbatim clozes, token by token.

    python3 -m experiments.state_bytes --data DIR --out DIR [--model FILE.gguf] [--rows 256] [--tokens 2048]

Every row is a held-out text of `--tokens` tokens and then a near cloze, all of it read one token at a time by the
layers of the shipped hybrid of SmolLM2-135M, so that a packed state is rounded after every token. A cloze is right
where each token of its answer is the likeliest. DIR gets one file for each of `--dtypes`, which is not measured again,
and state_bytes.json. A run over `--budget-s` ends without the rest. --model tiny tries the script with random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from experiments.shapes import build, synchronize
from nha.data.cloze import RANGES, make_clozes
from nha.evaluate.public.sets import HELD_OUT, find_set, read_documents
from nha.io import write_atomically
from nha.models.cache import NHACacheLayer, cache_nbytes, nha_layers
from nha.models.conversation import cache_keyword
from nha.models.delta import apply_delta
from nha.models.head import head_logits, token_losses
from nha.models.smollm2 import DELTA, forget_gguf, gguf_path
from nha.report.results import to_json


def load(name: str | None, device: str) -> tuple[Any, Any]:
    """The shipped hybrid, bfloat16 on a GPU and else float32, and its tokenizer."""
    path = gguf_path() if name in (None, "tiny") else Path(name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if name == "tiny":
        return build("smollm2-135m", 4, device), tokenizer
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    forget_gguf(model)
    apply_delta(model, DELTA)
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval(), tokenizer


def make_rows(tokenizer: Any, documents: list[str], rows: int, tokens: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Token ids [rows, T] and where the answer of each row begins and ends."""
    text = tokenizer("\n\n".join(documents), verbose=False).input_ids
    clozes = make_clozes(tokenizer, documents, rows, RANGES["cloze_near"])
    found, places = [], []
    for row, cloze in enumerate(clozes):
        start = row * tokens % max(len(text) - tokens, 1)
        prompt = tokenizer("\n\n" + cloze.prompt, verbose=False).input_ids
        answer = tokenizer(" " + cloze.answer, verbose=False).input_ids
        found.append(text[start : start + tokens] + prompt + answer)
        places.append((len(found[-1]) - len(answer), len(found[-1])))
    longest = max(map(len, found))
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in found]), places


@contextmanager
def one_by_one(end: float) -> Iterator[None]:
    """Within the context, NHA layers read every segment one token at a time. Raises TimeoutError once time is over.

    A layer needs of a token only what the layers before made of it and of earlier ones, so that this is decoding of a
    known text, while projections see all tokens at once and weights are read once.
    """
    attend = NHACacheLayer.attend

    def read(self: NHACacheLayer, segment: Any, reading: Any) -> Tensor:
        outs = []
        for place in range(segment.length):
            outs.append(attend(self, segment.part(place, place + 1), reading))
            if place % 64 == 0 and time.perf_counter() > end:
                raise TimeoutError
        return torch.cat(outs, 1)

    NHACacheLayer.attend = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        NHACacheLayer.attend = attend  # type: ignore[method-assign]


@torch.no_grad()
def measure(model: Any, ids: Tensor, places: list[tuple[int, int]], tokens: int, end: float) -> dict[str, Any] | None:
    """Read rows one token at a time; None where the time is over first."""
    device = model.device.type
    cache: Any = DynamicCache(config=model.config)
    start = time.perf_counter()
    try:
        with one_by_one(end):
            hidden = model.get_decoder()(ids, use_cache=True, **{cache_keyword(model): cache}).last_hidden_state
    except TimeoutError:
        return None
    synchronize(device)
    seconds = time.perf_counter() - start
    losses, answers, clozes = [], [], []
    for row, (first, last) in enumerate(places):
        losses.append(token_losses(model, hidden[row, : tokens - 1], ids[row, 1:tokens]).double().cpu())
        logits = head_logits(model, hidden[row, first - 1 : last - 1]).float()
        target = ids[row, first:last]
        answers.append(torch.nn.functional.cross_entropy(logits, target, reduction="sum").item())
        clozes.append(bool((logits.argmax(-1) == target).all()))
    loss = torch.stack(losses)
    nbytes = sum(layer.nbytes for layer in nha_layers(cache))
    return {
        "perplexity": round(math.exp(loss.mean()), 5),
        "perplexity of the second half": round(math.exp(loss[:, tokens // 2 :].mean()), 5),
        "clozes": f"{sum(clozes)} of {len(clozes)}",
        "nats per cloze answer": round(sum(answers) / len(answers), 5),
        "bytes per sequence, hybrid layers": nbytes // len(ids),
        "bytes per sequence, full layers": (cache_nbytes(cache) - nbytes) // len(ids),
        "seconds": round(seconds, 1),
        "rows": len(ids),
        "tokens": tokens,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    }


@torch.no_grad()
def decoding_ms(model: Any, ids: Tensor) -> float:
    """Milliseconds of a decoded token of all rows, as `generate` writes it."""
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    times = []
    for new in (16, 80):
        synchronize(model.device.type)
        start = time.perf_counter()
        model.generate(ids[:, :128], max_new_tokens=new, min_new_tokens=new, **options)
        synchronize(model.device.type)
        times.append(time.perf_counter() - start)
    return round(1e3 * (times[1] - times[0]) / 64, 3)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=256 if device == "cuda" else 8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtypes", default="float32,int8,bfloat16")
    parser.add_argument("--budget-s", type=float, default=math.inf)
    options = parser.parse_args()
    end = time.perf_counter() + options.budget_s
    model, tokenizer = load(options.model, device)
    documents = read_documents(find_set(options.data, HELD_OUT))
    ids, places = make_rows(tokenizer, documents, options.rows, options.tokens)
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name in options.dtypes.split(","):
        path = options.out / f"{name}.json"
        if not path.exists():
            model.config.state_dtype = name
            measured = measure(model, ids.to(device), places, options.tokens, end)
            if measured is None:
                break
            if device == "cuda":
                decoding_ms(model, ids.to(device))  # compiles kernels
                measured["ms per decoded token"] = decoding_ms(model, ids.to(device))
            write_atomically(path, to_json(measured))
        found[name] = json.loads(path.read_text())
        print(name, to_json(found[name]), flush=True)
    write_atomically(options.out / "state_bytes.json", to_json(found))


if __name__ == "__main__":
    main()
