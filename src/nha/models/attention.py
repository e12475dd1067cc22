"""The attention function "nha" of transformers: what a family's attention calls in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from nha.layer import write_order
from nha.models.cache import HeadGroupsCacheLayer, NHACacheLayer, nha_layers, prepare_cache
from nha.models.config import FULL
from nha.models.full_attention import base_attention, packed_base_attention
from nha.models.head_windows import LayerCache, keep_in_graph, read_heads, read_segment
from nha.models.masks import NAME, HybridMask, causal_mask, read_mask
from nha.models.next_token import defers_gates, is_next_token, next_token
from nha.models.observe import Observation
from nha.models.segment import Initial, Reading, Segment, Sink, mask_first_token_write, zero_slots
from nha.models.slots import SlotInputs
from nha.ops.heads import Window, map_window
from nha.ops.int8_rows import Int8Rows
from nha.ops.rotary import unrotate, unrotate_for_slots, unrotate_token


class LayerInputs(NamedTuple):
    """Arguments of the attention function besides queries, keys and values, from a hybrid attention module.

    Attributes:
        hidden: [B, T, hidden], what the module projects.
        tables: rotary cosines and sines [B, T, R]; None in layers without positions.
        cache: the layer's cache, if there is one.
        slots: gates and sink, where they are computed already; then queries and keys as the slots see them are too.
        slot_query, slot_key: [B, T, heads, D].
    """

    hidden: Tensor
    tables: tuple[Tensor, Tensor] | None
    cache: LayerCache | None
    slots: SlotInputs | None = None
    slot_query: Tensor | None = None
    slot_key: Tensor | None = None


def cache_windows(module: Any) -> list[int | tuple[int, ...]]:
    """The windows of all layers as their caches see them, from one attention module."""
    windows = module.config.window_sizes[: module.config.num_hidden_layers]
    return [window_now(module, window) for window in windows]


def window_now(module: Any, window: Window) -> int | tuple[int, ...]:
    """A layer's window, without the windows that an ablation takes off."""
    off = module.ablation == "window_off"
    return map_window(lambda own: 0 if off and own != FULL else own, window)


def layer_cache(module: Any, cache: Cache | None, rows: int) -> LayerCache | None:
    """The NHA layer of a cache that belongs to an attention module; the first module prepares the whole cache.

    Raises ValueError for a cache of other sizes than a batch of `rows` sequences needs.
    """
    if cache is None:
        return None
    if module.layer_idx == 0:
        prepare_cache(cache, cache_windows(module), module.config.state_dtype, module.config.kv_cache_dtype)
        slots = 0 if module.ablation == "slots_off" else module.config.num_slots
        for layer in nha_layers(cache):
            layer.check(rows, slots)
    layer = cache.layers[module.layer_idx]
    return layer if isinstance(layer, NHACacheLayer | HeadGroupsCacheLayer) else None


