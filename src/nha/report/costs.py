"""Costs of a conversation: bytes and milliseconds per token against the length of the context."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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


def filled_cache(model: PreTrainedModel, ids: torch.Tensor, context: int, cache: Cache | None = None) -> Cache:
    """A cache as large as after `context` tokens.

    The model reads `ids` [1, T], or as many of them as the context has; caches that would grow are then lengthened by
    repeating what they hold. Neither size nor time depends on the contents, and reading the whole context would take
    much longer. A `cache` that was made in this way for a shorter context is lengthened in place, so that the model
    reads only the tokens which it has not read.
    """
    import torch

    from nha.models.cache import NHACacheLayer, cache_parts
    from nha.models.conversation import cache_keyword
    from nha.models.int8_cache import Int8CacheLayer

    rest = ids[:, 0 if cache is None else cache.get_seq_length() : context]
    if rest.shape[1]:
        given: dict[str, Any] = {} if cache is None else {cache_keyword(model): cache}
        with torch.no_grad():
            cache = model(rest, use_cache=True, logits_to_keep=1, **given).past_key_values
    assert cache is not None
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


def token_milliseconds(
    model: PreTrainedModel, token: torch.Tensor, cache: Cache, context: int, steps: int = 5
) -> float:
    """Median milliseconds of a decoding step from a cache of `context` tokens; it gets the token `steps` + 1 times."""
    import torch

    from nha.models.conversation import cache_keyword

    name, times = cache_keyword(model), []
    with torch.no_grad():
        for step in range(steps + 1):
            position = torch.tensor([[context + step]], device=token.device)
            _wait(token)
            started = time.perf_counter()
            model(token, position_ids=position, use_cache=True, **{name: cache})
            _wait(token)
            times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[1:])


def costs(
    model: PreTrainedModel,
    ids: torch.Tensor,
    contexts: Sequence[int] = CONTEXTS,
    *,
    max_bytes: float = 1.2e9,
    advance: Callable[[int, int], None] | None = None,
) -> list[Cost]:
    """Bytes and milliseconds of original and hybrid after each number of tokens in `contexts`, which grow.

    `ids` [1, T] is some text. The models read as much of it, repeated where it is too short, as fills all windows.
    Contexts for which the original's cache would be larger than `max_bytes` are left out, but never the first two.
    """
    from nha.models.cache import cache_nbytes

    ids = repeated(ids, tokens_to_fill(model, contexts))
    first, token = ids[:, : min(contexts)], ids[:, -1:]
    found: list[Cost] = []
    caches: dict[str, Cache] = {}
    for number, context in enumerate(contexts):
        if number >= 2 and found[-1].teacher_bytes * context / found[-1].context > max_bytes:
            break
        measured = []
        for name, text in (("teacher", first), ("hybrid", ids)):
            with as_teacher(model) if name == "teacher" else nullcontext():
                cache = caches[name] = filled_cache(model, text, context, caches.get(name))
                stepped = cache if name == "teacher" else copy.deepcopy(cache)  # tokens make a state larger for a while
                measured.append((cache_nbytes(cache), token_milliseconds(model, token, stepped, context)))
        (teacher_bytes, teacher_ms), (hybrid_bytes, hybrid_ms) = measured
        found.append(Cost(context, teacher_bytes, hybrid_bytes, teacher_ms, hybrid_ms))
        if advance:
            advance(number + 1, len(contexts))
    return found


def tokens_to_fill(model: PreTrainedModel, contexts: Sequence[int]) -> int:
    """How many tokens a hybrid must read until no window of it takes more memory, at least the first context."""
    from nha.models.windows import decoder
    from nha.ops.heads import all_windows

    return max(min(contexts), 1 + max(all_windows(decoder(model).config.window_sizes)))


def repeated(ids: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` tokens of ids [1, T], repeated where there are fewer."""
    return ids.repeat(1, -(-count // ids.shape[1]))[:, :count]


def _wait(tensor: Any) -> None:
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize(tensor.device)
