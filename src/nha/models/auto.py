"""Make transformers' Auto classes know hybrid models: the one place where classes are registered."""

from __future__ import annotations

from functools import cache

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nha.models.adapter import hybrid_model_class
from nha.models.config import NHAConfig, hybrid_config_class
from nha.models.families import FAMILIES
from nha.models.nha import NHAForCausalLM


def hybrid_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The configuration and the model class of a hybrid's model type; the file saved beside hybrids calls this.

    >>> [found.__name__ for found in hybrid_classes("nha-llama")]
    ['NHALlamaConfig', 'NHALlamaForCausalLM']
    """
    if model_type == NHAConfig.model_type:
        return NHAConfig, NHAForCausalLM
    config_class = hybrid_config_class(model_type.removeprefix("nha-"))
    return config_class, hybrid_model_class(config_class)


def register_family(model_type: str) -> None:
    """Register the configuration and the model of one type of hybrids, such as "nha-llama"."""
    config_class, model_class = hybrid_classes(model_type)
    AutoConfig.register(model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


@cache
def register() -> None:
    """Register `NHAForCausalLM` and the hybrids of every family that this version of transformers has, once."""
    register_family(NHAConfig.model_type)
    for family in FAMILIES:
        if family in CONFIG_MAPPING:
            register_family(f"nha-{family}")
