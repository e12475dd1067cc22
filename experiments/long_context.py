"""Read far beyond the training length: needles, verbatim clozes, perplexity by position, memory and time, by length.

    python3 -m experiments.long_context --data DATA --output DIR --model FILE [--delta FILE] [--lengths 32768,131072]

The original in FILE (default: the embedded model) and its hybrid of the small file --delta (default: the shipped
one) read the same prompts, one after another. --data has heldout.jsonl. A cloze of length n has its source between
0.4 n and 0.8 n tokens back, a near cloze at most 256 tokens back after other prose; a needle is right if nothing but
its number is written, "contained" is RULER's rule. --models adds the original with full attention on this library's
kernels ("kernels", time and memory alone) and with positions that YaRN stretches to the longest prompt ("yarn").
Seconds are the shortest of --rounds prompts of random tokens. Every part is written to DIR/long_context.json as soon as
it is known, and a part that is there is not measured again; none begins after --budget-s. --report DIR writes the table
and the picture of what is there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.shapes import synchronize
from nha.bench.shapes import Variants
from nha.data.cloze import Cloze, make_clozes
from nha.evaluate.bootstrap import wilson
from nha.evaluate.measure import plain_ids, tokenized
from nha.evaluate.public.run import NEEDLE, PERPLEXITY, PublicData, PublicSettings, counted, measure_public
from nha.evaluate.public.sets import HELD_OUT, find_set, read_documents
from nha.evaluate.public.written import begins_with, write
from nha.io import write_atomically
from nha.models.cache import cache_nbytes
from nha.models.delta import apply_delta
from nha.models.smollm2 import DELTA, forget_gguf, gguf_path
from nha.report.results import to_json

RESULT = "long_context.json"
MODELS = ("hybrid", "original", "kernels", "yarn")
COST, CLOZE = "cost", "cloze"
PARTS = (COST, NEEDLE, PERPLEXITY, CLOZE)
NEAR = (72, 256)  # tokens from the source of a near cloze
NEW, LATER = 32, 96  # tokens written after a timed prompt; between them a recorded step is replayed, if there is one
Found = dict[str, dict[str, dict[str, Any]]]  # by model, part and length


@cache
def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a .gguf file or a directory."""
    where, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    return AutoTokenizer.from_pretrained(where, **options)


def clozes_of(path: Path, documents: list[str], count: int, distances: tuple[int, int]) -> list[Cloze]:
    """Clozes by the tokenizer of a model."""
    return make_clozes(load_tokenizer(path), documents, count, distances)


def maker() -> Executor:
    """Makes clozes meanwhile: in a process on a GPU, since a thread would hold back what starts the kernels."""
    cuda = torch.cuda.is_available()
    return ProcessPoolExecutor(1, mp_context=get_context("spawn")) if cuda else ThreadPoolExecutor(1)


@cache
def load_original(path: Path) -> Any:
    """The original in a .gguf file, which takes seconds to read, or in a directory."""
    where, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    model: Any = AutoModelForCausalLM.from_pretrained(where, **options)
    forget_gguf(model)
    return model


def load(path: Path, name: str, delta: Path, longest: int) -> Any:
    """A model of `MODELS`, from the original in a .gguf file or a directory; bfloat16 on a GPU, else float32."""
    model = copy.deepcopy(load_original(path))
    if name == "hybrid":
        apply_delta(model, delta)
    elif name == "yarn":
        stretch(model, longest)
    cuda = torch.cuda.is_available()
    model = model.to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32).eval()
    return Variants(model).get("original-kernels") if name == "kernels" else model


def stretch(model: Any, length: int) -> None:
    """Stretch the positions of a Llama by YaRN, in place, to prompts of this length."""
    config = model.config
    context = config.max_position_embeddings
    given = {"rope_type": "yarn", "factor": max(1.0, length / context), "original_max_position_embeddings": context}
    config.rope_parameters = dict(config.rope_parameters) | given
    config.max_position_embeddings = max(length, context)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(model.device)


