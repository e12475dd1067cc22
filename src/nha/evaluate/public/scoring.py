"""Log-likelihoods of continuations, in batches sorted by length, for any causal language model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.evaluate.perplexity import batch_tokens
from nha.evaluate.public.sets import Item
from nha.models.head import head_logits, hidden_states

MAX_BATCH = 512
LOGITS = 1 << 28  # numbers of float32 logits at a time: 1 GiB
PROBE_TOKENS = 8


@dataclass(frozen=True)
class Request:
    """A continuation to score: all input tokens (the last of the continuation is only a target), and its tokens."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Tokenize every (prompt, continuation) together and split it, as lm-evaluation-harness does.

    Spaces at the end of a prompt belong to its continuation. An empty prompt is the BOS or EOS token.
    """
    stems = [prompt.rstrip() for prompt, _ in pairs]
    wholes = [prompt + continuation for prompt, continuation in pairs]
    full = [i for i, stem in enumerate(stems) if stem]
    found: dict[int, Request] = {}
    if full:
        whole = tokenizer([wholes[i] for i in full], verbose=False).input_ids
        stem = tokenizer([stems[i] for i in full], verbose=False).input_ids
        for i, ids, start in zip(full, whole, stem, strict=True):
            found[i] = Request(tuple(ids[:-1]), tuple(ids[len(start) :]))
    for i in set(range(len(pairs))) - set(full):
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError("expected a prompt, or a tokenizer with a BOS or EOS token, got neither")
        ids = [start, *tokenizer(wholes[i], add_special_tokens=False, verbose=False).input_ids]
        found[i] = Request(tuple(ids[:-1]), tuple(ids[1:]))
    return [found[i] for i in range(len(pairs))]


def truncate(request: Request, max_seq_len: int | None) -> Request:
    """The request without what is too long at its left.

    >>> truncate(Request((1, 2, 3, 4), (4, 5)), 3)
    Request(inputs=(2, 3, 4), targets=(4, 5))
    """
    if max_seq_len is None or len(request.inputs) <= max_seq_len:
        return request
    return Request(request.inputs[-max_seq_len:], request.targets[-max_seq_len:])


class ContinuationScorer:
    """Scores continuations with one model.

    `score` computes logits at the continuations' positions alone, if the model's head applied to its decoder's output
    gives the model's own logits (checked once on a few tokens); else it takes the model's logits of all positions.
    """

    def __init__(self, model: PreTrainedModel, max_batch_tokens: int | None = None):
        self.model = model
        self.max_batch_tokens = batch_tokens(model) if max_batch_tokens is None else max_batch_tokens
        self.separate_head = _head_is_separate(model)

    @torch.no_grad()
    def score(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether every token is the most likely one) of every continuation.

        Continuations of the same inputs are scored with one forward pass. `progress` is called with (inputs done,
        inputs in all).
        """
        by_inputs: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            by_inputs.setdefault(request.inputs, []).append(index)
        order = sorted(by_inputs, key=lambda inputs: (-len(inputs), inputs))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for batch in self._batches(order):
            asked = [by_inputs[inputs] for inputs in batch]
            sizes = [max(len(requests[i].targets) for i in some) for some in asked]
            for rows, logits in self._logits(batch, sizes):
                ends = np.cumsum([sizes[row] for row in rows])
                spans = [(i, int(end)) for row, end in zip(rows, ends, strict=True) for i in asked[row]]
                found = _scores(logits, [(requests[i].targets, end) for i, end in spans])
                for (i, _), score in zip(spans, found, strict=True):
                    results[i] = score
            done += len(batch)
            if progress is not None:
                progress(done, len(order))
        return results

    def _batches(self, order: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Inputs in batches of up to `max_batch_tokens` with padding; they are sorted, the longest first."""
        start = 0
        while start < len(order):
            size = max(1, min(MAX_BATCH, self.max_batch_tokens // len(order[start])))
            yield list(order[start : start + size])
            start += size

    def _logits(self, batch: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        """(rows, float32 logits [sum of their sizes, V] of the last `size` positions of each), a part at a time.

        Inputs are padded on the right: in a causal model no token sees the padding after it.
        """
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
        for row, inputs in enumerate(batch):
            ids[row, : len(inputs)] = torch.tensor(inputs)
        ids = ids.to(self.model.device)
        if not self.separate_head:
            for row, (inputs, size) in enumerate(zip(batch, sizes, strict=True)):
                logits = self.model(ids[row : row + 1, : len(inputs)], use_cache=False).logits[0]
                yield [row], logits[len(inputs) - size :].float()
            return
        hidden = hidden_states(self.model, ids)
        limit = max(1, LOGITS // self.model.config.get_text_config().vocab_size)
        for rows in _groups(sizes, limit):
            parts = [hidden[row, len(batch[row]) - sizes[row] : len(batch[row])] for row in rows]
            yield rows, head_logits(self.model, torch.cat(parts)).float()


def _groups(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Consecutive indices in groups whose sizes sum to at most `limit`, but at least one index.

    >>> list(_groups([2, 3, 1, 9, 1], 5))
    [[0, 1], [2], [3], [4]]
    """
    group: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(index)
        total += size
    if group:
        yield group


def _scores(logits: Tensor, spans: Sequence[tuple[tuple[int, ...], int]]) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy) of every (targets, end): the targets' positions end before `end`."""
    places = np.concatenate([np.arange(end - len(targets), end) for targets, end in spans])
    at = torch.from_numpy(places).to(logits.device)
    targets = torch.tensor([token for tokens, _ in spans for token in tokens], device=logits.device)
    losses = (logits[at, targets] - logits.logsumexp(1)[at]).double().cpu().numpy()
    greedy = (logits.argmax(1)[at] == targets).cpu().numpy()
    starts = np.cumsum([0, *(len(tokens) for tokens, _ in spans)])
    return [(float(losses[a:b].sum()), bool(greedy[a:b].all())) for a, b in pairwise(starts)]


