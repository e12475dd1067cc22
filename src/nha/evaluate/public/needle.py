"""Needles in held-out prose: a key and a number at a depth, asked for at the end, written by the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from nha.data.recall.facts import draw_facts, filler_tokens, pieces_of
from nha.data.recall.words import EVALUATION

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DIGITS = 6


@dataclass(frozen=True)
class Needle:
    """A prompt of token ids, the number that is asked for, and where it stands: 0 is the start, 1 the end."""

    prompt: tuple[int, ...]
    answer: str
    depth: float


def make_needles(
    tokenizer: PreTrainedTokenizerBase,
    haystack: np.ndarray,
    length: int,
    count: int,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> list[Needle]:
    """`count` needles for every depth, in prompts of exactly `length` tokens of the haystack's ids [N].

    A function of its arguments; needle n has the same key and number at every depth and length. Raises ValueError if
    the haystack is shorter than `length`, or `length` than the needle and its question.
    """
    pieces = pieces_of(tokenizer)
    wording = next(w for w in EVALUATION.wordings if w.task == "needle")
    found = []
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        (fact,) = draw_facts(generator, pieces, EVALUATION, [wording], lambda _: DIGITS)
        room = length - len(pieces.start) - len(fact.statement) - len(fact.question)
        if room < 0:
            raise ValueError(f"expected needles in at least {length - room} tokens, got {length}")
        answer = str(tokenizer.decode(fact.value)).strip()
        for depth in depths:
            place = np.random.default_rng([seed, number, length, round(1000 * depth)])
            text = filler_tokens(place, haystack, room)
            before = round(depth * room)
            prompt = [*pieces.start, *text[:before], *fact.statement, *text[before:], *fact.question]
            found.append(Needle(tuple(prompt), answer, depth))
    return found
