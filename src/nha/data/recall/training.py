"""Recall sequences to train on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from nha.data.recall.facts import Fact, Filler, Pieces, draw_facts, filler_tokens, pick, pieces_of
from nha.data.recall.settings import RecallSettings
from nha.data.recall.words import TRAINING

MAX_FACT_FRACTION = 0.6  # of a sequence: facts with their questions
Event = tuple[int, Fact, bool]  # start, fact, whether it is the question


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))


def training_sequence(
    generator: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    seq_len: int,
    settings: RecallSettings | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One recall sequence to train on: ids [seq_len] int64, and bool [seq_len], true at the tokens of every answer.

    The token after an answer's value belongs to it: a model that is trained on values alone writes on after them.

    Facts and their questions lie in real text from `filler`: a function that returns as many tokens as requested, or
    ids [N] from which spans are drawn. The sequence is a function of the generator and the filler alone, and has at
    least one answer. Raises ValueError if `seq_len` is too short for one fact and its question.
    """
    settings = settings or RecallSettings()
    pieces = pieces_of(tokenizer)
    room = seq_len - len(pieces.start)
    scattered = bool(generator.random() < settings.scattered_fraction)
    facts = _draw_training_facts(generator, pieces, settings, room, scattered)
    ids, answers = list(pieces.start), [False] * len(pieces.start)

    def append(tokens: list[int], answer: tuple[int, int] = (0, 0)) -> None:
        ids.extend(tokens)
        answers.extend(answer[0] <= i < answer[1] for i in range(len(tokens)))

    for start, fact, is_question in _plan(generator, facts, settings, room, scattered):
        append(filler_tokens(generator, filler, start + len(pieces.start) - len(ids)))
        if is_question:
            tokens = [*fact.question, *fact.value, *fact.end]
            append(tokens, (len(fact.question), len(fact.question) + len(fact.value) + 1))
        else:
            append(fact.statement)
    append(filler_tokens(generator, filler, seq_len - len(ids)))
    return np.array(ids, dtype=np.int64), np.array(answers, dtype=bool)


def _draw_training_facts(
    generator: np.random.Generator, pieces: Pieces, settings: RecallSettings, room: int, scattered: bool
) -> list[Fact]:
    """Facts of one sequence: as many as drawn, or as many as fit `MAX_FACT_FRACTION` of it with their questions."""
    count = round(_log_uniform(generator, settings.facts[0] - 0.49, settings.facts[1] + 0.49))
    task = pick(generator, settings.tasks)
    tasks = [pick(generator, settings.tasks) if scattered else task for _ in range(count)]
    wordings = [pick(generator, [w for w in TRAINING.wordings if w.task == t]) for t in tasks]
    if not scattered and wordings[0].key and generator.random() < 0.5:
        wordings = wordings[:1] * count
    bounds = {"digits": settings.digits, "word": (1, 1), "words": settings.copy_words}

    def size_of(kind: str) -> int:
        return int(generator.integers(bounds[kind][0], bounds[kind][1] + 1))

    facts = draw_facts(generator, pieces, TRAINING, wordings, size_of, fewer=True)
    needed = _min_room(facts[0], settings) + len(pieces.start)
    if needed > room + len(pieces.start):
        raise ValueError(f"expected recall sequences of at least {needed} tokens, got {room + len(pieces.start)}")
    total = np.cumsum([len(fact.statement) + fact.question_len for fact in facts])
    return facts[: max(1, int((total <= MAX_FACT_FRACTION * room).sum()))]


def _min_room(fact: Fact, settings: RecallSettings) -> int:
    """Tokens of the shortest sequence that holds this fact and its question."""
    return max(
        fact.value_offset + settings.distances[0] + len(fact.value) + len(fact.end),
        len(fact.statement) + fact.question_len,
    )


