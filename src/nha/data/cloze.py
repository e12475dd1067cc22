"""Verbatim recall of natural text: a passage, text between, and a sentence of it again, cut before a name or number.

The words before the cut stand in the passage once, so the rest can be copied from there. A near cloze has its source
within 256 tokens, a far one 500 to 4,000 tokens back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

RANGES = {"cloze_near": (72, 256), "cloze_far": (500, 4000)}  # tokens from the source of the answer to the answer
SENTENCE = re.compile(r"[^\s.!?][^.!?\n]*(?:[.!?](?=\w)[^.!?\n]*)*[.!?][”’\"']?(?=\s|$)")
NAME = r"(?!(?:Mrs?|Dr|St|Gen|Col|Prof)\b)[A-Z][a-zà-ÿ]+(?:[ -][A-Z][a-zà-ÿ]+)*"
NUMBER = r"\d[\d,.]*\d|\d"
ANSWER = re.compile(rf"(?<=[a-z,] )(?:{NAME}|{NUMBER})(?!\w)")
MIN_PREFIX, MAX_SENTENCE = 30, 400  # characters
LEAD = 300  # characters of passage before the sentence, at most


@dataclass(frozen=True)
class Cloze:
    """A prompt that ends in a cut sentence, the name or number that follows, and its distance in tokens."""

    prompt: str
    answer: str
    distance: int


def cut_sentences(text: str) -> Iterator[tuple[int, int, int, str]]:
    """(start, cut, end, answer) of every sentence that can be cut before a name or number, in characters.

    >>> text = "We met in spring. The ship that brought her over was the old Narcissus of Bombay. It sank."
    >>> [(text[start:cut], answer) for start, cut, _, answer in cut_sentences(text)]
    [('The ship that brought her over was the old ', 'Narcissus')]
    """
    for sentence in SENTENCE.finditer(text):
        if len(sentence.group()) > MAX_SENTENCE:
            continue
        for found in ANSWER.finditer(sentence.group()):
            if found.start() >= MIN_PREFIX:
                yield sentence.start(), sentence.start() + found.start(), sentence.end(), found.group()
                break


def make_clozes(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    count: int,
    distances: tuple[int, int],
    seed: int = 0,
) -> list[Cloze]:
    """Up to `count` clozes whose source is `distances` (min, max) tokens before the answer, drawn log-uniformly.

    A function of its arguments. Raises ValueError if no document is long enough for any.
    """
    generator = np.random.default_rng([seed, *distances])
    candidates = [
        (number, (start, cut, end), answer)
        for number, text in enumerate(documents)
        for start, cut, end, answer in cut_sentences(text)
    ]
    found: list[Cloze] = []
    for index in generator.permutation(len(candidates)):
        number, place, answer = candidates[int(index)]
        target = float(np.exp(generator.uniform(*np.log(distances))))
        cloze = _make(tokenizer, documents[number], place, answer, target, distances)
        if cloze is not None:
            found.append(cloze)
        if len(found) == count:
            return found
    if not found:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"expected documents with room for {distances[0]} tokens between a sentence and its repetition, got "
            f"{longest} characters in the longest"
        )
    return found


def _make(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    place: tuple[int, int, int],
    answer: str,
    target: float,
    distances: tuple[int, int],
) -> Cloze | None:
    """A cloze near the target distance, or None if the text has none."""
    start, cut, end = place
    prefix = text[start:cut].rstrip()
    lead = text.rfind("\n", max(0, start - LEAD), start) + 1 or max(0, start - LEAD)
    if lead == start - LEAD:  # begin with a whole word
        lead = text.find(" ", lead, start) + 1 or start

    def tokens(part: str) -> int:
        return len(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)

    # Sentences tokenized one by one say about where the text between should end; its own tokens give the distance.
    ends = [end, *(m.end() for m in SENTENCE.finditer(text, end, min(len(text), end + int(8 * target))))]
    wanted = target - tokens(prefix)
    about = np.cumsum([tokens(text[a:b]) for a, b in pairwise([cut, *ends])])
    between = text[cut : ends[int(np.abs(about - wanted).argmin())]]
    distance = tokens(between) + tokens(prefix)
    prompt = f"{text[lead:cut]}{between}\n\n{prefix}"
    if not distances[0] <= distance <= distances[1] or prompt.count(prefix) != 2:
        return None
    return Cloze(prompt, answer, distance)
