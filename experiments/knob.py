"""Turn the windows of trained models from 0 to full attention: loss, recall and bytes of cache against the window.

    python experiments/knob.py random=runs/random/model fixed-64=runs/64/model --corpus run.corpus --out results/knob

Writes knob.csv, knob.json and knob.png. Each model is measured at every window of `--windows`, on held-out documents of
the corpus. Recall is the fraction of tokens predicted right when a text is read for the second time.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nha.bench.timing import stamp
from nha.data.corpus import open_corpus
from nha.io import write_atomically
from nha.models import loading
from nha.report.curves import line_styles
from nha.settings import parse_ints
from nha.train.knob import WINDOWS, relative_perplexity, turn_knob

PANELS = (("loss", "held-out loss, nats"), ("recall", "recall of a text read twice"), ("cache_bytes", "cache, bytes"))


def label(window: int) -> str:
    """A window on an axis.

    >>> label(64), label(-1)
    ('64', 'full')
    """
    return "full" if window < 0 else str(window)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture: three panels over one axis of windows."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    windows = list(dict.fromkeys(row["window"] for row in rows))
    styles = line_styles(names)
    figure = Figure(figsize=(4.9, 7.2), layout="constrained")
    panels = figure.subplots(len(PANELS), 1, sharex=True)
    for axes, (key, title) in zip(panels, PANELS, strict=True):
        for name, marker in zip(names, "osD^vPX" * len(names), strict=False):
            points = [(windows.index(row["window"]), row[key]) for row in rows if row["model"] == name]
            colour, dash = styles[name]
            axes.plot(*zip(*points, strict=True), color=colour, ls=dash, marker=marker, ms=4, label=name)
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(alpha=0.25)
    panels[-1].set_yscale("log")
    panels[-1].set_xticks(range(len(windows)), [label(window) for window in windows], fontsize=8)
    panels[-1].set_xlabel("window, tokens", fontsize=9)
    if len(names) > 1:
        panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=160)


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
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    first, *others = by_model
    relative = {name: relative_perplexity(by_model[first], by_model[name]) for name in others}
    found = {"rows": rows, f"perplexity of {first} relative to": relative, **about}
    write_atomically(out / "knob.json", json.dumps(found, indent=1) + "\n")
    draw(rows, out / "knob.png")


def main(arguments: list[str] | None = None) -> int:
    """Measure all models and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="NAME=PATH")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", type=Path, default=Path("results/knob"))
    parser.add_argument("--windows", type=parse_ints, default=WINDOWS)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    options = parser.parse_args(arguments)
    pairs = [pair.partition("=")[::2] for pair in options.models]
    if not all(name and path for name, path in pairs):
        parser.error(f"expected NAME=PATH, got {' '.join(options.models)}")
    write([row for name, path in pairs for row in measure(name, path, options)], options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
