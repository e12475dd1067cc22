"""How many KV heads need full attention: the fewest with which a model still copies what it copies with all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.convert.check import in_eval_mode
from nha.convert.heads import (
    SPARE,
    CopyRow,
    HeadPlan,
    Mixer,
    Weights,
    copy_rows,
    count_weights,
    mixing,
    plan_heads,
    sample,
    top_heads,
)
from nha.convert.search import candidate_layers
from nha.convert.settings import HeadSearchSettings
from nha.data.text import calibration_text
from nha.models.config import FULL
from nha.models.head import head_logits, hidden_states

ROWS = 48  # clozes that heads are counted with
OTHER_SEED = 1000  # added to the seed: other clozes than those that weights are learned on


@torch.no_grad()
def copied(model: PreTrainedModel, rows: Sequence[CopyRow], heads: Tensor, window_size: int) -> list[bool]:
    """Whether the model writes each row's answer greedily, with full attention where `heads` [layers, KV heads] is 1.

    Elsewhere it is 0 and heads see a window and the first token. The answer's tokens are given one after another, so
    that one pass a row is enough: an answer is right if every token of it is the most likely one.
    """
    mixer = Mixer(heads.to(model.device), window_size, candidate_layers(model.config.get_text_config()))
    found = []
    with in_eval_mode(model), mixing(model, mixer):
        for row in rows:
            ids = row.ids.to(model.device)
            hidden = hidden_states(model, ids[None, :-1])[0, -row.answer_tokens :]
            found.append(bool((head_logits(model, hidden).argmax(-1) == ids[-row.answer_tokens :]).all()))
    return found


def fewest_heads(measure: Callable[[int], float], total: int, wanted: float) -> dict[int, float]:
    """Measured values by the number of heads, for the numbers that bisection tries: one is the fewest for `wanted`.

    More heads are taken to keep no less. All heads keep everything, and are not measured.

    >>> found = fewest_heads(lambda count: min(1.0, count / 10), 90, 0.85)
    >>> min(count for count, kept in found.items() if kept >= 0.85)
    9
    """
    found, low, high = {total: 1.0}, 0, total
    while low < high:
        middle = (low + high) // 2
        found[middle] = measure(middle)
        low, high = (low, middle) if found[middle] >= wanted else (middle + 1, high)
    return dict(sorted(found.items()))


def count_heads(
    model: PreTrainedModel,
    rows: Sequence[CopyRow],
    weights: Weights,
    window_size: int,
    wanted: float,
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[int, float]:
    """The fraction kept of what the model copies, by the number of full heads of the largest weights.

    Nothing is trained: distillation brings more back. Rows that the model does not copy with full attention do not
    count. Raises ValueError where it copies none.
    """
    total = count_weights(weights)
    shape = (len(weights), max(len(row or ()) for row in weights))
    right = copied(model, rows, torch.ones(shape), window_size)
    asked = [row for row, correct in zip(rows, right, strict=True) if correct]
    if not asked:
        raise ValueError(f"expected a model that copies some of {len(rows)} clozes, got one that copies none")

    def measure(count: int) -> float:
        if progress is not None:
            progress(count)
        heads = torch.zeros(shape)
        for layer, head in top_heads(weights, count):
            heads[layer, head] = 1.0
        return sum(copied(model, asked, heads, window_size)) / len(asked)

    return fewest_heads(measure, total, wanted)


def propose(
    plan: HeadPlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str] | None,
    settings: HeadSearchSettings,
    wanted: float,
    *,
    progress: Callable[[int], None] | None = None,
) -> HeadPlan:
    """The plan of the same weights with the fewest full heads that keep the fraction `wanted` of copied clozes.

    `kept` of the plan says what every number of heads that was measured keeps. Numbers that the plan has are not
    measured again if they decide. Raises ValueError as `copy_rows` and `count_heads` do.
    """
    kept = {int(count): value for count, value in plan.kept}
    if not decided(kept, wanted):
        rows = copy_rows(
            tokenizer,
            sample([calibration_text()] if documents is None else documents, settings.seed),
            min(ROWS, settings.steps * settings.batch_size),
            min_distance=settings.train_window + SPARE,
            max_distance=settings.max_distance,
            seed=settings.seed + OTHER_SEED,
        )
        kept |= count_heads(model, rows, plan.weights, settings.window_size, wanted, progress=progress)
    heads = min(count for count, value in kept.items() if value >= wanted)
    windows = plan_heads(plan.weights, heads=heads, wide_window=FULL, window_size=settings.window_size)
    measured: list[list[float]] = [[count, value] for count, value in sorted(kept.items())]
    return dataclasses.replace(plan, heads=heads, wide_window=FULL, windows=windows, kept=measured)


def decided(kept: dict[int, float], wanted: float) -> bool:
    """Whether numbers of heads that were measured say how many are needed: one suffices and the next fewer does not.

    >>> decided({3: 0.5, 4: 0.9, 90: 1.0}, 0.85), decided({3: 0.5, 90: 1.0}, 0.85)
    (True, False)
    """
    enough = min((count for count, value in kept.items() if value >= wanted), default=None)
    return enough is not None and (enough == 0 or kept.get(enough - 1, 1.0) < wanted)
