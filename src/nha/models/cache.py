"""The cache of a generation: NHA layers of constant size beside transformers' own layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache as memoize
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from nha.models.config import FULL
from nha.models.int8_cache import Int8CacheLayer
from nha.models.rollback import attend_with_rollback, supports_rollback
from nha.models.segment import Inputs, Reading, Segment, Sink, attend, count_kept, initial_state, steps_in_place
from nha.ops import NHAState, RingState
from nha.ops.backends import needs_grad
from nha.ops.heads import Window, head_groups, join_heads, window_of
from nha.ops.packed_state import PackedState, like_ring
from nha.ops.single_token import FusedRing, read_token
from nha.ops.state import check_max_rollback

DRAFTS = 64  # tokens of a segment that may be a draft: longer ones are not recorded beside a rollback


class NHACacheLayer(CacheLayerMixin):
    """One layer's memory of a batch of sequences: an `NHAState`, whose size does not grow with their length.

    A hybrid layer calls `attend`, which reads the state, writes the segment and keeps the next state: a `RingState`
    where later tokens can be written into it. With `max_cache_len` the layer is static: its tensors keep their
    addresses and its length is a tensor, so that a compiled decoding step neither recompiles nor copies.

    Slots cannot forget single tokens. With `max_rollback` of R the newest R tokens are not written to them yet, and
    `crop` takes those back by moving a cursor: it can go back R tokens behind the furthest one that was read. After
    `activate_past_recording` (assisted decoding calls it) the layer also keeps the state before segments that are
    longer and their inputs, and `crop` advances that state again, exactly; with a `max_rollback` it does not keep
    whole prompts. A crop beyond both raises RuntimeError.

    With a `state_dtype` of "bfloat16" or "int8" the state is packed between two calls, and a call computes with an
    unpacked copy, of one layer at a time.
    """

    _layer_type = "nha"
    is_croppable = True
    supports_early_init = False
    # Masks are sized after the first layer whose flag is True (sliding) or falsy (full): never after this one.
    is_sliding = "nha"

    def __init__(
        self,
        window_size: int | None = None,
        max_cache_len: int | None = None,
        max_rollback: int = 0,
        state_dtype: str = "float32",
        **_: Any,
    ):
        super().__init__()
        self.state_dtype = state_dtype
        self.window_size = window_size
        self.max_cache_len = max_cache_len
        self.max_rollback = max_rollback
        self.is_compileable = max_cache_len is not None
        self.state: NHAState | None = None
        self.length: int | Tensor = 0
        self.record_past = False
        self._base: NHAState | None = None
        self._recorded: list[Inputs] = []
        self._removable = self._base_removable = 0  # tokens that a rollback of the state, of the base, takes back
        self._since_crop = 0  # tokens read since the latest crop that are not recorded

    def __repr__(self) -> str:
        return f"NHACacheLayer(window_size={self.window_size})"

    @property
    def num_kept(self) -> Tensor | None:
        """Tokens in exact slots so far, [B, H] int64; None for soft slots and before the first token."""
        return None if self.state is None else self.state.num_kept

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
        if isinstance(before, PackedState):
            check_no_grad(segment, self.state_dtype)
            before = before.unpack()
        if self.appends_only and before is not None and steps_in_place(segment, reading, before):
            self.state = before
            out = self.append(segment.tensors, reading.sink, reading.scale, reading.softcap, segment.num_kept)
            if self.state_dtype != "float32":
                self._keep(self.state)
            return out
        before = before.aligned() if isinstance(before, FusedRing) else before
        rollback = self.max_rollback if not self.is_compileable and supports_rollback(segment, before) else 0
        recorded = self.record_past and self._must_record(segment, rollback)
        base = self._snapshot(before) if recorded else None
        if not isinstance(before, RingState) or before.max_rollback != rollback:
            self._removable = 0  # a ring of another size begins with all that left the window in its slots
            before = before.aligned() if isinstance(before, RingState) and before.max_rollback else before
        if rollback:
            out, after, removable = attend_with_rollback(segment, reading, before, rollback)
        else:
            out, after = attend(segment, reading, before, keep=True)
            removable = None
        if recorded:
            self._base = base
            self._recorded.append(segment.inputs)
        elif self._recorded or not self.record_past or segment.length > rollback:
            self._forget()
        else:
            self._since_crop += segment.length
        self._removable = 0 if removable is None else min(self._removable + removable, rollback)
        count_kept(after, segment.num_kept)
        self._keep(after)
        self._count(segment)
        return out

    @property
    def appends_only(self) -> bool:
        """Whether tokens are never taken back and no tensor has to keep its address."""
        return not (self.is_compileable or self.record_past or self.max_rollback)

    def append(
        self,
        inputs: tuple[Tensor | None, ...],
        sink: Sink | None,
        scale: float | None,
        softcap: float | None,
        num_kept: Tensor | None,
    ) -> Tensor:
        """Read the next token of every sequence, [B, 1, HQ, Dv], and write it into the state, or first into a copy.

        `inputs` as `Segment.tensors`, `num_kept` as in `Segment`; `supports_step` says where this works.
        """
        state = self.state
        assert state is not None and isinstance(self.length, int)
        if not isinstance(state, FusedRing) or not state.hold_sink(sink):
            state = self.state = FusedRing.of(state, sink)
        self.length += 1
        count_kept(state, num_kept)
        return read_token(state, *inputs, scale=scale, softcap=softcap)  # type: ignore[arg-type]

    def _must_record(self, segment: Segment, rollback: int) -> bool:
        """Whether a crop may have to go back behind what a rollback takes back. A prompt is not kept for that."""
        if rollback and segment.length > max(DRAFTS, 2 * rollback):
            return False
        return bool(self._recorded) or segment.mask is not None or self._since_crop + segment.length > rollback

    def make_static(self, max_cache_len: int) -> None:
        """From now on keep the addresses of all tensors, up to `max_cache_len` tokens in layers with full attention."""
        state, length = self.state, self.length
        self.max_cache_len, self.is_compileable, self.state = max_cache_len, True, None
        if state is not None:
            self.lazy_initialization(state.key, state.value)
            self._keep(state)
        if isinstance(self.length, Tensor):
            self.length.fill_(length)

    def make_growing(self) -> None:
        """Undo `make_static`: the state may be replaced by another from now on."""
        self.max_cache_len, self.is_compileable, self.length = None, False, int(self.length)

    def pack(self, state_dtype: str) -> None:
        """Keep the state in another format from now on, one that is held included; a static layer stays as it is."""
        if not self.is_compileable:
            self.state_dtype = state_dtype
            self._keep(self.state.unpack() if isinstance(self.state, PackedState) else self.state)

    def check(self, rows: int, slots: int) -> None:
        """Raise ValueError for a state that holds another number of sequences or slots."""
        got = [rows, slots] if self.state is None else [self.state.slot_key.shape[0], self.state.slot_key.shape[2]]
        if got != [rows, slots]:
            raise ValueError(f"expected a cache of [rows, slots] {[rows, slots]}, got one of {got}")

    def _snapshot(self, state: NHAState | None) -> NHAState | None:
        """The state before the first recorded segment: a copy where the segment is written into the state itself."""
        if self._recorded:
            return self._base
        self._base_removable = self._removable
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
        if state is not None and self.state_dtype != "float32" and not isinstance(state, PackedState):
            if self.is_compileable and held is not None:
                state = like_ring(state, held)
            state = PackedState.of(state, self.state_dtype)
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
            new = like_ring(state, held).tensors()
            for name, tensor in held.tensors().items():
                tensor.copy_(new[name])

    def _forget(self) -> None:
        self._base, self._recorded, self._base_removable, self._since_crop = None, [], 0, 0

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
        recorded = max(self._removable, self._recorded_length + (self._base_removable if self._recorded else 0))
        if self.is_initialized and recorded + tokens_to_remove < 0:
            raise RuntimeError(
                f"expected to remove at most {recorded} recorded tokens, got {-tokens_to_remove}: "
                "slots cannot forget, call activate_past_recording before the tokens are read"
            )

    @property
    def _recorded_length(self) -> int:
        return sum(inputs.length for inputs in self._recorded)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; 0 only drops what was recorded."""
        self.check_crop(tokens_to_remove)
        if tokens_to_remove < 0 and self.is_initialized:
            if -tokens_to_remove <= self._removable:
                assert isinstance(self.state, RingState | PackedState)
                self.state.rollback(-tokens_to_remove)
                self._removable += tokens_to_remove
            else:
                self._advance_base(self._recorded_length + tokens_to_remove)
            self.length += tokens_to_remove
        self._grow()
        self._forget()

    def _grow(self) -> None:
        """Give a rollback that proved too small for a draft enough places from now on."""
        if self.max_rollback and self._base is not None:  # not a prompt
            self.max_rollback = max(self.max_rollback, *(inputs.length for inputs in self._recorded))

    def _advance_base(self, kept: int) -> None:
        """Go back to the state before the recorded tokens and read the first `kept` of them again.

        A negative number goes back behind them.
        """
        state = self._base
        self._removable = 0
        if kept < 0:
            assert isinstance(state, RingState)
            state.rollback(-kept)
            self._removable = self._base_removable + kept
        for inputs in self._recorded:
            part = inputs.first(min(max(kept, 0), inputs.length))
            kept -= part.length
            if part.length and self.window_size is not None:
                state = part.advance(state, self.window_size)
        self._keep(state)

    def reset(self) -> None:
        self._forget()
        self._removable = 0
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


