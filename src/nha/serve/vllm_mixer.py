"""Slots and window of a layer in vLLM, in the place of attention: a state of constant size for every sequence."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from nha.layer import log_gate
from nha.models.nha import FEATURES
from nha.models.segment import mask_first_token_write
from nha.ops import NHAState, nha_attention
from nha.ops.heads import take_heads
from nha.ops.packed_state import PackedState
from nha.ops.rotary import unrotate_for_slots
from nha.serve.layout import lay_out, nbytes
from nha.serve.parts import NHAMetadata, Part
from nha.serve.plugin import OPERATOR
from nha.serve.rooms import HeadPlan, Room, own_heads
from nha.serve.vllm_metadata import NHABackend
from nha.serve.vllm_spec import NHASpec

MIXER = "_slots"  # ends the name of a mixer beside the attention of full heads


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
        rank, processes = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.first_head = own_heads(config.num_key_value_heads, rank, processes).start
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
    """Slots and windows of one layer in vLLM; takes the place of the `Attention` that the family built.

    Args:
        attention: that layer, whose head counts, scale and name this one takes over.
        config: the hybrid's configuration.
        heads: where the windows of this process's KV heads are.
        rotary: the layer's rotary embedding.
        weights: its gate and sink.
        converted: whether the model was converted, not trained from scratch.

    In a layer of which some heads are full, vLLM's own attention stays beside it and reads all heads: vLLM's pages have
    one size, and its prefix cache needs blocks of one length.
    """

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(
        self,
        attention: Any,
        config: Any,
        heads: HeadPlan,
        rotary: Any,
        weights: SlotWeights,
        converted: bool,
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_size,
        )
        self.scale, self.softcap = attention.impl.scale, getattr(config, "attn_logit_softcapping", None)
        self.layer_name, self.heads, self.num_slots = attention.layer_name, heads, config.num_slots
        self.slots_active = bool(config.slots_from_start)
        self.slot_features = FEATURES[getattr(config, "slot_features", "none")]
        self.masks_first_token = converted and config.num_sinks > 0
        self.sink = (weights.sink_key, weights.sink_value) if config.num_sinks else None
        self.rotary, self.weights = [rotary], [weights]  # in lists: they are registered where the family has them
        self.full = attention if heads.has_full else None
        if heads.has_full:
            self.layer_name += MIXER
        vllm_config = get_current_vllm_config()
        self.dtype, self.state_dtype = vllm_config.model_config.dtype, config.state_dtype
        sizes = self.num_kv_heads, self.head_dim, self.num_slots, heads.places
        self.pieces = lay_out(*sizes, self.dtype, self.state_dtype)
        self.kv_cache = (torch.tensor([]),)
        vllm_config.compilation_config.static_forward_context[self.layer_name] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((nbytes(self.pieces),),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    def get_kv_cache_spec(self, vllm_config: Any) -> NHASpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        return None if spec is None else NHASpec.of(spec)

    def get_attn_backend(self) -> type[NHABackend]:
        return NHABackend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, logits: Tensor, positions: Tensor | None) -> Tensor:
        """Read slots and windows for a batch of any sequences, [T, HQ * D].

        Args:
            query: [T, HQ * D], as the family rotates it; key and value [T, H * D] likewise.
            logits: of the gate, [T, H * M].
            positions: of the tokens, int64 [T]; None in layers that do not rotate.
        """
        out = query.new_empty(query.shape[0], self.num_heads * self.head_dim)
        torch.ops.vllm.nha_mixer(query, key, value, logits, positions, out, self.layer_name)
        return out if self.full is None else self.add_full(out, self.full(query, key, value))

    def add_full(self, out: Tensor, whole: Tensor) -> Tensor:
        """The output [T, HQ * D] with that of the full heads from `whole`, as vLLM's own attention reads all heads."""
        slots, full = (x.chunk(self.num_kv_heads, 1) for x in (out, whole))
        return torch.cat([(full if head in self.heads.full else slots)[head] for head in range(len(full))], 1)

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
        slot_query, slot_key = self.slot_features(slot_query), self.slot_features(slot_key)
        whole = [x[0] for x in (q, k, v, gate, slot_query, slot_key)]
        by_head = out[:count].view(count, self.num_kv_heads, -1)
        for room in self.heads.rooms:
            segment = [take_heads(x, room.group.heads, 1, self.num_kv_heads) for x in whole]
            for part in metadata.parts:
                found = self.read_part(room, part, [x[part.tokens] for x in segment])
                if len(room.group.heads) == self.num_kv_heads:
                    out[part.tokens] = found
                    continue
                for head, own in zip(room.group.heads, found.chunk(len(room.group.heads), 1), strict=True):
                    by_head[part.tokens, head] = own

    def read_part(self, room: Room, part: Part, segment: list[Tensor]) -> Tensor:
        """Read sequences together for heads of one window.

        Args:
            room: the heads, and where their states are.
            part: the sequences.
            segment: their tokens in these heads, [T, heads, dim] each.

        Returns:
            The output of the query heads that read these, [T, query heads * D].
        """
        state = self.load_state(room, part)
        packed = part.cu_seqlens is not None
        q, k, v, gate, slot_query, slot_key = (x[None] if packed else x[:, None] for x in segment)
        if self.masks_first_token:
            gate = mask_first_token_write(gate, None, part.cu_seqlens, state)
        sink = self.sink
        if sink is not None:
            sink_key, sink_value = (take_heads(x, room.group.heads, 0, self.num_kv_heads) for x in sink)
            sink = sink_key, sink_value
        result = nha_attention(
            q,
            k,
            v,
            gate,
            window_size=room.group.window_size,
            q_slot=slot_query,
            k_slot=slot_key,
            sink=sink,
            scale=self.scale,
            softcap=self.softcap,
            state=state,
            return_state=True,
            cu_seqlens=part.cu_seqlens,
        )
        assert result.state is not None
        self.store_state(room, part, result.state)
        return result.out.flatten(2).flatten(0, 1)

    def load_state(self, room: Room, part: Part) -> NHAState:
        """The states of sequences before this step. Blocks come as others left them, so a new sequence gets zeros."""
        fresh, heads = (part.num_tokens == 0)[:, None, None, None], len(room.group.heads)
        found: dict[str, Any] = {"window_size": room.group.window_size, "num_tokens": part.num_tokens}
        for piece in self.pieces:
            x = piece.view(self.kv_cache[0])[part.source, room.slots if piece.is_slot else room.places]
            x = x if piece.is_slot else x.unflatten(1, (room.group.window_size, heads))
            found[piece.name] = x.masked_fill_(fresh, 0)
        found["slots_active"] = self.slots_active
        if self.state_dtype == "float32":
            return NHAState(**found)
        formats = {"state_dtype": self.state_dtype, "dtype": self.dtype, "gate_dtype": torch.float32}
        return PackedState(**found, **formats).unpack()

    def store_state(self, room: Room, part: Part, state: NHAState) -> None:
        """Write the states of sequences after this step into their blocks."""
        state = state.padded()
        if self.state_dtype != "float32":
            state = PackedState.of(state, self.state_dtype)
        for piece in self.pieces:
            x, new = piece.view(self.kv_cache[0]), getattr(state, piece.name).to(piece.dtype)
            if piece.is_slot:
                x[part.target, room.slots] = new
            elif room.group.window_size:
                x[part.target, room.places] = new.flatten(1, 2)


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
