"""One adapter for every family: attention modules keep their own code and gain slots, a sink and a window.

A family's attention projects, normalises and rotates as it always did and then calls the attention function that
its configuration names. Here that function is "nha". Each attention module's class is swapped for a subclass that
passes on what the slots need as well: the hidden states (for the gate), the rotary tables and the cache layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as memoize
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from nha.layer import log_gate
from nha.models.attend import (
    LAST,
    Segment,
    attend,
    base_attention,
    causal_mask,
    mask_first_token_write,
    packed_base_attention,
    remember,
    zero_slots,
)
from nha.models.cache import NHACacheLayer, prepare_cache
from nha.models.config import FULL, check_windows
from nha.models.families import rotates
from nha.models.rotary import rotary_style
from nha.ops.rotary import unrotate, unrotate_for_slots

NAME = "nha"
ABLATIONS = (None, "slots_off", "window_off")
PACKED = (1, 1, 0, 0)  # shape of the mask that stands for boundaries in cu_seq_lens_q, so that none of T x T is made


class SlotParameters(nn.Module):
    """What one attention layer gains: the gate, the sink and where the slots sit.

    `g_proj` maps hidden states to gate logits [B, T, H * M]; `sink_key` [H, S, D] and `sink_value` [H, S, Dv] are
    constant keys and values; `slot_cos` and `slot_sin` [1, 1, R] are the family's rotary tables at the distance at
    which a query sees the slots.
    """

    slot_cos: Tensor
    slot_sin: Tensor
    initial: tuple[Tensor, Tensor] | None = None  # what slots hold before a text (see `nha.models.peft_slots`)

    def __init__(self, hidden_size: int, heads: int, head_dim: int, num_slots: int, num_sinks: int, tables: Tensor):
        super().__init__()
        self.g_proj = nn.Linear(hidden_size, heads * num_slots)
        self.sink_key = nn.Parameter(torch.empty(heads, num_sinks, head_dim))
        self.sink_value = nn.Parameter(torch.empty(heads, num_sinks, head_dim))
        self.register_buffer("slot_cos", tables[0])
        self.register_buffer("slot_sin", tables[1])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates that leave the slots nearly alone and a sink of zeros, until calibration or training sets them."""
        init.normal_(self.g_proj.weight, std=0.02)
        init.zeros_(self.g_proj.bias)
        init.zeros_(self.sink_key)
        init.zeros_(self.sink_value)


@dataclass
class Observation:
    """What an attention layer saw in the latest forward pass: hidden [B, T, hidden], the rest [B, T, H, D]."""

    hidden: Tensor
    slot_key: Tensor
    key: Tensor
    value: Tensor


