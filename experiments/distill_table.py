"""Tabulate and draw what `experiments/distill.py` measured; needs matplotlib and no GPU.

    PYTHONPATH=src python3 -m experiments.distill_table results/hybridize

Reads summary.json there, prints a table of all runs and writes table.md, recall.png (whole answers that are right, by
distance), perplexity.png (by position in the longest texts) and, from logs.jsonl, learning.png (the longest run, or
the last of them) beside it. Perplexities are compared on the texts that both models read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.distill import TEACHER
from nha.io import write_atomically
from nha.report.curves import recall_png
from nha.report.drawing import LIGHT, line_styles
from nha.report.sentences import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
SHOWN = ("one_fact", "four_facts")
# What is drawn, where it was measured.
PICTURED = {
    TEACHER: "teacher",
    "hybrid4": "4 full layers",
    "long_recall": "no full layer, 8K tokens, long-range",
    "long": "no full layer, 8K tokens",
    "hybrid": "no full layer",
    "sink128": "window 128 alone",
}
DPI = 160


def name_of(row: Row, pictured: bool = False) -> str:
    """A run, its tokens, and its seed if that is not 0; for pictures in words.

    >>> name_of({"run": "hybrid4", "tokens": 11_993_088, "seed": 0})
    'hybrid4, 12 M'
    >>> name_of({"run": "hybrid4", "tokens": 11_993_088, "seed": 0}, pictured=True)
    '4 full layers, 12 M'
    """
    count = f", {row['tokens'] / 1e6:.0f} M" if row["tokens"] else ""
    return (PICTURED[row["run"]] if pictured else row["run"]) + count + (f", seed {row['seed']}" if row["seed"] else "")


def relative_perplexity(row: Row, teacher: Row, length: str = "2k") -> float | None:
    """Perplexity relative to the teacher's on the documents that both were measured on, the first of each."""
    key = f"by_text_{length}"
    if key not in row or key not in teacher:
        return None
    pairs = list(zip(row[key], teacher[key], strict=False))
    return math.exp(sum(a - b for a, b in pairs) / len(pairs))


def percent(scores: dict[str, Any], metric: str = "exact") -> str:
    """Scores at every distance, nearest first, in percent."""
    ordered = sorted(scores.items(), key=lambda pair: int(pair[0]))
    return " ".join(f"{100 * found[metric]:.0f}" for _, found in ordered)


def distances(rows: Sequence[Row]) -> list[int]:
    """All distances that were measured."""
    return sorted({int(d) for row in rows for task in SHOWN for d in row.get("recall", {}).get(task, {})})


def changed(settings: Row) -> list[str]:
    """Settings that are not the default, besides those with a column of their own.

    >>> changed({"tokens": 1e6, "seed": 1, "long_range_fraction": 0.5})
    ['seed 1', 'long_range_fraction 0.5']
    """
    return [f"{name} {value}" for name, value in settings.items() if name not in ("tokens", "full_layers")]