def _plan(
    generator: np.random.Generator, facts: list[Fact], settings: RecallSettings, room: int, scattered: bool
) -> list[Event]:
    """Starts of statements and questions, in order and without overlap, within `room` tokens."""
    # Without a long-range fraction no number is drawn, so that older runs keep their sequences.
    long_range = settings.long_range_fraction > 0 and bool(generator.random() < settings.long_range_fraction)
    place = _scatter if scattered else _place_block
    events = _separate(place(generator, facts, settings, room, long_range), settings.distances[0], room)
    if not any(is_question for _, _, is_question in events):  # one fact alone always fits
        return _plan(generator, facts[: max(1, len(facts) // 2)], settings, room, scattered)
    return events


def _draw_distance(generator: np.random.Generator, settings: RecallSettings, limit: float, long_range: bool) -> float:
    """Tokens from a value to its answer, at most `limit` where the settings allow it."""
    low, high = settings.distances
    high = max(low, min(high, limit))
    drawn = _log_uniform(generator, low, high)
    return low + high - drawn if long_range else drawn


def _pair(fact: Fact, start: float, distance: float) -> list[tuple[float, Fact, bool]]:
    """The events of a statement at `start` and of its question `distance` tokens after the value."""
    question = start + max(len(fact.statement), fact.value_offset + distance - len(fact.question))
    return [(start, fact, False), (question, fact, True)]


def _scatter(
    generator: np.random.Generator, facts: list[Fact], settings: RecallSettings, room: int, long_range: bool
) -> list[tuple[float, Fact, bool]]:
    """Wanted events of facts that lie anywhere, each with its question anywhere after it."""
    wanted: list[tuple[float, Fact, bool]] = []
    low = settings.distances[0]
    for fact in facts:
        spare = max(1, room - _min_room(fact, settings))
        if long_range:
            distance = _draw_distance(generator, settings, low + spare, long_range)
            start = generator.uniform(0, max(1, spare - (distance - low)))
        else:
            start = generator.uniform(0, spare)
            distance = _draw_distance(generator, settings, room - start, long_range)
        wanted += _pair(fact, start, distance)
    return wanted


def _place_block(
    generator: np.random.Generator, facts: list[Fact], settings: RecallSettings, room: int, long_range: bool
) -> list[tuple[float, Fact, bool]]:
    """Wanted events of facts in one block, with their questions one after another or scattered after it."""
    wanted: list[tuple[float, Fact, bool]] = []
    stated, asked = sum(len(fact.statement) for fact in facts), sum(fact.question_len for fact in facts)
    spare = max(1, 0.9 * (room - stated - asked - settings.distances[0]))
    start = generator.uniform(0, max(1, 0.1 * spare) if long_range else spare)
    end = start + stated
    at_end = generator.random() < settings.questions_at_end_fraction
    shared = _draw_distance(generator, settings, room - end - asked, long_range)
    for fact in facts:
        own = _draw_distance(generator, settings, room - end, long_range)
        wanted += _pair(fact, start, end - start - fact.value_offset + shared if at_end else own)
        start += len(fact.statement)
    return wanted


def _separate(wanted: Sequence[tuple[float, Fact, bool]], min_distance: int, room: int) -> list[Event]:
    """Shift events until none overlap and all end within `room`; questions closer than `min_distance` are dropped."""
    wanted = sorted(wanted, key=lambda event: event[0])
    sizes = [fact.question_len if is_question else len(fact.statement) for _, fact, is_question in wanted]
    starts: list[int] = []
    free = 0
    values: dict[int, int] = {}
    for (start, fact, is_question), size in zip(wanted, sizes, strict=True):
        # A question comes after its statement: events keep their wanted order.
        soonest = values[id(fact)] + min_distance - len(fact.question) if is_question else 0
        placed = max(free, math.trunc(start), soonest)
        if not is_question:
            values[id(fact)] = placed + fact.value_offset
        starts.append(placed)
        free = placed + size
    limit = room
    for i in reversed(range(len(starts))):
        starts[i] = limit = min(starts[i], limit - sizes[i])
    events = [(start, fact, is_question) for start, (_, fact, is_question) in zip(starts, wanted, strict=True)]
    values = {id(fact): start + fact.value_offset for start, fact, is_question in events if not is_question}
    return [e for e in events if not e[2] or e[0] + len(e[1].question) - values[id(e[1])] >= min_distance]
