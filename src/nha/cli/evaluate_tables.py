"""Tables and files of `nha eval`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from nha.cli.common import err
from nha.io import atomic_directory


def save(output: Path, name: str, results: dict[str, Any], metric: str) -> None:
    """Write results as JSON, and recall as a picture, into a directory that appears only when it is whole."""
    from nha.report.results import to_json

    with atomic_directory(output) as work:
        (work / name).write_text(to_json(results), encoding="utf-8")
        recall = {model: row["recall"] for model, row in results["results"].items() if row.get("recall")}
        if recall:
            from nha.report.curves import recall_png

            (work / "recall.png").write_bytes(recall_png(recall, metric))
    err.print(f"[dim]saved in {escape(str(output))}[/]", soft_wrap=True)


def bracket(bounds: list[float], digits: int, factor: float = 1.0) -> str:
    """An interval in brackets, its bounds times `factor`, as markup."""
    low, high = (factor * bound for bound in bounds)
    return f"[dim]\\[{low:.{digits}f}, {high:.{digits}f}][/]"


def new_table(*titles: str, first: str = "") -> Table:
    """A plain table with these columns beside that of the names; titles are plain text."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(escape(first), no_wrap=True)
    for title in titles:
        table.add_column(escape(title), justify="right", no_wrap=True)
    return table


def slots_cell(row: dict[str, Any]) -> str:
    """The mean attention mass of the slots in percent."""
    mass = row.get("slot_mass")
    return f"{100 * mass['mean']:.0f} %" if mass and mass["mean"] else "-"


def nats_cell(value: float | None) -> str:
    """A loss, or a dash if there is none."""
    return f"{value:.3f}" if value is not None and value == value else "-"


def perplexity_tables(rows: dict[str, dict[str, Any]], edges: list[int]) -> Iterator[Table]:
    """Perplexity of every model as a whole, and by position."""
    table = new_table("perplexity", "", "loss, nats", "repeats, nats", "slots")
    for name, row in rows.items():
        table.add_row(
            escape(name),
            f"{row['perplexity']:.2f}",
            bracket(row["interval"], 2),
            f"{row['loss']:.3f}",
            nats_cell(row["long_range_repeats"]),
            slots_cell(row),
        )
    yield table
    table = new_table(*(f"{a}-{b}" for a, b in itertools.pairwise(edges)))
    for name, row in rows.items():
        table.add_row(escape(name), *(f"{value:.1f}" for value in row["by_position"]))
    yield table


def recall_tables(models: dict[str, dict[str, Any]], metric: str) -> Iterator[Table]:
    """One table per task: a row per model, a column per distance."""
    for task in next(iter(models.values())):
        distances = list(dict.fromkeys(d for scores in models.values() for d in scores.get(task, {})))
        table = new_table(*(f"{int(d):,}" for d in distances), first=task.replace("_", " "))
        for name, scores in models.items():
            cells = []
            for distance in distances:
                score = scores[task][distance]
                cells.append(f"{100 * score[metric]:.0f} " + bracket(score[f"{metric}_interval"], 0, 100))
            table.add_row(escape(name), *cells)
        yield table


def recall_note(metric: str, questions: int, seed: int) -> str:
    """The legend of recall tables, as markup."""
    names = {"digits": "correct tokens of answers", "exact": "answers all of whose tokens are most likely"}
    names |= {"generated": "answers written by greedy decoding"}
    return (
        f"[dim]columns: tokens from fact to answer; numbers: {names[metric]} in %, with 95 % bootstrap intervals over "
        f"{questions} questions, seed {seed}[/]"
    )


def summary_table(rows: dict[str, dict[str, Any]], lengths: list[str]) -> Table:
    """Perplexity, long-range repeats and attention mass of every model, at every length."""
    titles = [title for n in lengths for title in (f"perplexity {n}", "", f"repeats {n}, nats")]
    table = new_table(*titles, "slots")
    for name, row in rows.items():
        cells = []
        for n in lengths:
            cells += [f"{row[f'ppl_{n}']:.2f}", bracket(row[f"ppl_{n}_interval"], 2), nats_cell(row[f"repeats_{n}"])]
        table.add_row(escape(name), *cells, slots_cell(row))
    return table


