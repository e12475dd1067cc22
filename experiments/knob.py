"""Turn the windows of trained models from 0 to full attention: loss, recall and bytes of cache against the window.

    python experiments/knob.py random=runs/random/model fixed-64=runs/64/model --corpus run.corpus --output results/knob

Writes knob.csv, knob.json and knob.png. Each model is measured at every window of `--windows`, on held-out documents of
the corpus. Recall is the fraction of tokens predicted right when a text is read for the second time. `nha ablate
windows` trains models for this and compares them.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch

from nha.ablate.pictures import WindowPoint, windows_png
from nha.bench.timing import stamp
from nha.data.corpus import open_corpus
from nha.io import write_atomically
from nha.models import loading
from nha.settings import parse_ints
from nha.train.knob import WINDOWS, relative_perplexity, turn_knob


def measure(name: str, path: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
    model, tokenizer = loading.load(loading.find(path), dtype=options.dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    ids = torch.from_numpy(open_corpus(options.corpus, tokenizer).held_out_sequences(options.texts, options.seq_len))

    def progress(done: int, total: int) -> None:
        print(f"{name}: {done} of {total} windows", flush=True)

    rows = turn_knob(model, ids, options.windows, progress=progress)
    own = [window for window in model.config.window_sizes if window >= 0]
    return [{"model": name, "trained_with": max(own, default=-1), "texts": len(ids), **row} for row in rows]


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """Write the table, the comparison of the first model with the others, and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    about = stamp("torch", "transformers", "nha")
    with (out / "knob.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(name for name in rows[0] if name != "by_text"), *about], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    first, *others = by_model
    relative = {name: relative_perplexity(by_model[first], by_model[name]) for name in others}
    found = {"rows": rows, f"perplexity of {first} relative to": relative, **about}
    write_atomically(out / "knob.json", json.dumps(found, indent=1) + "\n")
    points = [WindowPoint(*(row[name] for name in WindowPoint._fields)) for row in rows]
    write_atomically(out / "knob.png", windows_png(points))


def main(arguments: list[str] | None = None) -> int:
    """Measure all models and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="NAME=PATH")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--output", type=Path, default=Path("results/knob"))
    parser.add_argument("--windows", type=parse_ints, default=WINDOWS)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    options = parser.parse_args(arguments)
    pairs = [pair.partition("=")[::2] for pair in options.models]
    if not all(name and path for name, path in pairs):
        parser.error(f"expected NAME=PATH, got {' '.join(options.models)}")
    write([row for name, path in pairs for row in measure(name, path, options)], options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
