"""Recall text: facts, then real text, then questions that only a memory of those facts can answer.

Every row is made of pieces that are tokenised once for each tokenizer and joined as token ids, so that a fact is the
same tokens where it is stated and where it is asked for, and distances are exact. Training and evaluation draw from
names, words and wordings that share nothing (`nha.data.recall_words`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary, proxy

import numpy as np
from transformers import PreTrainedTokenizerBase

from nha.data.recall_words import EVALUATION, TRAINING, Wording, Words

Filler = Callable[[int], Sequence[int]] | np.ndarray
TASKS = ("fact", "passkey", "needle", "phone_book", "pairs", "copy")


@dataclass(frozen=True)
class RecallSettings:
    """What rows to train on are made of.

    Attributes:
        tasks: drawn with equal chance; name one twice to draw it twice as often.
        facts: fewest and most facts in a row, drawn log-uniformly; raise the second over training for harder rows.
        distances: fewest and most tokens between a value and its answer, drawn log-uniformly. The first is always
            kept, the second is what is aimed at where questions crowd.
        far: share of rows whose distances are drawn log-uniformly from the far end instead. In rows of 8,192 tokens
            with up to 64 facts 3 % of the questions are asked more than half a row later and 0.1 % more than nine
            tenths; with 0.5 it is 40 and 15 %.
        scattered: share of rows whose facts and questions are scattered; the others have one block of facts.
        exam: share of the rows with a block whose questions come all at once.
        digits: fewest and most digits of a number.
        copied: fewest and most words of a list to copy.
    """

    tasks: tuple[str, ...] = TASKS
    facts: tuple[int, int] = (1, 16)
    distances: tuple[int, int] = (72, 1 << 20)
    far: float = 0.0
    scattered: float = 0.5
    exam: float = 0.3
    digits: tuple[int, int] = (3, 7)
    copied: tuple[int, int] = (4, 12)

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"expected tasks out of {TASKS}, got {self.tasks}")
        for name in ("facts", "distances", "digits", "copied"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"expected {name} to be two ints, 1 <= fewest <= most, got {(low, high)}")
        for name in ("far", "scattered", "exam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} to be a share from 0 to 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class EvaluationTask:
    """A task to measure: `facts` facts of the evaluation's wording for (task, value), one of them asked for.

    `size` is the number of digits or words of the value; scattered facts lie anywhere before the question.
    """

    task: str
    value: str
    facts: int
    size: int = 1
    scattered: bool = False


EVALUATION_TASKS: dict[str, EvaluationTask] = {
    "one_fact": EvaluationTask("fact", "digits", 1, 4),
    "one_fact_word": EvaluationTask("fact", "word", 1),
    "four_facts": EvaluationTask("fact", "digits", 4, 4),
    "four_facts_word": EvaluationTask("fact", "word", 4),
    "passkey": EvaluationTask("passkey", "digits", 1, 5),
    "multi_key_needle": EvaluationTask("needle", "digits", 4, 6, scattered=True),
    "phone_book": EvaluationTask("phone_book", "digits", 16, 5),
    "mqar": EvaluationTask("pairs", "word", 8),
    "copy": EvaluationTask("copy", "words", 1, 8),
}


@dataclass(frozen=True)
class RecallSet:
    """Rows of one task at one distance: ids [N, T] int64 and answers [N, T] bool, true at the answer's tokens.

    The answer is the end of every row; the prompt is what comes before it. `distance` is the number of tokens from the
    value's first token, where it is stated, to the answer's first token.
    """

    task: str
    distance: int
    ids: np.ndarray
    answers: np.ndarray


@dataclass
class Pieces:
    """The pieces of text that one tokenizer has read so far, as ids; `start` is its first token, if it adds one."""

    tokenizer: Any
    start: list[int]
    known: dict[str, list[int]] = field(default_factory=dict)

    def __call__(self, text: str) -> list[int]:
        """Ids of a piece in the middle of a text."""
        if text not in self.known:
            self.known[text] = self._encode(text)
        return self.known[text]

    def _encode(self, text: str) -> list[int]:
        def ids(of: str) -> list[int]:
            return list(self.tokenizer(of, add_special_tokens=False, verbose=False).input_ids)

        # Some tokenizers put a blank before a text's first word: let a line break come before the piece.
        line, led = ids("\n"), ids("\n" + text)
        found = led[len(line) :] if led[: len(line)] == line else ids(text)
        if not found:
            raise ValueError(f"expected a tokenizer that reads {text!r}, got no tokens")
        return found

    def number(self, digits: str) -> list[int]:
        """Ids of a number, as the tokenizer splits it."""
        single = [token for digit in "0123456789" for token in self(digit)]
        if self("0123456789") == single:
            return [token for digit in digits for token in self(digit)]
        return self._encode(digits)


_PIECES: WeakKeyDictionary[Any, Pieces] = WeakKeyDictionary()


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The pieces of a tokenizer, kept for as long as it lives."""
    if tokenizer not in _PIECES:
        first = list(tokenizer("a", verbose=False).input_ids[:1])
        start = first if first == [tokenizer.bos_token_id] else []
        _PIECES[tokenizer] = Pieces(proxy(tokenizer), start)
    return _PIECES[tokenizer]