def check_no_grad(segment: Segment, state_dtype: str) -> None:
    """Raise ValueError where a gradient would have to go through a state that is packed."""
    if needs_grad(segment.tensors):
        raise ValueError(f"expected state_dtype 'float32' where gradients go through a cache, got {state_dtype!r}")


class HeadGroupsCacheLayer(CacheLayerMixin):
    """The memory of a layer whose KV heads have windows of their own: one part per group of `head_groups`.

    A part is an `NHACacheLayer`; heads with full attention keep the layer that transformers has for them. All parts
    read the same tokens, so whatever happens to one happens to all.
    """

    is_croppable = True
    supports_early_init = False

    def __init__(
        self, windows: Sequence[int], base: CacheLayerMixin, max_rollback: int = 0, state_dtype: str = "float32"
    ):
        self.keys = self.values = None  # as in a layer that is empty: the parts hold them
        self.window_size = tuple(windows)
        self.parts: list[Any] = []
        self.groups = head_groups(windows)
        limit = base.max_cache_len if isinstance(base, StaticLayer | Int8CacheLayer) else None
        for group in self.groups:
            full = group.window_size == FULL
            own = base if full else NHACacheLayer(group.window_size, limit, max_rollback, state_dtype)
            self.parts.append(own)
        self.is_compileable = limit is not None
        # Masks are sized after full attention, where there is any.
        self.is_sliding = next((p.is_sliding for p in self.parts if p is base), NHACacheLayer.is_sliding)

    def __repr__(self) -> str:
        return f"HeadGroupsCacheLayer(window_size={self.window_size})"

    @property
    def _counting(self) -> NHACacheLayer:
        return next(part for part in self.parts if isinstance(part, NHACacheLayer))

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self._counting.is_initialized

    @property
    def state(self) -> Any:
        """The state of the first part that has one: it has read the same tokens as the others."""
        return self._counting.state

    @property
    def num_kept(self) -> Tensor | None:
        """Tokens in exact slots so far, [B, H] int64, 0 for heads with full attention; None as in `NHACacheLayer`."""
        own = self._counting.num_kept
        if own is None:
            return None
        none, found = torch.zeros_like(own[:, :1]), []
        for part, group in zip(self.parts, self.groups, strict=True):
            found.append(part.num_kept if isinstance(part, NHACacheLayer) else none.expand(-1, len(group.heads)))
        return join_heads(found, self.groups, 1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: each part does so with its own heads."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse an unconverted layer, as an `NHACacheLayer` does."""
        raise ValueError(f"expected a cache that an unconverted layer can read, got {self!r}")

    def get_seq_length(self) -> int:
        return self._counting.get_seq_length()

    def get_max_length(self) -> int:
        return self._counting.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sized = next((part for part in self.parts if not isinstance(part, NHACacheLayer)), self._counting)
        return sized.get_mask_sizes(query_length)

    def activate_past_recording(self) -> None:
        self._call("activate_past_recording")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens in all parts, or raise before anything changes."""
        for part in self.parts:
            if isinstance(part, NHACacheLayer):
                part.check_crop(tokens_to_remove)
        for part in sorted(self.parts, key=lambda part: isinstance(part, NHACacheLayer)):  # others may refuse as well
            part.crop(tokens_to_remove)

    def reset(self) -> None:
        self._call("reset")
        for part in self.parts:
            if type(part) is DynamicLayer and part.keys is not None and part.values is not None:
                # transformers 5.17 keeps the tokens and sets them to zero
                part.keys, part.values = part.keys[..., :0, :], part.values[..., :0, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._call("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._call("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._call("batch_select_indices", indices)

    def offload(self) -> None:
        self._call("offload")

    def prefetch(self) -> None:
        self._call("prefetch")

    def _call(self, name: str, *args: Any) -> None:
        for part in self.parts:
            if hasattr(part, name):
                getattr(part, name)(*args)


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


def prepare_cache(
    cache: Cache, windows: Sequence[Window], state_dtype: str = "float32", kv_cache_dtype: str = "auto"
) -> None:
    """Put an NHA layer into every place of `cache` whose window is not -1; other layers stay transformers' own.

    A layer with windows per head gets one of several parts. New layers keep their states in `state_dtype`, and with a
    `kv_cache_dtype` of "int8" layers and heads with full attention keep keys and values in 8 bits. Layers that hold
    tokens, and those with a sliding window of their own, stay as they are.

    Raises ValueError, before anything changes, for a cache that has already been filled by another model or with
    other windows.
    """
    layers: list[Any] = list(cache.layers)
    replicate = cache.layer_class_to_replicate
    while replicate is not None and len(layers) < len(windows):
        layers.append(replicate())
    if len(layers) != len(windows):
        raise ValueError(f"expected a cache of {len(windows)} layers, got one of {len(layers)}")
    rollback = getattr(cache, "max_rollback", 0)
    for index, (layer, given) in enumerate(zip(layers, windows, strict=True)):
        window = window_of(given)
        if not _is_of_hybrid(layer) or window == FULL or layer.window_size not in (None, window):
            layer = layer if window == FULL and kv_cache_dtype == "auto" else without_early_init(layer)
            _check_empty(layer, index, window)
            layers[index] = _layer_for(layer, window, rollback, state_dtype, kv_cache_dtype)
    for layer, window in zip(layers, windows, strict=True):
        if isinstance(layer, NHACacheLayer):
            layer.window_size = window_of(window)  # type: ignore[assignment]
    cache.layers[:] = layers
    if not isinstance(cache, HybridCacheMixin) and not torch.compiler.is_compiling():  # which cannot trace this
        cache.__class__ = hybrid_cache_class(type(cache))


def without_early_init(layer: Any) -> Any:
    """A cache's layer; a new one for a static layer that has its tensors and no token yet, as for prompts in chunks."""
    if not (isinstance(layer, StaticLayer) and layer.is_initialized) or bool(layer.get_seq_length()):
        return layer
    layer = copy.copy(layer)
    layer.is_initialized, layer.keys, layer.values = False, None, None
    return layer


def _is_of_hybrid(layer: Any) -> bool:
    return isinstance(layer, NHACacheLayer | HeadGroupsCacheLayer)


def _check_empty(layer: Any, index: int, window: int | tuple[int, ...]) -> None:
    """Raise ValueError for a cache's layer that cannot become one with this window: another's, or one with tokens."""
    ours, filled = _is_of_hybrid(layer), getattr(layer, "is_initialized", False)
    if not ours and (window == FULL or not filled):
        return
    got = type(layer).__name__ if filled and not ours else repr(layer)
    hint = "" if ours else " (for prefix tuning, nha.models.peft_slots learns what slots start with)"
    raise ValueError(
        f"expected an empty cache or one made with these windows, got {got} in layer {index}, whose window is "
        f"{window}{hint}"
    )


def _layer_for(layer: Any, window: int | tuple[int, ...], rollback: int, state_dtype: str, kv_cache_dtype: str) -> Any:
    """The layer that stands in for one of transformers' own in a cache; that one itself where it serves."""
    full: Any = layer
    if kv_cache_dtype != "auto" and not getattr(layer, "is_initialized", False):
        full = Int8CacheLayer.like(layer) or layer
    if isinstance(window, tuple):
        return HeadGroupsCacheLayer(window, full, rollback, state_dtype)
    if window == FULL:
        return full
    length = layer.max_cache_len if isinstance(layer, StaticLayer) else None
    return NHACacheLayer(window, length, rollback, state_dtype)


def allow_rollback(cache: Cache, max_rollback: int) -> None:
    """From now on let `crop` take back the newest tokens of a cache at no cost, up to `max_rollback` of them.

    That many tokens more are kept beside every window. 0 is what a cache starts with: nothing is kept. Static caches
    stay as they are, since their sizes are fixed. Raises ValueError for a number below 0 or above 4,096.

    >>> from transformers import DynamicCache
    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model, ids = NHAForCausalLM(NHAConfig.tiny()).eval(), torch.arange(60)[None]
    >>> cache = DynamicCache(config=model.config)
    >>> allow_rollback(cache, 8)
    >>> with torch.no_grad():
    ...     _ = model(ids, past_key_values=cache)
    >>> cache.crop(-8)
    >>> cache.get_seq_length()
    52
    """
    check_max_rollback(max_rollback)
    cache.max_rollback = max_rollback  # type: ignore[attr-defined]  # for layers to come
    for layer in nha_layers(cache):
        layer.max_rollback = max_rollback
        layer._removable = min(layer._removable, max_rollback)


def is_empty(cache: Cache | None) -> bool:
    """Whether no layer of a cache, if there is one, has ever held a token."""
    return cache is None or not any(part.is_initialized for part in cache_parts(cache))


def layer_parts(layer: Any) -> list[Any]:
    """The layers that hold the groups of heads of a layer with windows per head; any other layer itself."""
    return getattr(layer, "parts", [layer])


def cache_parts(cache: Cache) -> list[Any]:
    """The layers of a cache, in order, and in the place of those with windows per head their parts."""
    return [part for layer in cache.layers for part in layer_parts(layer)]


def nha_layers(cache: Cache) -> list[NHACacheLayer]:
    """The NHA layers of a cache, in order, and in their place those of layers with windows per head."""
    return [part for part in cache_parts(cache) if isinstance(part, NHACacheLayer)]


def cache_nbytes(cache: Cache) -> int:
    """Bytes held by all layers of a cache; those of NHA layers do not grow with the text."""
    total = 0
    for part in cache_parts(cache):
        if isinstance(part, NHACacheLayer | Int8CacheLayer):
            total += part.nbytes
        else:
            tensors = (getattr(part, "keys", None), getattr(part, "values", None))
            total += sum(x.numel() * x.element_size() for x in tensors if x is not None)
    return total
