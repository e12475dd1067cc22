"""Tiny random models of every supported family."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nha.models.auto import to_hybrid
from nha.models.families import FAMILIES

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
OWN: dict[str, dict[str, Any]] = {
    "mistral": dict(sliding_window=None),
    "qwen3": dict(head_dim=12),
    "qwen3_moe": dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0]),
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "gemma2": dict(
        head_dim=8,
        sliding_window=64,
        query_pre_attn_scalar=4,
        attn_logit_softcapping=5.0,
        layer_types=["full_attention"] * 3,
    ),
    "gemma3_text": dict(head_dim=8, sliding_window=64, query_pre_attn_scalar=4, layer_types=["full_attention"] * 3),
    "phi3": dict(partial_rotary_factor=0.5, sliding_window=None),
    "granite": dict(attention_multiplier=0.3, embedding_multiplier=2.0, residual_multiplier=0.7, logits_scaling=2.0),
}


@cache
def _teacher(family: str, changes: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    torch.manual_seed(0)
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in changes}
    config = AutoConfig.for_model(family, **(COMMON | OWN.get(family, {}) | listed))
    # transformers 5.17 drops Gemma 2's cap on scores silently, unless attention is "eager".
    chosen = "eager" if family == "gemma2" else None
    return AutoModelForCausalLM.from_config(config, attn_implementation=chosen).eval()


def teacher(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A tiny random model, the same at every call."""
    return copy.deepcopy(_teacher(family, tuple(changes.items())))


def sliding(window: int) -> dict[str, Any]:
    """Changes that let the outer two of three layers slide over a window of their own."""
    return {"sliding_window": window, "layer_types": ("sliding_attention", "full_attention", "sliding_attention")}


def hybrid(family: str = "llama", windows: int | list[int] = 8, *, slots: int = 6, sinks: int = 1, **changes: Any):
    """The hybrid of `teacher(family)` with random gates and sinks."""
    options = {k: changes.pop(k) for k in ("slot_distance", "slots_from_start") if k in changes}
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


__all__ = ["FAMILIES", "hybrid", "sliding", "teacher", "tokens"]
