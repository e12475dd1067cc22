"""The batches of a training run: each micro-batch is a function of its number alone."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nha.data.corpus import Corpus
from nha.data.packing import PackedSequences, pack
from nha.train.settings import TrainSettings

IGNORED = -100  # a target that does not count
Batch = dict[str, Any]


class Rows(Protocol):
    """Sequences of one length with targets, made rather than read: a synthetic task.

    Attributes:
        identity: the name, sizes and seed of the task; a run is resumed with the same one only.
        vocab_size: tokens are below this.
        seq_len: tokens of every sequence.

    >>> class Count:
    ...     identity, vocab_size, seq_len = "count", 16, 4
    ...
    ...     def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    ...         return next_tokens((index + np.arange(5)) % 16)
    >>> tokens, targets = Count().row(2)
    >>> tokens.tolist(), targets.tolist()
    ([2, 3, 4, 5], [3, 4, 5, 6])
    """

    identity: str
    vocab_size: int
    seq_len: int

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [T] int64 and targets [T] int64 of sequence `index`, a function of it alone.

        `targets[t]` is the token to be predicted from tokens 0 to t, or -100 where nothing counts.
        """
        ...


def held_out(corpus: Corpus) -> Corpus | None:
    """The held-out documents as documents to train on; None without any."""
    return dataclasses.replace(corpus, held=~corpus.held) if corpus.held.any() else None


def next_tokens(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T] and targets [T] of T + 1 tokens.

    >>> [x.tolist() for x in next_tokens(np.array([5, 6, 7]))]
    [[5, 6], [6, 7]]
    """
    return ids[:-1], ids[1:]


class Sequences:
    """Sequences of a corpus or of a task, and their batches.

    Args:
        data: where they come from.
        seq_len: tokens of a sequence, for a corpus.
        packing: "documents" ends attention where a document ends; "joined" does not.
        seed: of the order of documents.
    """

    def __init__(self, data: Corpus | Rows, seq_len: int, packing: str = "documents", seed: int = 0):
        self.rows: Rows | None = None if isinstance(data, Corpus) else data
        self.seq_len, self.documents = seq_len, isinstance(data, Corpus) and packing == "documents"
        self.packed = PackedSequences(data, seq_len + (not self.documents), seed) if isinstance(data, Corpus) else None

    def batch(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count - 1` as arguments of `LanguageModel.forward`.

        Documents are packed into one row [1, N], with boundaries; else ids and targets are [count, T].
        """
        if self.documents:
            assert self.packed is not None
            found = pack([(*self.packed.sequence(first + i), None) for i in range(count)])
            targets = np.where(found["follows"] > 0, found["target"], IGNORED)[None]
            arrays = {"ids": found["ids"], "targets": targets}
            arrays |= {name: found[name] for name in ("position_ids", "cu_seqlens")}
            tensors: Batch = {name: torch.from_numpy(x) for name, x in arrays.items()}
            return tensors | {"max_seq_len": self.seq_len}
        if self.rows is not None:
            pairs = [self.rows.row(first + i) for i in range(count)]
        else:
            assert self.packed is not None
            pairs = [next_tokens(self.packed.sequence(first + i)[0]) for i in range(count)]
        ids, targets = (np.stack(column) for column in zip(*pairs, strict=True))
        return {"ids": torch.from_numpy(ids), "targets": torch.from_numpy(targets)}


class MicroBatches(Dataset):
    """The micro-batches of a run on one of `world` devices, in the order in which they are trained on."""

    def __init__(self, data: Corpus | Rows, settings: TrainSettings, rank: int = 0, world: int = 1):
        self.seq_len = settings.seq_len if isinstance(data, Corpus) else data.seq_len
        self.sequences = Sequences(data, self.seq_len, settings.packing, settings.seed)
        self.steps = settings.steps(self.seq_len)
        self.size, self.per_step = settings.micro_batch(world)
        self.batch_size, self.rank = settings.batch_size, rank

    def __len__(self) -> int:
        return self.steps * self.per_step

    def __getitem__(self, index: int) -> Batch:
        step, number = divmod(index, self.per_step)
        own = self.size * self.per_step
        return self.sequences.batch(step * self.batch_size + self.rank * own + number * self.size, self.size)


def draw_window(windows: tuple[int, ...], seed: int, step: int) -> int:
    """The window of a step, drawn by seed and step: the same on all devices.

    >>> [draw_window((0, 16, -1), 0, step) for step in range(4)] == [draw_window((0, 16, -1), 0, s) for s in range(4)]
    True
    """
    return int(windows[int(np.random.default_rng([seed, 17, step]).integers(len(windows)))])


def draw_windows(windows: tuple[int, ...], seed: int, step: int, count: int) -> tuple[int, ...]:
    """`count` of the windows, each entry of the list at most once: as `draw_window`, where it is one.

    >>> sorted(draw_windows((0, 16, -1), 0, 5, 3))
    [-1, 0, 16]
    """
    if count == 1:
        return (draw_window(windows, seed, step),)
    order = np.random.default_rng([seed, 17, step]).permutation(len(windows))
    return tuple(windows[int(index)] for index in order[:count])


def count_targets(targets: Tensor) -> Tensor:
    """The number of targets that count, [] int64."""
    return (targets != IGNORED).sum()
