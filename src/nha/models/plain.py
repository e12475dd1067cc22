"""A model of `nha train` with full attention in every layer as the Llama or Qwen3 model that it is.

Conversion starts from a family of transformers. `NHAForCausalLM` with windows of -1 computes what Llama does, and with
normalized queries and keys what Qwen3 does, so it becomes one of these first, with the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from nha.models.config import FULL, NHAConfig
from nha.ops.heads import all_windows

SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHARED += ("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range")
SHARED += ("rms_norm_eps", "tie_word_embeddings", "rope_parameters", "attention_bias", "attention_dropout")
SHARED += ("bos_token_id", "eos_token_id", "pad_token_id")
OWN_WEIGHTS = (".g_proj.", ".sink_key", ".sink_value")  # of slots, which full attention does not read


def is_plain(config: Any) -> bool:
    """Whether `plain_config` has a configuration for this one: of `NHAForCausalLM`, and full attention throughout.

    >>> is_plain(NHAConfig.tiny(window_sizes=-1)), is_plain(NHAConfig.tiny()), is_plain(LlamaConfig())
    (True, False, False)
    """
    windows: Any = getattr(config, "window_sizes", ())
    return isinstance(config, NHAConfig) and all(window == FULL for window in all_windows(windows))


def plain_config(config: NHAConfig) -> LlamaConfig | Qwen3Config:
    """The configuration of the same model in transformers.

    Raises ValueError for windows other than -1, and for parts of a layer that neither Llama nor Qwen3 has.

    >>> plain_config(NHAConfig.tiny(window_sizes=-1, qk_norm=True)).model_type
    'qwen3'
    """
    if not is_plain(config):
        windows = getattr(config, "window_sizes", None)
        raise ValueError(f"expected a model of nha train with windows of -1, got {config.model_type} with {windows}")
    for name, plain in (("output_gate", False), ("output_norm", "none"), ("value_activation", "none")):
        if getattr(config, name) != plain:
            raise ValueError(f"expected {name} to be {plain} in a model to convert, got {getattr(config, name)}")
    kind = Qwen3Config if config.qk_norm else LlamaConfig
    found = kind(**{name: getattr(config, name) for name in SHARED})
    if not config.qk_norm:
        found.mlp_bias = config.mlp_bias
    elif config.mlp_bias:
        raise ValueError("expected mlp_bias to be False in a model to convert with qk_norm, got True")
    return found


def to_plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in transformers' own classes, with the same weights (shared, not copied), device and dtype.

    Raises ValueError as `plain_config` does.

    >>> from nha import NHAForCausalLM
    >>> model = NHAForCausalLM(NHAConfig.tiny(window_sizes=-1)).eval()
    >>> plain, tokens = to_plain(model), torch.arange(20)[None]
    >>> type(plain).__name__, torch.allclose(plain(tokens).logits, model(tokens).logits, atol=1e-5)
    ('LlamaForCausalLM', True)
    """
    config: Any = model.config
    found: Any = plain_config(config)
    kind: Any = Qwen3ForCausalLM if config.qk_norm else LlamaForCausalLM
    with torch.device("meta"):
        plain = kind(found)
    parameter = next(model.parameters())
    weights = {n: w for n, w in model.state_dict().items() if not any(part in n for part in OWN_WEIGHTS)}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    rotary = type(plain.model.rotary_emb)(found)  # its tables are buffers that no checkpoint holds
    plain.model.rotary_emb = rotary.to(parameter.device)
    plain.config._name_or_path = config.name_or_path
    plain.generation_config = model.generation_config
    return plain.train(model.training)


__all__ = ["is_plain", "plain_config", "to_plain"]
