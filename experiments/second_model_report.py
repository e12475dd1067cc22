"""Table and summary of what `experiments/second_model.py` measured, every hybrid relative to its fair control."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nha.evaluate.bootstrap import LEVEL, RESAMPLES, interval
from nha.evaluate.public.run import PERPLEXITY, relative
from nha.io import write_atomically

Run = dict[str, Any]  # a file of runs/: row, plan, log, eval
CHANCE = {"cloze_near": 0.0, "lambada_openai": 0.0, "piqa": 0.5}  # of guessing; a word out of a vocabulary counts as 0
NAMES = {"cloze_near": "near cloze", "lambada_openai": "LAMBADA", "piqa": "PIQA"}
KINDS = ("original", "control", "hybrid")


def read_runs(folder: Path) -> list[Run]:
    """All runs of a folder: by model, kind and recipe."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "runs").glob("*.json"))]

    def key(run: Run) -> tuple[Any, ...]:
        row = run["row"]
        hybrid = row["kind"] == "hybrid"
        sizes = row.get("train_tokens", 0), row["seed"], row.get("tokens", 0)
        return row["model"], *sizes, KINDS.index(row["kind"]), row["recipe"] if hybrid else row.get("control", "")

    return sorted(found, key=key)


def find_control(run: Run, runs: Sequence[Run]) -> Run | None:
    """The control of a hybrid: the same original, trained on the same batches, at the same rates if there is one."""
    same = ("model", "seed", "tokens", "control", "train_tokens")
    found = [
        other
        for other in runs
        if other["row"]["kind"] == "control" and all(other["row"].get(n) == run["row"].get(n) for n in same)
    ]
    rates = "learning_rates"
    return min(found, key=lambda other: other["row"].get(rates) != run["row"].get(rates), default=None)


def measures_of(run: Run) -> dict[str, dict[str, Any]]:
    """{name: {value, interval, count, chance}} of a run; the chance of a second reading is what the first one gives."""
    data, found = run["eval"], {}
    for length, each in data[PERPLEXITY].items():
        found[f"perplexity {int(length):,}"] = {
            "value": each["ppl"],
            "interval": each["interval"],
            "count": each["count"],
            "chance": None,
        }
    for length, each in data["repeats"].items():
        found[repeat_name(length)] = {
            "value": float(np.mean(each["second"])),
            "interval": list(interval(each["second"])),
            "count": len(each["second"]),
            "chance": float(np.mean(each["first"])),
        }
    for name, each in data["sets"].items():
        about = {key: each[key] for key in ("interval", "count")}
        found[NAMES.get(name, name)] = {"value": each["accuracy"], **about, "chance": CHANCE.get(name)}
    return found


def repeat_name(length: str) -> str:
    """The name of the measure of texts of so many tokens that are read twice."""
    return f"read twice, {int(length):,}"


def above_chance(measure: Mapping[str, Any]) -> bool:
    """Whether the interval of a measure lies above what guessing gives; perplexity always counts.

    >>> above_chance({"interval": [0.48, 0.55], "chance": 0.5}), above_chance({"interval": [20, 30], "chance": None})
    (False, True)
    """
    return measure["chance"] is None or measure["interval"][0] > max(measure["chance"], 0.01)


def shares_of(run: Run, control: Run) -> dict[str, dict[str, Any]]:
    """{name: {ratio, interval}} of a hybrid relative to its control, in paired resamples."""
    shares = relative(run["eval"], control["eval"])
    found = {NAMES.get(name, name): share for name, share in shares.items()}
    for length, each in run["eval"]["repeats"].items():
        own, other = (np.array(x) for x in (each["second"], control["eval"]["repeats"][length]["second"]))
        drawn = np.random.default_rng(0).integers(0, len(own), (RESAMPLES, len(own)))
        below = other[drawn].mean(1)
        ratios = (own[drawn].mean(1) / np.where(below > 0, below, np.nan))[below > 0]
        edges = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        if len(ratios):
            ratio = float(own.mean() / other.mean())
            found[repeat_name(length)] = {"ratio": ratio, "interval": [float(x) for x in np.quantile(ratios, edges)]}
    return found


def summary_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of summary.json."""
    rows = []
    for run in runs:
        row, control = dict(run["row"]), find_control(run, runs) if run["row"]["kind"] == "hybrid" else None
        row["measures"] = measures_of(run)
        row["loss"] = [run["log"][0]["loss"], run["log"][-1]["loss"]] if run["log"] else None
        if control is not None:
            used = measures_of(control)
            row["relative"] = shares_of(run, control)
            row["own_rates"] = control["row"].get("learning_rates") == row.get("learning_rates")
            row["above_chance"] = [name for name, measure in used.items() if above_chance(measure)]
        rows.append(row)
    return rows


def percent(share: Mapping[str, Any]) -> str:
    """A share with its interval."""
    if share["ratio"] is None:
        return ""
    return f"{100 * share['ratio']:.0f} % ({100 * share['interval'][0]:.0f} to {100 * share['interval'][1]:.0f})"


def cell(row: Mapping[str, Any], name: str) -> str:
    """A number of a row for the table: a hybrid's relative to its control's, others as they are."""
    if name not in row["measures"]:
        return ""
    if row["kind"] == "hybrid" and "relative" in row:
        share = row["relative"].get(name)
        if share is None or name not in row["above_chance"]:
            return "at chance"
        if not name.startswith("perplexity"):
            return percent(share)
        low, high = share["interval"]
        return f"{share['ratio']:.3f} times ({low:.3f} to {high:.3f})"
    value = row["measures"][name]["value"]
    return f"{value:.2f}" if name.startswith("perplexity") else f"{100 * value:.1f} %"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown: controls as they are, hybrids relative to them.

    A star stands where the control was trained at other learning rates than the hybrid; a control at other rates than
    the recipes' has the name of its recipe.
    """
    names = list(dict.fromkeys(name for row in rows for name in row["measures"]))
    lines = [f"| model | recipe | | full layers | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for row in rows:
        full = ",".join(map(str, row.get("full_layers", []))) if row["kind"] == "hybrid" else "all"
        recipe = row["recipe"] if row["kind"] == "hybrid" or ":" in (row["recipe"] or "") else ""
        recipe += "" if row.get("own_rates", True) else " *"
        cells = [row["model"], recipe, row["kind"], full or "none", *(cell(row, name) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def longest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose originals read the most tokens, of each model."""
    most: dict[str, float] = {}
    for row in rows:
        most[row["model"]] = max(most.get(row["model"], 0), row.get("train_tokens", 0))
    return [row for row in rows if row.get("train_tokens", 0) == most[row["model"]]]


def write_report(folder: Path) -> str:
    """Write summary.json of a folder's runs, and table.md of those whose originals read most; returns the table."""
    rows = summary_rows(read_runs(folder))
    write_atomically(folder / "summary.json", json.dumps(rows, indent=1) + "\n")
    text = table(longest(rows))
    write_atomically(folder / "table.md", text)
    return text
