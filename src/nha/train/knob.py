"""One trained model, its windows changed at run time from 0 to full attention: loss, recall and bytes of cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.convert.search import cache_bytes
from nha.evaluate.perplexity import perplexity
from nha.models.config import FULL
from nha.models.head import head_logits, hidden_states
from nha.models.windows import temporary_windows
from nha.ops.heads import map_window

WINDOWS = (0, 8, 16, 32, 64, 128, 256, 512, 1024, FULL)


@torch.no_grad()
def repeat_accuracy(model: PreTrainedModel, ids: Tensor) -> float:
    """Fraction of tokens predicted right in the second of two equal halves: recall of a text verbatim.

    Args:
        model: a causal language model.
        ids: [N, T]; the first T // 2 tokens of each row are read twice.
    """
    half, right, total = ids.shape[1] // 2, 0, 0
    for row in ids.to(model.device):
        twice = torch.cat([row[:half], row[:half]])[None]
        hidden = hidden_states(model, twice)[0, half:-1]
        right += int((head_logits(model, hidden).argmax(-1) == twice[0, half + 1 :]).sum())
        total += half - 1
    return right / max(1, total)


def turn_knob(
    model: PreTrainedModel,
    ids: Tensor,
    windows: Sequence[int] = WINDOWS,
    *,
    recall: Callable[[PreTrainedModel, Tensor], float] = repeat_accuracy,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure a hybrid at each window; layers with full attention keep it, and the model has its own windows after.

    Args:
        model: a hybrid in evaluation mode.
        ids: documents [N, T] to measure on.
        windows: in tokens; -1 is full attention.
        recall: from 0 to 1, of the model and `ids`.
        progress: called with (windows done, in all).

    Returns:
        A row for each window: `window`, `loss` in nats per token, `by_text` that of each document, `perplexity`,
        `recall`, and `cache_bytes` after T tokens of one document.

    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model = NHAForCausalLM(NHAConfig.tiny(window_sizes=[8, -1])).eval()
    >>> rows = turn_knob(model, torch.arange(64).view(2, 32), windows=(0, -1))
    >>> [row["window"] for row in rows], model.config.window_sizes
    ([0, -1], [8, -1])
    """
    own = list(model.config.window_sizes)  # type: ignore[arg-type]
    rows = []
    for number, window in enumerate(windows):
        each = [map_window(lambda kept, new=window: FULL if kept == FULL else new, layer) for layer in own]
        with temporary_windows(model, each):
            measured = perplexity(model, ids)
            row = {"window": window, "loss": measured.loss, "perplexity": measured.value, "by_text": measured.by_text}
            rows.append(row | {"recall": recall(model, ids), "cache_bytes": cache_bytes(model, each, ids.shape[1])})
        if progress is not None:
            progress(number + 1, len(windows))
    return rows


def relative_perplexity(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Perplexity of one model relative to that of another, by window: 1.01 is 1 % worse.

    >>> relative_perplexity([{"window": 8, "perplexity": 10.1}], [{"window": 8, "perplexity": 10.0}])
    {8: 1.01}
    """
    base = {row["window"]: row["perplexity"] for row in others}
    return {row["window"]: round(row["perplexity"] / base[row["window"]], 4) for row in rows if row["window"] in base}
