"""The decoder layers of one token of one sequence as a few launches each, for a step that is recorded.

A token of a model of 8B parameters waits for its weights half the time and for some fifty small kernels a layer in the
other half. Layers that compute as Llama's do, whatever the family calls them, are four launches and attention here;
all others keep the family's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as memoize
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from nha.models.attention import LayerInputs, hybrid_attention
from nha.models.cache import NHACacheLayer
from nha.models.config import FULL
from nha.models.masks import HybridMask, cache_argument
from nha.models.rotary import RotaryStyle
from nha.models.segment import Reading, Segment
from nha.models.windows import decoder
from nha.ops import RingState
from nha.ops.backends import HAS_TRITON, resolve_impl

if TYPE_CHECKING:
    from nha.ops.triton.token import Tiles

ATTENTIONS = (llama.LlamaAttention, Qwen2Attention, MistralAttention)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def code_of(function: Callable) -> tuple:
    """The instructions of a function and the names that they use."""
    code = inspect.unwrap(function).__code__
    return code.co_code, code.co_names, code.co_varnames


@memoize
def computes_as(kind: type, *known: type) -> bool:
    """Whether a class has the forward pass of one that is known: families copy each other's code.

    >>> computes_as(Qwen2Attention, *ATTENTIONS), computes_as(Qwen2Attention, llama.LlamaMLP)
    (True, False)
    """
    return any(code_of(kind.forward) == code_of(one.forward) for one in known)  # pyright: ignore


def is_linear(module: Any, bias: bool = False) -> bool:
    """Whether a module is PyTorch's linear layer, with weights that the kernels read, and no bias unless allowed."""
    from nha.ops.triton.token import ROWS

    if type(module) is not nn.Linear or module.out_features % ROWS:
        return False
    weight = module.weight
    if type(weight) is not Parameter or not weight.is_contiguous() or weight.dtype not in DTYPES:
        return False
    return bias or module.bias is None


def has_plain_mlp(layer: Any) -> bool:
    """Whether norms and MLP of a layer are Llama's, with SiLU."""
    if not computes_as(type(layer), llama.LlamaDecoderLayer) or not computes_as(type(layer.mlp), llama.LlamaMLP):
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if not all(computes_as(type(norm), llama.LlamaRMSNorm) for norm in norms):
        return False
    silu = isinstance(layer.mlp.act_fn, nn.SiLU) or type(layer.mlp.act_fn).__name__ == "SiLUActivation"
    return silu and all(is_linear(x) for x in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj))


def has_plain_attention(module: Any) -> bool:
    """Whether a hybrid attention module projects and rotates as Llama's does, with one window for all heads."""
    from nha.ops.triton.token import ROWS

    family = getattr(module, "family", None)
    if family is None or not computes_as(family, *ATTENTIONS) or not module.rotates:
        return False
    if not isinstance(module.window_size, int) or module.ablation or module.slot_write != "soft":
        return False
    if module.config.slots_from_start:
        return False
    whole_heads = module.nha.slot_cos.shape[-1] == module.head_dim and module.head_dim % ROWS == 0
    if module.rotary_style != RotaryStyle() or module.nha.initial is not None or not whole_heads:
        return False
    linears = (module.q_proj, module.k_proj, module.v_proj, module.nha.g_proj)
    return all(is_linear(x, bias=True) for x in linears) and is_linear(module.o_proj)


def is_fused(layer: Any) -> bool:
    """Whether `fused_forward` computes a layer: nothing in it is replaced, and it has one dtype."""
    if any("forward" in vars(module) for module in layer.modules()):
        return False
    if len({x.dtype for x in layer.parameters()}) != 1:
        return False
    return has_plain_mlp(layer) and has_plain_attention(layer.self_attn)


def can_fuse(model: Any) -> bool:
    """Whether kernels can compute layers where a model is."""
    return HAS_TRITON and resolve_impl("auto", model.device) == "triton"


@contextmanager
def fused(model: Any, tiles: Tiles | None = None) -> Iterator[int]:
    """Within the block, layers of a model that `fused_forward` computes are computed by it; gives their number."""
    from nha.ops.triton import token

    layers = [layer for layer in decoder(model).layers if is_fused(layer)]
    for layer in layers:
        layer.forward = partial(fused_forward, layer, tiles or token.TILES)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


def follows_others(module: Any, hidden: Tensor, mask: Any, cache: Any) -> bool:
    """Whether hidden states [B, T, hidden] are of one token that follows others in a static cache, without padding."""
    if hidden.shape[:2] != (1, 1) or cache is None or not (mask is None or isinstance(mask, HybridMask)):
        return False
    if mask is not None and mask.padding is not None:
        return False
    if module.window_size == FULL:
        return True
    layer = cache.layers[module.layer_idx]
    return isinstance(layer, NHACacheLayer) and layer.is_compileable and isinstance(layer.state, RingState)


def fused_forward(
    layer: Any,
    tiles: Tiles,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The forward pass of a decoder layer for a token [1, 1, hidden] that follows others in a static cache.

    Anything else, such as the prompt of another thread, is computed by the family's code.
    """
    from nha.ops.triton.token import Norm, token_inputs, token_linear, token_mlp

    module, mlp, cache = layer.self_attn, layer.mlp, cache_argument(kwargs)
    if not follows_others(module, hidden_states, attention_mask, cache):
        named = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        return type(layer).forward(layer, hidden_states, **named, **kwargs)
    slots = module.nha
    norms = [Norm(x.weight, x.variance_epsilon) for x in (layer.input_layernorm, layer.post_attention_layernorm)]
    is_full = module.window_size == FULL
    linears = [(x.weight, x.bias) for x in (module.q_proj, module.k_proj, module.v_proj, slots.g_proj)]
    inputs = token_inputs(
        hidden_states,
        norms[0],
        *linears[:3],
        None if is_full else linears[3],
        position_embeddings,
        (slots.slot_cos, slots.slot_sin),
        head_dim=module.head_dim,
        num_slots=slots.num_slots,
        tiles=tiles,
    )
    if is_full:
        q, k, v = (x.transpose(1, 2) for x in inputs[:3])
        k, v = cache.update(k, v, module.layer_idx)
        given = LayerInputs(hidden_states, None, None)
        out = hybrid_attention(module, q, k, v, attention_mask, scaling=module.scaling, nha=given)[0]
    else:
        q, k, v, gate, q_slot, k_slot = inputs
        assert gate is not None
        sink = (slots.sink_key, slots.sink_value) if slots.sink_key.shape[1] else None
        reading = Reading(module.window_size, scale=module.scaling, sink=sink)
        out = cache.layers[module.layer_idx].attend(Segment(q, k, v, gate, q_slot, k_slot, None, None), reading)
    hidden_states = token_linear(out.reshape(1, 1, -1), module.o_proj.weight, tiles, hidden_states)
    inner = token_mlp(hidden_states, norms[1], mlp.gate_proj.weight, mlp.up_proj.weight, tiles)
    return token_linear(inner, mlp.down_proj.weight, tiles, hidden_states)
