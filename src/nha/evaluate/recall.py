"""How much of a text a model can recall, by task and distance: teacher-forced and by generation."""

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
    """What a model recalled of one `RecallSet`: one number per row, 0 to 1.

    Attributes:
        task, distance, length: those of the rows, distance and length in tokens.
        digits: share of the answer's tokens that are the most likely ones, each given the right ones before it.
        exact: whether all of them are.
        generated: whether greedy generation writes the whole answer; None where that was not asked for.
    """

    task: str
    distance: int
    length: int
    digits: np.ndarray
    exact: np.ndarray
    generated: np.ndarray | None

    def to_dict(self, seed: int = 0) -> dict[str, Any]:
        """Means of the metrics, and as `<metric>_interval` their 95 % bootstrap intervals over rows."""
        found: dict[str, Any] = {"length": self.length, "rows": len(self.exact)}
        for metric in METRICS:
            values = getattr(self, metric)
            found[metric] = None if values is None else float(values.mean())
            found[f"{metric}_interval"] = None if values is None else list(interval(values, seed=seed))
        return found


def recall_distances(length: int, window: int = 64) -> list[int]:
    """Distances in tokens to measure in rows of `length` tokens: powers of two from twice the window, and the farthest.

    >>> recall_distances(2048)
    [128, 256, 512, 1024, 1900]
    >>> recall_distances(8192)[-2:]
    [4096, 8044]
    """
    farthest = length - 148
    powers = (2**k for k in range(1, length.bit_length()))
    return [*(d for d in powers if 2 * window <= d <= 0.75 * farthest), farthest]


def recall_sets(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    *,
    tasks: Iterable[str] | None = None,
    distances: Sequence[int] | None = None,
    beyond: int = 0,
    length: int = 2048,
    rows: int = 32,
    seed: int = 0,
) -> list[RecallSet]:
    """One `RecallSet` for every task (default: all of `EVALUATION_TASKS`) and distance, with text from `filler`.

    Without `distances` those of `recall_distances` above `beyond` are taken, as far as the task's facts fit there.
    Raises ValueError as `evaluation_set` does.
    """
    if isinstance(filler, np.ndarray) and len(filler) < length:
        raise ValueError(f"expected text of at least {length} tokens to fill rows with, got {len(filler)}")
    wanted = [d for d in recall_distances(length) if d > beyond] if distances is None else distances
    found = []
    for task in EVALUATION_TASKS if tasks is None else tasks:
        for distance in wanted:
            try:
                found.append(
                    evaluation_set(
                        task, distance, length=length, rows=rows, seed=seed, tokenizer=tokenizer, filler=filler
                    )
                )
            except ValueError:
                if distances is not None or task not in EVALUATION_TASKS or rows < 1:
                    raise
    if not found:
        raise ValueError(f"expected rows long enough for a question, got {length} tokens")
    return found


def measure_recall(
    model: PreTrainedModel,
    sets: Sequence[RecallSet],
    *,
    generate: bool = True,
    most: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[RecallScore]:
    """Score a model on recall sets, in their order.

    Rows of equal length and answer are read together, as many as have `most` tokens (default: `batch_tokens`). Logits
    are made for answers alone. `progress` is called with (rows done, rows in all).
    """
    groups: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, recall_set in enumerate(sets):
        for row, count in enumerate(recall_set.answers.sum(1).tolist()):
            groups[recall_set.ids.shape[1], count].append((number, row))
    results = [np.zeros((3, len(s.ids))) for s in sets]
    done, total = 0, sum(len(s.ids) for s in sets)
    for (length, count), members in groups.items():
        step = max(1, (batch_tokens(model) if most is None else most) // length)
        for start in range(0, len(members), step):
            some = members[start : start + step]
            ids = torch.from_numpy(np.stack([sets[number].ids[row] for number, row in some])).to(model.device)
            right, written = score_batch(model, ids, count, generate)
            for (number, row), hits, whole in zip(some, right.tolist(), written.tolist(), strict=True):
                results[number][:, row] = np.mean(hits), all(hits), whole
            done += len(some)
            if progress is not None:
                progress(done, total)
    return [
        RecallScore(s.task, s.distance, s.ids.shape[1], r[0], r[1], r[2] if generate else None)
        for s, r in zip(sets, results, strict=True)
    ]


@torch.no_grad()
def score_batch(model: Any, ids: Tensor, count: int, generate: bool) -> tuple[Tensor, Tensor]:
    """For rows ids [B, T] that end in answers of `count` tokens: which tokens are right [B, count], each given the
    right ones before it, and which answers are written whole [B]."""
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
        if new.shape[1] == count:  # shorter where every row ended early
            written = (new == answer).all(1)
    return right.cpu(), written.cpu()
