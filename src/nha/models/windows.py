"""The attention layers of a hybrid and their windows, which the configuration holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from nha.models.cache import nha_layers
from nha.models.config import FULL, check_windows
from nha.ops.heads import Window, all_windows, map_window, window_of
from nha.ops.int8_rows import check_kv_cache_dtype
from nha.ops.packed_state import check_state_dtype


def decoder(model: PreTrainedModel) -> Any:
    """The stack of decoder layers inside a language model."""
    return model.get_decoder()


def attention_layers(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a model's decoder, in order."""
    return [layer.self_attn for layer in decoder(model).layers]


def hybrid_layers(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a hybrid model; raises ValueError for any other model."""
    found = decoder(model) if hasattr(model, "get_decoder") else None
    if not hasattr(getattr(found, "config", None), "window_sizes"):
        raise ValueError(f"expected a hybrid model, got {type(model).__name__}; call hybridize first")
    return attention_layers(model)


def follow_config(stack: Any) -> None:
    """Let the attention layers of a decoder follow `config.window_sizes`, the one place where windows are set.

    Runs before every forward pass, so that a configuration that was edited by hand counts. A layer keeps its number
    beside its weights because `torch.compile` would build a graph per layer for an entry of the list. Raises
    ValueError for windows that do not fit the model.
    """
    modules = [layer.self_attn for layer in stack.layers]
    given = stack.config.window_sizes
    if isinstance(given, list) and [module.window_size for module in modules] == [_frozen(each) for each in given]:
        return
    stack.config.window_sizes = check_windows(stack.config, given)
    for module, window in zip(modules, stack.config.window_sizes, strict=True):
        set_module_window(module, window)


def set_module_window(module: Any, window: Window) -> None:
    """Let an attention module have a window, or one per KV head, and note whether it has full attention.

    Compiled code asks for the note alone, where it is to serve layers of different windows.
    """
    module.window_size = window_of(window)
    module.is_full = module.window_size == FULL


def _frozen(window: Any) -> Any:
    """An entry of the configuration as a module holds it: a list of heads as a tuple, which nobody can edit."""
    return tuple(window) if isinstance(window, list) else window


def set_windows(model: PreTrainedModel, windows: int | Sequence[Window]) -> None:
    """Change the windows of a model, in tokens.

    An int is the new window of every hybrid layer: layers and heads with full attention (-1) keep it. A list has one
    entry per layer, an int or a list of one int per KV head, and -1 there makes a layer or head what it was before the
    conversion. The int -1 does that to all layers; a list brings them back. Weights stay as they are; a running cache
    made with other windows is refused by the next forward pass. `model.config.window_sizes` holds the result.

    Raises:
        ValueError: a list of the wrong length, a window that a layer cannot have, or an int where every layer has
            full attention; nothing has changed.

    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model = NHAForCausalLM(NHAConfig.tiny())
    >>> set_windows(model, [8, -1])
    >>> set_windows(model, 32)
    >>> model.config.window_sizes
    [32, -1]
    >>> set_windows(model, [8, [4, 16]])  # one window per KV head of the second layer
    >>> model.config.window_sizes
    [8, [4, 16]]
    """
    _change_windows(model, windows)
    freeze_unused(model)


def _change_windows(model: PreTrainedModel, windows: int | Sequence[Window]) -> None:
    hybrid_layers(model)
    stack = decoder(model)
    if isinstance(windows, int) and windows != FULL:
        now = stack.config.window_sizes
        if all(window == FULL for window in all_windows(now)):
            raise ValueError(
                f"expected a list of {len(now)} windows where every layer has full attention, got {windows}"
            )
        size = windows
        windows = [map_window(lambda own: FULL if own == FULL else size, window) for window in now]
    stack.config.window_sizes = check_windows(stack.config, windows)
    follow_config(stack)


def set_state_dtype(model: PreTrainedModel, state_dtype: str) -> None:
    """Choose how new caches of a hybrid keep slots and windows between two calls.

    "float32" keeps slots in float32 and windows in the model's dtype; "bfloat16" and "int8" take fewer bytes. Caches
    that have read something stay as they are.

    Raises ValueError for another name and for a model that is no hybrid.

    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model = NHAForCausalLM(NHAConfig.tiny())
    >>> set_state_dtype(model, "int8")
    >>> model.config.state_dtype
    'int8'
    """
    hybrid_layers(model)
    check_state_dtype(state_dtype)
    decoder(model).config.state_dtype = state_dtype


def pack_states(cache: Cache, state_dtype: str) -> None:
    """Keep the states of a cache in another format from now on, those that it holds included.

    Layers with full attention and static layers stay as they are. Raises ValueError for an unknown format.

    >>> import torch
    >>> from transformers import DynamicCache
    >>> from nha import NHAConfig, NHAForCausalLM
    >>> from nha.models.cache import cache_nbytes
    >>> model, ids = NHAForCausalLM(NHAConfig.tiny()).eval(), torch.arange(60)[None]
    >>> cache = DynamicCache(config=model.config)
    >>> with torch.no_grad():
    ...     _ = model(ids, past_key_values=cache)
    >>> before = cache_nbytes(cache)
    >>> pack_states(cache, "int8")
    >>> cache_nbytes(cache) < before / 2
    True
    """
    check_state_dtype(state_dtype)
    for layer in nha_layers(cache):
        layer.pack(state_dtype)


def set_kv_cache_dtype(model: PreTrainedModel, kv_cache_dtype: str) -> None:
    """Choose how new caches of a hybrid keep keys and values of its layers and heads with full attention.

    "auto" keeps them in the model's dtype. "int8" rounds each token's key and value of a head to 8 bits: a number is at
    most 1 / 127 of the row's largest off. Caches that have read something stay as they are. With every window -1 this
    is the original model with the same cache.

    Raises ValueError for another name and for a model that is no hybrid.

    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model = NHAForCausalLM(NHAConfig.tiny(window_sizes=[16, -1]))
    >>> set_kv_cache_dtype(model, "int8")
    >>> model.config.kv_cache_dtype
    'int8'
    """
    hybrid_layers(model)
    check_kv_cache_dtype(kv_cache_dtype)
    decoder(model).config.kv_cache_dtype = kv_cache_dtype


@torch.no_grad()
def shift_gates(model: PreTrainedModel, by: float) -> None:
    """Add a constant to the biases of a hybrid's gates, in place: slots forget more slowly, or faster for `by` below 0.

    A log-gate is logsigmoid(x) / 8. Where x is large, as for a token that a slot lets pass, x + by divides it by
    e^by: a slot keeps what it holds e^by times as long. Where x is far below 0, as for a token that a slot takes, it
    hardly moves. What that gains and costs is measured in docs/quality.md.

    Raises ValueError for a model that is no hybrid, for exact slots, whose projection gives scores, and for
    `NHAForCausalLM`, whose gates have no bias.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from nha import hybridize
    >>> base = LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=9)
    >>> ids = torch.arange(32)[None] % 9
    >>> model = hybridize(LlamaForCausalLM(base), num_slots=2, window_size=4, calibration=ids)
    >>> bias = hybrid_layers(model)[0].nha.g_proj.bias
    >>> before = bias.tolist()
    >>> shift_gates(model, 2.0)
    >>> {round(after - x, 3) for after, x in zip(bias.tolist(), before)}
    {2.0}
    """
    layers, write = hybrid_layers(model), decoder(model).config.slot_write
    if write != "soft":
        raise ValueError(f"expected slots of slot_write 'soft', got {write!r}")
    biases = [getattr(module, "nha", module).g_proj.bias for module in layers]
    if any(bias is None for bias in biases):
        raise ValueError(f"expected gates with biases, got those of {type(model).__name__}, which have none")
    for bias in biases:
        bias += by


@contextmanager
def temporary_windows(model: PreTrainedModel, windows: int | Sequence[Window]) -> Iterator[None]:
    """Within the context, the model has other windows, as `set_windows` takes them; then its own again."""
    hybrid_layers(model)
    before = list(decoder(model).config.window_sizes)
    _change_windows(model, windows)
    try:
        yield
    finally:
        _change_windows(model, before)


@contextmanager
def temporary_window(model: PreTrainedModel, window: int) -> Iterator[None]:
    """Within the context, all layers and heads without full attention have this window; then their own again."""
    own = decoder(model).config.window_sizes
    with temporary_windows(model, [map_window(lambda w: FULL if w == FULL else window, each) for each in own]):
        yield


def slot_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of an attention module's gate and sink."""
    return [x for name, x in module.named_parameters() if name.startswith(("nha.", "g_proj.", "sink_"))]


def freeze_unused(model: PreTrainedModel) -> None:
    """Ask for no gradients of gates and sinks in layers with full attention, and for them again in hybrid layers.

    Data-parallel training waits for a gradient of every parameter that asks for one, empty ones included. Parameters
    that somebody else has frozen stay frozen.
    """
    for module in attention_layers(model):
        parameters, full = slot_parameters(module), module.window_size == FULL
        for x in parameters:
            x.requires_grad_(x.requires_grad and x.numel() > 0)
        if full and any(x.requires_grad for x in parameters):
            module.slots_frozen = True
        elif full or not module.slots_frozen:
            continue
        else:
            module.slots_frozen = False
        for x in parameters:
            x.requires_grad_(not full and x.numel() > 0)
