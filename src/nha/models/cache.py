"""The cache of a generation: NHA layers of constant size beside transformers' own layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as memoize
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from nha.models.config import FULL
from nha.models.segment import Inputs, Reading, Segment, attend, initial_state
from nha.ops import NHAState, RingState


class NHACacheLayer(CacheLayerMixin):
    """One layer's memory of a batch of sequences: an `NHAState`, whose size does not grow with their length.

    A hybrid layer calls `attend`, which reads the state, writes the segment and keeps the next state: a `RingState`
    where later tokens can be written into it. With `max_cache_len` the layer is static: its tensors keep their
    addresses and its length is a tensor, so that a compiled decoding step neither recompiles nor copies.

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
        """Refuse an unconverted layer, which would see only this segment: hybrid layers call `attend`."""
        raise ValueError(f"expected a cache that an unconverted layer can read, got {self!r}")

    def attend(self, segment: Segment, reading: Reading) -> Tensor:
        """Read slots and window for a segment, [B, T, HQ, Dv], and remember the segment."""
        before = self.state if self.state is not None else initial_state(segment, reading)
        base = self._snapshot(before)
        out, after = attend(segment, reading, before, keep=True)
        if self.record_past:
            self._base = base
            self._recorded.append(segment.inputs)
        else:
            self._forget()
        self._keep(after)
        self._count(segment)
        return out

    def check(self, rows: int, slots: int) -> None:
        """Raise ValueError for a state that holds another number of sequences or slots."""
        got = [rows, slots] if self.state is None else [self.state.slot_key.shape[0], self.state.slot_key.shape[2]]
        if got != [rows, slots]:
            raise ValueError(f"expected a cache of [rows, slots] {[rows, slots]}, got one of {got}")

    def _snapshot(self, state: NHAState | None) -> NHAState | None:
        """The state before the first recorded segment: a copy where the segment is written into the state itself."""
        if not self.record_past or self._recorded:
            return self._base
        overwritten = self.is_compileable or isinstance(state, RingState)
        return state.map(torch.clone) if state is not None and overwritten else state

    def _count(self, segment: Segment) -> None:
        if not self.is_initialized:
            self.lazy_initialization(segment.key, segment.value)
        if isinstance(self.length, Tensor):
            self.length.add_(segment.length)
        else:
            self.length += segment.length

    def _keep(self, state: NHAState | None) -> None:
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

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise, before anything changes, for a number of tokens that `crop` cannot remove."""
        if tokens_to_remove > 0:
            raise ValueError(f"expected crop to get minus the number of tokens to remove, got {tokens_to_remove}")
        recorded = sum(inputs.length for inputs in self._recorded)
        if self.is_initialized and recorded + tokens_to_remove < 0:
            raise RuntimeError(
                f"expected to remove at most {recorded} recorded tokens, got {-tokens_to_remove}: "
                "slots cannot forget, call activate_past_recording before the tokens are read"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; 0 only drops what was recorded."""
        self.check_crop(tokens_to_remove)
        if tokens_to_remove < 0 and self.is_initialized:
            kept = sum(inputs.length for inputs in self._recorded) + tokens_to_remove
            state = self._base
            for inputs in self._recorded:
                part = inputs.first(min(kept, inputs.length))
                kept -= part.length
                if part.length and self.window_size is not None:
                    state = part.advance(state, self.window_size)
            self._keep(state)
            self.length += tokens_to_remove
        self._forget()

    def reset(self) -> None:
        self._forget()
        self._keep(None)
        if isinstance(self.length, Tensor):
            self.length.zero_()
        else:
            self.length, self.is_initialized = 0, False

    def _select(self, rows: Tensor) -> None:
        if self.state is None:
            return
        self._keep(self.state.select(rows))
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
        """Do nothing: the state is small."""

    def prefetch(self) -> None:
        """Do nothing, as for `offload`."""


class HybridCacheMixin:
    """A cache in which some layers are NHA layers: it is cropped in all layers or in none."""

    layers: list[Any]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens. Raises RuntimeError where slots took them in for good."""
        for layer in nha_layers(self):  # type: ignore[arg-type]
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@memoize
def hybrid_cache_class(kind: type[Cache]) -> type[Cache]:
    """The class of a cache of this kind once it holds NHA layers."""
    return type(f"Hybrid{kind.__name__}", (HybridCacheMixin, kind), {"__module__": __name__})


def _rebuild(kind: type[Cache]) -> Cache:
    new = hybrid_cache_class(kind)
    return new.__new__(new)


def prepare_cache(cache: Cache, windows: Sequence[int]) -> None:
    """Put an NHA layer into every place of `cache` whose window is not -1; other layers stay transformers' own.

    Raises ValueError, before anything changes, for a cache that has already been filled by another model or with
    other windows.
    """
    layers: list[Any] = list(cache.layers)
    replicate = cache.layer_class_to_replicate
    while replicate is not None and len(layers) < len(windows):
        layers.append(replicate())
    if len(layers) != len(windows):
        raise ValueError(f"expected a cache of {len(windows)} layers, got one of {len(layers)}")
    for index, (layer, window) in enumerate(zip(layers, windows, strict=True)):
        is_nha = isinstance(layer, NHACacheLayer)
        if is_nha and layer.window_size in (None, window) and window != FULL:
            continue
        filled = getattr(layer, "is_initialized", False)
        if is_nha or (window != FULL and filled):
            got = type(layer).__name__ if filled and not is_nha else repr(layer)
            hint = "" if is_nha else " (for prefix tuning, nha.models.peft_slots learns what slots start with)"
            raise ValueError(
                f"expected an empty cache or one made with these windows, got {got} in layer {index}, whose window is "
                f"{window}{hint}"
            )
        if window != FULL:
            layers[index] = NHACacheLayer(window, layer.max_cache_len if isinstance(layer, StaticLayer) else None)
    for layer, window in zip(layers, windows, strict=True):
        if isinstance(layer, NHACacheLayer):
            layer.window_size = window
    cache.layers[:] = layers
    if not isinstance(cache, HybridCacheMixin) and not torch.compiler.is_compiling():  # which cannot trace this
        cache.__class__ = hybrid_cache_class(type(cache))


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
