"""Caches on disk: a running conversation's memory as one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import PreTrainedModel

from nha.io import OPTIONAL_TENSORS, read_tensors, write_tensors
from nha.models.cache import HeadGroupsCacheLayer, NHACacheLayer, prepare_cache
from nha.models.config import FULL
from nha.models.int8_cache import Int8CacheLayer
from nha.models.windows import decoder
from nha.ops import NHAState
from nha.ops.int8_rows import Int8Rows
from nha.ops.packed_state import PackedState
from nha.ops.state import check_state

FORMAT = "nha-cache-v2"
HEADS = "heads"  # the kind of a layer with windows per head
ROWS = ("keys", "values", "keys_scale", "values_scale")  # tensors of a layer with full attention in 8 bits
# Settings that say where a configuration came from or how to train and write, never what a forward pass computes.
IRRELEVANT = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "converted_from",
    "dtype",
    "gate_std",
    "initializer_range",
    "kv_cache_dtype",
    "state_dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the configuration, of every weight's name, shape and dtype, and of eight numbers of each.

    Caches and runs are tied to a model by it: settings that change what the model computes (windows, rotary settings,
    slots) change the digest, its name and the version of transformers do not.
    """
    settings = {k: v for k, v in decoder(model).config.to_dict().items() if k not in IRRELEVANT}
    if settings.get("slot_write") == "soft":  # as in all models that do not say so
        del settings["slot_write"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    weights = model.state_dict()
    for (name, weight), sample in zip(weights.items(), first_numbers(weights.values()), strict=True):
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def first_numbers(weights: Iterable[Tensor]) -> list[Tensor]:
    """The first eight numbers of each tensor, in float64 on the CPU; a device is waited for once for each dtype."""
    samples = [weight.detach().flatten()[:8] for weight in weights]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault((sample.device, sample.dtype), []).append(index)
    for indices in groups.values():
        numbers = torch.cat([samples[index] for index in indices]).double().cpu()
        for index, part in zip(indices, numbers.split([len(samples[index]) for index in indices]), strict=True):
            samples[index] = part
    return samples


def save_cache(cache: Cache, path: str | Path, model: PreTrainedModel) -> None:
    """Write a running conversation's memory (all layers) as one safetensors file; it belongs to `model`.

    An existing file is replaced only by a whole new one.

    Raises:
        ValueError: a layer is neither NHA nor one of transformers' dynamic layers (static ones do not know how full
            they are on every device); nothing is written.

    >>> import tempfile
    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model, ids = NHAForCausalLM(NHAConfig.tiny()).eval(), torch.arange(100)[None]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_cache(model(ids, use_cache=True).past_key_values, f"{folder}/read", model)
    ...     cache = load_cache(f"{folder}/read", model)
    >>> cache.get_seq_length()
    100
    """
    write_tensors(path, *cache_contents(cache, model))


def cache_contents(cache: Cache, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that `save_cache` writes."""
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    caches: list[Any] = list(cache.layers)
    for index, layer in enumerate(caches):
        if not isinstance(layer, HeadGroupsCacheLayer):
            entry, own = layer_contents(layer, index)
        else:
            found = [layer_contents(part, index) for part in layer.parts]
            entry = {"kind": HEADS, "length": layer.get_seq_length(), "parts": [entry for entry, _ in found]}
            own = {f"{place}.{name}": x for place, (_, parts) in enumerate(found) for name, x in parts.items()}
        layers.append(entry)
        tensors |= {f"{index}.{name}": x for name, x in own.items()}
    return tensors, {"format": FORMAT, "model": fingerprint(model), "layers": json.dumps(layers)}


def layer_contents(layer: Any, index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entry of a file and the tensors of one layer, or of one part of a layer with windows per head."""
    if isinstance(layer, NHACacheLayer) and not layer.is_compileable:
        active = layer.state is not None and layer.state.slots_active
        entry = {"kind": "nha", "window": layer.window_size, "length": layer.length, "active": active}
        if isinstance(layer.state, PackedState):
            packed = layer.state.in_order()
            dtypes = {"dtype": packed.dtype, "gate_dtype": packed.gate_dtype}
            names = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
            return entry | {"state_dtype": packed.state_dtype} | names, packed.tensors()
        return entry, {} if layer.state is None else layer.state.aligned().tensors()
    if isinstance(layer, Int8CacheLayer) and not layer.is_compileable:
        entry = {"kind": Int8CacheLayer.__name__, "length": layer.get_seq_length()}
        if not layer.is_initialized:
            return entry, {}
        return entry, dict(zip(ROWS, (x[i] for i in range(2) for x in (layer.keys, layer.values)), strict=True))
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        entry = {"kind": type(layer).__name__, "length": layer.get_seq_length()}
        parts: dict[str, Any] = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
        return entry, parts
    raise ValueError(f"expected a dynamic cache, got {type(layer).__name__} in layer {index}")


def load_cache(path: str | Path, model: PreTrainedModel) -> Cache:
    """Read a cache written by `save_cache`, on the device of `model`; going on from it gives the same bits.

    Raises:
        ValueError: the file is damaged, of another format, of another model, or holds tensors that do not fit
            together; the message names the file.
        OSError: there is no such file, or it cannot be read.
    """
    return cache_from(*read_tensors(path, model.device), path, model)


def cache_from(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | Path, model: PreTrainedModel) -> Cache:
    """The cache of a file with these contents; `path` names it in errors, which are those of `load_cache`."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"expected a cache of format {FORMAT!r} at {path}, got format {metadata.get('format')!r}")
    if metadata.get("model") != fingerprint(model):
        raise ValueError(f"expected a cache made by this {type(model).__name__} at {path}, got one of another model")
    config = decoder(model).config
    cache = DynamicCache(config=config)
    windows = getattr(config, "window_sizes", [FULL] * len(cache.layers))
    formats = getattr(config, "state_dtype", "float32"), getattr(config, "kv_cache_dtype", "auto")
    prepare_cache(cache, windows, *formats)
    entries = read_entries(metadata, path)
    if len(entries) != len(cache.layers):
        raise ValueError(f"expected {len(cache.layers)} layers at {path}, got {len(entries)}")
    for index, entry in enumerate(entries):
        layer, own, where = cache.layers[index], with_prefix(tensors, f"{index}."), f"of layer {index} at {path}"
        if not entry["length"]:
            continue
        if not isinstance(layer, HeadGroupsCacheLayer):
            cache.layers[index] = layer = layer_of_kind(layer, entry["kind"])
            fill_layer(layer, own, entry, where)
            continue
        kinds = [part["kind"] for part in entry.get("parts", [])]
        if entry["kind"] != HEADS or len(kinds) != len(layer.parts):
            got = f"{entry['kind']!r} {kinds}"
            raise ValueError(f"expected a layer of kind {HEADS!r} with {len(layer.parts)} parts, got {got} {where}")
        layer.parts[:] = map(layer_of_kind, layer.parts, kinds)
        for place, (part, inner) in enumerate(zip(layer.parts, entry["parts"], strict=True)):
            fill_layer(part, with_prefix(own, f"{place}."), inner, f"of part {place} {where}")
    return cache


def read_entries(metadata: dict[str, str], path: str | Path) -> list[dict[str, Any]]:
    """The descriptions of all layers in a file. Raises ValueError for a file that nobody wrote with `save_cache`.

    >>> read_entries({"layers": '[{"kind": "DynamicLayer", "length": 3}]'}, "x")
    [{'kind': 'DynamicLayer', 'length': 3}]
    >>> read_entries({"layers": '[{"kind": "DynamicLayer", "length": -3}]'}, "x")
    Traceback (most recent call last):
    ValueError: expected a kind and a length of every layer at x, got [{"kind": "DynamicLayer", "length": -3}]
    """
    text = metadata.get("layers", "")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(map(is_entry, entries)):
        raise ValueError(f"expected a kind and a length of every layer at {path}, got {text[:80]}")
    return entries


def is_entry(entry: Any) -> bool:
    """Whether a value of JSON describes a layer, or a part of one with windows per head."""
    if not isinstance(entry, dict):
        return False
    length, parts = entry.get("length"), entry.get("parts", [])
    is_nha = entry.get("kind") == "nha"
    return (
        isinstance(entry.get("kind"), str)
        and type(length) is int
        and length >= 0
        and (not is_nha or (type(entry.get("window")) is int and isinstance(entry.get("active"), bool)))
        and isinstance(parts, list)
        and all(isinstance(part, dict) and "parts" not in part and is_entry(part) for part in parts)
    )


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def layer_of_kind(layer: Any, kind: str) -> Any:
    """An empty layer that holds full attention in the format of a file; other layers as they are."""
    if kind == Int8CacheLayer.__name__ and type(layer) is DynamicLayer:
        return Int8CacheLayer()
    return DynamicLayer() if kind == DynamicLayer.__name__ and isinstance(layer, Int8CacheLayer) else layer


def fill_layer(layer: Any, parts: dict[str, Any], entry: dict[str, Any], where: str) -> None:
    """Put the tensors of a file into one layer of a cache.

    Raises ValueError for tensors that are missing, unknown or do not fit together.
    """
    if isinstance(layer, NHACacheLayer) and entry["kind"] == "nha" and "state_dtype" in entry:
        fill_packed(layer, parts, entry, where)
        return
    is_nha, is_int8 = isinstance(layer, NHACacheLayer), isinstance(layer, Int8CacheLayer)
    kind = "nha" if is_nha else type(layer).__name__
    if entry["kind"] != kind:
        raise ValueError(f"expected a layer of kind {kind!r}, got {entry['kind']!r} {where}")
    required = set(ROWS) if is_int8 else {"keys", "values"}
    if is_nha:
        required = {"slot_key", "slot_value", "key", "value", "window_log_gate", "num_tokens"}
    optional = OPTIONAL_TENSORS if is_nha else set()
    missing, unknown = sorted(required - parts.keys()), sorted(parts.keys() - required - optional)
    if missing or unknown:
        raise ValueError(f"expected tensors {sorted(required)} {where}, got {missing} missing and {unknown} unknown")
    if is_nha:
        parts = dict.fromkeys(OPTIONAL_TENSORS) | parts
        state = NHAState(window_size=entry["window"], slots_active=entry["active"], **parts)
        try:
            check_state(state)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error} {where}") from None
        layer.state, layer.length, layer.is_initialized = state, entry["length"], True
        layer.state_dtype = "float32"
        return
    keys, values = parts["keys"], parts["values"]
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"expected 'values' {[*keys.shape[:3], 'Dv']} {where}, got {list(values.shape)}")
    if is_int8:
        fill_int8(layer, parts, entry["length"], where)
        return
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = entry["length"]


def fill_int8(layer: Any, parts: dict[str, Tensor], length: int, where: str) -> None:
    """Put keys and values in 8 bits of a file into a layer, as `fill_layer` does."""
    for name, scale in ((name, f"{name}_scale") for name in ("keys", "values")):
        wanted = (
            f"{torch.int8} {[*parts[name].shape[:2], length]}",
            f"{torch.float32} {[*parts[name].shape[:2], length, 1]}",
        )
        x, y = parts[name], parts[scale]
        got = f"{x.dtype} {[*x.shape[:3]]}", f"{y.dtype} {list(y.shape)}"
        if got != wanted:
            raise ValueError(f"expected {name!r} and its scale to be {wanted} {where}, got {got}")
    layer.lazy_initialization(parts["keys"], parts["values"])
    layer.keys, layer.values = (Int8Rows(parts[name], parts[f"{name}_scale"]) for name in ("keys", "values"))
    layer.cumulative_length = length


def fill_packed(layer: NHACacheLayer, parts: dict[str, Tensor], entry: dict[str, Any], where: str) -> None:
    """Put a packed state of a file into a layer, which keeps its format from then on, as `fill_layer` does."""
    try:
        dtypes = {name: getattr(torch, str(entry[name])) for name in ("dtype", "gate_dtype")}
        options: dict[str, Any] = {**dtypes, "state_dtype": entry["state_dtype"], "window_slot_key": None, **parts}
        state = PackedState(window_size=entry["window"], slots_active=entry["active"], **options)
        state.check()
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{error} {where}") from None
    layer.state, layer.length, layer.is_initialized = state, entry["length"], True
    layer.state_dtype = state.state_dtype
