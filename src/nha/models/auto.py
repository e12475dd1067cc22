"""Make transformers' Auto classes know hybrid models: the one place where classes are registered.

The classes of all families take seconds to import, and a program needs those of one. So each is registered at first as
a stand-in of the same name, which makes and registers the class itself when an Auto class asks for it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
)

from nha.models.families import FAMILIES, MODEL_NAMES, MULTIMODAL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SCRATCH = "nha"  # model type of `NHAConfig`
SCRATCH_NAMES = {"base": "Model", "causal-lm": "ForCausalLM"}  # of its model classes, behind "NHA"
AUTO: dict[str, Any] = {
    "base": AutoModel,
    "causal-lm": AutoModelForCausalLM,
    "image-text-to-text": AutoModelForImageTextToText,
    "sequence-classification": AutoModelForSequenceClassification,
}


class DeferredConfig:
    """Stands for a hybrid's configuration class in `AutoConfig`."""

    model_type: ClassVar[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return register_family(cls.model_type)(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """`from_dict` of the configuration class."""
        return register_family(cls.model_type).from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` of the configuration class."""
        return register_family(cls.model_type).from_pretrained(*args, **kwargs)


class DeferredModel:
    """Stands for a hybrid's model class in the Auto class of a task."""

    config_class: ClassVar[type[PreTrainedConfig]]
    task: ClassVar[str]

    @classmethod
    def register(cls) -> type[PreTrainedModel]:
        """Put the model class in the place of this one, and return it."""
        found = model_class(cls.config_class, cls.task)
        AUTO[cls.task].register(cls.config_class, found, exist_ok=True)
        return found

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """`from_pretrained` of the model class."""
        return cls.register().from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """A model with random weights; Auto classes call `PreTrainedModel` by this name."""
        return cls.register()._from_config(config, **kwargs)


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of a hybrid's type. Raises KeyError for a family that transformers does not have.

    >>> config_class("nha-llama").__name__, config_class("nha").__name__
    ('NHALlamaConfig', 'NHAConfig')
    """
    from nha.models.config import NHAConfig, config_class_of

    return NHAConfig if model_type == SCRATCH else config_class_of(model_type.removeprefix("nha-"))


def model_class(config_class: type[PreTrainedConfig], task: str) -> type[PreTrainedModel]:
    """The model class of a hybrid's configuration class. Raises KeyError for a task that the family has no model of."""
    if config_class.model_type == SCRATCH:
        from nha.models import nha

        return getattr(nha, f"NHA{SCRATCH_NAMES[task]}")
    from nha.models.adapter import hybrid_model_class

    return hybrid_model_class(config_class, task)


def hybrid_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The configuration and the generating model class of a hybrid's type; the file saved beside hybrids calls this.

    >>> [found.__name__ for found in hybrid_classes("nha-llama")]
    ['NHALlamaConfig', 'NHALlamaForCausalLM']
    >>> [found.__name__ for found in hybrid_classes("nha-gemma3")]
    ['NHAGemma3Config', 'NHAGemma3ForConditionalGeneration']
    """
    from nha.models.config import is_multimodal

    found = config_class(model_type)
    return found, model_class(found, "image-text-to-text" if is_multimodal(found) else "causal-lm")


def stand_in(kind: type, name: str, **attributes: Any) -> type:
    """A stand-in by the name of the class that it stands for: pipelines and tokenizers look for that."""
    return type(name, (kind,), {"__module__": __name__, **attributes})


def register_family(model_type: str) -> type[PreTrainedConfig]:
    """Register the configuration class of a type of hybrids, such as "nha-llama", and stand-ins for its models."""
    found = config_class(model_type)
    AutoConfig.register(model_type, found, exist_ok=True)
    for task, auto in AUTO.items():
        scratch = model_type == SCRATCH
        base = SCRATCH_NAMES.get(task) if scratch else MODEL_NAMES[task].get(model_type.removeprefix("nha-"))
        if base is not None:
            model = stand_in(DeferredModel, f"NHA{base}", config_class=found, task=task)
            auto.register(found, model, exist_ok=True)
    return found


def model_types() -> list[str]:
    """The types of all hybrids that this version of transformers has the family of."""
    return [SCRATCH, *(f"nha-{family}" for family in (*FAMILIES, *MULTIMODAL) if family in CONFIG_MAPPING)]


@cache
def register_names() -> None:
    """Let `AutoConfig` know every type of hybrids, once; its classes are imported when one is asked for."""
    for model_type in model_types():
        if model_type in CONFIG_MAPPING:
            continue
        name = f"NHA{CONFIG_MAPPING_NAMES.get(model_type.removeprefix('nha-'), 'Config')}"
        AutoConfig.register(model_type, stand_in(DeferredConfig, name, model_type=model_type), exist_ok=True)  # type: ignore[arg-type]


@cache
def register() -> None:
    """Register `NHAForCausalLM` and the hybrids of every family that this version of transformers has, once.

    A configuration that was made without `AutoConfig` is known to the other Auto classes from then on.
    """
    for model_type in model_types():
        register_family(model_type)
