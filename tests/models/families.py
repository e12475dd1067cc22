"""Tiny random models of every supported family."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nha.models.adapter import to_hybrid
from nha.models.families import FAMILIES as SUPPORTED

VOCAB = 97
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    attention_dropout=0.0,
)
EXPERTS: dict[str, Any] = dict(
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
MIXED: dict[str, Any] = dict(
    sliding_window=64, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
)
FULL: dict[str, Any] = dict(sliding_window=64, layer_types=["full_attention"] * 3)
GRANITE: dict[str, Any] = dict(
    attention_multiplier=0.3, embedding_multiplier=2.0, residual_multiplier=0.7, logits_scaling=2.0
)
OWN: dict[str, dict[str, Any]] = {
    "afmoe": EXPERTS | MIXED | dict(num_dense_layers=1),
    "aria_text": dict(moe_num_experts=4, moe_topk=2),
    "cohere": dict(use_qk_norm=True, logit_scale=0.5),
    "cohere2": MIXED | dict(logit_scale=0.5),
    "cohere2_moe": EXPERTS | MIXED | dict(logit_scale=0.5),
    "cwm": MIXED,
    "ernie4_5_moe": EXPERTS | dict(moe_k=2, moe_num_shared_experts=1),
    "exaone4": MIXED,
    "exaone_moe": EXPERTS | MIXED,
    "flex_olmo": dict(num_experts=4, num_experts_per_tok=2),
    "gemma": dict(head_dim=8),
    "gemma2": FULL | dict(head_dim=8, query_pre_attn_scalar=4, attn_logit_softcapping=5.0),
    "gemma3_text": FULL | dict(head_dim=8, query_pre_attn_scalar=4),
    "gemma3n_text": MIXED
    | dict(
        head_dim=8,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 3,
        altup_num_inputs=2,
    ),
    "glm": dict(head_dim=8),
    "glm4": dict(head_dim=8),
    "glm4_moe": EXPERTS | dict(head_dim=8, n_shared_experts=1),
    "granite": GRANITE,
    "granitemoe": GRANITE | dict(num_local_experts=4, num_experts_per_tok=2),
    "granitemoeshared": GRANITE | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16),
    "helium": dict(head_dim=8),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8, num_experts=4, moe_topk=2),
    "hy_v3": EXPERTS | dict(head_dim=8),
    "hyperclovax": GRANITE,
    "kolibri1": EXPERTS | MIXED,
    "laguna": EXPERTS | MIXED | dict(head_dim=8, shared_expert_intermediate_size=16),
    "lfm2": dict(layer_types=["full_attention"] * 3, block_auto_adjust_ff_dim=False),
    "mellum": EXPERTS | MIXED,
    "minimax_m2": EXPERTS | dict(head_dim=8),
    "minimax_m3_vl_text": EXPERTS | dict(head_dim=8, layer_types=["full_attention"] * 3),
    "ministral": MIXED | dict(head_dim=8),
    "mistral": dict(sliding_window=None),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "olmo3": MIXED,
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "phi3": dict(partial_rotary_factor=0.5, sliding_window=None),
    "phimoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": EXPERTS | dict(shared_expert_intermediate_size=16, mlp_only_layers=[0]),
    "qwen3": dict(head_dim=12),
    "qwen3_moe": dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0]),
    "sarvam_moe": EXPERTS | dict(head_dim=8),
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "solar_open": EXPERTS | dict(head_dim=8),
    "vaultgemma": FULL | dict(head_dim=8, query_pre_attn_scalar=4, attn_logit_softcapping=5.0),
}
ALL_FAMILIES = tuple(family for family in SUPPORTED if family in CONFIG_MAPPING)
"""Every supported family that the installed transformers knows."""
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "olmo2",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
)
"""Families with one peculiarity each, for tests that would take too long for all."""


@cache
def _teacher(family: str, changes: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    torch.manual_seed(0)
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in changes}
    config = AutoConfig.for_model(family, **(COMMON | OWN.get(family, {}) | listed))
    # transformers 5.17 drops Gemma 2's cap on scores silently, unless attention is "eager".
    chosen = "eager" if family in ("gemma2", "vaultgemma") else None
    return AutoModelForCausalLM.from_config(config, attn_implementation=chosen).eval()


def teacher(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A tiny random model, the same at every call."""
    return copy.deepcopy(_teacher(family, tuple(changes.items())))


def sliding(window: int) -> dict[str, Any]:
    """Changes that let the outer two of three layers slide over a window of their own."""
    return {"sliding_window": window, "layer_types": ("sliding_attention", "full_attention", "sliding_attention")}


def hybrid(family: str = "llama", windows: Any = 8, *, slots: int = 6, sinks: int = 1, **changes: Any):
    """The hybrid of `teacher(family)` with random gates and sinks."""
    options = {k: changes.pop(k) for k in ("slot_distance", "slots_from_start", "slot_write") if k in changes}
    model = teacher(family, **changes)
    layers = model.config.num_hidden_layers
    to_hybrid(
        model,
        [windows] * layers if isinstance(windows, int) else windows,
        num_slots=slots,
        num_sinks=sinks,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".nha." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model.eval()


def tokens(batch: int = 1, length: int = 40, seed: int = 0) -> torch.Tensor:
    """Random tokens without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


__all__ = ["ALL_FAMILIES", "FAMILIES", "hybrid", "sliding", "teacher", "tokens"]
