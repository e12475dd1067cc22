"""A table that is measured case by case: measured cases are kept, and the same command measures the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nha.bench.timing import Table

Rows = list[dict[str, Any]]


def measured(path: Path, about: Mapping[str, Any]) -> dict[str, Rows]:
    """The rows of a file of cases by case, of those that were measured on the same machine with the same versions."""
    found: dict[str, Rows] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # a line that was cut short
                continue
            if entry["about"] == dict(about):
                found[entry["case"]] = entry["rows"]
    return found


def complete(
    path: Path,
    columns: Sequence[str],
    cases: Mapping[str, Callable[[], Rows]],
    about: Mapping[str, Any],
    budget_s: float,
    log: Callable[[str], None],
) -> bool:
    """Measure the cases that are missing and write the table once all are there; whether they are.

    No new case starts after `budget_s` seconds. A case's rows go to PATH.cases at once, from where the next call takes
    them; cases of another machine or version are measured again.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "times.csv"
    >>> cases = {"one": lambda: [{"ms": 1}], "two": lambda: [{"ms": 2}]}
    >>> complete(path, ["ms"], cases, {}, 0, lambda line: None)
    False
    >>> complete(path, ["ms"], cases, {}, 60, lambda line: None), path.read_text().split()
    (True, ['ms', '1', '2'])
    """
    kept, started = path.with_name(path.name + ".cases"), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    found = measured(kept, about)
    for name, measure in cases.items():
        if name in found:
            continue
        if time.perf_counter() - started >= budget_s:
            log(f"{len(found)} of {len(cases)} cases in {kept}: run the same command again to resume")
            return False
        found[name] = measure()
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": name, "about": dict(about), "rows": found[name]}) + "\n")
    with Table(path, columns) as table:
        for name in cases:
            for row in found[name]:
                table.add(row)
    kept.unlink(missing_ok=True)
    log(f"{len(table.rows)} rows in {path}")
    return True
