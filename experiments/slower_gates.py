"""Gain and cost of slower forgetting: a constant is added to the gates' biases of a hybrid, nothing is trained
(see `nha.models.windows.shift_gates`).

    python -m experiments.slower_gates --data DATA --output OUT [--model smollm2-hybrid] [--shifts 0,1.4,2.8]

Needles of --needle-lengths, perplexity by --lengths and verbatim clozes are measured as `nha eval public` does. A shift
is written to OUT/slower_gates.json as soon as it is measured, and one that is there is not measured again. Needles and
clozes are others than those that are reported, so that a shift can be chosen by them. `--model smollm2 --file FILE`
measures the hybrid that a small file of `experiments.quality --files` makes of a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from experiments.distill import versions
from nha.evaluate.public.run import NEEDLE, PERPLEXITY, PublicSettings, measure_public, read_public
from nha.io import write_atomically
from nha.models import loading
from nha.models.delta import apply_delta
from nha.models.windows import set_state_dtype, shift_gates
from nha.report.results import to_json

RESULT = "slower_gates.json"
PARTS = (NEEDLE, PERPLEXITY, "cloze_near", "cloze_far")


def numbers_of(options: argparse.Namespace) -> PublicSettings:
    """The measures at every shift."""
    return PublicSettings(
        parts=options.parts,
        needle_lengths=options.needle_lengths,
        needles=options.needles,
        lengths=options.lengths,
        documents=options.documents,
        clozes=options.clozes,
        seed=options.seed,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of all shifts.

    >>> rows = [{"shift": 0.0, "found": {"needle": {"8192": {"accuracy": 0.95, "count": 20}}}}]
    >>> print(table(rows))
    | added to the gates' biases | needle 8,192 |
    |---|---|
    | 0 | 95 % of 20 |
    <BLANKLINE>
    """
    cells: dict[str, dict[float, str]] = {}
    for row in rows:
        found = row["found"]
        for length, own in found.get("needle", {}).items():
            name = f"needle {int(length):,}"
            cells.setdefault(name, {})[row["shift"]] = f"{100 * own['accuracy']:.0f} % of {own['count']}"
        for length, own in found.get("perplexity", {}).items():
            cells.setdefault(f"perplexity {int(length):,}", {})[row["shift"]] = f"{own['ppl']:.2f}"
        for name, own in found.get("sets", {}).items():
            shown = f"{100 * own['accuracy']:.1f} % of {own['count']}"
            cells.setdefault(name.replace("_", " "), {})[row["shift"]] = shown
    lines = ["| added to the gates' biases | " + " | ".join(cells) + " |", "|---|" + "---|" * len(cells)]
    for shift in sorted({row["shift"] for row in rows}):
        lines.append(f"| {shift:g} | " + " | ".join(cells[name].get(shift, "") for name in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure all shifts."""

    def ints(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-hybrid")
    parser.add_argument("--file", type=Path, help="the small file that makes a hybrid of the model")
    parser.add_argument("--state-dtype", default="float32")
    parser.add_argument("--shifts", type=lambda s: tuple(map(float, s.split(","))), default=(0.0, 1.4, 2.1, 2.8))
    parser.add_argument("--parts", type=lambda s: tuple(s.split(",")), default=PARTS)
    parser.add_argument("--needle-lengths", type=ints, default=(8192, 32768, 65536, 131072))
    parser.add_argument("--needles", type=int, default=4, help="of each depth (5 depths)")
    parser.add_argument("--lengths", type=ints, default=(2048, 8192))
    parser.add_argument("--documents", type=int, default=PublicSettings.documents)
    parser.add_argument("--clozes", type=int, default=PublicSettings.clozes)
    parser.add_argument("--seed", type=int, default=1, help="of needles and clozes; the reported ones have 0")
    options = parser.parse_args(arguments)
    settings = numbers_of(options)
    cuda = torch.cuda.is_available()
    data = read_public(options.data, settings)
    source = loading.find(options.model)
    model, tokenizer = loading.load(source, dtype="bfloat16" if cuda else "float32")
    if options.file is not None:
        apply_delta(model, options.file)
    set_state_dtype(model, options.state_dtype)
    shift_gates(model, 0.0)
    options.output.mkdir(parents=True, exist_ok=True)
    path, now = options.output / RESULT, 0.0
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    about = {
        "model": options.model if options.file is None else f"{options.model} {options.file.name}",
        "state_dtype": options.state_dtype,
        "seed": options.seed,
        "identity": str(data.identity),
    }
    for shift in options.shifts:
        if any(row["shift"] == shift and row["about"] == about for row in rows):
            continue
        shift_gates(model, shift - now)
        now = shift
        found = measure_public(model, tokenizer, data, name=f"shift {shift:g}")
        kept = {name: found[name] for name in ("needle", "perplexity", "sets")}
        gpu = torch.cuda.get_device_name(0) if cuda else None
        row = {
            "shift": shift,
            "about": about,
            "found": kept,
            "gpu": gpu,
            "versions": versions(),
            "date": str(date.today()),
        }
        rows.append(row)
        write_atomically(path, to_json(rows))
        print(table([row]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
