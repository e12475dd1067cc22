"""Perplexity of a causal language model, by document and by position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.evaluate.bootstrap import interval
from nha.models.conversation import cache_keyword
from nha.models.head import batch_tokens, check_head, hidden_states, token_losses

SEGMENT = 1024
REPEAT_DISTANCE, REPEAT_START = 192, 256  # tokens


@dataclass(frozen=True)
class Perplexity:
    """Losses [N, T - 1] in nats of the tokens of N documents, each given all tokens before it.

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
        """Standard error of the mean loss over documents (nan for one)."""
        return (
            (self.losses.double().mean(1).std() / len(self.losses) ** 0.5).item() if len(self.losses) > 1 else math.nan
        )

    @property
    def by_text(self) -> list[float]:
        """Mean loss of every document, in nats per token."""
        return self.losses.double().mean(1).tolist()

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """The 95 % bootstrap interval of `value` over documents."""
        low, high = interval(self.by_text, seed=seed)
        return math.exp(low), math.exp(high)

    def by_position(self, edges: list[int]) -> list[float]:
        """Perplexity of the tokens at positions edges[i] to edges[i + 1] - 1 (the token at 0 is never predicted)."""
        pairs = itertools.pairwise(edges)
        return [math.exp(self.losses[:, max(a - 1, 0) : b - 1].double().mean()) for a, b in pairs]

    def where(self, mask: np.ndarray) -> float:
        """Mean loss of the tokens where `mask` [N, T] is true, without the first column; nan if there are none."""
        return self.losses[torch.from_numpy(mask[:, 1:])].double().mean().item()


def long_range_repeats(ids: np.ndarray, *, distance: int = REPEAT_DISTANCE, start: int = REPEAT_START) -> np.ndarray:
    """Tokens of ids [N, T] that end a pair of tokens whose last occurrence is more than `distance` tokens back.

    A model can copy such a token only from a memory that reaches further back than a window: associative recall in
    real text, as arXiv 2312.04927 measures it. Tokens before `start` do not count. Returns bool [N, T].

    >>> long_range_repeats(np.array([[5, 6, 7, 8, 5, 6, 5, 6]]), distance=2, start=0).astype(int).tolist()
    [[0, 0, 0, 0, 0, 1, 0, 0]]
    """
    found = np.zeros(ids.shape, dtype=bool)
    for row, tokens in enumerate(ids.astype(np.int64)):
        pairs = tokens[:-1] * (int(ids.max()) + 1) + tokens[1:]
        order = np.argsort(pairs, kind="stable")
        same = pairs[order][1:] == pairs[order][:-1]
        found[row, order[1:] + 1] = same & (np.diff(order) > distance)
        found[row, :start] = False
    return found


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    max_batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of documents ids [N, T], in batches of up to `max_batch_tokens` (default: `batch_tokens`).

    A longer document is read in segments of `SEGMENT` tokens through the cache, so that memory stays small.
    `progress` is called with (tokens read, tokens in all). Raises ValueError for documents of fewer than two tokens.
    """
    if ids.dim() != 2 or ids.shape[1] < 2:
        raise ValueError(f"expected token ids [N, T] with T >= 2, got {list(ids.shape)}")
    check_head(model, ids)
    limit = batch_tokens(model) if max_batch_tokens is None else max_batch_tokens
    length = ids.shape[1]
    segment = length if length <= limit else SEGMENT
    batch_size = max(1, limit // segment)
    found: list[Tensor] = []
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size].to(model.device)
        cache, losses = None, []
        for at in range(0, length, segment):
            part = batch[:, at : at + segment]
            if segment == length:
                hidden = hidden_states(model, part)
            else:
                decoder: Any = model.get_decoder()
                output = decoder(part, use_cache=True, **{cache_keyword(decoder): cache})
                hidden, cache = output.last_hidden_state, output.past_key_values
            target = batch[:, at + 1 : at + segment + 1]
            hidden = hidden[:, : target.shape[1]]
            losses.append(token_losses(model, hidden.flatten(0, 1), target.flatten()).view(target.shape))
            if progress is not None:
                progress(start * length + len(batch) * (at + part.shape[1]), ids.numel())
        found.append(torch.cat(losses, 1).cpu())
    return Perplexity(torch.cat(found))
