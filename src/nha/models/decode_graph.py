"""The decoding step of `generate` as one CUDA graph, which the host launches instead of some thousand kernels.

`generate` reads the prompt into a cache that grows, as ever. Its first step then moves the cache to tensors that stay
where they are, the second is recorded, and later steps replay it: the same kernels on the same inputs. A cache that
outlives the call, since it was handed in or is returned, grows again afterwards.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from nha.models.cache import HeadGroupsCacheLayer, NHACacheLayer
from nha.models.fused_step import after_layers
from nha.models.head import read_last_token
from nha.models.int8_cache import Int8CacheLayer
from nha.models.linear import after_head
from nha.models.masks import HybridMask, cache_argument
from nha.models.windows import attention_layers, decoder
from nha.ops.heads import per_head
from nha.ops.int8_rows import row_bytes

MIN_TOKENS = 8  # for fewer, recording takes longer than it saves
UNPADDED = HybridMask()  # stands for the mask of a batch without padding, which the recorded step makes itself
ATTRIBUTE = "decode_graph"  # of a cache: the graph of the steps that go on from it
SPARE_MEMORY = 1 / 8  # of a GPU's memory; where less is free, a recording may need what the allocator keeps


def can_capture(device: torch.device) -> bool:
    """Whether steps on this device can be recorded."""
    return device.type == "cuda"


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage within the context: a CUDA graph that is freed while another is recorded ends the recording.

    >>> with without_collection():
    ...     gc.isenabled()
    False
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def capture(run: Callable[[], Any], pool: Any = None) -> tuple[Any, Callable[[], None]]:
    """Where the output of a call will be, and a function that computes it; recording the call computes nothing.

    Graphs that share a `pool` of memory overwrite each other's outputs. Without one, memory that the allocator keeps,
    that of graphs which are gone included, is given back first. To take it again takes longer than a short prompt, so
    that a recording in a shared pool gives memory back only where little is free.
    """
    graph = torch.cuda.CUDAGraph()
    free, total = torch.cuda.mem_get_info()
    if pool is None or free < total * SPARE_MEMORY:
        with without_collection(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = run()
        return output, graph.replay
    stream, current = capture_stream(torch.cuda.current_device()), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream), without_collection():
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            output = run()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return output, graph.replay


@cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """The stream of a GPU on which calls are recorded; one alone, since cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)


def graph_of(kwargs: dict[str, Any]) -> DecodeGraph | None:
    """The graph of the cache among a call's arguments, if it has one."""
    return getattr(cache_argument(kwargs), ATTRIBUTE, None)


class DecodeGraph:
    """The steps of one call of `generate`: call it with the arguments of the model's forward pass.

    `outlives` says that somebody has the cache when the call is over.
    """

    def __init__(self, model: Any, max_new_tokens: int, padded: bool, outlives: bool):
        self.model, self.max_new_tokens, self.padded, self.outlives = model, max_new_tokens, padded, outlives
        self.steps = 0
        self.inputs: list[Any] = []
        self.spec: Any = None
        self.output: Any = None
        self.replay: Callable[[], None] | None = None

    def __call__(self, **kwargs: Any) -> Any:
        """The model's output for one token of every sequence; the next call overwrites its logits."""
        if not self.padded:
            kwargs.pop("attention_mask", None)
        self.steps += 1
        if self.steps == 1:
            cache = cache_argument(kwargs)
            make_static(cache, cache.get_seq_length() + self.max_new_tokens - 1)  # the last token is not read
            return self.model(**kwargs)
        leaves, spec = pytree.tree_flatten({n: x for n, x in kwargs.items() if not isinstance(x, Cache)})
        described = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves]
        if self.steps == 2:
            return self._record(kwargs, leaves, (spec, described))
        if self.replay is None or (spec, described) != self.spec:
            return self.model(**kwargs)
        for held, new in zip(self.inputs, leaves, strict=True):
            if isinstance(new, Tensor):
                held.copy_(new)
        self.replay()
        return self.output

    def _record(self, kwargs: dict[str, Any], leaves: list[Any], spec: Any) -> Any:
        self.inputs, self.spec = [x.clone() if isinstance(x, Tensor) else x for x in leaves], spec
        own = {n: x for n, x in kwargs.items() if isinstance(x, Cache)} | pytree.tree_unflatten(self.inputs, spec[0])
        try:
            self.output, replay = capture(lambda: self.model(**own))
        except RuntimeError as error:
            warnings.warn(f"decoding goes on without a CUDA graph, which could not be recorded: {error}", stacklevel=2)
            return self.model(**kwargs)
        replay()
        self.replay = replay
        return self.output


def make_static(cache: Cache, max_cache_len: int) -> None:
    """Move a cache to tensors that keep their addresses until it holds `max_cache_len` tokens."""
    for place, layer in enumerate(cache.layers):
        cache.layers[place] = static_layer(layer, max_cache_len)


