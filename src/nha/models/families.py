"""The families of models: which become hybrids, what is special about each, and why others are refused."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

LATENT = "its latent attention (MLA) shares one compressed key among all heads, so there are no keys to put in slots"
RECURRENT = "its layers are not softmax attention"
MULTIMODAL = "convert the text model inside it"


@dataclass(frozen=True)
class Family:
    """One line of the table: a model type of transformers, what is special, and why it is refused if it is."""

    model_type: str
    special: str = ""
    refused: str = ""


TABLE = (
    Family("llama"),
    Family("mistral"),
    Family("qwen2"),
    Family("qwen3"),
    Family("qwen3_moe"),
    Family("smollm3"),
    Family("olmo2"),
    Family("gemma2"),
    Family("gemma3_text"),
    Family("phi3"),
    Family("granite"),
    Family("deepseek_v2", refused=LATENT),
    Family("deepseek_v3", refused=LATENT),
    Family("deepseek_v32", refused=LATENT),
    Family("minicpm3", refused=LATENT),
    Family("kimi_linear", refused=LATENT),
    Family("glm4_moe_lite", refused=LATENT),
    Family("longcat_flash", refused=LATENT),
    Family("mamba", refused=RECURRENT),
    Family("mamba2", refused=RECURRENT),
    Family("rwkv", refused=RECURRENT),
    Family("gemma3", refused=MULTIMODAL),
    Family("mistral3", refused=MULTIMODAL),
    Family("gpt2", refused="its positions are added to the embeddings, not rotated into the keys"),
)
FAMILIES = tuple(family.model_type for family in TABLE if not family.refused)
REFUSED = {family.model_type: family.refused for family in TABLE if family.refused}


def check_family(config: PreTrainedConfig) -> None:
    """Raise ValueError, with the reason, for a model whose family cannot become a hybrid.

    >>> from transformers import DeepseekV3Config
    >>> check_family(DeepseekV3Config())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: expected a model of one of llama, ..., got deepseek_v3: its latent attention (MLA) ...
    """
    family = config.model_type
    if family in FAMILIES:
        return
    if hasattr(config, "window_sizes"):
        raise ValueError(f"expected a model that is not a hybrid yet, got {family}")
    reason = REFUSED.get(family, "it has not been tried")
    raise ValueError(f"expected a model of one of {', '.join(FAMILIES)}, got {family}: {reason}")
