"""Configurations: how many tokens each layer's window holds, and what the slots beside it look like."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import cache as memoize
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig

from nha.models.parallel import slot_plan
from nha.ops.heads import Window, all_windows, window_of
from nha.ops.int8_rows import check_kv_cache_dtype
from nha.ops.packed_state import check_state_dtype
from nha.settings import MAX_WINDOW, OUTPUT_NORMS, SLOT_FEATURES, SLOT_WRITES, VALUE_ACTIVATIONS, check_choice

FULL = -1
# The layer as the paper's authors published it; a plain layer does without both.
PAPER_LAYER = {"value_activation": "silu", "output_norm": "silu_rms"}
LAYER_CHOICES = {"slot_features": SLOT_FEATURES, "value_activation": VALUE_ACTIVATIONS, "output_norm": OUTPUT_NORMS}
LayerWindow = int | list[int]  # of a configuration: one for all KV heads of a layer, or one each


def context_length(config: PreTrainedConfig) -> int | None:
    """The tokens that a model was made for, as its configuration has them, None if it does not say.

    >>> context_length(LlamaConfig(max_position_embeddings=4096))
    4096
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def sliding_layers(config: PreTrainedConfig) -> list[bool]:
    """Which layers of a family's configuration attend to a sliding window of their own.

    >>> from transformers import Gemma2Config
    >>> sliding_layers(Gemma2Config(num_hidden_layers=4))
    [True, False, True, False]
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        kinds = [kind] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


def check_windows(config: PreTrainedConfig, windows: int | Sequence[Window]) -> list[LayerWindow]:
    """One window per layer, in tokens; an int stands for all layers, -1 for the layer as it came.

    The entry of a layer may be a list of one window per KV head, -1 for a head with full attention; where all are
    equal, an int takes its place. Raises ValueError for a list of the wrong length, for a window below -1 and for one
    that is longer than the sliding window a layer was trained with: beyond that the layer never saw a token.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    >>> check_windows(config, [64, -1, [8, 256]])
    [64, -1, [8, 256]]
    >>> check_windows(config, [64, -1, [8, 8, 8]])
    Traceback (most recent call last):
    ValueError: expected 2 window sizes for layer 2, one per KV head, got 3
    """
    layers = config.num_hidden_layers
    if not isinstance(windows, (int, Sequence)):
        raise ValueError(f"expected window sizes to be an int or a list of ints, got {windows!r}")
    given = [windows] * layers if isinstance(windows, int) else list(windows)
    if len(given) != layers:
        raise ValueError(f"expected {layers} window sizes, one per layer, got {len(given)}")
    own = getattr(config, "sliding_window", None)
    return [
        _layer_window(config, index, window, own if sliding else None)
        for index, (window, sliding) in enumerate(zip(given, sliding_layers(config), strict=True))
    ]


def _layer_window(config: Any, layer: int, window: Any, own: int | None) -> LayerWindow:
    """The window of one layer, checked; `own` is the sliding window that it was trained with."""
    listed = isinstance(window, Sequence) and not isinstance(window, str)
    if listed and len(window) != config.num_key_value_heads:
        heads = config.num_key_value_heads
        raise ValueError(f"expected {heads} window sizes for layer {layer}, one per KV head, got {len(window)}")
    for head, each in enumerate(window if listed else [window]):
        where = f"layer {layer}, head {head}" if listed else f"layer {layer}"
        if isinstance(each, bool) or not isinstance(each, int) or not FULL <= each <= MAX_WINDOW:
            raise ValueError(f"expected window sizes to be ints from -1 to {MAX_WINDOW}, got {each!r} for {where}")
        if own is not None and each > own:
            raise ValueError(f"expected a window of at most {own} for {where}, its own sliding window, got {each}")
    short = window_of(window)
    return short if isinstance(short, int) else list(short)


def largest_window(windows: Iterable[Window]) -> int:
    """The largest window of any head, -1 where all have full attention.

    >>> largest_window([64, -1, [24, 256]])
    256
    """
    return max([FULL, *all_windows(windows)])


def smallest_window(windows: Iterable[Window]) -> int:
    """The smallest window of a head without full attention, -1 where there is none.

    >>> smallest_window([64, -1, [24, 256]])
    24
    """
    found = [window for window in all_windows(windows) if window != FULL]
    return min(found) if found else FULL


def check_windows_end(windows: Iterable[Window], seq_len: int) -> None:
    """Raise ValueError where no window is shorter than training's sequences: no token would be written to the slots.

    >>> check_windows_end([64, -1, [24, 256]], 25)
    >>> check_windows_end([64, 64], 64)
    Traceback (most recent call last):
    ValueError: expected seq_len above the smallest window, 64, got 64
    """
    if seq_len <= (smallest := smallest_window(windows)):
        raise ValueError(f"expected seq_len above the smallest window, {smallest}, got {seq_len}")


def plan_windows(
    config: PreTrainedConfig, window_size: int | Sequence[Window], full_layers: Sequence[int] = ()
) -> list[LayerWindow]:
    """The windows of a conversion: `window_size` in every layer with full attention, except in `full_layers`.

    Layers that slide over a window of their own already take constant memory and stay as they are, unless all
    layers do (Mistral, Phi-3). A list names the window of every layer and overrides this. Raises ValueError as
    `check_windows` does, and for a layer that does not exist.

    >>> from transformers import Gemma2Config
    >>> plan_windows(Gemma2Config(num_hidden_layers=4), 64)
    [-1, 64, -1, 64]
    """
    sliding = sliding_layers(config)
    if isinstance(window_size, int) and not all(sliding):
        window_size = [FULL if slides else window_size for slides in sliding]
    windows = check_windows(config, window_size)
    if isinstance(full_layers, str) or not isinstance(full_layers, Iterable):
        raise ValueError(f"expected full_layers to be a list of ints, got {full_layers!r}")
    for layer in full_layers:
        whole = isinstance(layer, int) and not isinstance(layer, bool)
        if not whole or not -len(windows) <= layer < len(windows):
            raise ValueError(f"expected full_layers to be below {len(windows)}, the number of layers, got {layer!r}")
        windows[layer] = FULL
    return windows


def check_sizes(sizes: Any) -> None:
    """Raise ValueError for numbers of slots and sinks, a distance and a way to write (attributes) that cannot be."""
    for name, least in (("num_slots", 1), ("num_sinks", 0), ("slot_distance", 0)):
        value = getattr(sizes, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"expected {name} to be an int >= {least}, got {value!r}")
    check_choice("slot_write", sizes.slot_write, SLOT_WRITES)
    if sizes.slot_write == "exact" and sizes.slots_from_start:
        raise ValueError("expected slots_from_start=False with slot_write='exact', got True")


class HybridConfigMixin:
    """Adds the settings of hybrid layers to a family's configuration.

    Attributes:
        window_sizes: tokens in the window of each layer; -1 leaves the layer as it came. A list in place of an int has
            one window per KV head of the layer. An int alone stands for all layers.
        num_slots: slots per KV head.
        num_sinks: constant key/value pairs per KV head that stand in for the first tokens of a text.
        slot_distance: tokens between a query and where it sees the slots.
        slots_from_start: slots take part from token 0, at zero, as in the code published with the paper.
        slot_write: "soft", every token to all slots by gates, or "exact", kept tokens to one slot each.
        converted_from: the model before its conversion: its Hub id, or the name of the folder it was read from.
        state_dtype: how caches keep slots and windows between two calls: "float32" as they are computed (windows in
            the model's dtype), "bfloat16" or "int8" in fewer bytes. A setting of serving: it may be changed at any
            time and counts for new caches.
        kv_cache_dtype: how caches keep keys and values of layers and heads with full attention: "auto" in the model's
            dtype, "int8" in half the bytes of 16 bits. A setting of serving too.
    """

    window_sizes: int | list[int | list[int]]
    state_dtype: str
    kv_cache_dtype: str

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.check_hybrid()

    def check_hybrid(self) -> None:
        """Raise ValueError for settings of hybrid layers that cannot be, and write windows out as a list.

        Models call it as well: `from_pretrained` changes settings of a configuration that is made already.
        """
        self.window_sizes = check_windows(self, self.window_sizes)  # type: ignore[arg-type]
        check_sizes(self)
        check_state_dtype(self.state_dtype)
        check_kv_cache_dtype(self.kv_cache_dtype)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy a file of this package beside saved weights."""


@strict
class NHAConfig(HybridConfigMixin, LlamaConfig):
    """A Llama-shaped model of `NativeHybridAttention` layers, trained from scratch.

    Takes every argument of `transformers.LlamaConfig` and those of `HybridConfigMixin`, with the defaults of the
    paper: no sinks, and slots without positions. Raises ValueError for a window list of the wrong length.

    Attributes:
        qk_norm: normalize queries and keys of every head, before positions (arXiv 2302.05442).
        output_gate: multiply what attention returns by a sigmoid of the layer's input (arXiv 2505.06708).
        slot_features: function of the queries and keys that the slots see: "none", "silu" (arXiv 2409.07146) or "relu".
        value_activation: function of the values: "none" or "silu".
        output_norm: normalize what attention returns, all heads together: "none", "rms", or "silu_rms" (after a SiLU).
        gate_std: standard deviation of the gates' logits before training, for normalized inputs; the larger, the more
            the slots differ in what they take. 0 draws the gates' weights as all others.

    `NHAConfig(**PAPER_LAYER)` has the layer that the paper's authors published.

    >>> NHAConfig.tiny(window_sizes=[4, -1]).window_sizes
    [4, -1]
    """

    model_type = "nha"

    window_sizes: int | list[int | list[int]] = 64
    num_slots: int = 64
    num_sinks: int = 0
    state_dtype: str = "float32"
    kv_cache_dtype: str = "auto"
    qk_norm: bool = False
    output_gate: bool = False
    slot_features: str = "none"
    slot_write: str = "soft"
    value_activation: str = "none"
    output_norm: str = "none"
    gate_std: float = 0.0

    slot_distance = 0
    slots_from_start = False
    converted_from = None
    base_model_tp_plan = slot_plan(LlamaConfig.base_model_tp_plan, "layers.*.self_attn")

    def check_hybrid(self) -> None:
        """As for hybrids of other families, and for the choices of a layer trained from scratch."""
        super().check_hybrid()
        for name, known in LAYER_CHOICES.items():
            check_choice(name, getattr(self, name), known)
        if not 0 <= self.gate_std < float("inf"):
            raise ValueError(f"expected gate_std of at least 0, got {self.gate_std!r}")

    @classmethod
    def tiny(cls, **changes: Any) -> NHAConfig:
        """Two layers of width 64, for tests and first steps."""
        sizes: dict[str, Any] = dict(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            window_sizes=16,
            num_slots=8,
            max_position_embeddings=1 << 16,
        )
        return cls(**(sizes | changes))

    @classmethod
    def paper_340m(cls, **changes: Any) -> NHAConfig:
        """The 340M model of the paper: 24 layers of width 1,024, 64 slots, a window of 64 tokens."""
        sizes: dict[str, Any] = dict(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=1 << 16,
            tie_word_embeddings=True,
        )
        return cls(**(sizes | changes))

    @classmethod
    def paper_1_3b(cls, **changes: Any) -> NHAConfig:
        """The 1.3B model of the paper: 24 layers of width 2,048, 64 slots, a window of 64 tokens."""
        sizes: dict[str, Any] = dict(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=1 << 16,
        )
        return cls(**(sizes | changes))


@memoize
def hybrid_config_class(family: str) -> type[PreTrainedConfig]:
    """The configuration class of a family's hybrids, of model type "nha-<family>"."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base = CONFIG_MAPPING[family]
    fields: dict[str, tuple[Any, Any]] = {
        "window_sizes": (int | list[int | list[int]], 64),
        "num_slots": (int, 64),
        "num_sinks": (int, 1),
        "slot_distance": (int, 128),
        "slots_from_start": (bool, False),
        "slot_write": (str, "soft"),
        "converted_from": (str | None, None),
        "state_dtype": (str, "float32"),
        "kv_cache_dtype": (str, "auto"),
    }
    name = f"NHA{base.__name__}"
    body: dict[str, Any] = {field: default for field, (_, default) in fields.items()}
    body |= {"__annotations__": {field: kind for field, (kind, _) in fields.items()}, "__module__": __name__}
    body["base_model_tp_plan"] = slot_plan(base.base_model_tp_plan, "layers.*.self_attn.nha")
    body["__reduce_ex__"] = _reduce
    new = strict(type(name, (HybridConfigMixin, base), body | {"model_type": f"nha-{family}"}))
    setattr(sys.modules[__name__], name, new)
    return new


def _reduce(config: PreTrainedConfig, protocol: int) -> Any:
    """Pickle by family: a process that has only started knows no class that is made when it is asked for."""
    return _rebuild, (config.model_type.removeprefix("nha-"),), config.__dict__


def _rebuild(family: str) -> PreTrainedConfig:
    new = hybrid_config_class(family)
    return new.__new__(new)


def _of_text(name: str) -> property:
    def get(self: Any) -> Any:
        return getattr(self.text_config, name)

    def put(self: Any, value: Any) -> None:
        setattr(self.text_config, name, value)

    return property(get, put)


class HybridMultimodalConfigMixin:
    """Lets the configuration of a multimodal model hold that of a hybrid text model.

    The settings are those of `text_config`; reading or setting them here reaches through to it.
    """

    text_config: Any

    window_sizes, num_slots, num_sinks = _of_text("window_sizes"), _of_text("num_slots"), _of_text("num_sinks")
    slot_distance, slots_from_start = _of_text("slot_distance"), _of_text("slots_from_start")
    state_dtype, kv_cache_dtype = _of_text("state_dtype"), _of_text("kv_cache_dtype")
    slot_write = _of_text("slot_write")

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):  # as read from a file
            settings = dict(self.text_config)
            self.text_config = hybrid_config_class(settings.pop("model_type").removeprefix("nha-"))(**settings)
        super().__post_init__(**kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy a file of this package beside saved weights."""


@memoize
def hybrid_multimodal_config_class(family: str) -> type[PreTrainedConfig]:
    """The configuration class of multimodal models with a hybrid text model, of model type "nha-<family>"."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base = CONFIG_MAPPING[family]
    body = {"model_type": f"nha-{family}", "__module__": __name__}
    new = strict(type(f"NHA{base.__name__}", (HybridMultimodalConfigMixin, base), body))
    setattr(sys.modules[__name__], new.__name__, new)
    return new


def config_class_of(family: str) -> type[PreTrainedConfig]:
    """The configuration class of a family's hybrids, whether it is multimodal or not. Raises KeyError for no family."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    multimodal = is_multimodal(CONFIG_MAPPING[family])
    return hybrid_multimodal_config_class(family) if multimodal else hybrid_config_class(family)


def is_multimodal(config_class: type[PreTrainedConfig]) -> bool:
    """Whether a family's configurations hold one of a text model."""
    return "text_config" in getattr(config_class, "__dataclass_fields__", ())