def static_layer(layer: Any, max_cache_len: int) -> Any:
    """The layer with tensors that keep their addresses, or one like it."""
    if isinstance(layer, HeadGroupsCacheLayer):
        layer.parts[:] = [static_layer(part, max_cache_len) for part in layer.parts]
        layer.is_compileable = True
        return layer
    if isinstance(layer, NHACacheLayer):
        layer.make_static(max_cache_len)
        return layer
    if isinstance(layer, Int8CacheLayer):
        fixed = Int8CacheLayer(max_cache_len)
        fixed.copy_from(layer, layer.get_seq_length())
        return fixed
    new = StaticLayer(max_cache_len)
    new.update(layer.keys, layer.values)
    return new


def make_growing(cache: Cache) -> None:
    """Let a cache of `make_static` grow again, in tensors that hold its tokens and no room for others."""
    for place, layer in enumerate(cache.layers):
        cache.layers[place] = growing_layer(layer)


def growing_layer(layer: Any) -> Any:
    """A layer of `static_layer` that grows again, or one like it."""
    if isinstance(layer, HeadGroupsCacheLayer):
        layer.parts[:] = [growing_layer(part) for part in layer.parts]
        layer.is_compileable = False
        return layer
    if isinstance(layer, NHACacheLayer):
        layer.make_growing()
        return layer
    length = int(layer.get_seq_length())
    if isinstance(layer, Int8CacheLayer):
        new = Int8CacheLayer()
        new.copy_from(layer, length)
        return new
    new = DynamicLayer()
    new.update(layer.keys[:, :, :length], layer.values[:, :, :length])  # which copies them
    return new


def end_steps(kwargs: dict[str, Any]) -> None:
    """After a call of `generate`, also one that failed: drop the graph of the cache among its arguments."""
    cache, graph = cache_argument(kwargs), graph_of(kwargs)
    if graph is None:
        return
    delattr(cache, ATTRIBUTE)
    if graph.outlives and graph.steps:
        make_growing(cache)


def is_growing(layer: Any) -> bool:
    """Whether a layer is one that `make_static` can change."""
    if isinstance(layer, HeadGroupsCacheLayer):
        return all(is_growing(part) for part in layer.parts)
    if type(layer) is DynamicLayer:
        return True
    if isinstance(layer, Int8CacheLayer):
        return not layer.is_compileable
    return isinstance(layer, NHACacheLayer) and not (layer.is_compileable or layer.max_rollback or layer.record_past)


def static_bytes(model: Any, batch: int, max_cache_len: int) -> int:
    """Bytes of the full layers and heads of a static cache."""
    config = decoder(model).config
    heads = sum(per_head(window, config.num_key_value_heads).count(-1) for window in config.window_sizes)
    row = row_bytes(config.kv_cache_dtype, attention_layers(model)[0].head_dim, model.dtype.itemsize)
    return 2 * heads * batch * max_cache_len * row


def free_bytes(device: torch.device) -> float:
    """Bytes of a GPU's memory that a new tensor could take, what the allocator keeps included; infinite elsewhere."""
    if device.type != "cuda":
        return float("inf")
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free - torch.cuda.memory_allocated(device)


def has_memory(model: Any, batch: int, max_cache_len: int) -> bool:
    """Whether the full layers of a static cache take less than half of the memory that is free."""
    return 2 * static_bytes(model, batch, max_cache_len) < free_bytes(model.device)


def is_plain(model: Any, before_decoder: Callable) -> bool:
    """Whether a model's forward pass does nothing but compute: one device, no hooks and no observers in Python."""
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    spread = spread or (torch.distributed.is_available() and torch.distributed.is_initialized())
    changed = getattr(model, "hf_quantizer", None) is not None or model._compiled_call_impl is not None
    if spread or changed or model.training or not model._can_compile_fullgraph or torch.is_autocast_enabled("cuda"):
        return False
    if any(module.observer or module.mass_observer for module in attention_layers(model)):
        return False
    return not any(
        hook not in (before_decoder, after_layers, read_last_token, after_head)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def plan(
    model: Any,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    mode: GenerationMode,
    batch: int,
    max_cache_len: int,
    before_decoder: Callable,
    *,
    handed_in: bool,
) -> None:
    """Give the cache of a call of `generate` a graph, where its steps can be recorded and pay for it."""
    cache, mask = cache_argument(model_kwargs), model_kwargs.get("attention_mask")
    if graph_of(model_kwargs) is not None:  # of a call that failed before its first token
        delattr(cache, ATTRIBUTE)
    kept = config.output_hidden_states or config.output_attentions  # tensors that the next replay overwrites
    kept = kept or config.is_assistant or config.prefill_chunk_size is not None
    chosen = config.disable_compile or config.compile_config is not None or config.cache_implementation is not None
    single = mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH) and config.num_return_sequences == 1
    if kept or chosen or not single or not can_capture(model.device) or config.max_new_tokens is None:
        return
    layers = getattr(cache, "layers", [])
    if config.max_new_tokens < MIN_TOKENS or getattr(cache, "offloading", False) or not layers:
        return
    known = all(is_growing(layer) for layer in layers)
    if known and is_plain(model, before_decoder) and has_memory(model, batch, max_cache_len):
        padded = mask is not None and not bool(mask.all())
        outlives = handed_in or bool(config.return_dict_in_generate)
        setattr(cache, ATTRIBUTE, DecodeGraph(model, config.max_new_tokens, padded, outlives))