@torch.no_grad()
def _head_is_separate(model: PreTrainedModel) -> bool:
    """Whether `head_logits` of `hidden_states` gives the model's logits, to the rounding of its dtype."""
    count = min(PROBE_TOKENS, model.config.get_text_config().vocab_size)
    ids = torch.arange(count, device=model.device)[None]
    try:
        expected, found = model(ids, use_cache=False).logits, head_logits(model, hidden_states(model, ids))
    except (AttributeError, TypeError) as error:
        warnings.warn(f"logits of all positions are computed, since the head is not apart: {error}", stacklevel=2)
        return False
    if expected.shape != found.shape:
        return False
    scale = expected.float().abs().max().clamp(min=1.0)
    tolerance = 8 * torch.finfo(expected.dtype).eps
    return bool((expected.float() - found.float()).abs().max() <= tolerance * scale)


def choice_requests(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], max_seq_len: int | None = None
) -> tuple[list[list[Request]], int]:
    """The requests of every item, one for each choice, and how many items had to be truncated to `max_seq_len`."""
    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    requests = iter(encode(tokenizer, pairs))
    found, truncated = [], 0
    for item in items:
        whole = [next(requests) for _ in item.choices]
        cut = [truncate(request, max_seq_len) for request in whole]
        truncated += cut != whole
        found.append(cut)
    return found, truncated


def is_correct(item: Item, scores: Sequence[tuple[float, bool]], per_byte: bool) -> bool:
    """Whether the correct choice has the largest log-likelihood; of a single choice, whether it is the greedy one.

    >>> item = Item("2 + 2 =", ("four", "5"), gold=0)
    >>> is_correct(item, [(-3.0, False), (-2.0, False)], per_byte=False)
    False
    >>> is_correct(item, [(-3.0, False), (-2.0, False)], per_byte=True)
    True
    """
    if len(item.choices) == 1:
        return scores[0][1]
    sizes = [len(choice.encode()) if per_byte else 1 for choice in item.choices]
    values = [score / size for (score, _), size in zip(scores, sizes, strict=True)]
    return values.index(max(values)) == item.gold
