"""Perplexity of a causal language model, and where in a text it comes from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

SEGMENT = 1024


@dataclass(frozen=True)
class Perplexity:
    """Losses [N, T - 1] in nats of the tokens of N texts, each given all tokens before it.

    >>> measured = Perplexity(torch.full((2, 7), math.log(2.0)))
    >>> round(measured.value, 6), [round(value, 6) for value in measured.by_position([0, 4, 8])]
    (2.0, [2.0, 2.0])
    """

    losses: Tensor

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.losses.double().mean().item()

    @property
    def value(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.loss)

    @property
    def error(self) -> float:
        """Standard error of the mean loss over texts (nan for one text)."""
        return (
            (self.losses.double().mean(1).std() / len(self.losses) ** 0.5).item() if len(self.losses) > 1 else math.nan
        )

    def by_position(self, edges: list[int]) -> list[float]:
        """Perplexity of the tokens at positions edges[i] to edges[i + 1] - 1 (the token at 0 is never predicted)."""
        pairs = itertools.pairwise(edges)
        return [math.exp(self.losses[:, max(a - 1, 0) : b - 1].double().mean()) for a, b in pairs]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, ids: Tensor, *, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """Read texts ids [N, T] one by one, `SEGMENT` tokens at a time through the cache, so that memory stays small.

    `progress` is called with (tokens read, tokens in all). Raises ValueError for texts of fewer than two tokens.
    """
    if ids.dim() != 2 or ids.shape[1] < 2:
        raise ValueError(f"expected token ids [N, T] with T >= 2, got {list(ids.shape)}")
    rows = []
    for index, row in enumerate(ids.to(model.device)):
        cache, losses = None, []
        for start in range(0, len(row), SEGMENT):
            part = row[None, start : start + SEGMENT]
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            target = row[start + 1 : start + SEGMENT + 1]
            losses.append(F.cross_entropy(output.logits[0, : len(target)].float(), target, reduction="none"))
            if progress is not None:
                progress(index * len(row) + start + part.shape[1], ids.numel())
        rows.append(torch.cat(losses).cpu())
    return Perplexity(torch.stack(rows))