@torch.no_grad()
def cost(model: Any, length: int, rounds: int) -> dict[str, Any]:
    """Seconds until the first token and for one that follows, and memory, of one prompt of this length.

    Tokens are timed after the 32nd, when a step that `generate` records is there. It records none where it is to return
    its cache, so that the cache is of a call of its own.
    """
    device = model.device.type
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids, times = ids.to(model.device), {1: [], NEW: [], LATER: []}
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    before = 0
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    cache = cache_nbytes(model.generate(ids, max_new_tokens=1, return_dict_in_generate=True, **options).past_key_values)
    for number in range(rounds + 1):  # the first is not counted: it compiles
        for new in times:
            synchronize(device)
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
            synchronize(device)
            if number:
                times[new].append(time.perf_counter() - start)
    first, some, all_of_them = (min(times[new]) for new in times)  # kernels may still be compiled in the first rounds
    found = {
        "first token, s": round(first, 4),
        f"{NEW} tokens, s": round(some, 4),
        "token, ms": round(1000 * (all_of_them - some) / (LATER - NEW), 3),
    }
    if device == "cuda":
        found["peak beyond the weights, MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return found | {"cache, MB": round(cache / 1e6, 2), "rounds": rounds}


def reach(length: int) -> tuple[int, int]:
    """The distances of clozes, in tokens, for prompts of about this length.

    >>> reach(32768)
    (13107, 26214)
    """
    return 2 * length // 5, 4 * length // 5


def settings_of(options: argparse.Namespace, part: str, length: int) -> PublicSettings:
    """The settings of one part at one length."""
    counts = {"needles": options.needles, "documents": options.documents}
    return PublicSettings(parts=(part,), needle_lengths=(length,), lengths=(length,), **counts)


def public_part(model: Any, tokenizer: Any, data: PublicData) -> dict[str, Any]:
    """Needles, or perplexity, at the one length of the settings."""
    (part,) = data.settings.parts
    (found,) = measure_public(model, tokenizer, data)[part].values()
    return found


def clozes_correct(model: Any, tokenizer: Any, coming: Future[list[Cloze]], text: Filler | None) -> dict[str, Any]:
    """The accuracy of written clozes, which stand after other prose where a text is given."""
    clozes = coming.result()
    new = 2 + max(len(tokenizer(" " + cloze.answer).input_ids) for cloze in clozes)
    prompts = [tokenizer(cloze.prompt, verbose=False).input_ids for cloze in clozes]
    if text is not None:
        prompts = [text.before(number, prompt) for number, prompt in enumerate(prompts)]
    texts = write(model, tokenizer, prompts, new)
    right = [int(begins_with(text, cloze.answer)) for text, cloze in zip(texts, clozes, strict=True)]
    return counted(right) | {"mean distance": round(statistics.mean(cloze.distance for cloze in clozes))}


@dataclass(frozen=True)
class Filler:
    """Prose of held-out ids [N] that makes prompts as long as `length`."""

    ids: np.ndarray
    length: int

    def before(self, number: int, prompt: list[int]) -> list[int]:
        """Prompt `number` after other prose, a function of number and length.

        >>> len(Filler(np.arange(50), 20).before(0, [7, 7, 7]))
        20
        """
        room = min(max(0, self.length - len(prompt)), len(self.ids))
        at = int(np.random.default_rng([self.length, number]).integers(0, len(self.ids) - room + 1))
        return [*self.ids[at : at + room].tolist(), *prompt]


class Session:
    """The results so far, in one file."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.path = options, options.output / RESULT
        self.end = time.perf_counter() + options.budget_s
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else "{}"
        self.found: Found = json.loads(text).get("models", {})
        self.about = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}

    def add(self, model: str, part: str, length: int, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a part, if it is not there and time is left, and write the file."""
        parts = self.found.setdefault(model, {}).setdefault(part, {})
        if str(length) in parts or time.perf_counter() > self.end:
            return
        start = time.perf_counter()
        try:
            parts[str(length)] = measure()
        except torch.OutOfMemoryError:
            parts[str(length)] = {"out of memory": True}
        seconds = time.perf_counter() - start
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, to_json({**self.about, "models": self.found}))
        print(f"{model}, {part}, {length:,}: {seconds:.1f} s", flush=True)

    def measure(self) -> None:
        """All parts of both models: time first, then what decides most."""
        options, lengths = self.options, self.options.lengths
        path = options.model or gguf_path()
        documents = read_documents(find_set(options.data, HELD_OUT))
        with maker() as pool:  # seconds for each cloze, beside what the GPU measures
            coming = {}
            if CLOZE in options.parts:
                near = pool.submit(clozes_of, path, documents, options.clozes, NEAR)
                coming = {n: (pool.submit(clozes_of, path, documents, options.clozes, reach(n)), near) for n in lengths}
            tokenizer = load_tokenizer(path)
            models = {name: load(path, name, options.delta, max(lengths)) for name in options.models}
            ids = plain_ids(tokenizer, tokenized(tokenizer, documents))
            if COST in options.parts:
                each = [(n, name) for n in lengths for name in models if name not in ("kernels", "yarn")]
                for n, name in each + [(n, "kernels") for n in lengths if "kernels" in models]:
                    self.add(name, COST, n, partial(cost, models[name], n, options.rounds))
            models.pop("kernels", None)
            each = [(n, name, model) for n in lengths for name, model in models.items()]
            for part in (part for part in (NEEDLE, PERPLEXITY) if part in options.parts):
                for n, name, model in each:
                    data = PublicData(settings_of(options, part, n), {}, documents, {}, ids)
                    self.add(name, part, n, partial(public_part, model, tokenizer, data))
            for n, name, model in each if coming else ():
                far, near = coming[n]
                self.add(name, CLOZE, n, partial(clozes_correct, model, tokenizer, far, None))
                text = Filler(np.concatenate(ids), n)
                self.add(name, "near cloze", n, partial(clozes_correct, model, tokenizer, near, text))
            pool.shutdown(wait=False, cancel_futures=True)