def split_mask(mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """What `hybrid_mask` made for a segment of T tokens: the unconverted layers' mask and the padding [B, T].

    Raises ValueError for a mask prepared by someone else: only the padding of a text reaches slots.
    """
    if mask is None or mask.shape == PACKED:
        return None, None
    if mask.shape == LAST:
        return mask, None
    if mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[1] == 1:
        if mask.shape[2] == 1 and mask.shape[3] == length:
            return None, mask[:, 0, 0]
        if mask.shape[2] == length + 1:
            return mask[:, :, :-1], mask[:, 0, -1, :length]
    raise ValueError(
        f"expected a padding mask [B, T], got a prepared mask {list(mask.shape)} of {mask.dtype}; "
        "only padding and packing are meaningful"
    )


def cache_windows(module: Any) -> list[int]:
    """The windows of all layers as their caches see them, from one attention module."""
    off = module.ablation == "window_off"
    return [0 if off and window != FULL else window for window in module.config.window_sizes]


def cache_layer(module: Any, cache: Cache | None, cu_seqlens: Tensor | None, rows: int) -> NHACacheLayer | None:
    """The NHA layer of a cache that belongs to an attention module; the first module prepares the whole cache.

    Raises ValueError for a cache that cannot go on with `rows` texts.
    """
    if cache is None:
        return None
    if cu_seqlens is not None:
        raise ValueError("expected packed sequences without a cache, got cu_seq_lens_q and past_key_values")
    if module.layer_idx == 0:
        prepare_cache(cache, cache_windows(module))
    layer = cache.layers[module.layer_idx]
    if not isinstance(layer, NHACacheLayer):
        return None
    if layer.state is not None:
        config: Any = module.config
        slots = 0 if module.ablation == "slots_off" else config.num_slots
        wanted, got = [rows, config.num_key_value_heads, slots, module.head_dim], list(layer.state.slot_key.shape)
        if got != wanted:
            raise ValueError(f"expected a cache of [rows, KV heads, slots, head size] {wanted}, got one of {got}")
    layer.claimed = True
    return layer


class HybridGenerationMixin:
    """What `generate` of a hybrid model needs: a cache whose layers can take back tokens, before it reads any."""

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        parent: Any = super()
        made = parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = cache_argument(model_kwargs)
        if isinstance(cache, Cache):
            prepare_cache(cache, cache_windows(attention_layers(self)[0]))
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return made


def hybrid_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    nha_hidden: Tensor | None = None,
    nha_tables: tuple[Tensor, Tensor] | None = None,
    nha_layer: NHACacheLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function "nha" of transformers: query [B, HQ, T, D], key and value [B, H, Tk, D]."""
    if nha_hidden is None:
        raise ValueError(f"expected a hybrid attention module, got {type(module).__name__}; call hybridize first")
    if module.observer is not None:
        slot_key = key.transpose(1, 2)
        slot_key = (
            slot_key
            if nha_tables is None
            else unrotate(slot_key, *nha_tables, interleaved=module.rotary_style.interleaved)
        )
        module.observer(Observation(nha_hidden, slot_key, *(x.transpose(1, 2) for x in (key, value))))
    own_mask, padding = split_mask(attention_mask, query.shape[2])
    cu = kwargs.get("cu_seq_lens_q")
    if cu is None and attention_mask is not None and attention_mask.shape == PACKED:
        raise ValueError(
            f"expected sequences one by one, got packed ones: {module.family.__name__} gets no cu_seq_lens_q"
        )
    if module.window_size == FULL and cu is not None:
        return packed_base_attention(
            module,
            query,
            key,
            value,
            cu,
            softcap=softcap,
            scaling=scaling,
            dropout=dropout,
            sliding_window=kwargs.get("sliding_window"),
            longest=kwargs.get("max_length_q"),
        )
    if module.window_size == FULL:
        return base_attention(
            module, query, key, value, own_mask, softcap=softcap, scaling=scaling, dropout=dropout, **kwargs
        )
    check_dropout(dropout)
    window = 0 if module.ablation == "window_off" else module.window_size
    state = None if nha_layer is None else nha_layer.state
    padding = None if cu is not None else padding
    parameters = module.nha
    gate = log_gate(parameters.g_proj(nha_hidden), key.shape[1])
    if module.ablation == "slots_off":
        gate = gate[..., :0]
    sink = None
    if parameters.sink_key.shape[1]:
        sink = (parameters.sink_key.to(key.dtype), parameters.sink_value.to(value.dtype))
        gate = mask_first_token_write(gate, padding, cu, state)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    slot_query = slot_key = None  # without rotary positions slots and window see the same
    if nha_tables is not None:
        distance = parameters.slot_cos, parameters.slot_sin
        interleaved = module.rotary_style.interleaved
        slot_query, slot_key = unrotate_for_slots(q, k, nha_tables, distance, interleaved=interleaved)
    segment = Segment(q, k, v, gate, slot_query, slot_key, mask=padding, cu_seqlens=cu)
    initial = parameters.initial
    if initial is None and module.config.slots_from_start:
        initial = zero_slots(segment)
    if state is None and query.shape[2] <= window and cu is None and initial is None:
        # The very kernel of the unconverted layer, so that short inputs give its bits.
        if nha_layer is not None:
            remember(segment, window, nha_layer, softcap)
        mask = causal_mask(padding)
        return base_attention(module, query, key, value, mask, softcap=softcap, scaling=scaling, **kwargs)
    out = attend(
        segment,
        window_size=window,
        scale=scaling,
        sink=sink,
        layer=nha_layer,
        initial=initial,
        softcap=softcap,
        see_mass=module.mass_observer,
    )
    return out, None


def hybrid_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    *,
    attention_mask: Tensor | None = None,
    config: Any = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function "nha" of transformers: a hybrid layer needs the padding of its segment and nothing of T x T.

    Returns None without padding, else [B, 1, 1, T]. A model with some unconverted layers gets transformers' own mask
    with one more row that holds the padding, [B, 1, T + 1, Tk]: where a token is in it depends on the kind of cache.
    One of shape LAST stands for that of tokens that go on in a growing cache without padding.
    """
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    own = None
    if FULL in config.window_sizes:
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        plain = kwargs.get("mask_function") in (None, causal_mask_function) and kwargs.get("local_size") is None
        if plain and not capped and allow_is_causal_skip and appends(q_length, kv_length, q_offset, padding):
            return torch.empty(LAST, dtype=torch.bool, device=kwargs.get("device", "cpu"))
        own = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip and not capped,
            **kwargs,
        )
        if own is None:
            return None
    elif padding is None or (not torch.compiler.is_compiling() and bool(padding.all())):
        return None
    if padding is not None:
        column = torch.arange(q_length, device=padding.device) + q_offset
        padding = padding.index_select(1, column)[:, None, None, :]
    if own is None:
        return padding
    row = own.new_ones(own.shape[0], 1, 1, own.shape[3])
    if padding is not None:
        row[..., :q_length] = padding
    return torch.cat([own, row], 2)


