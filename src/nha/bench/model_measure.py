"""Measurements of one model: reading a prompt, decoding a token, and decoding as many sequences as fit."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nha.bench.timing import CUDA, DEVICE, captured, is_out_of_memory, median_ms, synchronize
from nha.ops.int8_rows import row_bytes

GIB = 2**30
SPARE = 4  # GiB that throughput leaves free for activations
ROOM = 64  # tokens that a static cache has room for after the prompt
SLOW_MS = 2000  # a call that takes longer is timed once more only
TOKENS = 64  # that `generate` writes for one measurement
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def random_ids(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(length)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator, device=DEVICE)


def peak_gib() -> float | None:
    return round(torch.cuda.max_memory_allocated() / GIB, 2) if CUDA else None


def reset_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def clear() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def prefill(model: Any, how: str, length: int) -> dict[str, Any]:
    """Time and peak of reading a prompt into an empty cache: in "one call", or by "generate" until its first token."""
    from transformers import DynamicCache

    prompt = random_ids(model, 1, length)

    def read() -> None:
        if how == "generate":
            model.generate(prompt, max_new_tokens=1, **GREEDY)
        else:
            cache = DynamicCache(config=model.config)
            model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    start = time.perf_counter()
    read()
    synchronize()
    slow = 1e3 * (time.perf_counter() - start) > SLOW_MS
    reset_peak()
    if slow:
        start = time.perf_counter()
        read()
        synchronize()
        ms = 1e3 * (time.perf_counter() - start)
    else:
        ms = median_ms(read, seconds=1, min_calls=3, host_ahead=False)
    return {"B": 1, "ms": ms, "tokens_s": length / ms * 1e3, "peak_gib": peak_gib()}


def grown_cache(model: Any, batch: int, length: int, window: int) -> Any:
    """A growing cache after `length` tokens of each sequence; keys and values of full layers are random."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    prompt = random_ids(model, batch, window + 8)
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in _layers(cache):
        if hasattr(layer, "state"):
            layer.length = length
            layer.state.num_tokens.fill_(length)
        else:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                shape = (*old.shape[:2], length, old.shape[3])
                setattr(layer, name, None)
                setattr(layer, name, torch.empty(shape, dtype=old.dtype, device=old.device).normal_())
    return cache


def static_cache(model: Any, batch: int, length: int) -> Any:
    """A cache of fixed addresses after `length` tokens of each sequence; keys and values of full layers are random."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length + ROOM)
    model(random_ids(model, batch, 1), past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in _layers(cache):
        if hasattr(layer, "state"):
            layer.length.fill_(length)
            layer.state.num_tokens.fill_(length)
        else:
            layer.cumulative_length.fill_(length)
            for x in (layer.keys, layer.values):
                if isinstance(x, Tensor):
                    x.normal_()
                else:
                    x.numbers.random_(-127, 128)
                    x.scale.fill_(2**-5)
    return cache


def _layers(cache: Any) -> list[Any]:
    return list(cache.layers)


def decoding_step(model: Any, how: str, batch: int, length: int, window: int) -> Callable[[], object]:
    """A function that decodes one token of every sequence; it resets a static cache first, so that none overflows."""
    token, position = random_ids(model, batch, 1), torch.full((batch, 1), length, device=DEVICE)
    if how == "eager":
        cache = grown_cache(model, batch, length, window)
        options = {"past_key_values": cache, "use_cache": True}
        return lambda: model(token, **options).logits
    cache = static_cache(model, batch, length)
    options = {"past_key_values": cache, "use_cache": True, "position_ids": position}
    run = model
    if how == "compiled":
        backend: dict[str, Any] = {} if CUDA else {"backend": "aot_eager"}
        run = torch.compile(model, fullgraph=True, dynamic=False, **backend)
    counts = [x.length if hasattr(x, "state") else x.cumulative_length for x in _layers(cache)]

    def step() -> object:
        for count in counts:
            count.fill_(length)
        return run(token, **options).logits

    return captured(step)


def cache_bytes(model: Any, length: int, slots: int) -> int:
    """Bytes of a static cache for one sequence of `length` tokens."""
    config = model.config.get_text_config()
    windows = getattr(config, "window_sizes", None) or [-1] * config.num_hidden_layers
    size, dim = model.dtype.itemsize, getattr(config, "head_dim", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    wide, row = config.num_key_value_heads * dim, row_bytes(getattr(config, "kv_cache_dtype", "auto"), dim, size)
    of_full = 2 * config.num_key_value_heads * row * (length + ROOM)
    gates = config.num_key_value_heads * slots * size
    return sum(
        of_full if window < 0 else 2 * wide * (slots * 4 + 2 * window * size) + window * (gates + wide * size)
        for window in windows
    )


def free_bytes(limit_gib: float | None = None) -> int:
    """Bytes of the GPU's memory that a new tensor could take, what the allocator keeps included."""
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    return int(min(free, free if limit_gib is None else limit_gib * GIB)) - torch.cuda.memory_allocated()


