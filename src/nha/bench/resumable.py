"""A table that is measured case by case: measured cases are kept, and the same command measures the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from nha.bench.timing import Table, select
from nha.errors import one_line
from nha.io import write_atomically

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """The result of a call of `complete`: whether all cases are there, the names of those that failed, and the rows."""

    whole: bool
    failed: tuple[str, ...] = ()
    rows: Rows = field(default_factory=list, compare=False, repr=False)


def kept_cases(path: Path) -> list[dict[str, Any]]:
    """The cases of a file, each with its machine and versions and its rows; a last line that was cut short is left out.

    Raises ValueError, with the line, for any other line that is no case.
    """
    found: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if _is_case(entry):
            found.append(entry)
        elif entry is not None or number < len(lines) or line.endswith(b"\n"):
            raise ValueError(f"expected a measured case in line {number} of {path}, got another line: delete the file")
    return found


def _is_case(entry: Any) -> TypeGuard[dict[str, Any]]:
    kinds = {"case": str, "about": dict, "rows": list}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in kinds.items()):
        return False
    return all(isinstance(row, dict) for row in entry["rows"])


def _write_cases(path: Path, entries: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def complete(
    path: Path,
    columns: Sequence[str],
    cases: Mapping[str, Callable[[], Rows]],
    about: Mapping[str, Any],
    budget_s: float,
    log: Callable[[str], None],
    only: str | None = None,
    in_part: bool = False,
) -> Outcome:
    """Measure the cases that are missing and write the table once all are there; `in_part`: with those that are there.

    No new case starts after `budget_s` seconds, and none whose name does not match the regular expression `only`. A
    case's rows go to PATH.cases at once, durably, from where the next call takes them; cases of another machine or
    version are measured again. A case that fails is left out with a line of the log, and the next call measures it
    again. Raises ValueError for an expression that matches none.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "times.csv"
    >>> cases = {"one": lambda: [{"ms": 1}], "two": lambda: [{"ms": 2}]}
    >>> complete(path, ["ms"], cases, {}, 0, lambda line: None)
    Outcome(whole=False, failed=())
    >>> complete(path, ["ms"], cases, {}, 60, lambda line: None), path.read_text().split()
    (Outcome(whole=True, failed=()), ['ms', '1', '2'])
    """
    kept, started = path.with_name(path.name + ".cases"), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    entries, wanted = kept_cases(kept), select(list(cases), only)
    found: dict[str, Rows] = {entry["case"]: entry["rows"] for entry in entries if entry["about"] == dict(about)}
    failed: list[str] = []
    for name in wanted:
        if name in found:
            continue
        if time.perf_counter() - started >= budget_s:
            break
        try:
            found[name] = cases[name]()
        except Exception as error:
            failed.append(name)
            log(f"failed: {name}: " + f"{type(error).__name__}: {one_line(error)[:300]}".removesuffix(": "))
            continue
        entries.append({"case": name, "about": dict(about), "rows": found[name]})
        _write_cases(kept, entries)
    whole, rows = cases.keys() <= found.keys(), [row for name in cases for row in found.get(name, ())]
    if whole or (in_part and rows):
        with Table(path, columns) as table:
            for row in rows:
                table.add(row)
        log(f"{len(rows)} rows in {path}")
    if whole:
        others = [entry for entry in entries if entry["about"] == dict(about) and entry["case"] not in cases]
        if others:  # of a longer table, which this call measured a part of
            _write_cases(kept, others)
        else:
            kept.unlink(missing_ok=True)
    else:
        log(f"{len(cases.keys() & found.keys())} of {len(cases)} cases in {kept}: run the command again for the others")
    return Outcome(whole, tuple(failed), rows)
