"""Costs of a conversation: bytes and milliseconds per token against the length of the context."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nha.report.results import Cost

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


@contextmanager
def as_teacher(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The hybrid with all windows at -1, which is the model it was made from; the windows come back at the end."""
    from nha.models.windows import temporary_windows

    with temporary_windows(model, -1):
        yield model


def filled_cache(model: PreTrainedModel, ids: torch.Tensor, context: int) -> Cache:
    """A cache as large as after `context` tokens.

    The model reads `ids` [1, T]; caches that would grow are then lengthened by repeating what they hold. Neither
    size nor time depends on the contents, and reading the whole context would take much longer.
    """
    import torch

    from nha.models.cache import NHACacheLayer, cache_parts
    from nha.models.int8_cache import Int8CacheLayer

    with torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    for layer in cache_parts(cache):
        if isinstance(layer, NHACacheLayer):
            layer.length = context
        elif isinstance(layer, Int8CacheLayer):
            layer.map(lambda x: lengthened(x, context))
            layer.cumulative_length = context
        elif not getattr(layer, "is_sliding", False):
            layer.keys, layer.values = lengthened(layer.keys, context), lengthened(layer.values, context)
    return cache


def lengthened(x: torch.Tensor, context: int) -> torch.Tensor:
    """Tokens [B, H, T, D] repeated until there are `context` of them."""
    return x.repeat(1, 1, -(-context // x.shape[2]), 1)[:, :, :context].contiguous()


def token_milliseconds(model: PreTrainedModel, ids: torch.Tensor, context: int, steps: int = 5) -> tuple[int, float]:
    """(bytes of the cache after `context` tokens, median milliseconds of one decoding step from there)."""
    import torch

    from nha.models.cache import cache_nbytes
    from nha.models.conversation import cache_keyword

    cache = filled_cache(model, ids, context)
    size = cache_nbytes(cache)
    token = ids[:, -1:]
    name = cache_keyword(model)
    times = []
    with torch.no_grad():
        for step in range(steps + 1):
            position = torch.tensor([[context + step]], device=ids.device)
            _wait(ids)
            started = time.perf_counter()
            model(token, position_ids=position, use_cache=True, **{name: cache})
            _wait(ids)
            times.append(time.perf_counter() - started)
    return size, 1000 * statistics.median(times[1:])


def costs(
    model: PreTrainedModel,
    ids: torch.Tensor,
    contexts: Sequence[int] = CONTEXTS,
    *,
    max_bytes: float = 1.2e9,
    advance: Callable[[int, int], None] | None = None,
) -> list[Cost]:
    """Bytes and milliseconds of original and hybrid after each number of tokens in `contexts`.

    `ids` [1, T] is some text, longer than the largest window. Contexts for which the original's cache would be
    larger than `max_bytes` are left out, but never the first two.
    """
    found: list[Cost] = []
    ids = ids[:, : min(contexts)]
    for number, context in enumerate(contexts):
        if number >= 2 and found[-1].teacher_bytes * context / found[-1].context > max_bytes:
            break
        with as_teacher(model):
            teacher = token_milliseconds(model, ids, context)
        hybrid = token_milliseconds(model, ids, context)
        found.append(Cost(context, teacher[0], hybrid[0], teacher[1], hybrid[1]))
        if advance:
            advance(number + 1, len(contexts))
    return found


def _wait(tensor: Any) -> None:
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize(tensor.device)
