"""The files of a directory of results: a JSON file for each row and for each table, checked as they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nha.ablate.language import BY_LENGTH, WINDOW
from nha.ablate.table import KINDS, Claim, row_name
from nha.evaluate.public.run import PERPLEXITY

ROWS, TABLES = "rows", "tables"
Data = dict[str, Any]
Kinds = Mapping[str, tuple[str, Callable[[Any], bool]]]  # by name: what is expected, and whether a value is that


def row_file(out: Path, name: str) -> Path:
    """Where the result of a row is."""
    return out / ROWS / f"{name}.json"


def read_row(path: Path, digest: str | None) -> Data | None:
    """The result of a row, None if there is none.

    Raises ValueError, with the file's name, if it is damaged, is not the row that its name says, or its digest is not
    `digest`, where that is known.
    """
    if not path.exists():
        return None
    row = _read(path, "a row of a table", ("digest",))
    if "model" not in row:
        raise ValueError(f"expected a row with the key model in {path}, got one of an older version: delete it")
    _check(row, ROW, path)
    name = row_name(row["table"], row["model"], row["lr"], row["seed"])
    if name != path.stem:
        raise ValueError(f"expected the row {path.stem} in {path}, got the row {name}: delete it")
    for number, size in enumerate(row["sizes"], 1):
        where = f"size {number} of {path}"
        _check(size, SIZE, where)
        _check(size, _measures(row["kind"], size["task"]), where)
    if digest is not None and row["digest"] != digest:
        raise ValueError(f"expected the row in {path} to be of the settings of this table, got others: delete it")
    return row


def read_rows(out: Path) -> list[Data]:
    """All rows in a directory of results, by name. Raises ValueError as `read_row` does."""
    found = [read_row(path, None) for path in sorted((out / ROWS).glob("*.json"))]
    return [row for row in found if row is not None]


def read_about(path: Path) -> Data:
    """The description of a table, which the page shows beside its rows.

    Raises ValueError, with the file's name, if it is damaged or of another table than its name says.
    """
    about = _read(path, "a table's description", ("name",))
    _check(about, ABOUT, path)
    if about["name"] != path.stem:
        raise ValueError(f"expected the table {path.stem} in {path}, got the table {about['name']}")
    for number, claim in enumerate(about["claims"], 1):
        try:
            Claim(**claim)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected a claim as claim {number} of {path}, got another one: {error}") from None
        _check({"sizes": []} | claim, {"sizes": TEXTS}, f"claim {number} of {path}")
    return about


def read_abouts(out: Path) -> list[Data]:
    """The descriptions of all tables in a directory of results, by name. Raises ValueError as `read_about`."""
    return [read_about(path) for path in sorted((out / TABLES).glob("*.json"))]


def check_record(out: Path) -> None:
    """Raise ValueError for a damaged file of a row or a table in a directory of results, which may be absent."""
    read_rows(out)
    read_abouts(out)


def _read(path: Path, what: str, names: tuple[str, ...]) -> Data:
    """The mapping in a JSON file. Raises ValueError for anything else, and for one without one of the names."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # RecursionError: brackets nested by the thousand
        found = None
    if not isinstance(found, dict) or not found.keys() >= set(names):
        raise ValueError(f"expected {what} in {path}, got another file")
    return found


def _check(values: Any, kinds: Kinds, where: Path | str) -> None:
    """Raise ValueError, with the place, unless a mapping holds values of these kinds."""
    if not isinstance(values, dict):
        raise ValueError(f"expected a mapping as {where}, got {type(values).__name__}")
    for name, (expected, fits) in kinds.items():
        if name not in values:
            raise ValueError(f"expected {name} in {where}, got the names {', '.join(map(str, values))}"[:300])
        if not fits(values[name]):
            raise ValueError(f"expected {name} as {expected} in {where}, got {values[name]!r}"[:300])


def _measures(kind: str, task: str) -> Kinds:
    """The measures that a size of a task has."""
    if kind == "recall":
        return {"accuracy": FRACTION}
    length: Kinds = {"size": INTEGER_TEXT} if task in (*BY_LENGTH, WINDOW) else {}
    if task == PERPLEXITY:
        return {**length, "ppl": PPL, "by_text": NUMBERS, "edges": NUMBERS, "by_position": NUMBERS}
    if task == WINDOW:
        return {**length, "ppl": PPL, "by_text": NUMBERS, "recall": FRACTION}
    return {**length, "accuracy": FRACTION, "correct": DIGITS}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


TEXT = "a text", _is_text
TEXTS = "a list of texts", _is_list(_is_text)
COUNT = "an integer of at least 0", lambda value: _is_int(value) and value >= 0
NUMBER = "a number", _is_number
NUMBERS = "a list of numbers", _is_list(_is_number)
FRACTION = "a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1
PPL = "a number of at least 1", lambda value: _is_number(value) and not value < 1  # NaN is shown as it is
DIGITS = "digits 0 and 1", lambda value: isinstance(value, str) and set(value) <= {"0", "1"}
INTEGER_TEXT = "an integer in a text", lambda value: isinstance(value, str) and value.removeprefix("-").isdecimal()
KIND = " or ".join(KINDS), lambda value: value in KINDS
LR = "a number above 0", lambda value: _is_number(value) and math.isfinite(value) and value > 0
PARTS = "a list of one or more", lambda value: isinstance(value, list) and bool(value)
SIZE: Kinds = {"task": TEXT, "size": TEXT, "state_bytes": COUNT}
ROW: Kinds = {
    **{name: TEXT for name in ("table", "digest", "model", "device")},
    **{name: COUNT for name in ("seed", "parameters", "tokens")},
    **{"kind": KIND, "lr": LR, "valid": NUMBER, "seconds": NUMBER, "sizes": PARTS},
}
ABOUT: Kinds = {
    **{name: TEXT for name in ("name", "title", "command")},
    **{name: TEXTS for name in ("models", "rows", "notes", "pictured")},
    **{"kind": KIND, "claims": ("a list of mappings", _is_list(lambda value: isinstance(value, dict)))},
}