def cell(part: dict[str, Any] | None, name: str = "accuracy") -> str:
    """A number of a table: accuracies with their interval in %."""
    if not part or name not in part:
        return "out of memory" if part and "out of memory" in part else ""
    if name != "accuracy":
        digits = 3 if part[name] < 1 else 2 if part[name] < 100 else 0
        return f"{part[name]:,.{digits}f}"
    low, high = part["interval"]
    return f"{100 * part[name]:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def table(found: Found) -> str:
    """A Markdown table, a row for each length and model; columns of what was not measured are left out."""
    columns = {"cache, MB": "cost", "peak beyond the weights, MiB": "cost", "first token, s": "cost"}
    columns |= {"token, ms": "cost"}
    head = [
        "tokens",
        "model",
        "needle, %",
        "contained, %",
        "cloze, %",
        "near cloze, %",
        "perplexity",
        "of the last tokens",
        *columns,
    ]
    rows: list[list[str]] = []
    lengths = sorted({int(n) for parts in found.values() for part in parts.values() for n in part})
    for n in lengths:
        for name in MODELS:
            parts = {part: values.get(str(n)) for part, values in found.get(name, {}).items()}
            if not any(parts.values()):
                continue
            text = parts.get(PERPLEXITY) or {}
            last = f"{text['by_position'][-1]:,.1f}" if text.get("by_position") else ""
            cells = [
                f"{n:,}",
                name,
                cell(parts.get(NEEDLE)),
                cell((parts.get(NEEDLE) or {}).get("contained")),
                cell(parts.get("cloze")),
                cell(parts.get("near cloze")),
                cell(text, "ppl") if text else "",
            ]
            rows.append([*cells, last, *(cell(parts.get(part), column) for column, part in columns.items())])
    known = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows)]  # columns of what was measured
    lines = [[head[i] for i in known], ["---"] * len(known), *([row[i] for i in known] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def needles_by_distance(needle: dict[str, dict[str, Any]]) -> str:
    """Needles of all lengths in Markdown, by how far before the question they stand: a window's tokens, then doublings.

    >>> one = {"2048": {"count": 10, "by_depth": {"0.00": 0.6, "1.00": 1.0}}}
    >>> print(needles_by_distance(one).splitlines()[-1])
    | 1,025 to 2,048 | 60 % (23 to 88) | 5 |
    """
    placed: dict[int, list[int]] = {}
    for length, part in needle.items():
        each = part["count"] // len(part["by_depth"])
        for depth, found in part["by_depth"].items():
            distance = round((1 - float(depth)) * int(length))
            end = max(256, 1 << max(0, distance - 1).bit_length())
            right = round(found * each)
            placed.setdefault(end, []).extend([1] * right + [0] * (each - right))
    lines = ["| tokens between needle and question | written exactly | needles |", "|---|---|---|"]
    for end, hits in sorted(placed.items()):
        low, high = wilson(sum(hits), len(hits))
        tokens = f"up to {end}" if end == 256 else f"{end // 2 + 1:,} to {end:,}"
        share = f"{100 * sum(hits) / len(hits):.0f} % ({100 * low:.0f} to {100 * high:.0f})"
        lines.append(f"| {tokens} | {share} | {len(hits)} |")
    return "\n".join(lines) + "\n"


def picture(found: Found) -> bytes:
    """Recall, and the memory of a sequence, by length; needs matplotlib."""
    from matplotlib.figure import Figure

    from nha.report.drawing import LIGHT, line_styles

    figure = Figure(figsize=(4.9, 6.4), layout="constrained", facecolor=LIGHT.background)
    recall, memory = figure.subplots(2, 1, sharex=True)
    for name, (colour, dash) in line_styles(list(MODELS)).items():
        parts = found.get(name, {})
        for part, marker in ((NEEDLE, "o"), ("cloze", "s")):
            points = sorted((int(n), 100 * x["accuracy"]) for n, x in parts.get(part, {}).items() if "accuracy" in x)
            if points:
                label = f"{name}, {part}"
                recall.plot(*zip(*points, strict=True), color=colour, linestyle=dash, marker=marker, label=label)
        points = sorted((int(n), x["cache, MB"]) for n, x in parts.get("cost", {}).items() if "cache, MB" in x)
        if points:
            memory.plot(*zip(*points, strict=True), color=colour, linestyle=dash, marker="o")
    recall.set_title("Needles and clozes, written, %", loc="left", fontsize=10)
    memory.set_title("Cache of one sequence, MB", loc="left", fontsize=10)
    recall.set_ylim(-3, 103)
    memory.set_yscale("log")
    for axes in (recall, memory):
        axes.set_xscale("log", base=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=LIGHT.line, linewidth=0.8)
    ticks = sorted({int(n) for parts in found.values() for part in parts.values() for n in part})
    memory.set_xticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks])
    memory.set_xlabel("tokens")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def write_report(folder: Path) -> str:
    """Write long_context.md and long_context.png beside the results. Returns the table."""
    found: Found = json.loads((folder / RESULT).read_text(encoding="utf-8"))["models"]
    text = table(found)
    write_atomically(folder / "long_context.md", text)
    write_atomically(folder / "long_context.png", picture(found))
    return text


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--delta", type=Path, default=DELTA)
    parser.add_argument(
        "--lengths", type=lambda s: [int(n) for n in s.split(",")], default=[8192, 32768, 65536, 131072]
    )
    parser.add_argument("--models", type=lambda s: s.split(","), default=["hybrid", "original"])
    parser.add_argument("--parts", type=lambda s: s.split(","), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--needles", type=int, default=5, help="of each length and depth (5 depths)")
    parser.add_argument("--clozes", type=int, default=24, help="of each length")
    parser.add_argument("--documents", type=int, default=8, help="for perplexity, of each length")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget-s", type=float, default=math.inf)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--distances", type=Path, help="print the needles of a run of results/quality by distance")
    options = parser.parse_args(arguments)
    if options.distances is not None:
        print(needles_by_distance(json.loads(options.distances.read_text(encoding="utf-8"))["eval"][NEEDLE]))
        return 0
    if options.report is not None:
        print(write_report(options.report))
        return 0
    if options.data is None or options.output is None:
        parser.error("expected --data and --output")
    for name, known in (("models", MODELS), ("parts", PARTS)):
        given = getattr(options, name)
        if not set(given) <= set(known):
            parser.error(f"expected {name} out of {', '.join(known)}, got {', '.join(given)}")
    Session(options).measure()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
