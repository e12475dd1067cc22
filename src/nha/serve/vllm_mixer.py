"""Slots and window of a layer in vLLM, in the place of attention: a state of constant size for every sequence."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from nha.layer import log_gate
from nha.models.segment import mask_first_token_write
from nha.ops import NHAState, nha_attention
from nha.ops.rotary import unrotate_for_slots
from nha.serve.parts import NHAMetadata, Part
from nha.serve.plugin import OPERATOR
from nha.serve.vllm_metadata import NHABackend

STATES = ("slot_key", "slot_value", "key", "value", "window_slot_key", "window_log_gate")


def state_shapes(heads: int, dim: int, slots: int, window: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a sequence's states in a layer, by `STATES`; a window of 0 tokens takes the room of one."""
    places = max(window, 1)
    of_slots, of_window = (heads, slots, dim), (places, heads, dim)
    return of_slots, of_slots, of_window, of_window, of_window, (places, heads, slots)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes of a sequence's states, by `STATES`, in a model of this dtype."""
    return torch.float32, torch.float32, dtype, dtype, dtype, dtype


class SlotWeights(nn.Module):
    """Gate, sink and rotary tables of a hybrid layer, as far as this process's KV heads go.

    Args:
        config: the hybrid's configuration.
        heads: KV heads of this process.
        dim: head dim.
        rotary_dim: R, dimensions of a head that are rotated.
        converted: whether the model was converted; one trained from scratch has no gate bias and no tables.
    """

    weight: Tensor
    bias: Tensor | None
    sink_key: Tensor
    sink_value: Tensor
    slot_cos: Tensor
    slot_sin: Tensor

    def __init__(self, config: Any, heads: int, dim: int, rotary_dim: int, converted: bool):
        super().__init__()
        self.heads = heads
        processes = get_current_vllm_config().parallel_config.tensor_parallel_size
        # With fewer heads than processes, several processes hold the same head.
        self.first_head = get_tensor_model_parallel_rank() * config.num_key_value_heads // processes
        gates, sinks, tables = heads * config.num_slots, (heads, config.num_sinks, dim), (1, 1, rotary_dim)
        shapes = {"weight": (gates, config.hidden_size), "sink_key": sinks, "sink_value": sinks}
        if converted:
            shapes |= {"bias": (gates,), "slot_cos": tables, "slot_sin": tables}
        else:
            self.bias = None
            self.register_buffer("slot_cos", torch.ones(tables), persistent=False)
            self.register_buffer("slot_sin", torch.zeros(tables), persistent=False)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))

    def load(self, name: str, whole: Tensor) -> None:
        """Copy this process's heads of a saved tensor. Raises ValueError for one of another shape."""
        parameter, part = getattr(self, name), whole
        if not name.startswith("slot_"):
            rows = parameter.shape[0] // self.heads
            part = whole[self.first_head * rows : (self.first_head + self.heads) * rows]
        if part.shape != parameter.shape:
            raise ValueError(f"expected {name} of {list(parameter.shape)} in one process, got {list(whole.shape)}")
        parameter.data.copy_(part)

    def forward(self, hidden: Tensor) -> Tensor:
        """Gate logits [T, H * M] of hidden states [T, hidden]."""
        return F.linear(hidden, self.weight, self.bias)


