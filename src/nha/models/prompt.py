"""Long prompts of `generate` in pieces; `nha.models.prompt_graph` has short ones.

Between two pieces a hybrid's memory is its state, so that activations, which take more than the cache of a long prompt,
are those of one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.configuration_utils import GenerationConfig

from nha.models.cache import layer_parts
from nha.models.config import FULL
from nha.models.decode_graph import ATTRIBUTE, graph_of, is_growing
from nha.models.masks import cache_argument
from nha.models.windows import decoder
from nha.ops.heads import all_windows

PIECE_BYTES = 1 << 28  # of the widest activation of a piece
TEXT = ("attention_mask", "position_ids", "use_cache", "past_key_values", "cache", "logits_to_keep")  # arguments


def widest(model: Any) -> int:
    """Elements of the widest activation of a token."""
    config = decoder(model).config
    size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return max(size) if isinstance(size, list | tuple) else size  # some families have one for each layer


def piece_length(model: Any, batch: int, length: int) -> int | None:
    """Tokens of a piece of prompts [batch, length]; None where they are read at once.

    All pieces are equally long but the last, which is hardly shorter.
    """
    size = max(PIECE_BYTES // (widest(model) * model.dtype.itemsize * batch), 1)
    size = 1 << size.bit_length() - 1
    windows = [window for window in all_windows(decoder(model).config.window_sizes) if window != FULL]
    if length <= 2 * size or not windows or 2 * max(windows) > size:
        return None
    count = -(-length // size)
    return -(-length // count)


def reads_text(config: GenerationConfig, kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate` reads token ids into a new, growing cache and keeps nothing else of them."""
    if any(x is not None for name, x in kwargs.items() if name not in TEXT):
        return False
    if config.output_hidden_states or config.output_attentions or config.is_assistant or config.prefill_chunk_size:
        return False
    cache = cache_argument(kwargs)
    layers = getattr(cache, "layers", None)
    if type(layers) is not list or not layers or getattr(cache, "offloading", False):
        return False
    return all(is_growing(layer) and not is_filled(layer) for layer in layers)


def is_filled(layer: Any) -> bool:
    """Whether a layer of a cache holds tokens, or will keep more than a state."""
    return any(part.is_initialized or getattr(part, "record_past", False) for part in layer_parts(layer))


def has_padding(ids: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a mask or positions of prompts [B, T] say something else than that every token is text."""
    mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (mask.shape != ids.shape or not bool(mask.all())):
        return True
    counted = torch.arange(ids.shape[1], device=ids.device)[None]
    return position is not None and (position.shape[-1] != ids.shape[1] or not bool((position == counted).all()))


class ReservedLayer(DynamicLayer):
    """A layer with room for a whole prompt: one that grows copies everything that it holds with every piece."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room  # tokens
        self.buffers: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.buffers = tuple(x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in new)
        stop = start + key_states.shape[2]
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, :, start:stop] = x
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.keys, self.values

    def growing(self) -> DynamicLayer:
        """A layer that grows and holds the same tokens."""
        layer = DynamicLayer()
        if self.keys is not None and self.values is not None:
            layer.lazy_initialization(self.keys, self.values)
            layer.keys, layer.values = self.keys, self.values
        return layer


def map_parts(cache: Cache, function: Callable[[Any], Any]) -> None:
    """Put `function` of every layer of a cache, and of every part of a layer with windows per head, in its place."""
    layers: list[Any] = cache.layers
    for place, layer in enumerate(layers):
        if hasattr(layer, "parts"):
            layer.parts[:] = [function(part) for part in layer.parts]
        else:
            layers[place] = function(layer)


@contextmanager
def reserving(cache: Cache, length: int) -> Iterator[None]:
    """Within the block, empty layers that grow have room for `length` tokens."""
    map_parts(cache, lambda part: ReservedLayer(length) if type(part) is DynamicLayer else part)
    try:
        yield
    finally:
        map_parts(cache, lambda part: part.growing() if isinstance(part, ReservedLayer) else part)


@contextmanager
def in_pieces(model: Any, ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> Iterator[None]:
    """Within the block, let transformers read a long prompt in pieces, and none of them with the graph of a step."""
    size = piece_length(model, *ids.shape) if reads_text(config, kwargs) else None
    if size is None:
        yield
        return
    cache, graph = cache_argument(kwargs), graph_of(kwargs)
    config.prefill_chunk_size = size
    if graph is not None:
        delattr(cache, ATTRIBUTE)
    try:
        with reserving(cache, ids.shape[1]):
            yield
    finally:
        config.prefill_chunk_size = None
        if graph is not None:
            setattr(cache, ATTRIBUTE, graph)
