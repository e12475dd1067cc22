"""Verbatim clozes of a small file's hybrid, with other windows set at run time and caches in 8 bits; nothing trained.

    python -m experiments.shipped_windows --data DIR --output DIR --wide 15:1000 --narrow 41 [--file FILE] [--near 60]
    python -m experiments.shipped_windows --report DIR

--wide takes heads:window by rank, separated by commas (-1: full attention), --narrow the window of all others. Clozes
are those of `nha eval public --clozes 500`, taken from each range of distances in turn, so that the rows of the fair
control and of `shipped_recall` in results/quality answer the same ones; the rows there are of that file, which
`experiments.quality --runs constant_recall --files` writes. DIR gets a line for every answer, and the same
command goes on from there; --report writes DIR/shipped_windows.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.quality_rows import cache_bytes
from experiments.quality_runs import Heads
from experiments.state_bytes import load
from nha import set_windows
from nha.data.cloze import Cloze
from nha.evaluate.bootstrap import wilson
from nha.evaluate.public.run import EDGES, PublicSettings, begins_with, read_public
from nha.io import write_atomically
from nha.models.smollm2 import DELTA
from nha.models.windows import set_kv_cache_dtype, set_state_dtype
from nha.report.results import to_json

RUNS = Path("results/quality/runs")
OTHERS = {"control": "control-4b2ddc-25M-0", "shipped": "shipped_recall-25M-0"}


def parse_wide(text: str) -> tuple[tuple[int, int], ...]:
    """Heads and windows by rank.

    >>> parse_wide("2:-1,13:2240")
    ((2, -1), (13, 2240))
    """
    pairs = (part.split(":") for part in text.split(","))
    return tuple((int(heads), int(window)) for heads, window in pairs)


def in_turn(clozes: Sequence[Cloze], part: str, count: int) -> list[int]:
    """Indices of clozes, from each range of distances in turn."""
    distances = np.array([cloze.distance for cloze in clozes])
    edges = [*EDGES[part][:-1], EDGES[part][-1] + 1]
    ranges = [np.flatnonzero((distances >= low) & (distances < high)) for low, high in pairwise(edges)]
    return [int(index) for row in zip_longest(*ranges) for index in row if index is not None][:count]


def answers(model: Any, tokenizer: Any, clozes: Sequence[Cloze], indices: Sequence[int]) -> Iterator[dict[str, int]]:
    """Whether the model writes the answer of each cloze."""
    for index in indices:
        cloze = clozes[index]
        ids = tokenizer(cloze.prompt, return_tensors="pt", verbose=False).input_ids.to(model.device)
        new = 2 + len(tokenizer(" " + cloze.answer, verbose=False).input_ids)
        with torch.no_grad():
            written = model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        yield {"item": index, "distance": cloze.distance, "correct": int(begins_with(text, cloze.answer))}


def summary(rows: Sequence[dict[str, Any]], part: str) -> dict[str, Any]:
    """Counts of a part, by distance and of the runs that read the same clozes, with an interval."""
    runs = {name: json.loads((RUNS / f"{run}.json").read_text()) for name, run in OTHERS.items()}
    texts = {name: run["eval"]["sets"][part]["correct"] for name, run in runs.items()}
    correct = [row["correct"] for row in rows]
    found: dict[str, Any] = {"correct": sum(correct), "count": len(rows), "interval": wilson(sum(correct), len(rows))}
    for name, text in texts.items():
        found[name] = sum(int(text[row["item"]]) for row in rows)
    for low, high in pairwise(EDGES[part]):
        last = high == EDGES[part][-1]
        own = [row["correct"] for row in rows if low <= row["distance"] < high + last]
        found.setdefault("by_distance", {})[f"{low:,} to {high:,}"] = [sum(own), len(own)]
    return found


def report(folder: Path) -> dict[str, Any]:
    """The summaries of all windows that were measured, in DIR/shipped_windows.json."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.jsonl")):
        head, *rows = map(json.loads, path.read_text().splitlines())
        parts = {part: [row for row in rows if row["part"] == part] for part in EDGES}
        found[path.stem] = head | {part: summary(own, part) for part, own in parts.items() if own}
    write_atomically(folder / "shipped_windows.json", to_json(found))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure one choice of windows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--file", type=Path, default=DELTA, help="the small file (default: the one in this package)")
    parser.add_argument("--wide", type=parse_wide)
    parser.add_argument("--narrow", type=int, default=64)
    parser.add_argument("--near", type=int, default=60)
    parser.add_argument("--far", type=int, default=60)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args(arguments)
    if options.report is not None:
        print(to_json(report(options.report)))
        return
    if None in (options.data, options.output, options.wide):
        parser.error("expected --data, --output and --wide, or --report")
    data = read_public(options.data, PublicSettings(parts=tuple(EDGES), clozes=500))
    model, tokenizer = load(None, "cuda" if torch.cuda.is_available() else "cpu", options.file)
    set_windows(model, Heads(options.wide, options.narrow).windows())
    set_state_dtype(model, "int8")
    set_kv_cache_dtype(model, "int8")
    name = "-".join(f"{heads}x{'full' if window < 0 else window}" for heads, window in options.wide)
    path = options.output / f"{name}-{options.narrow}.jsonl"
    if not path.is_file():
        held = cache_bytes(copy.deepcopy(model).to(torch.bfloat16), 16384)  # as the budgets of results/quality are
        options.output.mkdir(parents=True, exist_ok=True)
        head = {"wide": options.wide, "narrow": options.narrow, "bytes_16k": held, "dtype": str(model.dtype)}
        path.write_text(json.dumps(head) + "\n")
    known = {(row["part"], row["item"]) for row in map(json.loads, path.read_text().splitlines()[1:])}
    with path.open("a") as file:
        for part, count in (("cloze_near", options.near), ("cloze_far", options.far)):
            clozes = data.clozes(tokenizer, part)
            left = [index for index in in_turn(clozes, part, count) if (part, index) not in known]
            for found in answers(model, tokenizer, clozes, left):
                print(json.dumps({"part": part} | found), file=file, flush=True)


if __name__ == "__main__":
    main()
