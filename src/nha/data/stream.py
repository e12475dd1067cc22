"""The batches of a training run: packed rows of a corpus and of recall text, each a function of its number alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from nha.data.corpus import Corpus, Rows
from nha.data.recall import RecallSettings, training_row

TEXT, RECALL = "text", "recall"


@dataclass(frozen=True)
class Mixture:
    """What the batches of a run are made of.

    Attributes:
        steps: optimizer steps in all; the last `long_steps` of them have fewer, longer rows, of `long_length` tokens.
        rows, length: rows of a step (on each device) and tokens of a row.
        share: of the rows that are recall text.
        recall: what recall text is made of; longer rows hold more facts in proportion. `grow` is the share of the
            steps after which a row holds the most facts that it allows; before, they are fewer (0: from the start).
        divergence, cross_entropy, answers: weights of the losses: divergence and cross-entropy are means over all
            tokens, `answers` is the weight of the mean cross-entropy of answers.
        apart: recall text makes a batch of its own, so that its gradient can be treated by itself.
        micro_batch_size: rows that go through the model at a time (0: all).
        seed: of everything random.
    """

    steps: int
    rows: int = 16
    length: int = 2048
    long_steps: int = 0
    long_length: int = 8192
    share: float = 0.125
    recall: RecallSettings = field(default_factory=RecallSettings)
    grow: float = 0.0
    divergence: float = 1.0
    cross_entropy: float = 0.0
    answers: float = 0.5
    apart: bool = True
    micro_batch_size: int = 0
    seed: int = 0

    def shape(self, step: int) -> tuple[int, int]:
        """Rows and tokens of a row in a step."""
        if step < self.steps - self.long_steps:
            return self.rows, self.length
        return max(1, self.rows * self.length // self.long_length), self.long_length

    def recall_rows(self, step: int) -> int:
        """How many rows of a step are recall text: `share` of them, over steps where that is no whole number.

        >>> [Mixture(4, rows=4, share=0.375).recall_rows(step) for step in range(4)]
        [1, 2, 1, 2]
        """
        rows = self.shape(step)[0]
        return math.floor((step + 1) * rows * self.share) - math.floor(step * rows * self.share)

    def recall_at(self, step: int) -> RecallSettings:
        """The settings of recall text in a step: more facts later, if they are to grow, and in longer rows.

        >>> [Mixture(4, long_steps=1).recall_at(step).facts for step in (2, 3)]
        [(1, 16), (1, 64)]
        """
        least, most = self.recall.facts
        done = min(1.0, step / (self.grow * self.steps)) if self.grow else 1.0
        share = max(1.0, self.shape(step)[1] / self.length)  # as many questions among as many tokens
        return replace(self.recall, facts=(least, round(share * least * (most / least) ** done)))


def pack(
    rows: Sequence[tuple[np.ndarray, list[int], np.ndarray | None]],
) -> dict[str, np.ndarray]:
    """Rows (tokens [T], where their texts start, which tokens are answers [T]) as one row of packed texts.

    Returns `ids` and `position_ids` [1, N], `cu_seqlens` int32 with empty texts at the end up to a power of two and
    four for each row (so that few shapes occur), `target` [N] (the token after each, 0 for the last), `follows` and
    `answers` [N] float32: whether that token belongs to the same text, and whether it is part of an answer.
    """
    ids = np.concatenate([row[0] for row in rows])
    at, starts = 0, []
    for tokens, inner, _ in rows:
        starts += [at + start for start in inner]
        at += len(tokens)
    bounds = np.array([*starts, len(ids)])
    position = np.arange(len(ids)) - np.repeat(bounds[:-1], np.diff(bounds))
    follows = np.ones(len(ids), np.float32)
    follows[bounds[1:] - 1] = 0
    answers = np.zeros(len(ids), np.float32)
    told = [np.zeros(len(row[0]), bool) if row[2] is None else row[2] for row in rows]
    answers[:-1] = np.concatenate(told)[1:]
    texts = 1 << (max(len(starts), 4 * len(rows)) - 1).bit_length()
    cu = np.full(texts + 1, len(ids), np.int32)
    cu[: len(starts)] = starts
    return {
        "ids": ids[None],
        "position_ids": position[None],
        "cu_seqlens": cu,
        "target": np.append(ids[1:], 0),
        "follows": follows,
        "answers": answers * follows,
    }


class Stream(Dataset):
    """The steps of a run: item i is a list of micro-batches (name, tensors) for `Distillation.forward`.

    Item i depends on (corpus, tokenizer, mixture, rank, world, i) alone: any process can make it, in any order.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, mixture: Mixture, rank: int = 0, world: int = 1):
        self.corpus, self.tokenizer, self.mixture = corpus, tokenizer, mixture
        self.rank, self.world = rank, world
        self._rows = {n: Rows(corpus, n, mixture.seed) for n in {mixture.length, mixture.long_length}}

    def __len__(self) -> int:
        return self.mixture.steps

    def __getitem__(self, step: int) -> list[tuple[str, dict[str, Tensor]]]:
        mixture = self.mixture
        rows, length = mixture.shape(step)
        recall = mixture.recall_rows(step)
        # Text rows are numbered through all steps of their length, over all ranks.
        first = 0 if length == mixture.length else mixture.steps - mixture.long_steps
        before = (step - first) * rows - (
            math.floor(step * rows * mixture.share) - math.floor(first * rows * mixture.share)
        )
        number = before * self.world + self.rank * (rows - recall)
        stream = self._rows[length]
        text = [(*stream.row(number + i), None) for i in range(rows - recall)]
        told = [self._recall_row(step, i, length) for i in range(recall)]
        groups = [(TEXT, text), (RECALL, told)] if mixture.apart else [(TEXT, [*text, *told])]
        size = mixture.micro_batch_size or rows
        made = [(name, pack(group[at : at + size])) for name, group in groups for at in range(0, len(group), size)]
        counted = max(1.0, sum(float(batch["follows"].sum()) for _, batch in made))
        answers = max(1.0, sum(float(batch["answers"].sum()) for _, batch in made))
        for _, batch in made:
            by_answers = batch["answers"] * np.float32(mixture.answers / answers)
            batch["by_divergence"] = batch["follows"] * np.float32(mixture.divergence / counted)
            batch["by_cross_entropy"] = batch["follows"] * np.float32(mixture.cross_entropy / counted) + by_answers
        return [(name, {key: torch.from_numpy(value) for key, value in batch.items()}) for name, batch in made]

    def _recall_row(self, step: int, slot: int, length: int) -> tuple[np.ndarray, list[int], np.ndarray]:
        generator = np.random.default_rng([self.mixture.seed, 13, step, self.rank, slot])
        filler: Any = self.corpus.filler(generator)
        ids, answers = training_row(generator, self.tokenizer, filler, length, self.mixture.recall_at(step))
        return ids, [0], answers


class FromStep(Sampler[int]):
    """The numbers of the steps that are left, beginning with `start`; its length is that of the whole run."""

    def __init__(self, steps: int, start: int):
        self.steps, self.start = steps, start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.steps))

    def __len__(self) -> int:
        return self.steps
