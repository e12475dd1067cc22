"""The models that a table compares, in one code path: each is an `NHAConfig`, unless it belongs to another library."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from nha.ablate.convolution import ConvolvedAttention, convolve
from nha.ablate.fusion import FUSIONS, fuse
from nha.ablate.peers import PEERS, peer_model, peer_state_bytes
from nha.convert.search import cache_bytes
from nha.models.config import FULL, NHAConfig
from nha.models.nha import NHAForCausalLM
from nha.models.windows import attention_layers, slot_parameters

SOFTMAX = "softmax"
MULTIPLE = 8  # of the width of feed-forward layers
CACHE_DTYPE = torch.bfloat16  # of keys and values in what `state_bytes` counts; slots are float32


@dataclass(frozen=True)
class ModelSpec:
    """One model of a table.

    Attributes:
        name: as it stands in results.
        windows: tokens of every layer's window, or a list that is repeated over the layers; -1 is full attention, 0 a
            linear RNN (Gated Slot Attention).
        num_slots: slots per KV head.
        slots: False leaves the window alone.
        fusion: "softmax" reads slots and window with one softmax; "average" and "gate" are ablations of it
            (`nha.ablate.fusion`).
        convolution: taps of a causal convolution over time of queries, keys and values, 0 for none; an ablation of the
            layer (`nha.ablate.convolution`).
        random_windows: in a recall table, windows of which every step of training draws one for all layers without full
            attention; a language table has them under `train`.
        peer: a model of flash-linear-attention in place of all that (`nha.ablate.peers`).
        config: further settings of `NHAConfig`, or of the peer's configuration.
        train: settings of `nha train` that are the model's own, in a language table.

    >>> ModelSpec("hybrid of layers", windows=(0, 0, 0, -1)).layer_windows(8)
    [0, 0, 0, -1, 0, 0, 0, -1]
    """

    name: str
    windows: int | tuple[int, ...] = 64
    num_slots: int = 64
    slots: bool = True
    fusion: str = SOFTMAX
    convolution: int = 0
    random_windows: tuple[int, ...] = ()
    peer: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.fusion not in (SOFTMAX, *FUSIONS):
            known = ", ".join((SOFTMAX, *FUSIONS))
            raise ValueError(f"expected fusion of {self.name} to be one of {known}, got {self.fusion!r}")
        if self.peer is not None and self.peer not in PEERS:
            raise ValueError(f"expected peer of {self.name} to be one of {', '.join(PEERS)}, got {self.peer!r}")
        if not self.slots and 0 in self._pattern:
            raise ValueError(f"expected windows of at least 1 in {self.name}, which has no slots, got 0")
        if self.fusion != SOFTMAX and min(self._pattern) < 1:
            raise ValueError(f"expected windows of at least 1 in {self.name}, got {min(self._pattern)}")
        if self.convolution < 0 or (self.convolution and self.fusion != SOFTMAX):
            raise ValueError(
                f"expected one softmax and taps >= 0 in {self.name}, got {self.fusion}, {self.convolution}"
            )
        least = FULL if self.slots and self.fusion == SOFTMAX and self.peer is None else 1
        if min(self.random_windows, default=least) < least:
            low = min(self.random_windows)
            raise ValueError(f"expected random windows of at least {least} in {self.name}, got {low}")

    @property
    def _pattern(self) -> tuple[int, ...]:
        return (self.windows,) if isinstance(self.windows, int) else tuple(self.windows)

    @property
    def has_cache(self) -> bool:
        """Whether the model can generate."""
        return self.fusion == SOFTMAX and not self.convolution

    def readable(self, windows: Sequence[int]) -> tuple[int, ...]:
        """Those of the windows, in tokens, that such a trained model can have at run time.

        >>> ModelSpec("nha").readable((0, 8, -1)), ModelSpec("transformer", windows=-1).readable((0, 8, -1))
        ((0, 8, -1), (-1,))
        """
        if max(self._pattern) == FULL:
            return tuple(window for window in windows if window == FULL)
        least = FULL if self.slots and self.fusion == SOFTMAX else 1
        return tuple(window for window in windows if window >= least)

    def layer_windows(self, num_layers: int) -> list[int]:
        """The window of each layer. Raises ValueError if the list cannot be repeated evenly."""
        if num_layers % len(self._pattern):
            raise ValueError(
                f"expected windows of {self.name} to repeat over {num_layers} layers, got {len(self._pattern)}"
            )
        return list(self._pattern) * (num_layers // len(self._pattern))

    def build(self, shape: NHAConfig, seed: int = 0, *, match: ModelSpec | None = None) -> PreTrainedModel:
        """The model with freshly drawn weights, a function of its arguments.

        Args:
            shape: the configuration without windows and slots.
            seed: of the weights.
            match: a model whose number of parameters the width of the feed-forward layers makes up for.

        Raises:
            ValueError: windows that do not fit the layers.
            ImportError: the library of a peer is not installed.
        """
        config = self.settings(shape)
        if match is not None and match != self:
            config.intermediate_size += self._missing_width(config, match, shape)
        return self._make(config, seed)

    def settings(self, shape: NHAConfig) -> NHAConfig:
        """The configuration of this model. For a model without slots it has one that nothing reads."""
        config = copy.deepcopy(shape)
        windows = self.layer_windows(config.num_hidden_layers)
        reads_slots = self.slots and any(window != FULL for window in windows)
        values: dict[str, Any] = config.to_dict() | {"num_slots": self.num_slots if reads_slots else 1}
        values |= {"window_sizes": windows} | self.config
        return type(config)(**values)

    def _make(self, config: NHAConfig, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        if self.peer is not None:
            return peer_model(self.peer, config, self.config)
        model = NHAForCausalLM(config)
        if not self.slots:
            for module in attention_layers(model):
                module.ablation = "slots_off"
        if self.fusion != SOFTMAX:
            fuse(model, self.fusion)
        if self.convolution:
            convolve(model, self.convolution)
        return model

    def _missing_width(self, config: NHAConfig, match: ModelSpec, shape: NHAConfig) -> int:
        """The width that feed-forward layers must gain for as many parameters as `match` has."""
        with torch.device("meta"):
            wanted = used_parameters(match._make(match.settings(shape), 0))
            missing = wanted - used_parameters(self._make(config, 0))
        per_unit = 3 * config.hidden_size * config.num_hidden_layers
        return MULTIPLE * round(missing / (MULTIPLE * per_unit))


def used_parameters(model: PreTrainedModel) -> int:
    """Parameters that the model reads: gates and sinks of layers without slots do not count.

    >>> shape = NHAConfig.tiny()
    >>> used_parameters(ModelSpec("full", windows=-1).build(shape)) < used_parameters(ModelSpec("nha").build(shape))
    True
    """
    unused = 0
    if hasattr(model.config, "window_sizes"):
        for module in attention_layers(model):
            if module.window_size == FULL or module.ablation == "slots_off":
                unused += sum(x.numel() for x in slot_parameters(module))
    return sum(x.numel() for x in model.parameters()) - unused


def state_bytes(model: PreTrainedModel, context: int) -> int:
    """Bytes that a model must keep of one sequence of `context` tokens to continue it, exactly.

    Keys and values are counted in bfloat16, slots in float32, as the cache holds them. A model without slots needs
    neither slot keys nor gates of the tokens in its windows.

    >>> model = ModelSpec("window", windows=16, slots=False).build(NHAConfig.tiny())
    >>> state_bytes(model, 1000)  # 2 layers, 16 tokens, 2 heads of 16 numbers, keys and values, 2 bytes each
    4096
    """
    config: Any = model.config
    if not hasattr(config, "window_sizes"):
        return peer_state_bytes(model, context)
    kept = sum(module.kept_numbers for module in attention_layers(model) if isinstance(module, ConvolvedAttention))
    return kept * CACHE_DTYPE.itemsize + _attention_bytes(model, config, context)


def _attention_bytes(model: PreTrainedModel, config: Any, context: int) -> int:
    """Bytes of keys, values and slots."""
    if attention_layers(model)[0].ablation == "slots_off":
        numbers = 2 * config.num_key_value_heads * attention_layers(model)[0].head_dim
        tokens = sum(context if window == FULL else min(window, context) for window in config.window_sizes)
        return numbers * tokens * CACHE_DTYPE.itemsize
    with torch.device("meta"):
        counted = NHAForCausalLM(copy.deepcopy(config)).to(CACHE_DTYPE)  # type: ignore[arg-type]
    return cache_bytes(counted, list(config.window_sizes), context)
