"""Recall by task and distance: teacher-forced, and written by greedy decoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.data.recall import EVALUATION_TASKS, Filler, RecallSet, evaluation_set
from nha.evaluate.bootstrap import interval
from nha.evaluate.perplexity import batch_tokens
from nha.models.head import head_logits, hidden_states

METRICS = ("digits", "exact", "generated")


@dataclass(frozen=True)
class RecallScore:
    """A model's scores on one `RecallSet`: one number per sequence, 0 to 1.

    Attributes:
        task, distance, seq_len: those of the sequences, in tokens.
        digits: fraction of the answer's tokens that are the most likely ones, each given the correct ones before it.
        exact: 1 where all of them are.
        generated: 1 where greedy decoding writes the whole answer; None if that was not measured.
    """

    task: str
    distance: int
    seq_len: int
    digits: np.ndarray
    exact: np.ndarray
    generated: np.ndarray | None

    def to_dict(self, seed: int = 0) -> dict[str, Any]:
        """Means of the metrics, and as `<metric>_interval` their 95 % bootstrap intervals over sequences."""
        found: dict[str, Any] = {"seq_len": self.seq_len, "count": len(self.exact)}
        for metric in METRICS:
            values = getattr(self, metric)
            found[metric] = None if values is None else float(values.mean())
            found[f"{metric}_interval"] = None if values is None else list(interval(values, seed=seed))
        return found


def recall_distances(seq_len: int, window: int = 64) -> list[int]:
    """Distances to measure in sequences of `seq_len` tokens: powers of two from twice the window, and the longest.

    >>> recall_distances(2048)
    [128, 256, 512, 1024, 1900]
    >>> recall_distances(8192)[-2:]
    [4096, 8044]
    """
    longest = seq_len - 148
    powers = (2**k for k in range(1, seq_len.bit_length()))
    return [*(d for d in powers if 2 * window <= d <= 0.75 * longest), longest]


def recall_sets(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    *,
    tasks: Iterable[str] | None = None,
    distances: Sequence[int] | None = None,
    min_distance: int = 0,
    seq_len: int = 2048,
    count: int = 32,
    seed: int = 0,
) -> list[RecallSet]:
    """One `RecallSet` per task (default: all of `EVALUATION_TASKS`) and distance, with text from `filler`.

    The default distances are those of `recall_distances` above `min_distance` at which the task's facts fit.
    Raises ValueError as `evaluation_set` does.
    """
    if isinstance(filler, np.ndarray) and len(filler) < seq_len:
        raise ValueError(f"expected text of at least {seq_len} tokens as filler, got {len(filler)}")
    wanted = [d for d in recall_distances(seq_len) if d > min_distance] if distances is None else distances
    found = []
    for task in EVALUATION_TASKS if tasks is None else tasks:
        for distance in wanted:
            try:
                found.append(
                    evaluation_set(
                        task, distance, seq_len=seq_len, count=count, seed=seed, tokenizer=tokenizer, filler=filler
                    )
                )
            except ValueError:
                if distances is not None or task not in EVALUATION_TASKS or count < 1:
                    raise
    if not found:
        raise ValueError(f"expected sequences long enough for a question, got {seq_len} tokens")
    return found


def measure_recall(
    model: PreTrainedModel,
    sets: Sequence[RecallSet],
    *,
    generate: bool = True,
    max_batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[RecallScore]:
    """Score a model on recall sets, in their order.

    Sequences of equal length and answer length share batches of up to `max_batch_tokens` (default: `batch_tokens`).
    Logits are computed for answers alone. `progress` is called with (sequences done, sequences in all).
    """
    groups: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, recall_set in enumerate(sets):
        for index, count in enumerate(recall_set.answers.sum(1).tolist()):
            groups[recall_set.ids.shape[1], count].append((number, index))
    results = [np.zeros((3, len(s.ids))) for s in sets]
    done, total = 0, sum(len(s.ids) for s in sets)
    for (seq_len, count), members in groups.items():
        step = max(1, (batch_tokens(model) if max_batch_tokens is None else max_batch_tokens) // seq_len)
        for start in range(0, len(members), step):
            some = members[start : start + step]
            ids = torch.from_numpy(np.stack([sets[number].ids[index] for number, index in some])).to(model.device)
            right, written = score_batch(model, ids, count, generate)
            for (number, index), correct, whole in zip(some, right.tolist(), written.tolist(), strict=True):
                results[number][:, index] = np.mean(correct), all(correct), whole
            done += len(some)
            if progress is not None:
                progress(done, total)
    return [
        RecallScore(s.task, s.distance, s.ids.shape[1], r[0], r[1], r[2] if generate else None)
        for s, r in zip(sets, results, strict=True)
    ]


@torch.no_grad()
def score_batch(model: Any, ids: Tensor, count: int, generate: bool) -> tuple[Tensor, Tensor]:
    """Score sequences ids [B, T] that end in answers of `count` tokens.

    Returns bool [B, count], which tokens are correct given the correct ones before them, and bool [B], which answers
    greedy decoding writes whole.
    """
    prompt, answer = ids[:, :-count], ids[:, -count:]
    hidden = hidden_states(model, ids[:, :-1])[:, -count:]
    right = head_logits(model, hidden).argmax(-1) == answer
    written = torch.zeros(len(ids), dtype=torch.bool)
    if generate:
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=0,
        )
        new = generated[:, prompt.shape[1] :]
        if new.shape[1] == count:  # shorter if every sequence ended early
            written = (new == answer).all(1)
    return right.cpu(), written.cpu()