def hybrid_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: HybridMask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    nha: LayerInputs | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function "nha" of transformers: query [B, HQ, T, D], key and value [B, H, Tk, D].

    In a layer with full attention key and value come from its cache, for a single token perhaps as `Int8Rows`.
    """
    if nha is None:
        raise ValueError(f"expected a hybrid attention module, got {type(module).__name__}; call hybridize first")
    if module.observer is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        module.observer(observation(module, (query, key, value), nha, scale, softcap))
    cu = kwargs.get("cu_seq_lens_q")
    if cu is None and not dropout and is_next_token(module, query, query.shape[2], attention_mask, nha.cache):
        assert nha.cache is not None
        if defers_gates(module):
            given = nha.hidden, nha.tables, nha.cache
            return next_token(module, (query, key, value), *given, scaling, softcap), None
        if isinstance(nha.cache, NHACacheLayer):
            return next_gated_token(module, (query, key, value), nha, scaling, softcap), None
    mask = read_mask(module, attention_mask, query.shape[2], cu)
    options: dict[str, Any] = kwargs | {"softcap": softcap, "scaling": scaling, "dropout": dropout}
    read = read_outside_graph if module.attention_outside_graph else read_layer
    if module.is_full:
        out, weights = read(module, (query, key, value), None, nha.cache, tuple(mask), options)
        return keep_in_graph(out, unused_slots(module, nha.hidden)), weights
    check_dropout(dropout)
    state = None if nha.cache is None else nha.cache.state
    slots = slot_inputs(module, nha, mask.padding, cu) if nha.slots is None else nha.slots
    gate, sink, kept = slots.log_gate, slots.sink, slots.num_kept
    if sink is not None:
        sink = (sink[0].to(key.dtype), sink[1].to(value.dtype))
        gate = mask_first_token_write(gate, mask.padding, cu, state) if kept is None else gate
    if module.ablation == "slots_off":
        gate, kept = gate[..., :0], None
    slot_query, slot_key = nha.slot_query, nha.slot_key  # None without rotary positions: slots and window see the same
    if nha.tables is not None and slot_query is None:
        q, k = query.transpose(1, 2), key.transpose(1, 2)
        interleaved = module.rotary_style.interleaved
        slot_query, slot_key = unrotate_for_slots(q, k, nha.tables, slots.tables, interleaved=interleaved)
    given = (gate, sink, slot_query, slot_key, slots.initial, kept)
    return read(module, (query, key, value), given, nha.cache, tuple(mask), options)


def read_layer(
    module: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    slots: tuple[Tensor, Sink | None, Tensor | None, Tensor | None, Initial | None, Tensor | None] | None,
    cache: LayerCache | None,
    mask_fields: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Read a segment, [B, T, HQ, Dv], with the window of the layer or the windows of its heads.

    Args:
        module: the hybrid attention module.
        inputs: rotated queries [B, HQ, T, D], keys and values [B, H, Tk, D].
        slots: log-gate [B, T, H, M], sink, slot queries and slot keys [B, T, heads, D], first slots, and the number of
            tokens in exact slots; None in a layer with full attention.
        cache: the layer's.
        mask_fields: those of a `HybridMask`. Compiled code cannot make tuples of named fields for what it calls.
        options: further arguments of the attention function.
    """
    (query, key, value), mask = inputs, HybridMask(*mask_fields)
    cu, rest = options.get("cu_seq_lens_q"), {name: x for name, x in options.items() if name != "softcap"}
    softcap, scaling = options["softcap"], options["scaling"]

    def full(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        if cu is None:
            return base_attention(module, q, k, v, mask.base, softcap=softcap, appended=mask.appended, **rest)
        lengths = {"sliding_window": options.get("sliding_window"), "max_seq_len": options.get("max_length_q")}
        scores = {"softcap": softcap, "scaling": scaling, "dropout": options["dropout"]}
        return packed_base_attention(module, q, k, v, cu, **scores, **lengths)

    if module.window_size == FULL:
        return full(query, key, value)
    assert slots is not None
    gate, sink, slot_query, slot_key, initial, kept = slots
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    segment = Segment(q, k, v, gate, slot_query, slot_key, mask.padding, cu, kept, mask.num_tokens)
    if initial is None and module.config.slots_from_start:
        initial = zero_slots(segment)
    # The mask of a static cache has room for later tokens.
    within = causal_mask(mask.padding) if mask.base is None else mask.base[..., : query.shape[2]]
    without_dropout = {name: x for name, x in rest.items() if name != "dropout"}
    window = window_now(module, module.window_size)
    reading = Reading(
        window_size=window if isinstance(window, int) else 0,
        scale=scaling,
        sink=sink,
        softcap=softcap,
        initial=initial,
        base=lambda q, k, v: base_attention(module, q, k, v, within, softcap=softcap, **without_dropout)[0],
        observe_mass=module.mass_observer,
    )
    if isinstance(window, int):
        return read_segment(segment, reading, cache), None
    return read_heads(segment, reading, window, cache, lambda q, k, v: full(q, k, v)[0]), None


# One graph before attention and one behind it serve layers of any windows, which no guard reads then.
read_outside_graph = cast(Callable[..., tuple[Tensor, Tensor | None]], torch.compiler.disable(read_layer))


def next_gated_token(
    module: Any, inputs: tuple[Tensor, ...], nha: LayerInputs, scaling: float | None, softcap: float | None
) -> Tensor:
    """`nha.models.next_token.next_token` with gates that are computed at once."""
    cache = nha.cache
    assert isinstance(cache, NHACacheLayer)
    slots = slot_inputs(module, nha)
    gate, sink, kept = slots.log_gate, slots.sink, slots.num_kept
    if module.ablation == "slots_off":
        gate, kept = gate[..., :0], None
    q, k, v = (x.transpose(1, 2) for x in inputs)
    if sink is not None and sink[0].dtype != k.dtype:
        sink = (sink[0].to(k.dtype), sink[1].to(v.dtype))
    slot_query = slot_key = None
    if nha.tables is not None:
        interleaved = module.rotary_style.interleaved
        slot_query, slot_key = unrotate_token(q, k, nha.tables, slots.tables, interleaved=interleaved)
    return cache.append((q, k, v, gate, slot_query, slot_key), sink, scaling, softcap, kept)


def slot_inputs(
    module: Any, nha: LayerInputs, padding: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> SlotInputs:
    """Gates, sink and slots of a hybrid attention module for a segment with padding [B, T] or packed sequences."""
    if module.slot_write == "soft":
        return module.nha(nha.hidden)
    state, kept = (None, None) if nha.cache is None else (nha.cache.state, nha.cache.num_kept)
    order = write_order(nha.hidden, state, padding, cu_seqlens, kept)
    return module.nha(nha.hidden, order, fill=state is None or not state.slots_active)


def observation(
    module: Any, inputs: Sequence[Tensor | Int8Rows], nha: LayerInputs, scale: float, softcap: float | None
) -> Observation:
    """The inputs of an attention module, keys without positions among them, for its observer."""
    dtype = nha.hidden.dtype
    query, key, value = (x.dequantize(dtype) if isinstance(x, Int8Rows) else x for x in inputs)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    slot_key = key
    if nha.tables is not None:
        slot_key = unrotate(key, *nha.tables, interleaved=module.rotary_style.interleaved)
    return Observation(nha.hidden, slot_key, key, value, query, scale, softcap)


def unused_slots(module: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """Gate and sink of a layer that reads neither, for `keep_in_graph`; nothing where no gradient is asked for."""
    if module.slots_frozen or not torch.is_grad_enabled():
        return ()
    slots = slot_inputs(module, LayerInputs(hidden[:, :1], None, None))
    return slots.log_gate, *(slots.sink or ())


def check_dropout(probability: float) -> None:
    """Raise ValueError for attention dropout, which slots cannot have."""
    if probability:
        raise ValueError(f"expected attention_dropout to be 0 in hybrid layers, got {probability}")


def check_implementation(config: Any) -> None:
    """Raise ValueError where something else than "nha" was chosen as the attention of a hybrid model."""
    if config._attn_implementation != NAME:
        got = config._attn_implementation
        raise ValueError(f"expected attn_implementation={NAME!r} in a hybrid model, got {got!r}")


AttentionInterface.register(NAME, hybrid_attention)
