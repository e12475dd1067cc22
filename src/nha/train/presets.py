"""Shapes of models to train from scratch; the two largest are the paper's."""

from __future__ import annotations

from typing import Any

from nha.models.config import FULL, LAYER_CHOICES, NHAConfig, plan_windows
from nha.train.settings import TrainSettings

VOCABULARY_MULTIPLE = 64  # rows of the embeddings, so that matrix units are used whole
SHAPES: dict[str, dict[str, Any]] = {
    "20m": dict(hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4),
    "60m": dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=10, num_attention_heads=8),
}


def preset_config(preset: str, vocab_size: int, **changes: Any) -> NHAConfig:
    """The configuration of a preset for a vocabulary, which is rounded up to a multiple of 64.

    "340m" and "1.3b" are the paper's shapes. "20m" and "60m" have about as many parameters as their names say with a
    vocabulary of 49,152 tokens and tied embeddings. Raises ValueError for another name.

    >>> preset_config("60m", vocab_size=49152, num_slots=32).num_hidden_layers
    10
    >>> preset_config("7b", vocab_size=100)
    Traceback (most recent call last):
    ValueError: expected preset to be one of tiny, 340m, 1.3b, 20m, 60m, got '7b'
    """
    sizes: dict[str, Any] = {"vocab_size": -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE} | changes
    known = {"tiny": NHAConfig.tiny, "340m": NHAConfig.paper_340m, "1.3b": NHAConfig.paper_1_3b}
    if preset in known:
        return known[preset](**sizes)
    if preset not in SHAPES:
        raise ValueError(f"expected preset to be one of {', '.join((*known, *SHAPES))}, got {preset!r}")
    shape = SHAPES[preset]
    common: dict[str, Any] = dict(tie_word_embeddings=True, max_position_embeddings=1 << 16)
    return NHAConfig(**(shape | {"num_key_value_heads": shape["num_attention_heads"]} | common | sizes))


def model_config(settings: TrainSettings, vocab_size: int) -> NHAConfig:
    """The configuration that settings describe. Raises ValueError for windows that do not fit its layers.

    >>> model_config(TrainSettings(preset="tiny", window_size=8, full_layers=(1,)), 300).window_sizes
    [8, -1]
    """
    shared = ("num_slots", "num_sinks", "qk_norm", "output_gate", "slot_write", "gate_std", *LAYER_CHOICES)
    changes: dict[str, Any] = {name: getattr(settings, name) for name in shared} | {"window_sizes": FULL}
    config = preset_config(settings.preset, vocab_size, **changes)
    size = settings.window_size
    config.window_sizes = plan_windows(config, size if isinstance(size, int) else list(size), settings.full_layers)
    return config
