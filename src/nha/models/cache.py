"""The cache of a generation: constant-size NHA layers beside transformers' own layers, and both on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)
from transformers.modeling_utils import PreTrainedModel

from nha.io import atomic_write
from nha.models.config import FULL
from nha.ops import NHAState, RingState, nha_attention
from nha.ops.validation import check_state

FORMAT = "nha-cache-v1"


@dataclass
class Inputs:
    """What one segment writes into a state: [B, T, H, ...] each, and its padding mask [B, T]."""

    key: Tensor
    value: Tensor
    log_gate: Tensor
    slot_key: Tensor | None
    mask: Tensor | None

    @property
    def length(self) -> int:
        return self.key.shape[1]

    @property
    def nbytes(self) -> int:
        parts = (self.key, self.value, self.log_gate, self.slot_key, self.mask)
        return sum(x.numel() * x.element_size() for x in parts if x is not None)

    def select(self, rows: Tensor) -> Inputs:
        return self._map(lambda x: x.index_select(0, rows.to(x.device)))

    def keep(self, length: int) -> Inputs:
        return self._map(lambda x: x[:, :length])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(*(None if x is None else function(x) for x in vars(self).values()))  # type: ignore[arg-type]

    def advance(self, state: NHAState | None, window_size: int) -> NHAState | None:
        """The state after these inputs; the queries do not matter, so the keys serve as such."""
        return nha_attention(
            self.key,
            self.key,
            self.value,
            self.log_gate,
            window_size=window_size,
            k_slot=self.slot_key,
            state=state,
            return_state=True,
            attention_mask=self.mask,
        ).state


class NHACacheLayer(CacheLayerMixin):
    """One layer's memory of a text: an `NHAState` whose size does not grow with the text.

    `update` returns the segment's own keys and values; the attention function reads `state`, says so to `record` and
    hands the next one to `keep`: a `RingState` where later tokens can be written into it. With `max_cache_len` the
    layer is static: its tensors keep their addresses and its length is a tensor, so that a compiled decoding step
    neither recompiles nor copies.

    Slots cannot forget single tokens. After `activate_past_recording` (assisted decoding calls it) the layer keeps
    the state before the newest segments and their inputs, and `crop` advances that state again, exactly; a crop
    beyond what was recorded raises RuntimeError.
    """

    _layer_type = "nha"
    is_croppable = True
    supports_early_init = False
    # Masks are sized after the first layer whose flag is True (sliding) or falsy (full): never after this one.
    is_sliding = "nha"

    def __init__(self, window_size: int | None = None, max_cache_len: int | None = None, **_: Any):
        super().__init__()
        self.window_size = window_size
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.state: NHAState | None = None
        self.length: int | Tensor = 0
        self.record_past = False
        self.claimed = False
        self._base: NHAState | None = None
        self._recorded: list[Inputs] = []

    def __repr__(self) -> str:
        return f"NHACacheLayer(window_size={self.window_size})"

    @property
    def nbytes(self) -> int:
        """Bytes held: the state's, and while recording those of the snapshot."""
        base = self._base.nbytes if self._base is not None and self._recorded else 0
        return base + sum(x.nbytes for x in self._recorded) + (0 if self.state is None else self.state.nbytes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.is_compileable:
            self.length = torch.zeros((), dtype=torch.int64, device=key_states.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.length)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the segment's tokens and return its keys and values [B, H, T, D] as they are.

        Raises ValueError where it is not a hybrid layer that reads the state: all it would see is this segment.
        """
        if not self.claimed:
            raise ValueError(f"expected a cache that an unconverted layer can read, got {self!r}")
        self.claimed = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if isinstance(self.length, Tensor):
            self.length.add_(key_states.shape[-2])
        else:
            self.length += key_states.shape[-2]
        return key_states, value_states

    def record(self, inputs: Inputs, before: NHAState | None) -> None:
        """While recording, keep a segment's inputs and the state `before` the first one, which may be overwritten."""
        if not self.record_past:
            self._forget()
            return
        if not self._recorded:
            overwritten = self.is_compileable or isinstance(before, RingState)
            self._base = before.map(torch.clone) if before is not None and overwritten else before
        self._recorded.append(inputs)

    def keep(self, state: NHAState | None) -> None:
        """Hold this state; a static layer copies it into the tensors that it has."""
        held = self.state
        if self.is_compileable and state is not None:
            state = state.padded()
        if not self.is_compileable:
            self.state = state
        elif state is None:
            for tensor in () if held is None else held.tensors().values():
                tensor.zero_()
        elif held is None or held.num_tokens.shape != state.num_tokens.shape:
            self.state = state.map(torch.clone)
            if not torch.compiler.is_compiling():
                for tensor in self.state.tensors().values():
                    torch._dynamo.mark_static_address(tensor)
        elif held is not state:
            if isinstance(held, RingState) != isinstance(state, RingState):
                state = RingState.of(state) if isinstance(held, RingState) else state.aligned()
            new = state.tensors()
            for name, tensor in held.tensors().items():
                tensor.copy_(new[name])

    def _forget(self) -> None:
        self._base, self._recorded = None, []

    def get_seq_length(self) -> int:
        return self.length  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.length  # type: ignore[return-value]

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs to go back to any token read after the latest crop."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; 0 only drops what was recorded."""
        if tokens_to_remove > 0:
            raise ValueError(f"expected crop to get minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove < 0 and self.is_initialized:
            kept = sum(x.length for x in self._recorded) + tokens_to_remove
            if kept < 0:
                raise RuntimeError(
                    f"expected to remove at most {kept - tokens_to_remove} recorded tokens, got {-tokens_to_remove}: "
                    "slots cannot forget, call activate_past_recording before the tokens are read"
                )
            state = self._base
            for inputs in self._recorded:
                part = inputs.keep(min(kept, inputs.length))
                kept -= part.length
                if part.length and self.window_size is not None:
                    state = part.advance(state, self.window_size)
            self.keep(state)
            self.length += tokens_to_remove
        self._forget()

    def reset(self) -> None:
        self._forget()
        self.keep(None)
        if isinstance(self.length, Tensor):
            self.length.zero_()
        else:
            self.length, self.is_initialized = 0, False

    def _select(self, rows: Tensor) -> None:
        if self.state is None:
            return
        self.keep(self.state.select(rows))
        self._base = None if self._base is None else self._base.select(rows)
        self._recorded = [inputs.select(rows) for inputs in self._recorded]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = self.state.num_tokens.shape[0]
            self._select(torch.arange(rows, device=self.state.num_tokens.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def offload(self) -> None:
        """Nothing: the attention function reads the state after `update` has returned, and it is small."""

    def prefetch(self) -> None:
        """Nothing, as for `offload`."""


def prepare_cache(cache: Cache, windows: Sequence[int]) -> None:
    """Put an NHA layer into every place of `cache` whose window is not -1; other layers stay transformers' own.

    Raises ValueError for a cache that has already been filled by another model or with other windows.
    """
    replicate = cache.layer_class_to_replicate
    while replicate is not None and len(cache.layers) < len(windows):
        cache.layers.append(replicate())  # type: ignore[arg-type]
    if len(cache.layers) != len(windows):
        raise ValueError(f"expected a cache of {len(windows)} layers, got one of {len(cache.layers)}")
    layer: Any
    for index, (layer, window) in enumerate(zip(cache.layers, windows, strict=True)):
        is_nha = isinstance(layer, NHACacheLayer)
        if is_nha and layer.window_size in (None, window) and window != FULL:
            layer.window_size = window
        elif is_nha or (window != FULL and getattr(layer, "is_initialized", False)):
            raise ValueError(
                f"expected an empty cache or one made with these windows, got {layer!r} in layer {index}, "
                f"whose window is {window}"
            )
        elif window != FULL:
            longest = layer.max_cache_len if isinstance(layer, StaticLayer) else None
            cache.layers[index] = NHACacheLayer(window, longest)


def nha_layers(cache: Cache) -> list[NHACacheLayer]:
    """The NHA layers of a cache, in order."""
    return [layer for layer in cache.layers if isinstance(layer, NHACacheLayer)]


def cache_nbytes(cache: Cache) -> int:
    """Bytes held by all layers of a cache; those of NHA layers do not grow with the text."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, NHACacheLayer):
            total += layer.nbytes
        else:
            tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
            total += sum(x.numel() * x.element_size() for x in tensors if x is not None)
    return total


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the configuration's shape and of a few numbers of every weight."""
    windows = getattr(model.config, "window_sizes", None)
    digest = hashlib.sha256(json.dumps([model.config.model_type, windows]).encode())
    for name, weight in model.state_dict().items():
        sample = weight.detach().flatten()[:8].double().cpu()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def save_cache(cache: Cache, path: str | Path, model: PreTrainedModel) -> None:
    """Write a running conversation's memory (all layers) as one safetensors file; it belongs to `model`.

    An existing file is replaced only by a whole new one. Raises ValueError for a cache with layers that are
    neither NHA nor transformers' dynamic layers (static ones do not know how full they are on every device).
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    caches: list[Any] = list(cache.layers)
    for index, layer in enumerate(caches):
        if isinstance(layer, NHACacheLayer) and not layer.is_compileable:
            parts: dict[str, Any] = {} if layer.state is None else layer.state.aligned().tensors()
            live = layer.state is not None and layer.state.slots_active
            layers.append({"kind": "nha", "window": layer.window_size, "length": layer.length, "live": live})
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            parts = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
            layers.append({"kind": type(layer).__name__, "length": layer.get_seq_length()})
        else:
            raise ValueError(f"expected a dynamic cache, got {type(layer).__name__} in layer {index}")
        tensors |= {f"{index}.{name}": x.detach().cpu().contiguous() for name, x in parts.items()}
    meta = {"format": FORMAT, "model": fingerprint(model), "layers": json.dumps(layers)}
    with atomic_write(path) as work:
        save_file(tensors, work, metadata=meta)


def load_cache(path: str | Path, model: PreTrainedModel) -> Cache:
    """Read a cache written by `save_cache`, on the device of `model`; going on from it gives the same bits.

    Raises ValueError for a truncated or foreign file and for the cache of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"expected a whole safetensors file at {path}, got: {error}") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"expected a cache of format {FORMAT!r} at {path}, got format {meta.get('format')!r}")
    if meta["model"] != fingerprint(model):
        raise ValueError(f"expected a cache made by this {type(model).__name__} at {path}, got one of another model")
    cache = DynamicCache(config=model.config)
    prepare_cache(cache, getattr(model.config, "window_sizes", [FULL] * len(cache.layers)))
    entries = json.loads(meta["layers"])
    if len(entries) != len(cache.layers):
        raise ValueError(f"expected {len(cache.layers)} layers at {path}, got {len(entries)}")
    layer: Any
    for index, (layer, entry) in enumerate(zip(cache.layers, entries, strict=True)):
        prefix = f"{index}."
        parts = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        if not entry["length"]:
            continue
        check_parts(parts, entry, layer, f"of layer {index} at {path}")
        if isinstance(layer, NHACacheLayer):
            parts.setdefault("window_slot_key", None)  # type: ignore[arg-type]
            layer.state = NHAState(window_size=entry["window"], slots_active=entry["live"], **parts)
            try:
                check_state(layer.state)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{error} of layer {index} at {path}") from None
            layer.length = entry["length"]
            layer.is_initialized = True
        else:
            layer.lazy_initialization(parts["keys"], parts["values"])  # type: ignore[call-arg]
            layer.keys, layer.values = parts["keys"], parts["values"]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = entry["length"]
    return cache


def check_parts(parts: dict[str, Tensor], entry: dict[str, Any], layer: Any, where: str) -> None:
    """Raise ValueError for a layer's tensors that are missing or do not fit together."""
    is_nha = isinstance(layer, NHACacheLayer)
    kind = "nha" if is_nha else type(layer).__name__
    if entry["kind"] != kind:
        raise ValueError(f"expected a layer of kind {kind!r}, got {entry['kind']!r} {where}")
    wanted = (
        {"slot_key", "slot_value", "key", "value", "window_log_gate", "num_tokens"} if is_nha else {"keys", "values"}
    )
    missing = sorted(wanted - parts.keys())
    if missing:
        raise ValueError(f"expected a tensor {missing[0]!r} {where}, got {sorted(parts)}")
    if is_nha:
        batch, heads, slots, dim = parts["slot_key"].shape
        value_dim = parts["slot_value"].shape[-1]
        window = min(entry["window"], parts["key"].shape[1])
        shapes = {
            "slot_value": (batch, heads, slots, value_dim),
            "key": (batch, window, heads, dim),
            "value": (batch, window, heads, value_dim),
            "window_slot_key": (batch, window, heads, dim),
            "window_log_gate": (batch, window, heads, slots),
            "num_tokens": (batch,),
        }
    else:
        shapes = {"values": (*parts["keys"].shape[:3], parts["values"].shape[-1])}
    for name, shape in shapes.items():
        if name in parts and tuple(parts[name].shape) != shape:
            raise ValueError(f"expected {name!r} {list(shape)} {where}, got {list(parts[name].shape)}")