class NHAMixer(nn.Module, MambaBase):
    """Slots and window of one layer in vLLM; takes the place of the `Attention` that the family built.

    Args:
        attention: that layer, whose head counts, scale and name this one takes over.
        config: the hybrid's configuration.
        window: tokens in the layer's window.
        rotary: the layer's rotary embedding.
        weights: its gate and sink.
        converted: whether the model was converted, not trained from scratch.
    """

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, attention: Any, config: Any, window: int, rotary: Any, weights: SlotWeights, converted: bool):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_size,
        )
        self.scale, self.softcap = attention.impl.scale, getattr(config, "attn_logit_softcapping", None)
        self.layer_name, self.window, self.num_slots = attention.layer_name, window, config.num_slots
        self.slots_active = bool(config.slots_from_start)
        self.masks_first_token = converted and config.num_sinks > 0
        self.sink = (weights.sink_key, weights.sink_value) if config.num_sinks else None
        self.rotary, self.weights = [rotary], [weights]  # in lists: they are registered where the family has them
        vllm_config = get_current_vllm_config()
        self.dtype = vllm_config.model_config.dtype
        self.kv_cache = (torch.tensor([]),)
        vllm_config.compilation_config.static_forward_context[self.layer_name] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.num_kv_heads, self.head_dim, self.num_slots, self.window)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return state_dtypes(self.dtype)

    def get_attn_backend(self) -> type[NHABackend]:
        return NHABackend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, logits: Tensor, positions: Tensor | None) -> Tensor:
        """Read slots and window for a batch of any sequences, [T, HQ * D].

        Args:
            query: [T, HQ * D], as the family rotates it; key and value [T, H * D] likewise.
            logits: of the gate, [T, H * M].
            positions: of the tokens, int64 [T]; None in layers that do not rotate.
        """
        out = query.new_empty(query.shape[0], self.num_heads * self.head_dim)
        torch.ops.vllm.nha_mixer(query, key, value, logits, positions, out, self.layer_name)
        return out

    def read(
        self, query: Tensor, key: Tensor, value: Tensor, logits: Tensor, positions: Tensor | None, out: Tensor
    ) -> None:
        """Write the output of all sequences of this step to `out`, and their states to their blocks."""
        described = get_forward_context().attn_metadata
        if described is None:  # vLLM measures memory
            out.zero_()
            return
        metadata: NHAMetadata = described[self.layer_name]  # type: ignore[index]
        count = metadata.num_tokens
        q, k, v = (x[:count].reshape(1, count, -1, self.head_dim) for x in (query, key, value))
        gate = log_gate(logits[None, :count], self.num_kv_heads)
        slot_query, slot_key = q, k
        if positions is not None:
            rotary, weights = self.rotary[0], self.weights[0]
            cos, sin = (x.repeat(1, 2)[None] for x in rotary.cos_sin_cache[positions[:count]].float().chunk(2, -1))
            distance = (weights.slot_cos.float(), weights.slot_sin.float())
            interleaved = not rotary.is_neox_style
            slot_query, slot_key = unrotate_for_slots(q, k, (cos, sin), distance, interleaved=interleaved)
        segment = [x[0] for x in (q, k, v, gate, slot_query, slot_key)]
        for part in metadata.parts:
            out[part.tokens] = self.read_part(part, [x[part.tokens] for x in segment])

    def read_part(self, part: Part, segment: list[Tensor]) -> Tensor:
        """Output [T, HQ * D] of sequences that are read together; `segment` holds their tokens [T, heads, dim]."""
        state = self.load_state(part)
        packed = part.cu_seqlens is not None
        q, k, v, gate, slot_query, slot_key = (x[None] if packed else x[:, None] for x in segment)
        if self.masks_first_token:
            gate = mask_first_token_write(gate, None, part.cu_seqlens, state)
        result = nha_attention(
            q,
            k,
            v,
            gate,
            window_size=self.window,
            q_slot=slot_query,
            k_slot=slot_key,
            sink=self.sink,
            scale=self.scale,
            softcap=self.softcap,
            state=state,
            return_state=True,
            cu_seqlens=part.cu_seqlens,
        )
        assert result.state is not None
        self.store_state(part, result.state)
        return result.out.flatten(2).flatten(0, 1)

    def load_state(self, part: Part) -> NHAState:
        """The states of sequences before this step. Blocks come as others left them, so a new sequence gets zeros."""
        fresh = (part.num_tokens == 0)[:, None, None, None]
        state = {name: x[part.source].masked_fill_(fresh, 0) for name, x in zip(STATES, self.kv_cache, strict=True)}
        for name in STATES[2:]:
            state[name] = state[name][:, : self.window]
        return NHAState(window_size=self.window, num_tokens=part.num_tokens, slots_active=self.slots_active, **state)

    def store_state(self, part: Part, state: NHAState) -> None:
        """Write the states of sequences after this step into their blocks."""
        state = state.padded()
        for name, x in zip(STATES, self.kv_cache, strict=True):
            if self.window or name in STATES[:2]:
                x[part.target] = getattr(state, name).to(x.dtype)


def nha_mixer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    positions: Tensor | None,
    out: Tensor,
    layer_name: str,
) -> None:
    """Read a layer by its name: compiled code sees only that `out` is written."""
    get_forward_context().no_compile_layers[layer_name].read(query, key, value, logits, positions, out)


def nha_mixer_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits: Tensor,
    positions: Tensor | None,
    out: Tensor,
    layer_name: str,
) -> None:
    return


direct_register_custom_op(op_name=OPERATOR, op_func=nha_mixer, mutates_args=["out"], fake_impl=nha_mixer_fake)
