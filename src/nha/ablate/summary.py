"""The outcome of tables: summary.json, rows.csv, pictures, and one page that sets the paper's statements beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nha.ablate.run import ROWS
from nha.ablate.table import EXPECTATIONS, Claim, Table
from nha.evaluate.bootstrap import interval
from nha.io import write_atomically

TABLES = "tables"
MARGIN = {"accuracy": 0.02, "loss": 0.01}  # a difference that does not count: of accuracy, of nats per token
COLUMNS = ("table", "arm", "task", "size", "seed", "lr", "state_bytes", "parameters", "tokens", "seconds", "device")
PLAIN = ("accuracy", "ppl", "loss", "repeats", "interval", "count", "edges", "by_position")
Data = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """By how much an arm is better than another, with its 95 % interval; `count` pairs of measurements."""

    mean: float
    low: float
    high: float
    count: int

    def verdict(self, expect: str, margin: float) -> str:
        """Whether a claim agrees with it.

        >>> Difference(0.2, 0.1, 0.3, 9).verdict("above", 0.02), Difference(0.0, -0.3, 0.3, 9).verdict("equal", 0.02)
        ('agrees', 'undecided')
        """
        if expect == "above":
            return "agrees" if self.low > 0 else "disagrees" if self.high < margin else "undecided"
        if expect == "at least":
            return "agrees" if self.low > -margin else "disagrees" if self.high < 0 else "undecided"
        if self.low > -margin and self.high < margin:
            return "agrees"
        return "disagrees" if self.low > 0 or self.high < 0 else "undecided"


def read_rows(out: Path) -> list[Data]:
    """All rows in a directory of results, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / ROWS).glob("*.json"))]


def best_rows(rows: Sequence[Data]) -> list[Data]:
    """The rows of each arm's best learning rate, chosen by the mean over seeds on validation data.

    Learning rates that have fewer seeds than another are left out.
    """
    groups: dict[tuple[str, str], dict[float, list[Data]]] = {}
    for row in rows:
        groups.setdefault((row["table"], row["arm"]), {}).setdefault(row["lr"], []).append(row)
    found: list[Data] = []
    for by_lr in groups.values():
        most = max(map(len, by_lr.values()))
        whole = [same for same in by_lr.values() if len(same) == most]
        found += max(whole, key=lambda same: float(np.mean([row["valid"] for row in same])))
    return found


def flat(rows: Sequence[Data]) -> list[Data]:
    """One entry an arm, task, size and seed, with its measures."""
    found = []
    for row in rows:
        for size in row["sizes"]:
            merged = {**row, **size}
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
        if claim.measure == "perplexity" and size["task"] == "perplexity":
            found |= {(*place, number): -loss for number, loss in enumerate(size["by_text"])}
        elif claim.measure == size["task"] and "correct" in size:
            found |= {(*place, number): float(digit) for number, digit in enumerate(size["correct"])}
        elif claim.measure == "accuracy" and row["kind"] == "recall":
            found[place] = size["accuracy"]
    return found


def compare(rows: Sequence[Data], claim: Claim) -> Difference | None:
    """The difference that a claim is about, over pairs of equal seed, size and item; None without a pair."""
    first, second = (
        {key: value for row in rows if row["arm"] == name for key, value in units(row, claim).items()}
        for name in (claim.arm, claim.against)
    )
    pairs = sorted(first.keys() & second.keys(), key=str)
    if not pairs:
        return None
    values = [first[key] - second[key] for key in pairs]
    low, high = interval(values)
    return Difference(float(np.mean(values)), low, high, len(values))


def remember(table: Table, out: Path, command: str) -> None:
    """Keep what the page says about a table besides its rows."""
    about: Data = {"name": table.name, "title": table.title, "kind": table.kind, "command": command}
    about["arms"] = [arm.name for arm in table.arms]
    about["claims"] = [vars(claim) for claim in table.claims]
    path = out / TABLES / f"{table.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(about, indent=1, default=list) + "\n")


