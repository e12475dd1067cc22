"""NHAForCausalLM: a Llama-shaped language model of `NativeHybridAttention` layers, trained from scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from nha.layer import NativeHybridAttention, log_gate
from nha.models.adapter import (
    NAME,
    HybridGenerationMixin,
    Observation,
    cache_argument,
    cache_layer,
    check_dropout,
    check_implementation,
    mark_packing,
    split_mask,
)
from nha.models.attend import Segment, attend, base_attention, packed_base_attention
from nha.models.checkpoint import CheckpointMixin
from nha.models.config import FULL, NHAConfig
from nha.ops.rotary import rotate


class NHAAttention(NativeHybridAttention):
    """`NativeHybridAttention` behind the interface of transformers' decoder layers."""

    is_causal = True

    def __init__(self, config: NHAConfig, layer_idx: int):
        windows: Any = config.window_sizes
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.num_slots,
            windows[layer_idx],
            config.head_dim,
            config.num_sinks,
            rope_theta=None,
            bias=config.attention_bias,
        )
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.ablation: str | None = None
        self.observer: Any = None
        self.mass_observer: Any = None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend from hidden_states [B, T, hidden] with rotary tables [B, T, D]; the cache is updated in place."""
        check_implementation(self.config)
        check_dropout(self.config.attention_dropout or 0.0 if self.training else 0.0)
        slot_query, slot_key, value = self.project(hidden_states)
        query, key = rotate(slot_query, *position_embeddings), rotate(slot_key, *position_embeddings)
        cu = kwargs.get("cu_seq_lens_q")
        cache = cache_argument(kwargs)
        layer = cache_layer(self, cache, cu, hidden_states.shape[0])
        full: tuple[Tensor, Tensor] = (key.transpose(1, 2), value.transpose(1, 2))
        if cache is not None:
            full = cache.update(*full, self.layer_idx)
        if self.observer is not None:
            self.observer(Observation(hidden_states, slot_key, key, value))
        own_mask, padding = split_mask(attention_mask, query.shape[1])
        if self.window_size == FULL:
            scale = self.head_dim**-0.5
            q, (k, v) = query.transpose(1, 2), full
            if cu is not None:
                out, _ = packed_base_attention(self, q, k, v, cu, scaling=scale, longest=kwargs.get("max_length_q"))
            else:
                out, _ = base_attention(self, q, k, v, own_mask, softcap=None, scaling=scale)
            return self.o_proj(out.flatten(2)), None
        padding = None if cu is not None else padding
        gate = log_gate(self.g_proj(hidden_states), self.num_kv_heads)
        if self.ablation == "slots_off":
            gate = gate[..., :0]
        out = attend(
            Segment(query, key, value, gate, slot_query, slot_key, padding, cu),
            layer=layer,
            window_size=0 if self.ablation == "window_off" else self.window_size,
            scale=None,
            sink=self.sink,
            initial=None,
            see_mass=self.mass_observer,
        )
        return self.o_proj(out.flatten(2)), None


class NHAModel(LlamaModel):
    """The decoder of `NHAForCausalLM`."""

    config_class = NHAConfig

    def __init__(self, config: NHAConfig):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = NHAAttention(config, index)  # type: ignore[union-attr]
        self.register_forward_pre_hook(mark_packing, with_kwargs=True)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, NativeHybridAttention):
            torch.nn.init.zeros_(module.sink_key)
            torch.nn.init.zeros_(module.sink_value)


class NHAForCausalLM(CheckpointMixin, HybridGenerationMixin, LlamaForCausalLM):
    """A language model of `NativeHybridAttention` layers; everything else is Llama's.

    >>> _ = torch.manual_seed(0)
    >>> model = NHAForCausalLM(NHAConfig.tiny())
    >>> tokens = torch.arange(40)[None]
    >>> tuple(model(tokens).logits.shape)
    (1, 40, 128)
    >>> model.generate(tokens, max_new_tokens=3, do_sample=False).shape[1]
    43
    """

    config_class = NHAConfig

    def __init__(self, config: NHAConfig):
        super().__init__(config)
        self.model = NHAModel(config)
        self.config._attn_implementation = NAME
        self.post_init()