@contextmanager
def memory_limit(limit_gib: float | None) -> Iterator[None]:
    """Let this process take no more of the GPU's memory within the block, as on a smaller one."""
    if limit_gib is None or not CUDA:
        yield
        return
    clear()
    torch.cuda.set_per_process_memory_fraction(min(limit_gib * GIB / torch.cuda.mem_get_info()[1], 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def kv_cache_dtype(model: Any, name: str) -> Iterator[None]:
    """Within the block, new caches of a hybrid keep keys and values of full attention so; others stay as they are."""
    from nha.models.windows import set_kv_cache_dtype

    config = model.config.get_text_config()
    if not hasattr(config, "window_sizes"):
        yield
        return
    own = config.kv_cache_dtype
    set_kv_cache_dtype(model, name)
    try:
        yield
    finally:
        set_kv_cache_dtype(model, own)


def decode(model: Any, how: str, length: int, window: int) -> dict[str, Any]:
    """Time and peak of one more token of one sequence after `length`."""
    if how == "generate":
        return generate(model, length)
    return _time_step(model, how, 1, length, window)


def throughput(
    model: Any, how: str, length: int, window: int, slots: int, limit_gib: float | None = None
) -> dict[str, Any]:
    """Time and peak of one more token of as many sequences of `length` tokens as fit into the memory."""
    batch = 2
    if CUDA:
        # The largest temporary tensors beside the cache are the logits in float32.
        of_logits = 6 * model.config.get_text_config().vocab_size
        batch = max(int((free_bytes(limit_gib) - SPARE * GIB) / (cache_bytes(model, length, slots) + of_logits)), 1)
        if how == "eager":  # a growing cache is copied layer by layer, and grows only as tokens come
            batch = max(int(batch * 0.9), 1)
    while True:
        try:
            return _time_step(model, how, batch, length, window)
        except Exception as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
        batch = max(int(batch * 0.8), 1)
        clear()


def _time_step(model: Any, how: str, batch: int, length: int, window: int) -> dict[str, Any]:
    reset_peak()
    step = decoding_step(model, how, batch, length, window)
    ms = median_ms(step, seconds=1, max_calls=30, host_ahead=False)
    return {"B": batch, "ms": ms, "tokens_s": batch / ms * 1e3, "peak_gib": peak_gib()}


def generate(model: Any, length: int) -> dict[str, Any]:
    """Time of a token by plain `generate()`: that of TOKENS more tokens over their number, after a first call."""
    prompt = random_ids(model, 1, length)

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **GREEDY)
        synchronize()
        return time.perf_counter() - start

    seconds(TOKENS + 1)
    reset_peak()
    ms = 1e3 * (min(seconds(TOKENS + 1) for _ in range(2)) - min(seconds(1) for _ in range(2))) / TOKENS
    return {"B": 1, "ms": max(ms, 1e-3), "tokens_s": 1e3 / max(ms, 1e-3), "peak_gib": peak_gib()}
