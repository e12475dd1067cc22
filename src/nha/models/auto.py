"""Make transformers' Auto classes know hybrid models: the one place where classes are registered."""

from __future__ import annotations

from functools import cache

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nha.models.adapter import TASKS, hybrid_model_class
from nha.models.config import NHAConfig, hybrid_config_class, hybrid_multimodal_config_class
from nha.models.families import FAMILIES, MULTIMODAL
from nha.models.nha import NHAForCausalLM

AUTO = {
    "base": AutoModel,
    "causal-lm": AutoModelForCausalLM,
    "image-text-to-text": AutoModelForImageTextToText,
    "sequence-classification": AutoModelForSequenceClassification,
}


def hybrid_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The configuration and the generating model class of a hybrid's type; the file saved beside hybrids calls this.

    >>> [found.__name__ for found in hybrid_classes("nha-llama")]
    ['NHALlamaConfig', 'NHALlamaForCausalLM']
    >>> [found.__name__ for found in hybrid_classes("nha-gemma3")]
    ['NHAGemma3Config', 'NHAGemma3ForConditionalGeneration']
    """
    if model_type == NHAConfig.model_type:
        return NHAConfig, NHAForCausalLM
    family = model_type.removeprefix("nha-")
    if "text_config" in getattr(CONFIG_MAPPING[family], "__dataclass_fields__", ()):
        config_class = hybrid_multimodal_config_class(family)
        return config_class, hybrid_model_class(config_class, "image-text-to-text")
    config_class = hybrid_config_class(family)
    return config_class, hybrid_model_class(config_class)


def register_family(model_type: str) -> None:
    """Register the configuration and the models of one type of hybrids, such as "nha-llama"."""
    config_class, model_class = hybrid_classes(model_type)
    AutoConfig.register(model_type, config_class, exist_ok=True)
    if config_class is NHAConfig:
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        return
    family = CONFIG_MAPPING[model_type.removeprefix("nha-")]
    for task, auto in AUTO.items():
        if family in TASKS[task]:
            auto.register(config_class, hybrid_model_class(config_class, task), exist_ok=True)


@cache
def register() -> None:
    """Register `NHAForCausalLM` and the hybrids of every family that this version of transformers has, once."""
    register_family(NHAConfig.model_type)
    for family in (*FAMILIES, *MULTIMODAL):
        if family in CONFIG_MAPPING:
            register_family(f"nha-{family}")
