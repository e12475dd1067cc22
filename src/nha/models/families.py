"""The families of models: which become hybrids, what is special about each, and why others are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

LATENT = "its latent attention (MLA) shares one compressed key among all heads, so there are no keys to put in slots"
RECURRENT = "its layers are not softmax attention"


@dataclass(frozen=True)
class Family:
    """One line of the table of families.

    Attributes:
        model_type: as in transformers' configurations.
        special: what sets its attention apart from Llama's, for the docs.
        rotates: whether an attention module of it rotates queries and keys; some leave a few layers without positions.
        refused: why it is refused; empty for a family that is supported.
    """

    model_type: str
    special: str = ""
    rotates: Callable[[Any], bool] = lambda module: True
    refused: str = ""


def _if_sliding(module: Any) -> bool:
    return module.sliding_window is not None


def _unless_full_among_sliding(module: Any) -> bool:
    return module.sliding_window is None or module.is_sliding


INTERLEAVED = "interleaved rotary positions"
PARTIAL = "rotary positions in a part of each head"
NORMALISED = "normalised queries and keys"
NORMALISED_LATE = "queries and keys normalised after rotation, so slot keys keep a trace of positions"
EXPERTS = "a mixture of experts"
SOME_ROTATE = "no positions in full-attention layers among sliding ones"
SINKS = "its attention has sinks of its own beside the keys"

TABLE = (
    Family("afmoe", f"{EXPERTS}; {NORMALISED}; a gate after attention; {SOME_ROTATE}", lambda m: m.is_local_attention),
    Family("apertus", NORMALISED),
    Family("apertus1p5_text", NORMALISED),
    Family("arcee"),
    Family("aria_text", EXPERTS),
    Family("bitnet", "a norm after attention"),
    Family("cohere", INTERLEAVED),
    Family("cohere2", f"{INTERLEAVED}; {SOME_ROTATE}", _if_sliding),
    Family("cohere2_moe", f"{EXPERTS}; {INTERLEAVED}; {SOME_ROTATE}", lambda m: m.force_rope or _if_sliding(m)),
    Family("cwm", "sliding windows in some layers"),
    Family("ernie4_5", INTERLEAVED),
    Family("ernie4_5_moe", f"{EXPERTS}; {INTERLEAVED}"),
    Family("exaone"),
    Family("exaone4", f"{NORMALISED}; {SOME_ROTATE}", _unless_full_among_sliding),
    Family("exaone_moe", f"{EXPERTS}; {NORMALISED}; {SOME_ROTATE}", _unless_full_among_sliding),
    Family("flex_olmo", f"{EXPERTS}; {NORMALISED}"),
    Family("gemma"),
    Family("gemma2", "sliding windows in some layers; capped scores"),
    Family("gemma3_text", f"sliding windows in some layers; {NORMALISED}"),
    Family("gemma3n_text", f"sliding windows in some layers; {NORMALISED}; only without layers that share keys"),
    Family("glm", f"{INTERLEAVED}; {PARTIAL}"),
    Family("glm4", f"{INTERLEAVED}; {PARTIAL}"),
    Family("glm4_moe", f"{EXPERTS}; {NORMALISED}; {PARTIAL}"),
    Family("granite", "a scale of its own for scores"),
    Family("granitemoe", f"{EXPERTS}; a scale of its own for scores"),
    Family("granitemoeshared", f"{EXPERTS}; a scale of its own for scores"),
    Family("helium", INTERLEAVED),
    Family("hunyuan_v1_dense", NORMALISED_LATE),
    Family("hunyuan_v1_moe", f"{EXPERTS}; {NORMALISED_LATE}"),
    Family("hy_v3", f"{EXPERTS}; {NORMALISED}"),
    Family("hyperclovax", "a scale of its own for scores"),
    Family("internlm3"),
    Family("iquestcoder"),
    Family("jais2"),
    Family("kolibri1", f"{EXPERTS}; {NORMALISED}; {SOME_ROTATE}", _unless_full_among_sliding),
    Family("laguna", f"{EXPERTS}; {NORMALISED}; a gate after attention; {PARTIAL}"),
    Family("lfm2", f"{NORMALISED}; only without convolution layers"),
    Family("llama"),
    Family("mellum", f"{EXPERTS}; {NORMALISED}; sliding windows in some layers"),
    Family("minimax_m2", f"{EXPERTS}; {NORMALISED}; {PARTIAL}"),
    Family("minimax_m3_vl_text", f"{EXPERTS}; {NORMALISED}; {PARTIAL}; only without sparse layers"),
    Family("ministral", "sliding windows in some layers"),
    Family("ministral3", "scales queries by their position"),
    Family("mistral", "a sliding window in all layers of some models"),
    Family("mixtral", EXPERTS),
    Family("nanochat", f"{NORMALISED}; rotates the other way"),
    Family("nemotron", f"{PARTIAL}; no packed sequences"),
    Family("olmo"),
    Family("olmo2", NORMALISED),
    Family("olmo3", f"sliding windows in some layers; {NORMALISED}"),
    Family("olmoe", f"{EXPERTS}; {NORMALISED}"),
    Family("phi", PARTIAL),
    Family("phi3", f"one projection for queries, keys and values; {PARTIAL}"),
    Family("phimoe", EXPERTS),
    Family("qwen2"),
    Family("qwen2_moe", EXPERTS),
    Family("qwen3", NORMALISED),
    Family("qwen3_moe", f"{EXPERTS}; {NORMALISED}"),
    Family("sarvam_moe", f"{EXPERTS}; {NORMALISED}"),
    Family("seed_oss"),
    Family("smollm3", "no positions in every fourth layer", lambda m: m.use_rope),
    Family("solar_open", f"{EXPERTS}; {PARTIAL}"),
    Family("stablelm", f"{PARTIAL}; no packed sequences"),
    Family("starcoder2"),
    Family("vaultgemma", "sliding windows in some layers"),
    # Forcing these gives wrong numbers.
    Family("gpt_oss", refused=SINKS),
    Family("flint", refused=SINKS),
    Family("granite_swa", refused=SINKS),
    Family("granitemoe_swa", refused=SINKS),
    Family("mimo_v2_flash", refused=SINKS),
    Family("diffllama", refused="it reads the difference of two softmaxes over the same keys"),
    Family("dory", refused="it runs through the same layers several times"),
    Family("doge", refused="its attention makes masks of its own"),
    Family("axk1", refused=LATENT),
    Family("deepseek_v2", refused=LATENT),
    Family("deepseek_v3", refused=LATENT),
    Family("deepseek_v32", refused=LATENT),
    Family("minicpm3", refused=LATENT),
    Family("kimi_linear", refused=LATENT),
    Family("glm4_moe_lite", refused=LATENT),
    Family("glm_moe_dsa", refused=LATENT),
    Family("longcat_flash", refused=LATENT),
    Family("mistral4", refused=LATENT),
    Family("sarvam_mla", refused=LATENT),
    Family("youtu", refused=LATENT),
    Family("mamba", refused=RECURRENT),
    Family("mamba2", refused=RECURRENT),
    Family("rwkv", refused=RECURRENT),
    Family("gpt2", refused="its positions are added to the embeddings, not rotated into the keys"),
)
MULTIMODAL = {
    "gemma3": "text model gemma3_text; in hybrid layers the tokens of an image see each other only backwards",
    "mistral3": "text model mistral or ministral3",
    "qwen2_5_vl": "text model qwen2_5_vl_text; positions in three dimensions",
}
"""Multimodal models that are tested, with what is special; the text model inside them becomes a hybrid."""
FAMILIES = tuple(family.model_type for family in TABLE if not family.refused)
ROTATES = {family.model_type: family.rotates for family in TABLE}
KEEP_POSITIONS = tuple(family.model_type for family in TABLE if NORMALISED_LATE in family.special)
# By task, the name of each family's model class; a table of names imports no model.
MODEL_NAMES: dict[str, dict[str, Any]] = {
    "base": MODEL_MAPPING_NAMES,
    "causal-lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text-to-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "sequence-classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
REFUSED = {family.model_type: family.refused for family in TABLE if family.refused}


def families_table() -> str:
    """A Markdown table of every family: what sets its attention apart, or why it is refused.

    >>> families_table().splitlines()[2]
    '| `afmoe` | yes | a mixture of experts; normalised queries and keys; a gate after attention; no positions in full-attention layers among sliding ones |'
    """  # noqa: E501
    rows = [("family", "hybrid", "its attention"), ("---", "---", "---")]
    rows += [(f"`{f.model_type}`", "no" if f.refused else "yes", f.refused or f.special or "as Llama's") for f in TABLE]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def families_summary() -> str:
    """A Markdown table of the supported families in a few rows, by what their attention has beside Llama's."""
    kinds: dict[str, list[str]] = {
        "as Llama's": [],
        "a mixture of experts": [],
        "windows of their own": [],
        "other": [],
    }
    for family in TABLE:
        if not family.refused:
            kind = "other" if family.special else "as Llama's"
            if EXPERTS in family.special:
                kind = "a mixture of experts"
            elif "sliding window" in family.special:
                kind = "windows of their own"
            kinds[kind].append(family.model_type)
    rows = [("attention", "families"), ("---", "---")]
    rows += [(kind, ", ".join(names)) for kind, names in kinds.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def check_family(config: PreTrainedConfig) -> None:
    """Raise ValueError, with the reason, for a model whose family or layers are known not to work as a hybrid.

    >>> from transformers import DeepseekV3Config
    >>> check_family(DeepseekV3Config())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: expected a family whose attention can be converted, got deepseek_v3: its latent attention ...
    """
    family = config.model_type
    if hasattr(config, "window_sizes"):
        from nha.models.config import FULL  # these load a family's code and the operator, which `import nha` need not
        from nha.ops.heads import all_windows

        full = family == "nha" and all(window == FULL for window in all_windows(config.window_sizes))
        hint = ": take nha.models.plain.to_plain(model), since all its attention is full" if full else ""
        raise ValueError(f"expected a model that is not a hybrid yet, got {family}{hint}")
    if family in REFUSED:
        raise ValueError(f"expected a family whose attention can be converted, got {family}: {REFUSED[family]}")
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(f"expected layers of full or sliding attention in {family}, got {', '.join(sorted(other))}")
    shared = getattr(config, "num_kv_shared_layers", 0)
    if shared:
        raise ValueError(f"expected layers with keys of their own in {family}, got {shared} that share others' keys")


def rotates(config: PreTrainedConfig, module: Any) -> bool:
    """Whether an attention module of a model, hybrid or not, rotates its queries and keys."""
    rule = ROTATES.get(config.model_type.removeprefix("nha-"))
    return True if rule is None else rule(module)