@dataclass
class Fact:
    """A fact as ids: its statement, where in it the value begins, the question up to its answer, the value, the end."""

    say: list[int]
    at: int
    ask: list[int]
    value: list[int]
    end: list[int]

    @property
    def asked(self) -> int:
        """Tokens of question, answer and end."""
        return len(self.ask) + len(self.value) + len(self.end)


def _join(pieces: Pieces, text: str, key: str, value: list[int], spaced: bool) -> tuple[list[int], int]:
    """Ids of a wording with key and value filled in, and where the value begins.

    The blank before a key, and before a value where it is `spaced`, is part of that word.
    """
    ids: list[int] = []
    at = 0
    parts = re.split(r"(\{key\}|\{value\})", text)
    for part, following in pairwise([*parts, ""]):
        if part == "{key}":
            ids += [token for word in key.split() for token in pieces(" " + word)]
        elif part == "{value}":
            at = len(ids)
            ids += value
        elif part:
            blank = following == "{key}" or (following == "{value}" and spaced)
            part = part.removesuffix(" ") if blank else part
            ids += pieces(part) if part else []
    return ids, at


def make_fact(pieces: Pieces, wording: Wording, key: str, value: str) -> Fact:
    """The fact that `key` has `value`: digits, or words with blanks between."""
    spaced = wording.value != "digits"
    words = [token for word in value.split() for token in pieces(" " + word)] if spaced else pieces.number(value)
    say, at = _join(pieces, wording.say, key, words, spaced)
    ask, end = _join(pieces, wording.ask, key, words, spaced)
    return Fact(say, at, ask[:end], words, pieces(".\n\n"))


def _draw_key(generator: np.random.Generator, words: Words, kind: str) -> str:
    if kind == "name":
        return f"{_pick(generator, words.first)} {_pick(generator, words.last)}"
    return _pick(generator, words.nouns) if kind == "word" else ""


def _draw_value(generator: np.random.Generator, words: Words, kind: str, size: int) -> str:
    if kind == "digits":
        return "".join(map(str, generator.integers(0, 10, size)))
    if kind == "word":
        return _pick(generator, words.nouns)
    return " ".join(words.nouns[i] for i in generator.choice(len(words.nouns), size, replace=False))


def _pick(generator: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(generator.integers(len(items)))]


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))


def draw_facts(
    generator: np.random.Generator,
    pieces: Pieces,
    words: Words,
    wordings: Sequence[Wording],
    sizes: Callable[[str], int],
) -> list[Fact]:
    """One fact for each wording; no two share wording and key, or a value, and no word is both key and value.

    Wordings without a key that come twice are left out. `sizes` gives the digits or words of a kind of value.
    """
    found: list[Fact] = []
    used: set[Any] = set()
    for wording in wordings:
        if not wording.key and wording in used:
            continue
        for _ in range(100):
            key = _draw_key(generator, words, wording.key)
            value = _draw_value(generator, words, wording.value, sizes(wording.value))
            taken = {value, (wording, key)} | ({key} if wording.key == "word" else set())
            if not taken & used and value != key:
                break
        else:
            raise ValueError(f"expected fewer facts than there are names and words, got {len(wordings)}")
        used |= taken | {wording}
        found.append(make_fact(pieces, wording, key, value))
    return found


def stretch(generator: np.random.Generator, filler: Filler, length: int) -> list[int]:
    """`length` tokens of real text: what `filler` gives, or a stretch of the ids that it is, from a random place.

    >>> stretch(np.random.default_rng(0), np.arange(100), 4)
    [82, 83, 84, 85]
    """
    if length == 0:
        return []
    if not callable(filler):
        if filler.ndim != 1 or len(filler) < length:
            raise ValueError(f"expected at least {length} filler tokens in one dimension, got {list(filler.shape)}")
        at = int(generator.integers(len(filler) - length + 1))
        return filler[at : at + length].tolist()
    found = [int(token) for token in filler(length)]
    if len(found) != length:
        raise ValueError(f"expected {length} tokens from the filler, got {len(found)}")
    return found


