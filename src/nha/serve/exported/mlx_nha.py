"""Runs a saved hybrid in MLX: mlx_lm loads this file out of the model's directory.

It needs mlx_lm and no other file of the package nha. Model code is mlx_lm's own for the family; its attention modules
read slots and windows. A hybrid layer's cache is of constant size. Sequences are not batched with others of another
length: the caches have no padding.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

FULL, GATE_DIVISOR, MIN_LOG_GATE = -1, 8, -5.0
CHUNK = 16  # tokens that are read at a time
FAMILIES = ("llama", "qwen2", "qwen3")


class ModelArgs:
    """The family's arguments and the settings of hybrid layers, from a config.json; ValueError for other models.

    Attributes:
        module: mlx_lm's module of the family.
        family: its arguments.
        windows: one per KV head in each layer.
        slots, sinks: per KV head.
        slots_from_start: whether slots take part from token 0.
    """

    def __init__(self, config: dict[str, Any]):
        family = config["model_type"].removeprefix("nha-")
        if family not in FAMILIES:
            raise ValueError(f"expected a hybrid of {', '.join(FAMILIES)} in MLX, got {config['model_type']}")
        if config.get("slot_write", "soft") != "soft":
            raise ValueError(f"expected slot_write 'soft' in MLX, got {config['slot_write']!r}")
        rope = config.get("rope_parameters") or {}
        changes: dict[str, Any] = {"model_type": family, "rope_theta": rope.get("rope_theta", 10000.0)}
        if rope.get("rope_type", "default") != "default":
            changes["rope_scaling"] = rope
        self.module = importlib.import_module(f"mlx_lm.models.{family}")
        self.family = self.module.ModelArgs.from_dict(config | changes)
        heads = config["num_key_value_heads"]
        self.windows = [[w] * heads if isinstance(w, int) else w for w in config["window_sizes"]]
        self.slots, self.sinks = config["num_slots"], config["num_sinks"]
        self.slots_from_start = config["slots_from_start"]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """The arguments of a config.json, under the name that mlx_lm calls."""
        return cls(config)


class SlotParameters(nn.Module):
    """Gate and sink of a layer, and cosines and sines of the distance at which queries see the slots."""

    def __init__(self, hidden: int, heads: int, dim: int, slots: int, sinks: int):
        super().__init__()
        self.g_proj = nn.Linear(hidden, heads * slots)
        self.sink_key = mx.zeros((heads, sinks, dim))
        self.sink_value = mx.zeros((heads, sinks, dim))
        self.slot_cos = mx.ones((1, 1, dim))
        self.slot_sin = mx.zeros((1, 1, dim))

    def turn(self, query: mx.array) -> mx.array:
        """Queries [B, HQ, T, D] without positions, as they see slots."""
        cos, sin = self.slot_cos.astype(mx.float32), self.slot_sin.astype(mx.float32)
        norm = mx.rsqrt(cos * cos + sin * sin)
        first, second = mx.split(query, 2, axis=-1)
        turned = query * (cos * norm) + mx.concatenate([-second, first], -1) * (sin * norm)
        return turned.astype(query.dtype)


class SlotCache:
    """The memory of a hybrid layer: the state of each group of heads with one window, and keys of full heads.

    The state of a group is slot keys and values [B, H, M, D] in float32, and of the last W tokens keys, values and slot
    keys [B, H, W, D] and log-gates [B, H, W, M]. Places that no token has taken hold zeros, which write nothing.
    """

    def __init__(self, groups: int, has_full: bool):
        self.offset = mx.array(0)
        self.groups: list[list[mx.array] | None] = [None] * groups
        self.full = KVCache() if has_full else None

    @property
    def state(self) -> list[Any]:
        """Everything that it holds."""
        held = [x for group in self.groups if group is not None for x in group]
        return [self.offset, *held, *(self.full.state if self.full is not None and self.full.offset else ())]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.state)

    def is_trimmable(self) -> bool:
        """Never: slots cannot forget a single token."""
        return False

    def empty(self) -> bool:
        """Whether it has read nothing."""
        return self.groups[0] is None

    def size(self) -> int:
        """The number of tokens read."""
        return int(self.offset.item())


def groups_of(windows: list[int]) -> list[tuple[int, list[int]]]:
    """Each window that is not full, and the KV heads that have it."""
    return [(w, [h for h, own in enumerate(windows) if own == w]) for w in dict.fromkeys(windows) if w != FULL]


def query_heads(heads: list[int], ratio: int) -> list[int]:
    """The query heads that read some KV heads."""
    return [head * ratio + i for head in heads for i in range(ratio)]


def empty_state(segment: list[mx.array], window: int) -> list[mx.array]:
    """The state of a group before the first token of a segment, whose tensors are those of the group."""
    _, key, value, _, _, gate = segment
    batch, heads, _, dim = key.shape
    slots = gate.shape[-1]
    of_slots = [mx.zeros((batch, heads, slots, x.shape[-1]), mx.float32) for x in (key, value)]
    window_cache = [mx.zeros((batch, heads, window, dim), x.dtype) for x in (key, value, key)]
    return [*of_slots, *window_cache, mx.zeros((batch, heads, window, slots), mx.float32)]


def read_chunk(
    chunk: list[mx.array],
    state: list[mx.array],
    start: mx.array,
    window: int,
    scale: float,
    sink: tuple[mx.array, mx.array],
    slots_from_start: bool,
) -> tuple[mx.array, list[mx.array]]:
    """Read a few tokens with heads of one window.

    Args:
        chunk: query [B, HQ, C, D], key and value [B, H, C, D], slot query and slot key likewise, log-gate [B, H, C, M].
        state: of these heads, as `SlotCache` describes.
        start: tokens read before.
        window: W.
        scale: of the scores.
        sink: keys and values [H, S, D].
        slots_from_start: whether slots take part from token 0.

    Returns:
        the output [B, HQ, C, D], and the state after the chunk.
    """
    query, *new, slot_query, slot_key, gate = chunk
    slot_keys, slot_values, *before = state
    batch, heads, count, dim = new[0].shape
    query, slot_query = (x.astype(mx.float32).reshape(batch, heads, -1, count, dim) for x in (query, slot_query))
    cache = [mx.concatenate(pair, 2) for pair in zip(before, (*new, slot_key, gate), strict=True)]
    key, value = (x.astype(mx.float32)[:, :, None] for x in cache[:2])
    # Query i writes the token that leaves its window, the i-th of the cache.
    leaving_value, leaving_key, log = (x[:, :, :count].astype(mx.float32) for x in (cache[1], cache[2], cache[3]))
    total = mx.cumsum(log, axis=2)
    index = mx.arange(count)
    written = index[:, None] >= index[None]
    decay = mx.exp(mx.minimum(total[:, :, :, None] - total[:, :, None], 0)) * (1 - mx.exp(log))[:, :, None]
    decay = mx.where(written[..., None], decay, 0)  # [B, H, query, token, M]
    kept = mx.exp(total)[:, :, None]
    products = slot_query @ leaving_key[:, :, None].swapaxes(-1, -2)
    slot_scores = kept * (slot_query @ slot_keys[:, :, None].swapaxes(-1, -2))
    slot_scores = slot_scores + mx.einsum("bhgij,bhijm->bhgim", products, decay)
    sink_key, sink_value = (x.astype(mx.float32)[None, :, None] for x in sink)
    active = (start + index >= window) | slots_from_start
    far = mx.concatenate([slot_query @ sink_key.swapaxes(-1, -2), slot_scores], -1)
    far = mx.where(active[:, None], far, -mx.inf)
    places = mx.arange(window + count)[None]
    seen = (places > index[:, None]) & (places <= index[:, None] + window) & (places >= window - start)
    near = mx.where(seen, query @ key.swapaxes(-1, -2), -mx.inf)
    weights = mx.softmax(scale * mx.concatenate([far, near], -1), axis=-1)
    sinks, slots = sink_value.shape[-2], slot_keys.shape[2]
    on_sink, on_slots, on_window = mx.split(weights, [sinks, sinks + slots], axis=-1)
    on_leaving = mx.einsum("bhgim,bhijm->bhgij", on_slots, decay)
    out = on_sink @ sink_value + (on_slots * kept) @ slot_values[:, :, None] + on_leaving @ leaving_value[:, :, None]
    out = out + on_window @ value
    last, written_last = mx.exp(total[:, :, -1])[..., None], decay[:, :, -1].swapaxes(-1, -2)
    slots_after = [last * slot_keys + written_last @ leaving_key, last * slot_values + written_last @ leaving_value]
    return out.reshape(batch, -1, count, dim), [*slots_after, *(x[:, :, count:] for x in cache)]


class HybridAttention:
    """Makes a family's attention module read slots and windows; mixed into its class."""

    nha: SlotParameters
    settings: dict[str, Any]

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Read hidden states [B, T, hidden]; the mask is made here."""
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).reshape(batch, length, heads, -1)
            for projection, heads in (
                (self.q_proj, self.n_heads),
                (self.k_proj, self.n_kv_heads),
                (self.v_proj, self.n_kv_heads),
            )
        )
        if "q_norm" in self:
            query, key = self.q_norm(query), self.k_norm(key)
        plain_query, plain_key, value = (y.transpose(0, 2, 1, 3) for y in (query, key, value))
        offset = 0 if cache is None else cache.offset
        query, key = self.rope(plain_query, offset=offset), self.rope(plain_key, offset=offset)
        if all(window == FULL for window in self.settings["windows"]):
            out = self.read_full(query, key, value, cache)
        else:
            cache = self.settings["make_cache"]() if cache is None else cache
            out = self.read_heads(x, (plain_query, plain_key), (query, key, value), cache)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def read_full(self: Any, query: mx.array, key: mx.array, value: mx.array, cache: Any) -> mx.array:
        """Read all keys, [B, HQ, T, D]."""
        if cache is not None:
            key, value = cache.update_and_fetch(key, value)
        mask = "causal" if query.shape[2] > 1 else None
        return mx.fast.scaled_dot_product_attention(query, key, value, scale=self.scale, mask=mask)

    def read_heads(self: Any, x: mx.array, plain: Any, rotated: Any, cache: SlotCache) -> mx.array:
        """Read every group of heads with its own window, [B, HQ, T, D], and keep what they remember."""
        query, key, value = rotated
        batch, length, _ = x.shape
        ratio, settings = self.n_heads // self.n_kv_heads, self.settings
        logits = self.nha.g_proj(x).astype(mx.float32).reshape(batch, length, self.n_kv_heads, -1)
        gate = mx.maximum(nn.log_sigmoid(logits) / GATE_DIVISOR, MIN_LOG_GATE).transpose(0, 2, 1, 3)
        if self.nha.sink_key.shape[1]:  # the sink stands in for the first token, and slots skip it
            gate = mx.where((cache.offset + mx.arange(length) == 0)[:, None], 0, gate)
        whole = [query, key, value, self.nha.turn(plain[0]), plain[1], gate]
        outs, order = [], []
        for index, (window, heads) in enumerate(groups_of(settings["windows"])):
            wide, narrow = mx.array(query_heads(heads, ratio)), mx.array(heads)
            segment = [y[:, wide if i in (0, 3) else narrow] for i, y in enumerate(whole)]
            sink = (self.nha.sink_key[narrow], self.nha.sink_value[narrow])
            state, parts = cache.groups[index] or empty_state(segment, window), []
            for start in range(0, length, CHUNK):
                chunk = [y[:, :, start : start + CHUNK] for y in segment]
                place = cache.offset + start
                out, state = read_chunk(chunk, state, place, window, self.scale, sink, settings["slots_from_start"])
                parts.append(out.astype(x.dtype))
            cache.groups[index] = state
            outs.append(mx.concatenate(parts, 2))
            order += query_heads(heads, ratio)
        full = [head for head, window in enumerate(settings["windows"]) if window == FULL]
        if full:
            wide, narrow = mx.array(query_heads(full, ratio)), mx.array(full)
            outs.append(self.read_full(query[:, wide], key[:, narrow], value[:, narrow], cache.full))
            order += query_heads(full, ratio)
        cache.offset = cache.offset + length
        return mx.concatenate(outs, 1)[:, mx.array(sorted(range(len(order)), key=order.__getitem__))]


class HybridDecoder:
    """Makes a family's stack of layers hand no masks to them; mixed into its class."""

    def __call__(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> mx.array:
        """Hidden states of tokens [B, T]."""
        hidden = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        for layer, own in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            hidden = layer(hidden, None, cache=own)
        return self.norm(hidden)


class HybridModel:
    """Gives a family's model the caches of hybrid layers; mixed into its class."""

    cache_makers: list[Any]

    def make_cache(self) -> list[Any]:
        """A cache for each layer."""
        return [make() for make in self.cache_makers]


def mix(mixin: type, module: nn.Module) -> None:
    """Put a mixin before a module's class."""
    module.__class__ = type(f"NHA{type(module).__name__}", (mixin, type(module)), {})


def cache_maker(windows: list[int]) -> Any:
    """Makes the cache of a layer."""
    groups, has_full = len(groups_of(windows)), FULL in windows
    return (lambda: SlotCache(groups, has_full)) if groups else KVCache


def Model(args: ModelArgs) -> nn.Module:
    """mlx_lm's model of the family, with hybrid layers; mlx_lm looks for it under this name."""
    model = args.module.Model(args.family)
    makers = [cache_maker(windows) for windows in args.windows]
    for layer, windows, make in zip(model.model.layers, args.windows, makers, strict=True):
        own = layer.self_attn
        dim = own.k_proj.weight.shape[0] // own.n_kv_heads
        own.nha = SlotParameters(args.family.hidden_size, own.n_kv_heads, dim, args.slots, args.sinks)
        own.settings = {"windows": tuple(windows), "slots_from_start": args.slots_from_start, "make_cache": make}
        mix(HybridAttention, own)
    mix(HybridDecoder, model.model)
    mix(HybridModel, model)
    object.__setattr__(model, "cache_makers", makers)
    return model