def write_summary(out: Path) -> Path:
    """Write summary.json, rows.csv, pictures and README.md of all rows in `out`; returns the page's path.

    Pictures need matplotlib (the extra `report`) and are left out without it.
    """
    rows = read_rows(out)
    best = best_rows(rows)
    entries = flat(best)
    write_atomically(out / "summary.json", json.dumps(entries, indent=1) + "\n")
    write_atomically(out / "rows.csv", as_csv(flat(rows)))
    pictures: list[str] = []
    if find_spec("matplotlib") is not None:
        from nha.ablate.pictures import draw

        for name, data in draw(best).items():
            write_atomically(out / name, data)
            pictures.append(name)
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / TABLES).glob("*.json"))]
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
    lines += ["Every number is of the learning rate that was best on validation data; all rates are in `rows.csv`.", ""]
    for table in tables:
        own = [row for row in best if row["table"] == table["name"]]
        if not own:
            continue
        everything = [row for row in rows if row["table"] == table["name"]]
        lines += [f"## {table['title']}", "", *about_lines(table, everything, own), ""]
        lines += [*claim_lines(table, own), ""] if table["claims"] else []
        lines += [*(recall_lines(own) if table["kind"] == "recall" else language_lines(own)), ""]
        lines += [f"![{name}]({name})" for name in pictures if name.startswith(f"{table['name']}-")] + [""]
    return "\n".join(lines).rstrip() + "\n"


def about_lines(table: Data, rows: Sequence[Data], best: Sequence[Data]) -> list[str]:
    """Seeds, sizes, devices and the command."""
    seeds, lrs, devices = (sorted({row[name] for row in rows}) for name in ("seed", "lr", "device"))
    parameters = [row["parameters"] for row in best]
    tokens = [row["tokens"] for row in best]
    missing = [name for name in table["arms"] if name not in {row["arm"] for row in best}]
    return [
        f"{', '.join(devices)}; seeds {', '.join(map(str, seeds))}; "
        f"learning rates {', '.join(f'{lr:g}' for lr in lrs)}; "
        f"{min(parameters):,} to {max(parameters):,} parameters; {min(tokens) / 1e6:.1f} to {max(tokens) / 1e6:.1f} M "
        "tokens (recall ends early once all sizes are learned)"
        + (f"; not measured: {', '.join(missing)}." if missing else "."),
        "",
        f"    {table['command']}",
    ]


def claim_lines(table: Data, rows: Sequence[Data]) -> list[str]:
    """The table of claims."""
    lines = ["| the paper says | measured: difference, 95 % interval | |", "|---|---|---|"]
    for plain in table["claims"]:
        claim = Claim(**(plain | {"sizes": tuple(plain["sizes"])}))
        found = compare(rows, claim)
        text, verdict = "not measured", ""
        if found is not None:
            kind = "loss" if claim.measure == "perplexity" else "accuracy"
            scale, unit = (1, " nats") if kind == "loss" else (100, " points")
            text = (
                f"{claim.measure} of {claim.arm}, {scale * found.mean:+.2f}{unit} better than {claim.against} "
                f"[{scale * found.low:+.2f}, {scale * found.high:+.2f}], {found.count} pairs"
            )
            verdict = found.verdict(claim.expect, MARGIN[kind])
        lines.append(
            f"| {claim.says} ({claim.arm} {EXPECTATIONS[claim.expect]} {claim.against}) | {text} | {verdict} |"
        )
    return lines


def recall_lines(rows: Sequence[Data]) -> list[str]:
    """Accuracy by arm and size, in percent, mean over seeds."""
    sizes = list(dict.fromkeys(f"{s['task']} {s['size']}" for row in rows for s in row["sizes"]))
    lines = [f"| arm | lr | state, KiB | {' | '.join(sizes)} |", "|---|---|---|" + "---|" * len(sizes)]
    for name in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == name]
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


def language_lines(rows: Sequence[Data]) -> list[str]:
    """Perplexity by length and accuracy by set, mean over seeds."""
    keys = list(dict.fromkeys((s["task"], s["size"]) for row in rows for s in row["sizes"]))
    heads = [f"perplexity {int(size):,}" if task == "perplexity" else task for task, size in keys]
    lines = [f"| arm | lr | state at the longest, KiB | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(heads)]
    for name in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == name]
        cells = []
        for key in keys:
            found = [s for row in own for s in row["sizes"] if (s["task"], s["size"]) == key]
            values = [s["ppl"] if key[0] == "perplexity" else 100 * s["accuracy"] for s in found]
            cells.append(f"{np.mean(values):.2f}" if values else "")
        memory = max(s["state_bytes"] for s in own[0]["sizes"]) / 1024
        lines.append(f"| {name} | {own[0]['lr']:g} | {memory:,.0f} | {' | '.join(cells)} |")
    return lines
