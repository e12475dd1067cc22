"""Measure what caches in fewer bytes cost in quality: perplexity and verbatim clozes, token by token, on the same rows.

    python3 -m experiments.state_bytes --data DIR --output DIR [--model FILE.gguf] [--rows 1024] [--tokens 0]

Every row is a held-out text of `--tokens` tokens and then a near cloze, all of it read `--segment` tokens at a time (1)
by the layers of the shipped hybrid of SmolLM2-135M: a packed state is rounded after each of these segments. A cloze is
right where each token of its answer is the likeliest. Batches of `--batch` rows are read in every one of `--dtypes` and
noted in DIR, where they are not read again; a run over `--budget-s` ends with the batches that it has. state_bytes.json
gets the sums, and how the rows of a format differ from the same rows in the first one, with intervals of 95 %. A format
is a `state_dtype`, or kv-int8: keys and values of full attention in 8 bits, which N layers, evenly apart, have with
--full N (30: the original). --model tiny tries the script with random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from experiments.shapes import build, synchronize
from nha import set_windows
from nha.bench.shapes import full_layers
from nha.data.cloze import RANGES, make_clozes
from nha.evaluate.public.sets import HELD_OUT, find_set, read_documents
from nha.io import write_atomically
from nha.models.cache import NHACacheLayer, cache_nbytes, nha_layers
from nha.models.conversation import cache_keyword
from nha.models.delta import apply_delta
from nha.models.head import head_logits, token_losses
from nha.models.smollm2 import DELTA, forget_gguf, gguf_path
from nha.models.windows import set_kv_cache_dtype, set_state_dtype
from nha.report.results import to_json


def load(name: str | None, device: str, delta: Path = DELTA) -> tuple[Any, Any]:
    """The hybrid of a small file, by default the shipped one, bfloat16 on a GPU and else float32, and its tokenizer."""
    path = gguf_path() if name in (None, "tiny") else Path(name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if name == "tiny":
        return build("smollm2-135m", 4, device), tokenizer
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    forget_gguf(model)
    apply_delta(model, delta)
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval(), tokenizer


KV_INT8 = "kv-int8"  # a format of full attention's keys and values, beside those of states


def use_format(model: Any, name: str) -> None:
    """Let new caches of a model have this format."""
    set_state_dtype(model, "float32" if name == KV_INT8 else name)
    set_kv_cache_dtype(model, "int8" if name == KV_INT8 else "auto")


def with_full_layers(model: Any, count: int) -> None:
    """Let `count` layers, evenly apart, have full attention; others keep their windows."""
    windows = list(model.config.window_sizes)
    for layer in full_layers(len(windows), count):
        windows[layer] = -1
    set_windows(model, windows)


class Row(NamedTuple):
    """Token ids of a text and a cloze, and where the answer begins."""

    ids: list[int]
    answer: int


def make_rows(tokenizer: Any, documents: list[str], rows: int, tokens: int) -> list[Row]:
    """Rows for clozes in a random order."""
    text = tokenizer("\n\n".join(documents), verbose=False).input_ids if tokens else []
    found = []
    for row, cloze in enumerate(make_clozes(tokenizer, documents, rows, RANGES["cloze_near"])):
        start = row * tokens % max(len(text) - tokens, 1)
        prompt = tokenizer("\n\n" + cloze.prompt, verbose=False).input_ids
        answer = tokenizer(" " + cloze.answer, verbose=False).input_ids
        before = text[start : start + tokens] + prompt
        found.append(Row(before + answer, len(before)))
    return found


@contextmanager
def in_segments(size: int, end: float) -> Iterator[None]:
    """Within the context, NHA layers read `size` tokens at a time. Raises TimeoutError once time is over.

    A layer needs of a token only what the layers before made of it and of earlier ones, so that this is decoding of a
    known text, while projections see all tokens at once and weights are read once.
    """
    attend = NHACacheLayer.attend

    def read(self: NHACacheLayer, segment: Any, reading: Any) -> Tensor:
        outs = []
        for number, place in enumerate(range(0, segment.length, size)):
            outs.append(attend(self, segment.part(place, min(place + size, segment.length)), reading))
            if number % 64 == 0 and time.perf_counter() > end:
                raise TimeoutError
        return torch.cat(outs, 1)

    NHACacheLayer.attend = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        NHACacheLayer.attend = attend  # type: ignore[method-assign]


@torch.no_grad()
def measure(model: Any, rows: list[Row], end: float, segment: int = 1) -> dict[str, Any] | None:
    """Read rows some tokens at a time: what each cost, in nats; None where the time is over first."""
    device, longest = model.device.type, max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows], device=model.device)
    cache: Any = DynamicCache(config=model.config)
    start = time.perf_counter()
    try:
        with in_segments(segment, end):
            hidden = model.get_decoder()(ids, use_cache=True, **{cache_keyword(model): cache}).last_hidden_state
    except TimeoutError:
        return None
    synchronize(device)
    found: dict[str, Any] = {"seconds": time.perf_counter() - start, "text": [], "answer": [], "right": []}
    for row, states in zip(rows, hidden, strict=True):
        last = len(row.ids) - 1
        target = torch.tensor(row.ids[1:], device=model.device)
        losses = token_losses(model, states[:last], target).double()
        found["text"].append(losses.sum().item())
        found["answer"].append(losses[row.answer - 1 :].sum().item())
        guesses = head_logits(model, states[row.answer - 1 : last]).argmax(-1)
        found["right"].append(bool((guesses == target[row.answer - 1 :]).all()))
    hybrid = sum(layer.nbytes for layer in nha_layers(cache))
    found["tokens"] = [len(row.ids) - 1 for row in rows]
    found["bytes per sequence, hybrid layers"] = hybrid // len(rows)
    found["bytes per sequence, full layers"] = (cache_nbytes(cache) - hybrid) // len(rows)
    return found


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of several batches, and the bytes of the last one."""
    found = dict(batches[-1])
    for name in ("text", "answer", "right", "tokens"):
        found[name] = [x for batch in batches for x in batch[name]]
    return found | {"seconds": sum(batch["seconds"] for batch in batches)}


