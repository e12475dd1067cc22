"""Packed sequences: documents end to end, cut into sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nha.data.corpus import Corpus


@dataclass(frozen=True)
class PackedSequences:
    """Sequences to train on: all training documents end to end, in an order of its own in every epoch.

    Sequence i [seq_len] is a function of (corpus, seq_len, seed, i) alone. Every epoch is cut at other places. Where
    a sequence cuts a document, the rest starts the next sequence as a document of its own.
    """

    corpus: Corpus
    seq_len: int
    seed: int = 0

    @property
    def per_epoch(self) -> int:
        """Sequences in one pass over the training documents."""
        return max(1, int(self.corpus.train_ends[-1]) // self.seq_len)

    def sequence(self, index: int) -> tuple[np.ndarray, list[int]]:
        """Tokens [seq_len] int64 of a sequence and where its documents start (the first at 0)."""
        epoch, place = divmod(index, self.per_epoch)
        order, ends, shift = self._epoch(epoch)
        place = (shift + place * self.seq_len) % int(ends[-1])
        at = int(np.searchsorted(ends, place, side="right"))
        ids, starts, filled = np.empty(self.seq_len, np.int64), [], 0
        skipped = place - (int(ends[at - 1]) if at else 0)
        while filled < self.seq_len:
            part = self.corpus.document(order[at % len(order)])[skipped:][: self.seq_len - filled]
            ids[filled : filled + len(part)] = part
            starts.append(filled)
            filled, skipped, at = filled + len(part), 0, at + 1
        return ids, starts

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Order of the documents, their cumulative ends, and where the first sequence starts."""
        known = self.__dict__.setdefault("_epochs", {})
        if epoch not in known:
            generator = np.random.default_rng([self.seed, 11, epoch])
            indices = self.corpus.train_indices
            order = indices[generator.permutation(len(indices))]
            known.clear()
            known[epoch] = (order, self.corpus.lengths[order].cumsum(), int(generator.integers(self.seq_len)))
        return known[epoch]


def pack(
    sequences: Sequence[tuple[np.ndarray, list[int], np.ndarray | None]], teacher_context: int | None = None
) -> dict[str, np.ndarray]:
    """Pack sequences (tokens [T], where documents start, which tokens are answers [T]) into one batch of size 1.

    Returns `ids` and `position_ids` [1, N]; `cu_seqlens` int32, with empty documents at the end up to a power of two
    and four for each sequence (so that few shapes occur); `target` [N] (the token after each, 0 for the last);
    `follows` and `answers` [N] float32: whether that token belongs to the same document, and to an answer. With a
    `teacher_context` also `teacher_position_ids` and `teacher_cu_seqlens`, which cut documents into pieces of so many
    tokens: a teacher that was made for these reads each as a document.

    >>> batch = pack([(np.array([5, 6, 7]), [0, 2], None)])
    >>> batch["cu_seqlens"].tolist(), batch["position_ids"].tolist(), batch["follows"].tolist()
    ([0, 2, 3, 3, 3], [[0, 1, 0]], [1.0, 0.0, 0.0])
    >>> pack([(np.array([5, 6, 7]), [0], None)], teacher_context=2)["teacher_position_ids"].tolist()
    [[0, 1, 0]]
    """
    ids = np.concatenate([tokens for tokens, _, _ in sequences])
    offset, starts = 0, []
    for tokens, inner, _ in sequences:
        starts += [offset + start for start in inner]
        offset += len(tokens)
    bounds = np.array([*starts, len(ids)])
    position = np.arange(len(ids)) - np.repeat(bounds[:-1], np.diff(bounds))
    follows = np.ones(len(ids), np.float32)
    follows[bounds[1:] - 1] = 0
    answers = np.zeros(len(ids), np.float32)
    marked = [np.zeros(len(tokens), bool) if answer is None else answer for tokens, _, answer in sequences]
    answers[:-1] = np.concatenate(marked)[1:]
    batch = {
        "ids": ids[None],
        "position_ids": position[None],
        "cu_seqlens": _padded_bounds(bounds, 4 * len(sequences)),
        "target": np.append(ids[1:], 0),
        "follows": follows,
        "answers": answers * follows,
    }
    if teacher_context is not None:
        place = position % teacher_context
        pieces = np.append(np.flatnonzero(place == 0), len(ids))
        least = 4 * sum(-(-len(tokens) // teacher_context) for tokens, _, _ in sequences)
        batch |= {"teacher_position_ids": place[None], "teacher_cu_seqlens": _padded_bounds(pieces, least)}
    return batch


def _padded_bounds(bounds: np.ndarray, least: int) -> np.ndarray:
    """Bounds of documents, with empty ones at the end: in all a power of two, and at least `least` documents."""
    padded = 1 << (max(len(bounds) - 1, least) - 1).bit_length()
    return np.append(bounds, np.full(padded + 1 - len(bounds), bounds[-1])).astype(np.int32)
