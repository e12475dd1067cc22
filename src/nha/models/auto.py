"""Hybrid models of every family: which there are, and how a live model becomes one."""

from __future__ import annotations

import sys
from functools import cache as memoize
from types import SimpleNamespace
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from nha.models.adapter import HybridGenerationMixin, install, reset_slots
from nha.models.checkpoint import CheckpointMixin
from nha.models.config import NHAConfig, check_sizes, check_windows, hybrid_config_class
from nha.models.families import check_family


class HybridModelMixin(CheckpointMixin, HybridGenerationMixin):
    """What a family's causal language model gains as a hybrid."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self)  # type: ignore[arg-type]

    def initialize_weights(self) -> None:
        """Fill in what a checkpoint lacks; the family's decoder initialises its own modules and knows no slots."""
        super().initialize_weights()  # type: ignore[misc]
        reset_slots(self)  # type: ignore[arg-type]


@memoize
def hybrid_model_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The model class that a hybrid configuration class belongs to: a subclass of the family's own."""
    family = config_class.model_type.removeprefix("nha-")
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    name = f"NHA{base.__name__}"
    body = {"config_class": config_class, "config": None, "__module__": __name__}
    new = type(name, (HybridModelMixin, base), body)
    setattr(sys.modules[__name__], name, new)
    return new


def register_model(config_class: type[PreTrainedConfig]) -> None:
    """Make `AutoModelForCausalLM` know the model of a hybrid configuration class (the first time one is made)."""
    if config_class is NHAConfig:
        from nha.models.nha import NHAForCausalLM as model_class
    else:
        model_class = hybrid_model_class(config_class)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def to_hybrid(
    model: PreTrainedModel,
    windows: list[int],
    *,
    num_slots: int = 64,
    num_sinks: int = 1,
    slot_distance: int = 128,
    slots_from_start: bool = False,
) -> None:
    """Turn a live model into its family's hybrid, in place: class, configuration and attention modules.

    All weights are shared with what the model was; gates and sinks are not calibrated yet (`hybridize` does that).
    Raises ValueError for an unsupported family and for numbers that cannot be, before anything changes.
    """
    config: Any = model.config
    check_family(config)
    check_windows(config, windows)
    family = config.model_type
    changes = {
        "num_slots": num_slots,
        "num_sinks": num_sinks,
        "slot_distance": slot_distance,
        "slots_from_start": slots_from_start,
        "window_sizes": list(windows),
    }
    check_sizes(SimpleNamespace(**changes))
    config_class = hybrid_config_class(family)
    config_class(**(config.to_dict() | changes))  # raises what loading the saved model would
    expected: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    if type(model).__name__ != expected.__name__:
        raise ValueError(f"expected a causal language model, got {type(model).__name__}")
    config.__class__ = config_class
    for name, value in changes.items():
        setattr(config, name, value)
    config.architectures = [hybrid_model_class(config_class).__name__]
    model.__class__ = hybrid_model_class(config_class)
    install(model)


def hybrid_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The configuration and the model class of a hybrid's model type; the file saved beside hybrids calls this.

    >>> [found.__name__ for found in hybrid_classes("nha-llama")]
    ['NHALlamaConfig', 'NHALlamaForCausalLM']
    """
    if model_type == NHAConfig.model_type:
        from nha.models.nha import NHAForCausalLM

        return NHAConfig, NHAForCausalLM
    config_class = hybrid_config_class(model_type.removeprefix("nha-"))
    return config_class, hybrid_model_class(config_class)
