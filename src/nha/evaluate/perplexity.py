"""Perplexity of a causal language model, and where in a text it comes from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.evaluate.bootstrap import interval
from nha.models.head import hidden_states, token_losses

SEGMENT = 1024
FAR, FAR_START = 192, 256  # tokens
MOST_TOKENS = 1 << 18


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

    @property
    def by_text(self) -> list[float]:
        """Mean loss of every text, in nats per token."""
        return self.losses.double().mean(1).tolist()

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """The 95 % bootstrap interval of `value` over texts."""
        low, high = interval(self.by_text, seed=seed)
        return math.exp(low), math.exp(high)

    def by_position(self, edges: list[int]) -> list[float]:
        """Perplexity of the tokens at positions edges[i] to edges[i + 1] - 1 (the token at 0 is never predicted)."""
        pairs = itertools.pairwise(edges)
        return [math.exp(self.losses[:, max(a - 1, 0) : b - 1].double().mean()) for a, b in pairs]

    def where(self, mask: np.ndarray) -> float:
        """Mean loss of the tokens where `mask` [N, T] is true, the first column aside; nan where there are none."""
        return self.losses[torch.from_numpy(mask[:, 1:])].double().mean().item()


def far_repeats(ids: np.ndarray, *, distance: int = FAR, start: int = FAR_START) -> np.ndarray:
    """Which tokens of ids [N, T] end a pair of tokens that last occurred more than `distance` tokens before.

    Such tokens can be copied, but only by a memory that reaches further back than a window. Tokens before `start` are
    left out. Returns bool [N, T] (associative recall in real text, as arXiv 2312.04927 measures it).

    >>> far_repeats(np.array([[5, 6, 7, 8, 5, 6, 5, 6]]), distance=2, start=0).astype(int).tolist()
    [[0, 0, 0, 0, 0, 1, 0, 0]]
    """
    found = np.zeros(ids.shape, dtype=bool)
    for row, text in enumerate(ids.astype(np.int64)):
        pairs = text[:-1] * (int(ids.max()) + 1) + text[1:]
        order = np.argsort(pairs, kind="stable")
        same = pairs[order][1:] == pairs[order][:-1]
        found[row, order[1:] + 1] = same & (np.diff(order) > distance)
        found[row, :start] = False
    return found


def batch_tokens(model: PreTrainedModel) -> int:
    """Tokens to read in one forward pass: what half of a GPU's free memory holds, or what stays small on a CPU.

    A token takes the widest activations of one layer and its keys and values in all layers.
    """
    if model.device.type != "cuda":
        return 4096
    config = model.config.get_text_config()
    heads = config.num_key_value_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    numbers = 3 * config.intermediate_size + 8 * config.hidden_size + 2 * heads * config.num_hidden_layers
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(min(MOST_TOKENS, max(4096, free // 2 // (numbers * model.dtype.itemsize))))


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    most: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Read texts ids [N, T], as many at a time as have `most` tokens together (default: `batch_tokens`).

    A text with more tokens than that is read `SEGMENT` tokens at a time through the cache, so that memory stays small.
    `progress` is called with (tokens read, tokens in all). Raises ValueError for texts of fewer than two tokens.
    """
    if ids.dim() != 2 or ids.shape[1] < 2:
        raise ValueError(f"expected token ids [N, T] with T >= 2, got {list(ids.shape)}")
    most = batch_tokens(model) if most is None else most
    length = ids.shape[1]
    segment = length if length <= most else SEGMENT
    rows = max(1, most // segment)
    found: list[Tensor] = []
    for start in range(0, len(ids), rows):
        texts = ids[start : start + rows].to(model.device)
        cache, losses = None, []
        for at in range(0, length, segment):
            part = texts[:, at : at + segment]
            if segment == length:
                hidden = hidden_states(model, part)
            else:
                output = model.get_decoder()(part, past_key_values=cache, use_cache=True)
                hidden, cache = output.last_hidden_state, output.past_key_values
            target = texts[:, at + 1 : at + segment + 1]
            hidden = hidden[:, : target.shape[1]]
            losses.append(token_losses(model, hidden.flatten(0, 1), target.flatten()).view(target.shape))
            if progress is not None:
                progress(start * length + len(texts) * (at + part.shape[1]), ids.numel())
        found.append(torch.cat(losses, 1).cpu())
    return Perplexity(torch.cat(found))