def harness_table(rows: dict[str, dict[str, Any]]) -> Table:
    """Metrics of lm-evaluation-harness: a row per task and metric, a column per model."""
    table = new_table(*rows, "documents")
    for task, metrics in next(iter(rows.values()))["tasks"].items():
        for metric, first in metrics.items():
            cells = []
            for row in rows.values():
                score = row["tasks"][task][metric]
                bounds = "" if score["interval"] is None else " " + bracket(score["interval"], 3)
                cells.append(f"{score['value']:.3f}" + bounds)
            table.add_row(escape(f"{task}, {metric}"), *cells, f"{first['documents']:,}")
    return table


def save_public(output: Path, results: dict[str, Any]) -> None:
    """Write public.json and public.png into a directory that appears only when it is whole."""
    from nha.report.public import public_png
    from nha.report.results import to_json

    with atomic_directory(output) as work:
        (work / "public.json").write_text(to_json(results), encoding="utf-8")
        (work / "public.png").write_bytes(public_png(results["results"]))
    err.print(f"[dim]saved in {escape(str(output))}[/]", soft_wrap=True)


def public_tables(models: dict[str, dict[str, Any]], relative: dict[str, dict[str, Any]]) -> Iterator[Table]:
    """Accuracy on every set and perplexity, a column per model and, beside it, relative to the control."""
    titles = [title for name in models for title in (name, *(["of control"] if name in relative else []))]
    for title, rows in (("accuracy, %", _accuracy_rows(models)), ("perplexity", _perplexity_rows(models))):
        if not rows:
            continue
        table = new_table("n", *titles, first=title)
        for row in rows:
            cells = [row.items]
            for name, cell in row.cells.items():
                cells += [cell, *_relative_cell(relative, name, row.part)]
            table.add_row(row.title, *cells)
        yield table


class PublicRow(NamedTuple):
    """A row of a table: its title, how many items, a cell for each model by name, and its part of the results."""

    title: str
    items: str
    cells: dict[str, str]
    part: str


def _accuracy_rows(models: dict[str, dict[str, Any]]) -> list[PublicRow]:
    from nha.evaluate.public.run import values_of

    accuracy = {name: dict(values_of(row)) for name, row in models.items()}
    rows = []
    for part in dict.fromkeys(part for values in accuracy.values() for part in values):
        found = {name: values.get(part) for name, values in accuracy.items()}
        count = ", ".join(f"{n:,}" for n in sorted({one["count"] for one in found.values() if one}))
        cells = {
            name: f"{100 * one['accuracy']:.1f} {bracket(one['interval'], 1, 100)}" if one else "-"
            for name, one in found.items()
        }
        rows.append(PublicRow(escape(part.replace("_", " ")), count, cells, part))
    return rows


def _perplexity_rows(models: dict[str, dict[str, Any]]) -> list[PublicRow]:
    rows = []
    for length in dict.fromkeys(length for row in models.values() for length in row["perplexity"]):
        found = {name: row["perplexity"].get(length) for name, row in models.items()}
        count = f"{next(one['count'] for one in found.values() if one):,}"
        cells = {name: f"{one['ppl']:.2f} {bracket(one['interval'], 2)}" if one else "-" for name, one in found.items()}
        rows.append(PublicRow(f"{int(length):,} tokens", count, cells, f"perplexity {int(length):,}"))
    return rows


def _relative_cell(relative: dict[str, dict[str, Any]], name: str, part: str) -> list[str]:
    """The cell of a model's column that is relative to the control, none without such a column."""
    if name not in relative:
        return []
    found = relative[name].get(part)
    if found is None or found["ratio"] is None:
        return ["-"]
    return [f"{100 * found['ratio']:.0f} % {bracket(found['interval'], 0, 100)}"]
