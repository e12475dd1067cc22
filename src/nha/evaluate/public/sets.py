"""The public test sets: which fields they have, how a prompt is made of them, and reading them from a directory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nha.data.sources import json_rows, text_in

SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.bz2")
HELD_OUT = "heldout"  # the file of held-out documents


@dataclass(frozen=True)
class SetFormat:
    """How a set is read and scored.

    Attributes:
        kind: "choice" (fields query, choices, gold), "last_word" (context, continuation) or "question" (passage,
            question, answers).
        delimiter: between a query and its answer; what follows its last character that is no space is scored.
        per_byte: whether a choice's log-likelihood is divided by its bytes.
    """

    kind: str
    delimiter: str = " "
    per_byte: bool = False


ANSWER = "\nAnswer: "
FORMATS = {
    "lambada_openai": SetFormat("last_word"),
    "piqa": SetFormat("choice", ANSWER),
    "arc_easy": SetFormat("choice", ANSWER),
    "arc_challenge": SetFormat("choice", ANSWER, per_byte=True),
    "hellaswag": SetFormat("choice", per_byte=True),
    "boolq": SetFormat("choice"),
    "copa": SetFormat("choice"),
    "squad_qa": SetFormat("question"),
}


@dataclass(frozen=True)
class Item:
    """A question with one prompt: likelihoods of `choices` after it are compared, or an answer is written.

    `gold` is the index of the correct choice; `answers` are the accepted written answers, all of one meaning.
    """

    prompt: str
    choices: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()


def files_of_set(data: Path, name: str) -> list[Path]:
    """The files of a directory and below it that hold a set of this name."""
    return [path for suffix in SUFFIXES for path in sorted(data.rglob(name + suffix)) if path.is_file()]


def find_set(data: Path, name: str) -> Path:
    """The file of a set in a directory or below it. Raises ValueError that names what is missing, or is there twice.

    >>> find_set(Path("/nowhere"), "piqa")
    Traceback (most recent call last):
        ...
    ValueError: expected a directory of test sets, there is none at /nowhere
    """
    if not data.is_dir():
        raise ValueError(f"expected a directory of test sets, there is none at {data}")
    found = files_of_set(data, name)
    if not found:
        raise ValueError(f"expected the set {name} in {data}, there is no {name}.jsonl, {name}.jsonl.xz or .gz")
    if len(found) > 1:
        raise ValueError(f"expected the set {name} once in {data}, got {found[0]} and {found[1]}")
    return found[0]


def read_set(path: Path, layout: SetFormat) -> list[Item]:
    """The items of a set. Raises ValueError, with file and line, for a field that is missing or of another type."""
    read = {"choice": _choice, "last_word": _last_word, "question": _question}[layout.kind]
    items = [read(row, layout, f"line {number} of {path}") for number, row in json_rows(path)]
    if not items:
        raise ValueError(f"expected at least one item in {path}, got none")
    return items


def _choice(row: dict[str, Any], layout: SetFormat, place: str) -> Item:
    query, choices, gold = text_in(row, "query", place), _texts(row, "choices", place), row.get("gold")
    if len(choices) < 2:
        raise ValueError(f"expected two or more choices in {place}, got {len(choices)}")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"expected gold as an index below {len(choices)} in {place}, got {gold!r}")
    query = query.strip() if layout.delimiter == ANSWER else query
    return Item(query + layout.delimiter, choices, gold)


def _last_word(row: dict[str, Any], layout: SetFormat, place: str) -> Item:
    word = text_in(row, "continuation", place).strip()
    if not word:
        raise ValueError(f"expected a word in field 'continuation' in {place}, got none")
    return Item(text_in(row, "context", place) + layout.delimiter, (word,))


def _question(row: dict[str, Any], layout: SetFormat, place: str) -> Item:
    passage, question = text_in(row, "passage", place), text_in(row, "question", place)
    return Item(f"{passage}\nQuestion: {question}\nAnswer:", answers=_texts(row, "answers", place))


def _texts(row: dict[str, Any], field: str, place: str) -> tuple[str, ...]:
    given = row.get(field)
    if not isinstance(given, list) or not given:
        got = f"{type(given).__name__}" if field in row else f"the fields {sorted(row)}"
        raise ValueError(f"expected a list of texts in field {field!r} in {place}, got {got}")
    texts = tuple(text_in({field: text}, field, place) for text in given)
    if not all(text.strip() for text in texts):
        raise ValueError(f"expected no empty text in field {field!r} in {place}")
    return texts


def read_documents(path: Path) -> list[str]:
    """Held-out documents: the field text of every line; consecutive lines with the same field book are joined.

    Raises ValueError with file and line, as `read_set` does.
    """
    documents: list[str] = []
    before = None
    for number, row in json_rows(path):
        text, book = text_in(row, "text", f"line {number} of {path}"), row.get("book")
        if book is not None and book == before:
            documents[-1] += "\n\n" + text
        else:
            documents.append(text)
        before = book
    if not any(text.strip() for text in documents):
        raise ValueError(f"expected text in {path}, got none")
    return documents


def read_passages(path: Path) -> list[str]:
    """Documents made of a set of questions: its passages, each once, those of one title joined.

    Raises ValueError, with file and line, for a line without a passage.
    """
    titles: dict[str, dict[str, None]] = {}
    for number, row in json_rows(path):
        passage = text_in(row, "passage", f"line {number} of {path}")
        titles.setdefault(str(row.get("title")), {})[passage] = None
    return ["\n\n".join(passages) for passages in titles.values()]


def spaced(items: Sequence[Any], limit: int | None) -> list[Any]:
    """At most `limit` items, evenly spaced, in order.

    >>> spaced(list(range(10)), 4)
    [0, 2, 5, 7]
    """
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def file_digest(path: Path) -> str:
    """A digest of a file's bytes, for the identity of an evaluation."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
