"""Recall sequences to measure with: one question at the end, at an exact distance from its fact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from nha.data.recall.facts import Fact, Filler, Pieces, draw_facts, filler_tokens, pieces_of
from nha.data.recall.words import EVALUATION


@dataclass(frozen=True)
class EvaluationTask:
    """A task to measure: `facts` facts of the evaluation's wording for (task, value), one of which is asked for.

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
    """Sequences of one task at one distance: ids [N, T] int64 and answers [N, T] bool, true at the answer's tokens.

    The answer ends every sequence and the prompt is the rest. `distance` is the number of tokens from the value's
    first token, where it is stated, to the answer's first token.
    """

    task: str
    distance: int
    ids: np.ndarray
    answers: np.ndarray


def evaluation_set(
    task: str, distance: int, *, seq_len: int, count: int, seed: int, tokenizer: PreTrainedTokenizerBase, filler: Filler
) -> RecallSet:
    """`count` sequences of `seq_len` tokens of a task in `EVALUATION_TASKS`, each with one question at its end.

    From the first token of the value, where it is stated, to the first token of the answer it is exactly `distance`
    tokens. Sequence n has the same facts at every distance and length. A function of the arguments alone. Raises
    ValueError for an unknown task and where the distance leaves no room.
    """
    if task not in EVALUATION_TASKS:
        raise ValueError(f"expected a recall task in {sorted(EVALUATION_TASKS)}, got {task!r}")
    if count < 1:
        raise ValueError(f"expected at least one sequence, got {count}")
    pieces, kind, number = pieces_of(tokenizer), EVALUATION_TASKS[task], list(EVALUATION_TASKS).index(task)
    wordings = [w for w in EVALUATION.wordings if (w.task, w.value) == (kind.task, kind.value)]
    ids = np.empty((count, seq_len), dtype=np.int64)
    answers = np.zeros((count, seq_len), dtype=bool)
    for index in range(count):
        generator = np.random.default_rng([seed, number, index])
        facts = draw_facts(generator, pieces, EVALUATION, wordings[:1] * kind.facts, lambda _: kind.size)
        try:
            ids[index], size = _sequence(generator, pieces, facts, distance, seq_len, kind.scattered, filler)
        except ValueError as error:
            raise ValueError(f"{error}, for {task!r} at a distance of {distance} in {seq_len} tokens") from None
        answers[index, seq_len - size :] = True
    return RecallSet(task, distance, ids, answers)


def _sequence(
    generator: np.random.Generator,
    pieces: Pieces,
    facts: list[Fact],
    distance: int,
    seq_len: int,
    scattered: bool,
    filler: Filler,
) -> tuple[list[int], int]:
    """A sequence that asks for one of the facts at this distance, and the number of tokens of its answer."""
    sizes = np.array([len(fact.statement) for fact in facts])
    value_start = seq_len - np.array([len(fact.value) for fact in facts]) - distance
    fact_start = value_start - [fact.value_offset for fact in facts]
    question = seq_len - np.array([len(fact.value) + len(fact.question) for fact in facts])
    # Tokens of filler before and after the fact that is asked for, if it is this one.
    before = fact_start - len(pieces.start) - (sizes.cumsum() - sizes)
    after = question - fact_start - sizes - (sizes[::-1].cumsum()[::-1] - sizes)
    fits = np.flatnonzero((before >= 0) & (after >= 0))
    if not len(fits):
        raise ValueError(f"expected room for the facts, got a value too {'far back' if (before < 0).all() else 'near'}")
    target = int(generator.choice(fits))
    if scattered:
        target = int(np.clip(generator.binomial(len(facts) - 1, 1 - distance / seq_len), fits[0], fits[-1]))
    ids = list(pieces.start)

    def lay_out(part: list[Fact], room: int, filler_first: bool) -> None:
        block = np.full(len(part), room if filler_first else 0)
        cuts = np.sort(generator.integers(0, room + 1, len(part))) if scattered else block
        for fact, gap in zip(part, np.diff(cuts, prepend=0), strict=True):
            ids.extend(filler_tokens(generator, filler, int(gap)))
            ids.extend(fact.statement)
        ids.extend(filler_tokens(generator, filler, room - int(cuts[-1] if len(part) else 0)))

    fact = facts[target]
    lay_out(facts[:target], int(before[target]), True)
    ids.extend(fact.statement)
    lay_out(facts[target + 1 :], int(after[target]), False)
    return ids + fact.question + fact.value, len(fact.value)
