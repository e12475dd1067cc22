"""Refusals of models and settings that vLLM cannot run exactly, in one line each. Imports no vLLM."""

from __future__ import annotations

from typing import Any

from nha.models.config import check_windows
from nha.models.families import EXPERTS, TABLE
from nha.ops.packed_state import check_state_dtype
from nha.serve.experts import EXPERT_NAMES

WITH_EXPERTS = {family.model_type for family in TABLE if EXPERTS in family.special}
OF_ALL_HEADS = {"output_gate": False, "output_norm": "none"}  # options of a layer that are not split among processes
TESTED = ("0.32",)  # versions of vLLM, as far as its second number


def check_version(version: str | None) -> None:
    """Raise ValueError for a version of vLLM that the plugin was not tested with.

    >>> check_version("0.32.0")
    >>> check_version("0.11.2")
    Traceback (most recent call last):
    ValueError: expected vLLM 0.32 to serve a hybrid, got 0.11.2
    """
    if version is None or ".".join(version.split(".")[:2]) not in TESTED:
        raise ValueError(f"expected vLLM {' or '.join(TESTED)} to serve a hybrid, got {version}")


def check_architecture(architecture: str, known: bool) -> None:
    """Raise ValueError for a hybrid whose family vLLM does not have, and for one that reads images.

    >>> check_architecture("NHAHeliumForCausalLM", known=False)
    Traceback (most recent call last):
    ValueError: expected a family that vLLM has code of its own for, got NHAHeliumForCausalLM; transformers can serve it
    """
    if not architecture.endswith("ForCausalLM"):
        raise ValueError(f"expected a model of text alone in vLLM, got {architecture}; transformers can serve it")
    if not known:
        raise ValueError(
            f"expected a family that vLLM has code of its own for, got {architecture}; transformers can serve it"
        )


def check_model(config: Any) -> None:
    """Raise ValueError for a configuration that is no hybrid's, or whose windows or weights vLLM cannot hold."""
    windows = getattr(config, "window_sizes", None)
    if not isinstance(windows, (list, tuple)):
        raise ValueError(f"expected the configuration of a hybrid, got {config.model_type}: call hybridize first")
    family = config.model_type.removeprefix("nha-")
    if family in WITH_EXPERTS and family not in EXPERT_NAMES:
        known = ", ".join(EXPERT_NAMES)
        raise ValueError(f"expected experts as in {known} in vLLM, got {family}; transformers can serve it")
    write = getattr(config, "slot_write", "soft")
    if write != "soft":
        raise ValueError(f"expected slot_write='soft' in vLLM, got {write!r}; transformers can serve it")
    check_windows(config, windows)
    check_state_dtype(config.state_dtype)
    if getattr(config, "kv_cache_dtype", "auto") != "auto":
        got = config.kv_cache_dtype
        raise ValueError(f"expected kv_cache_dtype='auto' in vLLM, which has --kv-cache-dtype of its own, got {got!r}")


def check_run(vllm_config: Any) -> None:
    """Raise ValueError for settings of vLLM under which a hybrid would give other tokens, or that were not tested."""
    pipeline = vllm_config.parallel_config.pipeline_parallel_size
    if pipeline != 1:
        raise ValueError(f"expected pipeline_parallel_size=1 for a hybrid, got {pipeline}")
    config, processes = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    for name, plain in OF_ALL_HEADS.items():
        if processes > 1 and getattr(config, name, plain) != plain:
            raise ValueError(f"expected tensor_parallel_size=1 with {name}={getattr(config, name)!r}, got {processes}")
    dtype = vllm_config.model_config.dtype
    if str(dtype).removeprefix("torch.") not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"expected dtype float32, bfloat16 or float16 for a hybrid, got {dtype}")
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method not in ("ngram", "ngram_gpu"):
        raise ValueError(f"expected speculative method ngram for a hybrid, got {drafts.method}")
