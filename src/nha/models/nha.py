"""NHAForCausalLM: a Llama-shaped language model of `NativeHybridAttention` layers, trained from scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from nha.layer import NativeHybridAttention, write_order
from nha.models.adapter import HybridGenerationMixin, before_decoder
from nha.models.attention import check_dropout, check_implementation, layer_cache, window_now
from nha.models.checkpoint import CheckpointMixin
from nha.models.config import FULL, NHAConfig
from nha.models.full_attention import base_attention, packed_base_attention
from nha.models.head import watch_head
from nha.models.head_windows import keep_in_graph, read_heads, read_segment
from nha.models.masks import NAME, HybridMask, cache_argument, read_mask
from nha.models.observe import Observation
from nha.models.segment import Reading, Segment
from nha.models.windows import freeze_unused
from nha.ops.heads import window_of
from nha.ops.rotary import rotate

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "silu": F.silu, "relu": F.relu}


class NHAAttention(NativeHybridAttention):
    """`NativeHybridAttention` behind the interface of transformers' decoder layers."""

    is_causal = True

    def __init__(self, config: NHAConfig, layer_idx: int):
        windows: Any = config.window_sizes
        window = window_of(windows[layer_idx])
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.num_slots,
            window if isinstance(window, int) else max(window),
            config.head_dim,
            config.num_sinks,
            rope_theta=None,
            bias=config.attention_bias,
            slot_write=config.slot_write,
        )
        self.config, self.layer_idx, self.window_size = config, layer_idx, window
        self.q_norm, self.k_norm = (
            nn.RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        width = self.num_heads * self.head_dim
        normalized = config.output_norm != "none"
        self.output_norm = nn.RMSNorm(width, config.rms_norm_eps) if normalized else nn.Identity()
        self.output_gate = nn.Linear(config.hidden_size, width, bias=False) if config.output_gate else None
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.ablation: str | None = None
        self.observer: Any = None
        self.mass_observer: Any = None
        self.slots_frozen = False

    def to_heads(self, projected: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As in `NativeHybridAttention`, with queries and keys normalized under `qk_norm` and values activated."""
        q, k, v = super().to_heads(projected)
        return self.q_norm(q), self.k_norm(k), FEATURES[self.config.value_activation](v)

    def output(self, out: Tensor, hidden: Tensor) -> Tensor:
        """The layer's output [B, T, hidden] of what attention returned [B, T, HQ, D]."""
        out = out.flatten(2)
        out = self.output_norm(F.silu(out) if self.config.output_norm == "silu_rms" else out)
        return self.o_proj(out if self.output_gate is None else out * torch.sigmoid(self.output_gate(hidden)))

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: HybridMask | Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend from hidden_states [B, T, hidden] with rotary tables [B, T, D]; the cache is updated in place."""
        # All layers share the configuration, which is slow to read; a graph that reads the index serves one layer only.
        if not torch.compiler.is_compiling() and self.layer_idx == 0:
            check_implementation(self.config)
        check_dropout(self.config.attention_dropout or 0.0 if self.training else 0.0)
        gate_logits = None
        if self.window_size == FULL:
            slot_query, slot_key, value = self.project(hidden_states)
        else:
            slot_query, slot_key, value, gate_logits = self.project_with_gate(hidden_states)
        query, key = rotate(slot_query, *position_embeddings), rotate(slot_key, *position_embeddings)
        features = FEATURES[self.config.slot_features]
        slot_query, slot_key = features(slot_query), features(slot_key)
        cache, cu = cache_argument(kwargs), kwargs.get("cu_seq_lens_q")
        mask = read_mask(self, attention_mask, hidden_states.shape[1], cu)
        layer = layer_cache(self, cache, hidden_states.shape[0])
        if self.observer is not None:
            self.observer(Observation(hidden_states, slot_key, key, value, query, self.head_dim**-0.5, None))

        def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scale, longest = self.head_dim**-0.5, kwargs.get("max_length_q")
            if cu is not None:
                return packed_base_attention(self, q, k, v, cu, scaling=scale, max_seq_len=longest)[0]
            return base_attention(self, q, k, v, mask.base, softcap=None, scaling=scale, appended=mask.appended)[0]

        if self.window_size == FULL:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            k, v = (k, v) if cache is None else cache.update(k, v, self.layer_idx)
            out = full(q, k, v)
            unused = () if self.slots_frozen else (self.g_proj(hidden_states[:, :1]), self.sink_key, self.sink_value)
            return self.output(keep_in_graph(out, unused), hidden_states), None
        assert gate_logits is not None
        order = None
        if self.slot_write == "exact":
            state, kept = (None, None) if layer is None else (layer.state, layer.num_kept)
            order = write_order(hidden_states, state, mask.padding, cu, kept)
        gate, kept = self.gates(gate_logits, order)
        if self.ablation == "slots_off":
            gate, kept = gate[..., :0], None
        window = window_now(self, self.window_size)
        segment = Segment(query, key, value, gate, slot_query, slot_key, mask.padding, cu, kept)
        one = window if isinstance(window, int) else 0
        reading = Reading(one, sink=self.sink, observe_mass=self.mass_observer)
        if isinstance(window, int):
            out = read_segment(segment, reading, layer)
        else:
            out = read_heads(segment, reading, window, layer, full)
        return self.output(out, hidden_states), None


class NHAModel(CheckpointMixin, LlamaModel):
    """The decoder of `NHAForCausalLM`."""

    config_class = NHAConfig

    def __init__(self, config: NHAConfig):
        config.check_hybrid()
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = NHAAttention(config, index)  # type: ignore[union-attr]
        self.register_forward_pre_hook(before_decoder, with_kwargs=True)
        self.config._attn_implementation = NAME
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, NativeHybridAttention):
            torch.nn.init.zeros_(module.sink_key)
            torch.nn.init.zeros_(module.sink_value)
            if self.config.gate_std and module.slot_write == "soft":  # exact slots have one score a head, and a bias
                torch.nn.init.normal_(module.g_proj.weight, std=self.config.gate_std / module.g_proj.in_features**0.5)


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
        self.post_init()
        watch_head(self)
        freeze_unused(self)