def table(rows: Sequence[Row]) -> str:
    """All runs in Markdown."""
    teacher = next(row for row in rows if row["run"] == TEACHER)
    head = ["run, tokens", "changed", "full layers", "2K", "8K", "slots off, 2K", *(f"{t}, %" for t in SHOWN)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        ratios = [relative_perplexity(row, teacher, length) for length in ("2k", "8k")]
        off = row.get("slots_off") and relative_perplexity(row["slots_off"], teacher)
        full = [str(i) for i, w in enumerate(row["windows"]) if w == -1]
        cells = [
            name_of(row),
            ", ".join(changed(row.get("settings") or {})),
            "all" if len(full) == len(row["windows"]) else ", ".join(full) or "none",
            *("" if x is None else f"{x:.3f}" for x in (*ratios, off)),
            *(percent(row.get("recall", {}).get(task, {})) for task in SHOWN),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    far = ", ".join(f"{d:,}" for d in distances(rows))
    about = (
        f"Perplexity relative to the teacher's ({teacher['ppl_2k']:.2f} at 2K tokens, {teacher['ppl_8k']:.2f} at 8K)."
    )
    return f"{about} Whole answers right at distances of {far} tokens.\n\n" + "\n".join(lines) + "\n"


def plain(axes: Axes, title: str, below: str) -> None:
    """Axes with a title and a name below, thin lines across and no frame."""
    axes.grid(axis="y", color=LIGHT.line, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(below)
    axes.set_title(title, loc="left", fontsize=11, color=LIGHT.ink)


def png(figure: Figure) -> bytes:
    """A picture as a PNG file's bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def by_position(rows: Sequence[Row]) -> Figure:
    """Perplexity by position in texts of 8,192 tokens, a line for every row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.7, 3.9), layout="constrained", facecolor=LIGHT.background)
    axes = figure.add_subplot()
    names = [name_of(row, pictured=True) for row in rows]
    for row, (colour, dash) in zip(rows, line_styles(names).values(), strict=True):
        edges = row["edges_8k"]
        middles = [math.sqrt(max(a, 16) * b) for a, b in itertools.pairwise(edges)]
        axes.plot(
            middles,
            row["by_position_8k"],
            color=colour,
            linestyle=dash,
            marker="o",
            markersize=3.5,
            linewidth=1.8,
            label=name_of(row, pictured=True),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    shown = [edge for edge in rows[0]["edges_8k"] if edge]
    axes.set_xticks(shown, [tokens(edge) for edge in shown])
    axes.set_yticks([8, 10, 12, 14, 16, 20, 24, 32], ["8", "10", "12", "14", "16", "20", "24", "32"])
    axes.minorticks_off()
    plain(axes, "Perplexity by position", "position in a held-out text, tokens")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=LIGHT.ink)
    return figure


def learning(run: Row, points: int = 40) -> Figure:
    """Learning curves of a run against its tokens: KL from the teacher on text, and accuracy of answers.

    `run` is a line of logs.jsonl; entries of its log are averaged to about so many points.
    """
    from matplotlib.figure import Figure

    log = run["log"]
    size = max(1, len(log) // points)
    groups = [log[at : at + size] for at in range(0, len(log), size)]
    read = [group[-1]["tokens"] / 1e6 for group in groups]
    figure = Figure(figsize=(7.7, 3.0), layout="constrained", facecolor=LIGHT.background)
    left, right = figure.subplots(1, 2)
    for axes, key, factor, title in (
        (left, "kl", 1, "KL from the teacher, nats per token"),
        (right, "answer_accuracy", 100, "Correct tokens of answers, %"),
    ):
        axes.plot(
            read,
            [factor * sum(entry[key] for entry in group) / len(group) for group in groups],
            color=line_styles(["model"])["model"][0],
            linewidth=1.8,
        )
        axes.set_ylim(bottom=0)
        plain(axes, title, "million tokens")
    return figure


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(given)
    file = options.folder / "summary.json"
    if not file.is_file():
        parser.error(f"expected summary.json in {options.folder}, found none")
    rows = json.loads(file.read_text(encoding="utf-8"))
    if TEACHER not in [row["run"] for row in rows]:
        parser.error(f"expected a row of the run {TEACHER} in {file}, got {[row['run'] for row in rows]}")
    text = table(rows)
    print(text)
    write_atomically(options.folder / "table.md", text)
    drawn = [row for name in PICTURED for row in rows if row["run"] == name and not row["seed"] and "recall" in row]
    recall = {name_of(row, pictured=True): {task: row["recall"][task] for task in SHOWN} for row in drawn}
    pictures = {"recall.png": recall_png(recall, "exact")}
    long = [row for row in drawn if "by_position_8k" in row]
    if long:
        pictures["perplexity.png"] = png(by_position(long))
    logs = options.folder / "logs.jsonl"
    runs = [json.loads(line) for line in logs.read_text(encoding="utf-8").splitlines()] if logs.is_file() else []
    if runs:
        pictures["learning.png"] = png(learning(max(reversed(runs), key=lambda run: run["tokens"])))
    for name, data in pictures.items():
        write_atomically(options.folder / name, data)
        print(options.folder / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