def training_row(
    generator: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    length: int,
    settings: RecallSettings | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One row to train on: ids [length] int64, and answers [length] bool, true at the tokens of every answer.

    Facts and their questions lie in real text from `filler`: a function that gives as many tokens as it is asked
    for, or ids [n] from which stretches are drawn. The row is a function of the generator (and the filler) alone, and
    it has at least one answer. Raises ValueError for rows too short for one fact and its question.
    """
    settings = settings or RecallSettings()
    pieces = pieces_of(tokenizer)
    room = length - len(pieces.start)
    scattered = generator.random() < settings.scattered
    facts = _training_facts(generator, pieces, settings, room, scattered)
    ids, answers = list(pieces.start), [False] * len(pieces.start)

    def put(tokens: list[int], answer: tuple[int, int] = (0, 0)) -> None:
        ids.extend(tokens)
        answers.extend(answer[0] <= i < answer[1] for i in range(len(tokens)))

    for start, fact, asks in _plan(generator, facts, settings, room, scattered):
        put(stretch(generator, filler, start + len(pieces.start) - len(ids)))
        if asks:
            put([*fact.ask, *fact.value, *fact.end], (len(fact.ask), len(fact.ask) + len(fact.value)))
        else:
            put(fact.say)
    put(stretch(generator, filler, length - len(ids)))
    return np.array(ids, dtype=np.int64), np.array(answers, dtype=bool)


def _training_facts(
    generator: np.random.Generator, pieces: Pieces, settings: RecallSettings, room: int, scattered: bool
) -> list[Fact]:
    """Facts for one row: as many as drawn, or as many as take up at most 60 % of it with their questions."""
    count = round(_log_uniform(generator, settings.facts[0] - 0.49, settings.facts[1] + 0.49))
    task = _pick(generator, settings.tasks)
    tasks = [_pick(generator, settings.tasks) if scattered else task for _ in range(count)]
    wordings = [_pick(generator, [w for w in TRAINING.wordings if w.task == t]) for t in tasks]
    if not scattered and wordings[0].key and generator.random() < 0.5:
        wordings = wordings[:1] * count
    bounds = {"digits": settings.digits, "word": (1, 1), "words": settings.copied}

    def size(kind: str) -> int:
        return int(generator.integers(bounds[kind][0], bounds[kind][1] + 1))

    facts = draw_facts(generator, pieces, TRAINING, wordings, size)
    needed = _least_room(facts[0], settings) + len(pieces.start)
    if needed > room + len(pieces.start):
        raise ValueError(f"expected rows of at least {needed} tokens, got {room + len(pieces.start)}")
    taken = np.cumsum([len(fact.say) + fact.asked for fact in facts])
    return facts[: max(1, int((taken <= 0.6 * room).sum()))]


def _least_room(fact: Fact, settings: RecallSettings) -> int:
    """Tokens of the shortest row that has this fact and its question."""
    return max(fact.at + settings.distances[0] + len(fact.value) + len(fact.end), len(fact.say) + fact.asked)


def _plan(
    generator: np.random.Generator, facts: list[Fact], settings: RecallSettings, room: int, scattered: bool
) -> list[tuple[int, Fact, bool]]:
    """Where each statement (False) and question (True) starts, in order and without overlap, within `room` tokens."""
    least, most = settings.distances
    far = settings.far > 0 and generator.random() < settings.far  # without a share nothing is drawn
    wanted: list[tuple[float, Fact, bool]] = []

    def distance(longest: float) -> float:
        longest = max(least, min(most, longest))
        drawn = _log_uniform(generator, least, longest)
        return least + longest - drawn if far else drawn

    def state_and_ask(fact: Fact, start: float, distance: float) -> None:
        wanted.append((start, fact, False))
        wanted.append((start + max(len(fact.say), fact.at + distance - len(fact.ask)), fact, True))

    if scattered:
        for fact in facts:
            spare = max(1, room - _least_room(fact, settings))
            if far:
                apart = distance(least + spare)
                start = generator.uniform(0, max(1, spare - (apart - least)))
            else:
                start = generator.uniform(0, spare)
                apart = distance(room - start)
            state_and_ask(fact, start, apart)
    else:
        said, asked = sum(len(fact.say) for fact in facts), sum(fact.asked for fact in facts)
        spare = max(1, 0.9 * (room - said - asked - least))
        start = generator.uniform(0, max(1, 0.1 * spare) if far else spare)
        end = start + said
        exam = generator.random() < settings.exam
        together = distance(room - end - asked)
        for fact in facts:
            alone = distance(room - end)
            state_and_ask(fact, start, end - start - fact.at + together if exam else alone)
            start += len(fact.say)
    events = _settle(sorted(wanted, key=lambda event: event[0]), least, room)
    if not any(asks for _, _, asks in events):  # one fact alone always fits
        return _plan(generator, facts[: max(1, len(facts) // 2)], settings, room, scattered)
    return events


def _settle(wanted: list[tuple[float, Fact, bool]], least: int, room: int) -> list[tuple[int, Fact, bool]]:
    """Move events apart until none overlap and all end within `room`; questions that come too soon are left out."""
    sizes = [fact.asked if asks else len(fact.say) for _, fact, asks in wanted]
    starts: list[int] = []
    free = 0
    values: dict[int, int] = {}
    for (start, fact, asks), size in zip(wanted, sizes, strict=True):
        # What a question waits for was said before: events come in the order in which they are wanted.
        soonest = values[id(fact)] + least - len(fact.ask) if asks else 0
        start = max(free, int(start), soonest)
        if not asks:
            values[id(fact)] = start + fact.at
        starts.append(start)
        free = start + size
    limit = room
    for i in reversed(range(len(starts))):
        starts[i] = limit = min(starts[i], limit - sizes[i])
    events = [(start, fact, asks) for start, (_, fact, asks) in zip(starts, wanted, strict=True)]
    values = {id(fact): start + fact.at for start, fact, asks in events if not asks}
    return [e for e in events if not e[2] or e[0] + len(e[1].ask) - values[id(e[1])] >= least]


def evaluation_set(
    task: str, distance: int, *, length: int, rows: int, seed: int, tokenizer: PreTrainedTokenizerBase, filler: Filler
) -> RecallSet:
    """`rows` rows of `length` tokens of a task in `EVALUATION_TASKS`, each with one question at its end.

    From the first token of the value, where it is stated, to the first token of the answer it is exactly `distance`
    tokens. Row n has the same facts at every distance and length. A function of the arguments alone (with `filler` ids,
    or a function of its length). Raises ValueError for an unknown task and where the distance leaves no room.
    """
    if task not in EVALUATION_TASKS:
        raise ValueError(f"expected a recall task in {sorted(EVALUATION_TASKS)}, got {task!r}")
    if rows < 1:
        raise ValueError(f"expected at least one row, got {rows}")
    pieces, kind, number = pieces_of(tokenizer), EVALUATION_TASKS[task], list(EVALUATION_TASKS).index(task)
    wordings = [w for w in EVALUATION.wordings if (w.task, w.value) == (kind.task, kind.value)]
    ids = np.empty((rows, length), dtype=np.int64)
    answers = np.zeros((rows, length), dtype=bool)
    for row in range(rows):
        generator = np.random.default_rng([seed, number, row])
        facts = draw_facts(generator, pieces, EVALUATION, wordings[:1] * kind.facts, lambda _: kind.size)
        try:
            ids[row], count = _evaluation_row(generator, pieces, facts, distance, length, kind.scattered, filler)
        except ValueError as error:
            raise ValueError(f"{error}, for {task!r} at a distance of {distance} in rows of {length}") from None
        answers[row, length - count :] = True
    return RecallSet(task, distance, ids, answers)


def _evaluation_row(
    generator: np.random.Generator,
    pieces: Pieces,
    facts: list[Fact],
    distance: int,
    length: int,
    scattered: bool,
    filler: Filler,
) -> tuple[list[int], int]:
    """A row that asks for one of the facts at this distance, and the number of tokens of its answer."""
    sizes = np.array([len(fact.say) for fact in facts])
    value = length - np.array([len(fact.value) for fact in facts]) - distance  # where the asked fact's value begins
    begin = value - [fact.at for fact in facts]
    question = length - np.array([len(fact.value) + len(fact.ask) for fact in facts])
    before = begin - len(pieces.start) - (sizes.cumsum() - sizes)  # tokens of filler before and after the asked fact
    after = question - begin - sizes - (sizes[::-1].cumsum()[::-1] - sizes)
    fits = np.flatnonzero((before >= 0) & (after >= 0))
    if not len(fits):
        raise ValueError(f"expected room for the facts, got a value too {'far back' if (before < 0).all() else 'near'}")
    asked = int(generator.choice(fits))
    if scattered:
        asked = int(np.clip(generator.binomial(len(facts) - 1, 1 - distance / length), fits[0], fits[-1]))
    ids = list(pieces.start)

    def lay(part: list[Fact], room: int, filler_first: bool) -> None:
        block = np.full(len(part), room if filler_first else 0)
        cuts = np.sort(generator.integers(0, room + 1, len(part))) if scattered else block
        for fact, gap in zip(part, np.diff(cuts, prepend=0), strict=True):
            ids.extend(stretch(generator, filler, int(gap)))
            ids.extend(fact.say)
        ids.extend(stretch(generator, filler, room - int(cuts[-1] if len(part) else 0)))

    fact = facts[asked]
    lay(facts[:asked], int(before[asked]), True)
    ids.extend(fact.say)
    lay(facts[asked + 1 :], int(after[asked]), False)
    return ids + fact.ask + fact.value, len(fact.value)
