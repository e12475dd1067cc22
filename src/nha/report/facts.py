"""A number at the start of a long text, asked for as the text goes on, and the digits of it that come back.

The text is read once. Every question is asked of a copy of its cache, and the text then goes on without it. A copy may
keep its states in fewer bits, so that one reading serves several formats.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from nha.data.recall.facts import draw_facts, filler_tokens, pieces_of
from nha.data.recall.words import EVALUATION
from nha.evaluate.public.needle import DIGITS
from nha.evaluate.public.written import begins_with, first_line
from nha.models.cache import cache_nbytes
from nha.models.conversation import cache_keyword
from nha.models.windows import pack_states
from nha.report.results import RecallAt, Sample

MORE = 2  # tokens written after as many as the number has


@dataclass(frozen=True)
class Asked:
    """A question, and what was written after it."""

    distance: int  # tokens between the statement and the question
    answer: str
    question: str
    written: str
    state_dtype: str = "float32"  # how states were kept
    bytes: int = 0  # of the cache that the question was asked of


def leading_digits(text: str, answer: str) -> int:
    """The number of characters of an answer that a text begins with.

    >>> leading_digits(" 6520", "652300"), leading_digits("x", "12")
    (3, 0)
    """
    pairs = zip(text.lstrip(), answer, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystack: np.ndarray,
    distances: Sequence[int],
    *,
    seed: int = 0,
    state_dtypes: Sequence[str] = ("float32",),
    progress: Callable[[int, int], None] | None = None,
) -> list[Asked]:
    """Read a fact and then text of the haystack's ids [N], and ask for the fact at every distance, in rising order.

    The text is read with states in float32, whatever the model's own format is, and every question is asked once with
    them in each of `state_dtypes`. Raises ValueError if the haystack is shorter than the largest distance.
    """
    generator, pieces = np.random.default_rng(seed), pieces_of(tokenizer)
    wording = next(w for w in EVALUATION.wordings if w.task == "needle")
    (fact,) = draw_facts(generator, pieces, EVALUATION, [wording], lambda _: DIGITS)
    text = filler_tokens(generator, haystack, max(distances))
    question, answer = (str(tokenizer.decode(ids)).strip() for ids in (fact.question, fact.value))
    cache, done, found = DynamicCache(config=model.config), 0, []
    pack_states(cache, "float32")
    read(model, cache, [*pieces.start, *fact.statement])
    for distance in distances:
        read(model, cache, text[done:distance])
        for state_dtype in state_dtypes:
            memory = copy.deepcopy(cache)
            pack_states(memory, state_dtype)
            size = cache_nbytes(memory)
            written = write(model, memory, fact.question, len(fact.value) + MORE)
            found.append(Asked(distance, answer, question, str(tokenizer.decode(written)), state_dtype, size))
        done = distance
        if progress is not None:
            progress(done, distances[-1])
    return found


def read(model: PreTrainedModel, cache: DynamicCache, ids: Sequence[int]) -> Tensor:
    """Read tokens into a cache; the logits [V] after the last."""
    given = torch.tensor([ids], device=model.device)
    return model(given, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache}).logits[0, -1]


def write(model: PreTrainedModel, cache: DynamicCache, ids: Sequence[int], count: int) -> list[int]:
    """The likeliest `count` tokens after ids, one by one."""
    found: list[int] = []
    given = list(ids)
    for _ in range(count):
        found.append(int(read(model, cache, given).argmax()))
        given = found[-1:]
    return found


def recall_by_distance(asked: Sequence[Asked]) -> list[RecallAt]:
    """The answers counted by distance, from the nearest to the furthest."""
    found = []
    for distance in sorted({one.distance for one in asked}):
        own = [one for one in asked if one.distance == distance]
        right = [begins_with(one.written, one.answer) for one in own]
        digits = [leading_digits(one.written, one.answer) for one in own]
        whole = [count == len(one.answer) for count, one in zip(digits, own, strict=True)]
        found.append(
            RecallAt(
                tokens=distance,
                facts=len(own),
                recalled=sum(right),
                continued=sum(whole) - sum(right),
                digits=sum(digits),
                of_digits=sum(len(one.answer) for one in own),
                bytes=max(one.bytes for one in own),
            )
        )
    return found


def sample_of(one: Asked) -> Sample:
    """A question and its answer, for the page."""
    teacher = f"(not asked here; the number is {one.answer})"
    title = f"A number {one.distance:,} tokens back"
    return Sample(title, one.question, one.distance, teacher, first_line(one.written))