def interval(x: Tensor) -> list[float]:
    """The mean of paired differences, and the 95 % interval around it.

    >>> interval(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    [0.5, -0.0658, 1.0658]
    """
    half = 1.96 * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return [round(value, 5) for value in (x.mean().item(), x.mean().item() - half, x.mean().item() + half)]


def summary(found: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Sums over all rows of a format, and how they differ from the same rows in the first format."""
    text, answer, right, tokens = (
        torch.tensor(found[name], dtype=torch.float64) for name in ("text", "answer", "right", "tokens")
    )
    old_text, old_answer, old_right = (
        torch.tensor(first[name], dtype=torch.float64) for name in ("text", "answer", "right")
    )
    changed = (text - old_text) * len(tokens) / tokens.sum()
    return {
        "rows": len(tokens),
        "tokens": int(tokens.sum()),
        "perplexity": round(math.exp(text.sum() / tokens.sum()), 5),
        "perplexity, change in %": [round(100 * math.expm1(x), 4) for x in interval(changed)],
        "clozes right": int(right.sum()),
        "clozes right here alone, there alone": [int((right > old_right).sum()), int((right < old_right).sum())],
        "clozes, change of the fraction right": interval(right - old_right),
        "nats per answer": round(answer.mean().item(), 5),
        "nats per answer, change": interval(answer - old_answer),
        "bytes per sequence, hybrid layers": found["bytes per sequence, hybrid layers"],
        "bytes per sequence, full layers": found["bytes per sequence, full layers"],
        "seconds": round(found["seconds"], 1),
    }


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=4096 if device == "cuda" else 8)
    parser.add_argument("--batch", type=int, default=1024 if device == "cuda" else 8)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--segment", type=int, default=1)
    parser.add_argument("--dtypes", default="float32,int8")
    parser.add_argument("--full", type=int, default=0)
    parser.add_argument("--budget-s", type=float, default=math.inf)
    options = parser.parse_args()
    end = time.perf_counter() + options.budget_s
    model, tokenizer = load(options.model, device)
    if options.full:
        with_full_layers(model, options.full)
    documents = read_documents(find_set(options.data, HELD_OUT))
    rows = make_rows(tokenizer, documents, options.rows, options.tokens)
    options.output.mkdir(parents=True, exist_ok=True)
    names = options.dtypes.split(",")
    batches: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for start in range(0, len(rows), options.batch):
        read = []
        for name in names:
            stop = min(start + options.batch, len(rows))
            about = f"tokens-{options.tokens}-segment-{options.segment}" + f"-full-{options.full}" * bool(options.full)
            path = options.output / f"{name}-{start}-{stop}-{about}.json"
            if not path.exists():
                use_format(model, name)
                measured = measure(model, rows[start:stop], end, options.segment)
                if measured is None:
                    break
                write_atomically(path, to_json(measured))
            read.append(json.loads(path.read_text()))
        if len(read) < len(names):
            break
        for name, batch in zip(names, read, strict=True):
            batches[name].append(batch)
        whole = {name: joined(found) for name, found in batches.items()}
        found: dict[str, Any] = {name: summary(one, whole[names[0]]) for name, one in whole.items()}
        found["device"] = (
            torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        write_atomically(options.output / "state_bytes.json", to_json(found))
        print(to_json(found), flush=True)


if __name__ == "__main__":
    main()
