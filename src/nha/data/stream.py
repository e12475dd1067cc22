"""The batches of a training run: packed text and recall sequences, each a function of its step alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from nha.data.corpus import Corpus
from nha.data.packing import PackedSequences, pack
from nha.data.recall import RecallSettings, training_sequence

TEXT, RECALL = "text", "recall"


@dataclass(frozen=True)
class Mixture:
    """The composition of a run's batches.

    Attributes:
        steps: optimizer steps in all; the last `long_steps` of them have fewer sequences, of `long_seq_len` tokens.
        batch_size, seq_len: sequences of a step (on each device) and tokens of a sequence.
        recall_fraction: fraction of the sequences that are recall text.
        recall: how recall text is drawn; longer sequences hold more facts in proportion.
        fact_warmup: fraction of the steps over which the facts of a sequence grow from the minimum to the maximum
            (0: the maximum from the start).
        kl_weight, cross_entropy_weight, answer_weight: weights of the losses. KL and cross-entropy are means over all
            tokens, `answer_weight` is that of the mean cross-entropy of answers.
        separate_recall: recall text makes a batch of its own, so that its gradient can be scaled by itself.
        micro_batch_size: sequences in one forward pass (0: all).
        seed: of everything random.
    """

    steps: int
    batch_size: int = 16
    seq_len: int = 2048
    long_steps: int = 0
    long_seq_len: int = 8192
    recall_fraction: float = 0.125
    recall: RecallSettings = field(default_factory=RecallSettings)
    fact_warmup: float = 0.0
    kl_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    answer_weight: float = 0.5
    separate_recall: bool = True
    micro_batch_size: int = 0
    seed: int = 0

    def shape(self, step: int) -> tuple[int, int]:
        """Sequences of a step and tokens of a sequence."""
        if step < self.steps - self.long_steps:
            return self.batch_size, self.seq_len
        return self.long_batch_size, self.long_seq_len

    @property
    def long_batch_size(self) -> int:
        """Sequences of a step in longer sequences: as many tokens as in the others, and text beside recall text.

        >>> [Mixture(1, long_seq_len=tokens).long_batch_size for tokens in (8192, 65536)]
        [4, 2]
        """
        least = 2 if self.separate_recall and 0 < self.recall_fraction < 1 else 1
        return max(least, self.batch_size * self.seq_len // self.long_seq_len)

    def num_recall(self, step: int) -> int:
        """Recall sequences of a step: `recall_fraction` of them, as a mean over steps if that is no integer.

        >>> [Mixture(4, batch_size=4, recall_fraction=0.375).num_recall(step) for step in range(4)]
        [1, 2, 1, 2]
        """
        size, fraction = self.shape(step)[0], self.recall_fraction
        return math.floor((step + 1) * size * fraction) - math.floor(step * size * fraction)

    def recall_settings(self, step: int) -> RecallSettings:
        """The settings of recall text in a step: more facts as they warm up, and in longer sequences.

        >>> [Mixture(4, long_steps=1).recall_settings(step).facts for step in (2, 3)]
        [(1, 16), (1, 64)]
        """
        low, high = self.recall.facts
        done = min(1.0, step / (self.fact_warmup * self.steps)) if self.fact_warmup else 1.0
        scale = max(1.0, self.shape(step)[1] / self.seq_len)  # keeps the questions per token
        return replace(self.recall, facts=(low, round(scale * low * (high / low) ** done)))


class Stream(Dataset):
    """The steps of a run: item i is a list of micro-batches (name, tensors) for `Distillation.forward`.

    Item i depends on the arguments and i alone: any process can make it, in any order. `first` is the step of the
    mixture that item 0 is. Sequences beyond `teacher_context` tokens come with their pieces for a teacher.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        mixture: Mixture,
        rank: int = 0,
        world: int = 1,
        first: int = 0,
        teacher_context: int | None = None,
    ):
        self.corpus, self.tokenizer, self.mixture = corpus, tokenizer, mixture
        self.rank, self.world, self.first, self.teacher_context = rank, world, first, teacher_context
        lengths = {mixture.seq_len, mixture.long_seq_len}
        self._packed = {n: PackedSequences(corpus, n, mixture.seed) for n in lengths}

    def __len__(self) -> int:
        return self.mixture.steps - self.first

    def shape(self, item: int) -> tuple[int, int]:
        """Sequences of an item and tokens of a sequence."""
        return self.mixture.shape(self.first + item)

    def __getitem__(self, item: int) -> list[tuple[str, dict[str, Tensor]]]:
        mixture, step = self.mixture, self.first + item
        size, seq_len = mixture.shape(step)
        num_recall = mixture.num_recall(step)
        packed, first = self._packed[seq_len], self._first_text(step)
        text = [(*packed.sequence(first + i), None) for i in range(size - num_recall)]
        recall = [self._recall_sequence(step, i, seq_len) for i in range(num_recall)]
        groups = [(TEXT, text), (RECALL, recall)] if mixture.separate_recall else [(TEXT, [*text, *recall])]
        micro = mixture.micro_batch_size or size
        context = self.teacher_context
        pieces = context if context is not None and seq_len > context else None
        cuts = [(name, group[at : at + micro]) for name, group in groups for at in range(0, len(group), micro)]
        made = [(name, pack(cut, pieces)) for name, cut in cuts]
        counted = max(1.0, sum(float(batch["follows"].sum()) for _, batch in made))
        answers = max(1.0, sum(float(batch["answers"].sum()) for _, batch in made))
        for _, batch in made:
            by_answers = batch["answers"] * np.float32(mixture.answer_weight / answers)
            batch["kl_weight"] = batch["follows"] * np.float32(mixture.kl_weight / counted)
            batch["ce_weight"] = batch["follows"] * np.float32(mixture.cross_entropy_weight / counted) + by_answers
        return [(name, {key: torch.from_numpy(value) for key, value in batch.items()}) for name, batch in made]

    def _first_text(self, step: int) -> int:
        """The number of this step's first text sequence, counted over all steps of its length and all ranks."""
        mixture = self.mixture
        size, seq_len = mixture.shape(step)
        start = 0 if seq_len == mixture.seq_len else mixture.steps - mixture.long_steps
        fraction = mixture.recall_fraction
        recall_before = math.floor(step * size * fraction) - math.floor(start * size * fraction)
        before = (step - start) * size - recall_before
        return before * self.world + self.rank * (size - mixture.num_recall(step))

    def _recall_sequence(self, step: int, slot: int, seq_len: int) -> tuple[np.ndarray, list[int], np.ndarray]:
        generator = np.random.default_rng([self.mixture.seed, 13, step, self.rank, slot])
        filler = self.corpus.filler(generator)
        ids, answers = training_sequence(generator, self.tokenizer, filler, seq_len, self.mixture.recall_settings(step))
        return ids, [0], answers


class ResumeSampler(Sampler[int]):
    """The steps from `start` on; its length is that of the whole run."""

    def __init__(self, steps: int, start: int):
        self.steps, self.start = steps, start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.steps))

    def __len__(self) -> int:
        return self.steps
