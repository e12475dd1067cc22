"""The outcome of tables: summary.json, rows.csv, pictures, and one page that sets the paper's statements beside it."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nha.ablate.language import BY_LENGTH, WINDOW
from nha.ablate.record import ROWS, TABLES, Data, read_about, read_abouts, read_row, read_rows
from nha.ablate.run import best_lr
from nha.ablate.table import EXPECTATIONS, Claim, Row, Table, built_in_tables, read_table, row_name
from nha.evaluate.bootstrap import interval, nested_interval
from nha.io import write_atomically

MIN_PAIRS = 3  # an interval of fewer says nothing
MIN_SEEDS = 3  # of fewer, an interval does not hold what another seed would change
UNDECIDED, UNMEASURED = "undecided", "not measured"
FEW = ", "  # between a verdict and its number of seeds
LOSSES = ("perplexity", WINDOW)  # tasks that are compared by the loss of each document
MARGIN = {"accuracy": 0.02, "loss": 0.01}  # a difference that does not count: of accuracy, of nats per token
COLUMNS = ("table", "arm", "task", "size", "seed", "lr", "state_bytes", "parameters", "tokens", "seconds", "device")
PLAIN = ("accuracy", "ppl", "loss", "recall", "repeats", "interval", "count", "edges", "by_position")


@dataclass(frozen=True)
class Difference:
    """By how much a model is better than another, with its 95 % interval.

    Attributes:
        mean: over `count` pairs of measurements.
        low, high: the interval: over seeds where there are three, and over their documents; else over the pairs.
        seeds: the mean of each seed.
    """

    mean: float
    low: float
    high: float
    count: int
    seeds: tuple[float, ...] = ()

    def verdict(self, expect: str, margin: float) -> str:
        """Whether a claim agrees with it.

        >>> Difference(0.2, 0.1, 0.3, 9).verdict("above", 0.02), Difference(0.0, -0.3, 0.3, 9).verdict("equal", 0.02)
        ('agrees', 'undecided')
        """
        if self.count < MIN_PAIRS:
            return UNDECIDED
        if expect == "above":
            return "agrees" if self.low > 0 else "disagrees" if self.high < margin else UNDECIDED
        if expect == "at least":
            return "agrees" if self.low > -margin else "disagrees" if self.high < 0 else UNDECIDED
        if self.low > -margin and self.high < margin:
            return "agrees"
        return "disagrees" if self.low > 0 or self.high < 0 else UNDECIDED


def best_rows(rows: Sequence[Data]) -> list[Data]:
    """The rows of each model's best learning rate, chosen by the mean over seeds on validation data.

    Learning rates that have fewer seeds than another are left out.
    """
    groups: dict[tuple[str, str], list[Data]] = {}
    for row in rows:
        groups.setdefault((row["table"], row["model"]), []).append(row)
    found: list[Data] = []
    for own in groups.values():
        best = best_lr(own)
        found += [row for row in own if row["lr"] == best]
    return found


def flat(rows: Sequence[Data]) -> list[Data]:
    """One entry a model (under the name `arm`), task, size and seed, with its measures."""
    found = []
    for row in rows:
        for size in row["sizes"]:
            merged = {**row, **size, "arm": row["model"]}
            found.append({name: merged[name] for name in (*COLUMNS, *PLAIN) if name in merged})
    return found


def units(row: Data, claim: Claim) -> dict[tuple[Any, ...], float]:
    """The values that a claim compares, higher is better, by what must be equal in a pair: seed, size and item."""
    found: dict[tuple[Any, ...], float] = {}
    for size in row["sizes"]:
        label = f"{size['task']} {size['size']}"
        if claim.sizes and label not in claim.sizes:
            continue
        place = (row["seed"], label)
        if claim.measure in LOSSES and size["task"] == claim.measure:
            found |= {(*place, number): -loss for number, loss in enumerate(size["by_text"])}
        elif claim.measure == size["task"] and "correct" in size:
            found |= {(*place, number): float(digit) for number, digit in enumerate(size["correct"])}
        elif claim.measure == "accuracy" and row["kind"] == "recall":
            found[place] = size["accuracy"]
    return found


def compare(rows: Sequence[Data], claim: Claim) -> Difference | None:
    """The difference that a claim is about, over pairs of equal seed, size and item; None without a pair."""
    first, second = (
        {key: value for row in rows if row["model"] == name for key, value in units(row, claim).items()}
        for name in (claim.model, claim.against)
    )
    pairs = sorted(first.keys() & second.keys(), key=str)
    if not pairs:
        return None
    by_seed: dict[int, list[float]] = {}
    for key in pairs:
        by_seed.setdefault(key[0], []).append(first[key] - second[key])
    values = [value for own in by_seed.values() for value in own]
    means = tuple(float(np.mean(own)) for own in by_seed.values())
    sampled = claim.measure != "accuracy"  # documents are a sample, sizes of recall are not
    low, high = interval(values) if len(by_seed) < MIN_SEEDS else nested_interval(list(by_seed.values()), inner=sampled)
    return Difference(float(np.mean(values)), low, high, len(values), means)


def remember(table: Table, out: Path, name: str | None = None) -> None:
    """Keep what the page says about a table besides its rows; `name` is that of its file."""
    text = [] if table.language is None else ["--corpus", "CORPUS", "--data", "DATA"]
    about: Data = {"name": table.name, "title": table.title, "kind": table.kind}
    about |= {"command": shlex.join(["nha", "ablate", name or table.name, *text])}
    about |= {"models": [model.name for model in table.models], "rows": [row.name(table.name) for row in table.rows]}
    about["claims"] = [vars(claim) for claim in table.claims]
    about |= {"notes": list(table.notes), "pictured": list(table.pictured)}
    path = out / TABLES / f"{table.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(about, indent=1, default=list) + "\n")


def built_in_digest(row: Data, tables: Mapping[str, Table]) -> str | None:
    """The digest that a row should have, of any learning rate and seed; None if its model is in none of the tables."""
    table = tables.get(row["table"])
    models = () if table is None else table.models
    model = next((model for model in models if model.name == row["model"]), None)
    return None if table is None or model is None else table.digest(Row(model, row["lr"], row["seed"]))


def add_rows(source: Path, out: Path) -> tuple[int, int]:
    """Copy the rows of a directory of results, made on another machine for example, into `out`.

    Returns how many were new, and how many were there already, which are kept.

    Raises:
        ValueError: a row or a table's description is damaged, or a row of other settings than the row or the built-in
            table of its name; nothing is copied then.
    """
    paths = sorted((source / ROWS).glob("*.json"))
    if not paths:
        raise ValueError(f"expected rows of tables in {source / ROWS}, got none")
    new: dict[Path, str] = {}
    tables = {name: read_table(name) for name in built_in_tables()}
    for path in paths:
        found = read_row(path, None)
        assert found is not None
        read_row(path, built_in_digest(found, tables))
        if read_row(out / ROWS / path.name, found["digest"]) is None:
            new[out / ROWS / path.name] = path.read_text(encoding="utf-8")
    for path in (source / TABLES).glob("*.json"):
        read_about(path)
        if not (out / TABLES / path.name).exists():
            new[out / TABLES / path.name] = path.read_text(encoding="utf-8")
    for path, text in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    added = sum(path.parent.name == ROWS for path in new)
    return added, len(paths) - added


def write_summary(out: Path) -> Path:
    """Write summary.json, rows.csv, pictures and README.md of all rows in `out`; returns the page's path.

    Pictures need matplotlib (the extra `report`) and are left out without it. Raises ValueError, before anything is
    written, for a damaged file of a row or a table.
    """
    rows, tables = read_rows(out), read_abouts(out)
    tables.sort(key=lambda table: (table["name"].endswith("-cpu"), table["name"]))  # sizes for a CPU come last
    order = {(table["name"], model): number for table in tables for number, model in enumerate(table["models"])}
    best = sorted(best_rows(rows), key=lambda row: (row["table"], order.get((row["table"], row["model"]), len(order))))
    write_atomically(out / "summary.json", json.dumps(flat(best), indent=1) + "\n")
    write_atomically(out / "rows.csv", as_csv(flat(rows)))
    pictures: list[str] = []
    if find_spec("matplotlib") is not None:
        from nha.ablate.pictures import draw

        hidden = {
            (t["name"], model) for t in tables if t.get("pictured") for model in {*t["models"]} - {*t["pictured"]}
        }
        for name, data in draw([row for row in best if (row["table"], row["model"]) not in hidden]).items():
            write_atomically(out / name, data)
            pictures.append(name)
    page = out / "README.md"
    write_atomically(page, page_text(tables, rows, best, pictures))
    return page


def as_csv(entries: Sequence[Data]) -> str:
    """Entries as CSV, without lists."""
    names = list(COLUMNS) + [name for name in PLAIN if name not in ("interval", "edges", "by_position")]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*names, "low", "high"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        low, high = entry.get("interval") or (None, None)
        writer.writerow({**entry, "low": low, "high": high})
    return file.getvalue()


def page_text(tables: Sequence[Data], rows: Sequence[Data], best: Sequence[Data], pictures: Sequence[str]) -> str:
    """The page in Markdown."""
    lines = ["# Trained from scratch: what the paper says, and what was measured", ""]
    lines += ["Every number is of the learning rate that was best on validation data; all rates are in `rows.csv`."]
    lines += [
        "A claim *agrees* or *disagrees* where the 95 % interval of the paired difference shows it; it is *undecided* "
        f"elsewhere, and with fewer than {MIN_PAIRS} pairs. With {MIN_SEEDS} seeds the interval is over seeds "
        "and the documents of each. With fewer it is over sizes or documents: another seed may change the verdict, "
        "which names the seeds.",
        "",
    ]
    made = [table for table in tables if any(row["table"] == table["name"] for row in best)]
    lines += [*main_lines(made, best), *overview_lines(made, best), ""] if made else []
    for table in made:
        own = [row for row in best if row["table"] == table["name"]]
        everything = [row for row in rows if row["table"] == table["name"]]
        lines += [f"## {table['title']}", "", *about_lines(table, everything, own), ""]
        lines += [*claim_lines(table, own), ""] if table["claims"] else []
        lines += [" ".join(table["notes"]), ""] if table.get("notes") else []
        lines += [*(recall_lines(own) if table["kind"] == "recall" else language_lines(own)), ""]
        if any(size["task"] == WINDOW for row in own for size in row["sizes"]):
            lines += [*window_lines(own), ""]
        for name in pictures:
            if name.rpartition("-")[0] == table["name"]:
                lines += [f"![{table['title']}]({name})", ""]
    missing = [table for table in tables if table not in made]
    if missing:
        lines += ["## Not run yet", "", "| table | command |", "|---|---|"]
        lines += [f"| {table['title']} | `{table['command']}` |" for table in missing]
    return "\n".join(lines).rstrip() + "\n"


def counted(found: Sequence[str], verdict: str) -> str:
    """How often a verdict was found, and how often with few seeds.

    >>> counted(["agrees", "agrees, 1 seed", "undecided"], "agrees")
    '2, 1 of few seeds'
    """
    own = [each for each in found if each.partition(FEW)[0] == verdict]
    few = sum(FEW in each for each in own)
    return f"{len(own)}, {few} of few seeds" if few else str(len(own))


def overview_lines(tables: Sequence[Data], rows: Sequence[Data]) -> list[str]:
    """How many claims of each table agree."""
    lines = ["| table | agree | disagree | undecided | not measured |", "|---|---|---|---|---|"]
    for table in tables:
        found = [judge(rows, claim, table["name"])[1] for claim in claims_of(table)]
        verdicts = ("agrees", "disagrees", UNDECIDED, UNMEASURED)
        counts = " | ".join(counted(found, verdict) for verdict in verdicts)
        lines.append(f"| {table['title']} | {counts} |")
    return lines


def main_lines(tables: Sequence[Data], rows: Sequence[Data]) -> list[str]:
    """The main claims of all tables, and an empty line; nothing without any."""
    lines = []
    for table in tables:
        for claim in claims_of(table):
            if claim.main:
                text, verdict = judge(rows, claim, table["name"])
                lines.append(f"| {table['title']} | {full_text(claim)} | {text} | {shown_verdict(verdict)} |")
    return ["| table | main claim | measured, + is better | |", "|---|---|---|---|", *lines, ""] if lines else []


def full_text(claim: Claim) -> str:
    """A claim with the models that it compares.

    >>> full_text(Claim("slots help", "nha", "window"))
    'slots help (nha better than window)'
    """
    return f"{claim.says} ({claim.model} {EXPECTATIONS[claim.expect]} {claim.against})"


def shown_verdict(verdict: str) -> str:
    """A verdict in Markdown: bold unless it is of few seeds.

    >>> shown_verdict("agrees"), shown_verdict("agrees, 1 seed")
    ('**agrees**', 'agrees, 1 seed')
    """
    return verdict if FEW in verdict else f"**{verdict}**"


def devices_text(rows: Sequence[Data]) -> str:
    """The devices of rows; of several each with its models and seeds.

    >>> devices_text([{"device": "CPU", "model": "nha", "seed": 0}, {"device": "H200", "model": "nha", "seed": 1}])
    'CPU (nha: seed 0); H200 (nha: seed 1)'
    """
    devices = sorted({row["device"] for row in rows})
    if len(devices) == 1:
        return devices[0]
    parts = []
    for device in devices:
        seeds: dict[str, set[int]] = {}
        for row in rows:
            if row["device"] == device:
                seeds.setdefault(row["model"], set()).add(row["seed"])
        shown = [f"{model}: seed{'s' * (len(own) > 1)} {numbers(own)}" for model, own in seeds.items()]
        parts.append(f"{device} ({', '.join(shown)})")
    return "; ".join(parts)


def numbers(values: Iterable[float]) -> str:
    """Numbers, sorted, in a few words."""
    return ", ".join(f"{value:g}" for value in sorted(values))


def millions(values: Sequence[float]) -> str:
    """The range of numbers in millions.

    >>> millions([40_000]), millions([1e6, 2.5e6])
    ('0.04 M', '1 M to 2.5 M')
    """
    low, high = (f"{value / 1e6:.3g} M" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def about_lines(table: Data, rows: Sequence[Data], best: Sequence[Data]) -> list[str]:
    """Devices, seeds, sizes, rows that are missing, and the command."""
    present = {row_name(row["table"], row["model"], row["lr"], row["seed"]) for row in rows}
    missing = [name for name in table["rows"] if name not in present]
    models = [name for name in table["models"] if name not in {row["model"] for row in best}]
    learned = " (a run ends early once all sizes are learned)" if table["kind"] == "recall" else ""
    lines = [
        f"{devices_text(rows)}. Seeds {numbers({row['seed'] for row in rows})}; learning rates "
        f"{numbers({row['lr'] for row in rows})}; {millions([row['parameters'] for row in best])} parameters; "
        f"{millions([row['tokens'] for row in best])} tokens{learned}.",
    ]
    if missing:
        without = f"; no row of: {', '.join(models)}" if models else ""
        lines += ["", f"{len(missing)} of {len(table['rows'])} rows are not run yet{without}."]
    return [*lines, "", f"    {table['command']}"]


def claims_of(table: Data) -> list[Claim]:
    """The claims of a table as it was remembered."""
    return [Claim(**(plain | {"sizes": tuple(plain["sizes"])})) for plain in table["claims"]]


def judge(rows: Sequence[Data], claim: Claim, table: str) -> tuple[str, str]:
    """The measured difference of a claim in a few words, and the verdict, with the seeds where they are few."""
    found = compare([row for row in rows if row["table"] == table], claim)
    if found is None:
        return "", UNMEASURED
    kind = "loss" if claim.measure in LOSSES else "accuracy"
    scale, unit = (1, "nats per token") if kind == "loss" else (100, f"points of {claim.measure.replace('_', ' ')}")
    digits = 3 if kind == "loss" else 1
    low, middle, high = (f"{scale * value:+.{digits}f}" for value in (found.low, found.mean, found.high))
    text = f"{middle} {unit} [{low}, {high}], {found.count} pair{'s' * (found.count > 1)}"
    seeds, verdict = len(found.seeds), found.verdict(claim.expect, MARGIN[kind])
    if seeds > 1:
        text += f"; by seed {', '.join(f'{scale * value:+.{digits}f}' for value in found.seeds)}"
    if seeds < MIN_SEEDS and verdict != UNDECIDED:
        verdict += f"{FEW}{seeds} seed{'s' * (seeds > 1)}"
    return text, verdict


def claim_lines(table: Data, rows: Sequence[Data]) -> list[str]:
    """The table of claims."""
    lines = ["| claim | measured, + is better | |", "|---|---|---|"]
    for claim in claims_of(table):
        text, verdict = judge(rows, claim, table["name"])
        lines.append(f"| {full_text(claim)} | {text} | {shown_verdict(verdict)} |")
    return lines


def recall_lines(rows: Sequence[Data]) -> list[str]:
    """Accuracy by model and size, in percent, mean over seeds."""
    sizes = list(dict.fromkeys(f"{s['task']} {s['size']}" for row in rows for s in row["sizes"]))
    lines = [f"| model | lr | state, KiB | {' | '.join(sizes)} |", "|---|---|---|" + "---|" * len(sizes)]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        values = [
            np.mean([s["accuracy"] for row in own for s in row["sizes"] if f"{s['task']} {s['size']}" == size])
            for size in sizes
        ]
        memory = [s["state_bytes"] / 1024 for s in own[0]["sizes"]]
        low, high = f"{min(memory):,.0f}", f"{max(memory):,.0f}"
        shown = low if low == high else f"{low} to {high}"
        cells = " | ".join(f"{100 * value:.1f}" for value in values)
        lines.append(f"| {name} | {own[0]['lr']:g} | {shown} | {cells} |")
    return lines


def window_lines(rows: Sequence[Data]) -> list[str]:
    """Perplexity and recall of a text that is read twice, by model and window at run time, mean over seeds."""
    sizes = list(dict.fromkeys(s["size"] for row in rows for s in row["sizes"] if s["task"] == WINDOW))
    heads = " | ".join("full" if size == "-1" else size for size in sizes)
    lines = [
        "Perplexity / recall (%) of a text that is read twice, with these windows at run time:",
        "",
        f"| model | {heads} |",
        "|---|" + "---|" * len(sizes),
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        found = [s for row in rows if row["model"] == name for s in row["sizes"] if s["task"] == WINDOW]
        cells = []
        for size in sizes:
            own = [s for s in found if s["size"] == size]
            ppl, recall = (float(np.mean([s[key] for s in own])) if own else None for key in ("ppl", "recall"))
            cells.append("" if ppl is None or recall is None else f"{ppl:.2f} / {100 * recall:.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def language_lines(rows: Sequence[Data]) -> list[str]:
    """Perplexity by length and accuracy by set, mean over seeds."""
    keys = list(dict.fromkeys((s["task"], s["size"]) for row in rows for s in row["sizes"] if s["task"] != WINDOW))
    heads = [f"{task} {int(size):,}" if task in BY_LENGTH else task for task, size in keys]
    lines = [f"| model | lr | state at the longest, KiB | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(heads)]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        cells = []
        for key in keys:
            found = [s for row in own for s in row["sizes"] if (s["task"], s["size"]) == key]
            values = [s["ppl"] if key[0] == "perplexity" else 100 * s["accuracy"] for s in found]
            cells.append(f"{np.mean(values):.2f}" if values else "")
        memory = max(s["state_bytes"] for s in own[0]["sizes"]) / 1024
        lines.append(f"| {name} | {own[0]['lr']:g} | {memory:,.0f} | {' | '.join(cells)} |")
    return lines
