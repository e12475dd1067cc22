"""Facts as token ids: wordings filled in with keys and values, and the text that fills the space between."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, proxy

import numpy as np
from transformers import PreTrainedTokenizerBase

from nha.data.recall.words import Wording, Words

Filler = Callable[[int], Sequence[int] | np.ndarray] | np.ndarray
T = TypeVar("T")
MAX_DRAWS = 100


@dataclass
class Pieces:
    """Token ids of the pieces of text read so far with one tokenizer; `start` is its BOS token, if it adds one."""

    tokenizer: Any
    start: list[int]
    known: dict[str, list[int]] = field(default_factory=dict)

    def __call__(self, text: str) -> list[int]:
        """Token ids of a piece in the middle of a text."""
        if text not in self.known:
            self.known[text] = self._encode(text)
        return self.known[text]

    def _encode(self, text: str) -> list[int]:
        def ids(of: str) -> list[int]:
            return list(self.tokenizer(of, add_special_tokens=False, verbose=False).input_ids)

        # Some tokenizers put a space before a text's first word, so a newline comes before the piece.
        newline, with_newline = ids("\n"), ids("\n" + text)
        found = with_newline[len(newline) :] if with_newline[: len(newline)] == newline else ids(text)
        if not found:
            raise ValueError(f"expected a tokenizer that gives tokens for {text!r}, got none")
        return found

    def number(self, digits: str) -> list[int]:
        """Token ids of a number, split as the tokenizer splits it."""
        single = [token for digit in "0123456789" for token in self(digit)]
        if self("0123456789") == single:
            return [token for digit in digits for token in self(digit)]
        return self._encode(digits)


_PIECES: WeakKeyDictionary[Any, Pieces] = WeakKeyDictionary()


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The pieces of a tokenizer, cached for its lifetime."""
    if tokenizer not in _PIECES:
        first = list(tokenizer("a", verbose=False).input_ids[:1])
        start = first if first == [tokenizer.bos_token_id] else []
        _PIECES[tokenizer] = Pieces(proxy(tokenizer), start)
    return _PIECES[tokenizer]


@dataclass
class Fact:
    """A fact as token ids.

    Attributes:
        statement: the statement; the value begins at `value_offset` in it.
        question: the question up to its answer.
        value: the answer.
        end: what follows the answer.
    """

    statement: list[int]
    value_offset: int
    question: list[int]
    value: list[int]
    end: list[int]

    @property
    def question_len(self) -> int:
        """Tokens of question, answer and end."""
        return len(self.question) + len(self.value) + len(self.end)


def _fill_in(pieces: Pieces, text: str, key: str, value: list[int], spaced: bool) -> tuple[list[int], int]:
    """Token ids of a wording with key and value filled in, and the offset of the value.

    The space before a key, and before a value where it is `spaced`, is part of that word's tokens.
    """
    ids: list[int] = []
    offset = 0
    parts = re.split(r"(\{key\}|\{value\})", text)
    for part, following in pairwise([*parts, ""]):
        if part == "{key}":
            ids += [token for word in key.split() for token in pieces(" " + word)]
        elif part == "{value}":
            offset = len(ids)
            ids += value
        elif part:
            takes_space = following == "{key}" or (following == "{value}" and spaced)
            part = part.removesuffix(" ") if takes_space else part
            ids += pieces(part) if part else []
    return ids, offset


def make_fact(pieces: Pieces, wording: Wording, key: str, value: str) -> Fact:
    """The fact that `key` has `value`: digits, or words separated by spaces."""
    spaced = wording.value != "digits"
    tokens = [token for word in value.split() for token in pieces(" " + word)] if spaced else pieces.number(value)
    statement, offset = _fill_in(pieces, wording.statement, key, tokens, spaced)
    question, end = _fill_in(pieces, wording.question, key, tokens, spaced)
    return Fact(statement, offset, question[:end], tokens, pieces(".\n\n"))


def pick(generator: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, drawn uniformly."""
    return items[int(generator.integers(len(items)))]


def _draw_key(generator: np.random.Generator, words: Words, kind: str) -> str:
    if kind == "name":
        return f"{pick(generator, words.first)} {pick(generator, words.last)}"
    return pick(generator, words.nouns) if kind == "word" else ""


def _draw_value(generator: np.random.Generator, words: Words, kind: str, size: int) -> str:
    if kind == "digits":
        return "".join(map(str, generator.integers(0, 10, size)))
    if kind == "word":
        return pick(generator, words.nouns)
    return " ".join(words.nouns[i] for i in generator.choice(len(words.nouns), size, replace=False))


def draw_facts(
    generator: np.random.Generator,
    pieces: Pieces,
    words: Words,
    wordings: Sequence[Wording],
    size_of: Callable[[str], int],
    fewer: bool = False,
) -> list[Fact]:
    """One fact for each wording; no two share wording and key, or a value, and no word is both key and value.

    Wordings without a key that come twice are left out. `size_of` gives the digits or words of a kind of value. Where
    names and words run out, those that were drawn are returned if `fewer` is set. Raises ValueError otherwise.
    """
    found: list[Fact] = []
    used: set[Any] = set()
    for wording in wordings:
        if not wording.key and wording in used:
            continue
        for _ in range(MAX_DRAWS):
            key = _draw_key(generator, words, wording.key)
            value = _draw_value(generator, words, wording.value, size_of(wording.value))
            new = {value, (wording, key)} | ({key} if wording.key == "word" else set())
            if not new & used and value != key:
                break
        else:
            if fewer and found:
                return found
            raise ValueError(f"expected fewer facts than there are names and words, got {len(wordings)}")
        used |= new | {wording}
        found.append(make_fact(pieces, wording, key, value))
    return found


def filler_tokens(generator: np.random.Generator, filler: Filler, count: int) -> list[int]:
    """`count` tokens of real text: from the function `filler`, or a random span of the ids [N] in `filler`.

    >>> filler_tokens(np.random.default_rng(0), np.arange(100), 4)
    [82, 83, 84, 85]
    """
    if count == 0:
        return []
    if not callable(filler):
        if filler.ndim != 1 or len(filler) < count:
            raise ValueError(f"expected at least {count} filler tokens in one dimension, got {list(filler.shape)}")
        start = int(generator.integers(len(filler) - count + 1))
        return filler[start : start + count].tolist()
    found = [int(token) for token in filler(count)]
    if len(found) != count:
        raise ValueError(f"expected {count} tokens from the filler, got {len(found)}")
    return found
