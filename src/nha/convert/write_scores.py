"""Which tokens exact slots keep: a score learned from the attention of the model before its conversion.

A token is worth a place in a head if a query from beyond the window attends to it. The score of a token, from its
hidden state alone, predicts the logarithm of the largest such attention (ridge regression; no gradient, one forward
pass). A threshold lets a head keep as many tokens as slots can hold for a wanted distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.models.config import FULL, largest_window
from nha.models.observe import Observation, observe
from nha.models.windows import attention_layers, decoder
from nha.ops.heads import per_head

REACH = 512  # tokens that a kept token shall stay
MAX_RATE = 0.5  # of a head's tokens that are kept
RIDGE = 0.03  # relative to the mean square of a hidden state's coordinate
SMALLEST = -12.0  # log of an attention that counts as none
SCORE_DEVIATION = 6.0  # of scores, as of the logits of gates that are trained
QUERIES = 256  # that are compared with all keys at a time


@dataclass
class WriteScores:
    """Scores of a model's heads before their threshold.

    Attributes:
        weights: [H, hidden] of each layer; None for layers with full attention.
        scores: [H, N], sorted, of the tokens that thresholds are taken from.
        correlations: [H], of the score and its target over the tokens that it was fitted to.
    """

    weights: list[Tensor | None] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    correlations: list[Tensor] = field(default_factory=list)


def far_attention(
    query: Tensor, key: Tensor, windows: Sequence[int], scale: float, softcap: float | None = None
) -> Tensor:
    """The log of the largest attention [T, H] that each token gets from queries that no longer have it in the window.

    One sequence: query [T, HQ, D], key [T, H, D], both with positions, and one window per KV head. Tokens that every
    window still holds get -inf.

    >>> found = far_attention(torch.zeros(3, 1, 2), torch.zeros(3, 1, 2), [2], 1.0)  # a third: token 0, from query 2
    >>> (3 * found[:, 0].exp()).round().tolist()
    [1.0, 0.0, 0.0]
    """
    length, heads = key.shape[:2]
    keys = key.float().permute(1, 2, 0)[:, None]  # [H, 1, D, T]
    queries = query.float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [H, G, T, D]
    place = torch.arange(length, device=key.device)
    limit = torch.tensor(list(windows), device=key.device)[:, None, None, None]
    largest = keys.new_full((heads, length), float("-inf"))
    for start in range(0, length, QUERIES):
        rows = place[start : start + QUERIES]
        score = queries[:, :, start : start + QUERIES] @ keys * scale
        score = score if softcap is None else torch.tanh(score / softcap) * softcap
        distance = rows[:, None] - place
        log_attention = score.masked_fill(distance < 0, float("-inf")).log_softmax(-1)
        far = log_attention.masked_fill(distance < limit, float("-inf"))
        largest = torch.maximum(largest, far.amax((1, 2)))
    return largest.T


@dataclass
class _Moments:
    """Sums over tokens for one layer's regression."""

    hidden: Tensor  # [F]
    target: Tensor  # [H]
    square: Tensor  # [F, F]
    cross: Tensor  # [F, H]
    target_square: Tensor  # [H]
    count: int = 0

    @classmethod
    def empty(cls, width: int, heads: int, device: torch.device) -> _Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zeros(width), zeros(heads), zeros(width, width), zeros(width, heads), zeros(heads))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens of hidden states [N, F] and targets [N, H]."""
        self.count += len(x)
        self.hidden += x.sum(0)
        self.target += y.sum(0)
        self.square += x.T @ x
        self.cross += x.T @ y
        self.target_square += y.square().sum(0)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights [H, F] of the regression of targets on hidden states, and its correlation [H]."""
        mean, target = self.hidden / self.count, self.target / self.count
        square = self.square / self.count - torch.outer(mean, mean)
        cross = self.cross / self.count - torch.outer(mean, target)
        ridge = RIDGE * square.diagonal().mean().clamp_min(1e-12)
        weight = torch.linalg.solve(square + ridge * torch.eye(len(square)).to(square), cross)
        spread = (weight * (square @ weight)).sum(0) * (self.target_square / self.count - target.square())
        return weight.T, (weight * cross).sum(0) / spread.clamp_min(1e-12).sqrt()


@torch.no_grad()
def fit_write_scores(
    model: PreTrainedModel, texts: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
) -> WriteScores:
    """Scores for every head of a hybrid, from the attention that it had before its conversion to some texts.

    Args:
        model: a hybrid; its windows say which queries are beyond them.
        texts: token ids [N, T], each longer than the windows. Thresholds will be taken from the last.
        progress: called with (layers done, layers in all) of the last text.

    Raises:
        ValueError: no text is longer than the windows.
    """
    config = decoder(model).config
    windows, heads = list(config.window_sizes), config.num_key_value_heads
    first = 1 if config.num_sinks else 0  # a sink stands in for the first token
    longest = max(ids.shape[1] for ids in texts)
    if longest <= first + max(largest_window(windows), 0):
        raise ValueError(f"expected texts longer than the windows {windows}, got {longest} tokens")
    moments: dict[int, _Moments] = {}
    found = WriteScores()

    def learn(index: int, seen: Observation, last: bool) -> None:
        if windows[index] == FULL:
            if last:
                found.weights.append(None)
                found.scores.append(torch.empty(0))
                found.correlations.append(torch.empty(0))
            return
        limits = [max(window, 0) for window in per_head(windows[index], heads)]
        own = moments.setdefault(index, _Moments.empty(seen.hidden.shape[2], heads, seen.hidden.device))
        for hidden, query, key in zip(seen.hidden, seen.query, seen.key, strict=True):
            target = far_attention(query, key, limits, seen.scale, seen.softcap)[first:]
            left = target.isfinite().all(1)
            own.add(hidden[first:][left].double(), target[left].clamp_min(SMALLEST).double())
        if last:
            weight, correlation = moments.pop(index).solve()
            found.weights.append(weight.float())
            found.correlations.append(correlation.float().cpu())
            scores = seen.hidden[:, first:].flatten(0, 1).float() @ weight.float().T
            found.scores.append(scores.T.sort(1).values.cpu())
            if progress is not None:
                progress(index + 1, len(windows))

    for number, ids in enumerate(texts):
        last = number == len(texts) - 1
        with observe(model, lambda index, seen, last=last: learn(index, seen, last)):
            model.get_decoder()(ids.to(model.device), use_cache=False)
    return found


def set_write_scores(model: PreTrainedModel, found: WriteScores, reach: int = REACH) -> None:
    """Give the heads of a hybrid with exact slots their scores: each keeps M / `reach` of the tokens, at most half.

    A kept token then stays for about `reach` tokens. Scores have a deviation of `SCORE_DEVIATION`.
    """
    rate = min(MAX_RATE, decoder(model).config.num_slots / reach)
    for module, weight, scores in zip(attention_layers(model), found.weights, found.scores, strict=True):
        if weight is None:
            continue
        scale = SCORE_DEVIATION / scores.std(1).clamp_min(1e-6)
        limit = scores[:, min(scores.shape[1] - 1, round((1 - rate) * scores.shape[1]))]
        module.nha.set_gates(weight * scale[:, None].to(weight.device), -limit * scale)