def appends(length: int, kv_length: int, offset: Any, padding: Tensor | None) -> bool:
    """Whether several tokens come last in a cache that has room for no others, and nothing before is padding."""
    if torch.compiler.is_compiling() or not isinstance(offset, int) or not 1 < length < kv_length == offset + length:
        return False
    return padding is None or bool(padding.all())


AttentionInterface.register(NAME, hybrid_attention)
AttentionMaskInterface.register(NAME, hybrid_mask)


def check_dropout(probability: float) -> None:
    """Raise ValueError for attention dropout, which slots cannot have."""
    if probability:
        raise ValueError(f"expected attention_dropout to be 0 in hybrid layers, got {probability}")


def check_implementation(config: Any) -> None:
    """Raise ValueError where something else than "nha" was chosen as the attention of a hybrid model."""
    if config._attn_implementation != NAME:
        got = config._attn_implementation
        raise ValueError(f"expected attn_implementation={NAME!r} in a hybrid model, got {got!r}")


def cache_argument(kwargs: dict[str, Any]) -> Any:
    """The cache among a call's arguments: `past_key_values`, which transformers calls `cache` from 5.24 on."""
    given = kwargs.get("cache")
    return kwargs.get("past_key_values") if given is None else given


@memoize
def hybrid_class(family: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a family's attention class that hands the slots' inputs on."""
    name_of_cache = "cache" if "cache" in inspect.signature(family.forward).parameters else "past_key_values"

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        check_implementation(self.config)
        cache = cache_argument(kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")} | {name_of_cache: cache}
        layer = cache_layer(self, cache, kwargs.get("cu_seq_lens_q"), hidden_states.shape[0])
        tables = None
        if position_embeddings is not None and self.rotates:
            tables = self.rotary_style.standard_tables(position_embeddings)
        return family.forward(
            self,
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            nha_hidden=hidden_states,
            nha_tables=tables,
            nha_layer=layer,
            **kwargs,
        )

    def __reduce_ex__(self, protocol: int) -> Any:
        return _rebuild, (family,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    name = f"NHA{family.__name__}"
    body = {"forward": forward, "__reduce_ex__": __reduce_ex__, "family": family, "__module__": __name__}
    body["rotary_style"] = rotary_style(family)
    return type(name, (family,), body)


def _rebuild(family: type[nn.Module]) -> nn.Module:
    new = hybrid_class(family)
    return new.__new__(new)


def decoder(model: PreTrainedModel) -> Any:
    """The stack of layers inside a causal language model."""
    return model.get_decoder()


def attention_layers(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a model's decoder, in order."""
    return [layer.self_attn for layer in decoder(model).layers]


def slot_tables(model: PreTrainedModel, distance: int) -> list[Tensor]:
    """Per layer, cosines and sines [2, 1, 1, R] of the family's rotary embedding at a distance, for `rotate`."""
    config, parameter = model.config, next(model.parameters())
    with torch.device(parameter.device):
        rotary = type(decoder(model).rotary_emb)(config)  # a fresh one: the model's may not be filled in yet
    x = torch.zeros(1, 1, 1, dtype=torch.float32, device=parameter.device)
    position = torch.full((1, 1), distance, device=parameter.device)
    typed = "layer_type" in inspect.signature(rotary.forward).parameters
    kinds = config.layer_types if typed else [None] * config.num_hidden_layers
    style = rotary_style(getattr(type(attention_layers(model)[0]), "family", type(attention_layers(model)[0])))
    found = [rotary(x, position, kind) if typed else rotary(x, position) for kind in kinds]
    return [torch.stack(style.standard_tables(tables)) for tables in found]


def reset_slots(model: PreTrainedModel) -> None:
    """Give the slots of every layer their first values, except where a checkpoint brought some."""
    modules = attention_layers(model)
    if not hasattr(modules[0], NAME):
        return
    tables = slot_tables(model, model.config.slot_distance)
    for module, (cos, sin) in zip(modules, tables, strict=True):
        module.nha.reset_parameters()
        init.copy_(module.nha.slot_cos, cos)
        init.copy_(module.nha.slot_sin, sin)


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of a model's hidden states: that of its embeddings or norms, which are never in 4 or 8 bits."""
    embeddings: Any = model.get_input_embeddings()
    for weight in (*embeddings.parameters(), *model.parameters()):
        if weight.is_floating_point() and weight.dtype.itemsize > 1:
            return weight.dtype
    return torch.float32


def install(model: PreTrainedModel) -> None:
    """Give every attention module of a model whose configuration is a hybrid's the class and parameters it needs.

    The modules' weights stay as they are. Parameters of the slots start as in `SlotParameters.reset_parameters`.
    """
    config: Any = model.config
    tables, dtype = slot_tables(model, config.slot_distance), compute_dtype(model)
    for module, window, table in zip(attention_layers(model), config.window_sizes, tables, strict=True):
        weight = next(module.parameters())
        if not hasattr(module, NAME):
            heads = config.num_key_value_heads
            new = SlotParameters(config.hidden_size, heads, module.head_dim, config.num_slots, config.num_sinks, table)
            module.nha = new.to(device=weight.device, dtype=dtype)
        module.__class__ = hybrid_class(getattr(type(module), "family", type(module)))
        module.window_size, module.ablation, module.observer, module.mass_observer = window, None, None, None
        module.rotates = rotates(config, module)
    stack = decoder(model)
    if not any(hook is mark_packing for hook in stack._forward_pre_hooks.values()):
        stack.register_forward_pre_hook(mark_packing, with_kwargs=True)
    config._attn_implementation = NAME


def mark_packing(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before a forward pass, name the boundaries of sequences packed into one row.

    They come as `cu_seq_lens_q` (which `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes) or are
    read off `position_ids` that start again. Without them slots would leak from one sequence into the next.
    """
    position = kwargs.get("position_ids")
    if cache_argument(kwargs) is not None:
        return None
    cu = kwargs.get("cu_seq_lens_q")
    if cu is not None:
        return args, kwargs | {"use_cache": False, "attention_mask": _packed_mask(cu)}
    if position is None or kwargs.get("attention_mask") is not None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError(
            "expected cu_seq_lens_q beside position_ids in a compiled forward pass without a cache, got none; use "
            "DataCollatorWithFlattening(return_flash_attn_kwargs=True), or leave position_ids out"
        )
    jumps = position.diff(dim=1) != 1
    if not bool(jumps.any()):
        return None
    if position.shape[0] != 1:
        raise ValueError(f"expected packed sequences in one row, got position_ids {list(position.shape)} that restart")
    inner = jumps[0].nonzero().flatten() + 1
    ends = torch.tensor([0, position.shape[1]], device=position.device)
    cu = torch.cat([ends[:1], inner, ends[1:]]).to(torch.int32)
    marks = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "use_cache": False, "attention_mask": _packed_mask(cu)}
    return args, kwargs | marks


def _packed_mask(cu_seqlens: Tensor) -> Tensor:
    return torch.empty(PACKED, dtype=torch.bool, device=cu_seqlens.device)


def hybrid_layers(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a hybrid model; raises ValueError for any other model."""
    config = getattr(model, "config", None)
    if not hasattr(config, "window_sizes"):
        raise ValueError(f"expected a hybrid model, got {type(model).__name__}; call hybridize first")
    return attention_layers(model)


def set_windows(model: PreTrainedModel, windows: int | Sequence[int]) -> None:
    """Change the windows of a live model: one int per layer, in tokens, or one int for all.

    -1 makes a layer what it was before the conversion. Weights stay as they are; a running cache made with other
    windows is refused by the next forward pass. Raises ValueError, before anything changes, for a list of the
    wrong length or a window that a layer cannot have.

    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model = NHAForCausalLM(NHAConfig.tiny())
    >>> set_windows(model, [8, -1])
    >>> model.config.window_sizes
    [8, -1]
    """
    modules = hybrid_layers(model)
    checked = check_windows(model.config, windows)
    model.config.window_sizes = checked
    for module, window in zip(modules, checked, strict=True):
        module.window_size = window


@contextmanager
def temporary_windows(model: PreTrainedModel, windows: int | Sequence[int]) -> Iterator[None]:
    """Within the context, the model has other windows, as `set_windows` takes them; then its own again."""
    before = list(model.config.window_sizes)  # type: ignore[arg-type]
    set_windows(model, windows)
    try:
        yield
    finally:
        set_windows(model, before)


@contextmanager
def ablate(model: PreTrainedModel, what: str | None) -> Iterator[None]:
    """Within the context, read hybrid layers without their slots ("slots_off") or their window ("window_off").

    Slots off keeps window and sink. Window off reads slots that hold every token and the sink (a window of 0).
    """
    if what not in ABLATIONS:
        raise ValueError(f"expected an ablation in {ABLATIONS}, got {what!r}")
    modules = hybrid_layers(model)
    before = [module.ablation for module in modules]
    try:
        for module in modules:
            module.ablation = what
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            module.ablation = old


@contextmanager
def observe(
    model: PreTrainedModel, see: Callable[[int, Observation], None], windows: int | Sequence[int] = FULL
) -> Iterator[None]:
    """Within the context, call `see(layer, observation)` in every forward pass, as soon as a layer has its keys.

    Windows are -1 meanwhile (the model before its conversion), unless others are asked for.
    """
    modules = hybrid_layers(model)
    with temporary_windows(model, windows):
        try:
            for index, module in enumerate(modules):
                module.observer = partial(see, index)
            yield
        finally:
            for module in modules:
                module.observer = None


@contextmanager
def observe_mass(model: PreTrainedModel, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the context, call `see(layer, slots, sink)` in every forward pass, for every layer that reads slots.

    `slots` and `sink` [B, T, HQ] are the shares of the softmax that went to either. Without the context nothing of
    this is computed. Inputs that no window is shorter than are not reported: their shares are 0.
    """
    modules = hybrid_layers(model)
    try:
        for index, module in enumerate(modules):
            module.mass_observer = partial(see, index)
        yield
    finally:
        for module in modules:
            module.mass_observer = None
