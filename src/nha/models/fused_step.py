"""Decoder layers in fewer launches, where no gradient is needed on a GPU.

A token of a model of 8B parameters waits for its weights half of the time, and for some fifty small kernels a layer in
the other half; a short prompt waits for the host that launches them. For one token of one sequence in a static cache,
layers that compute as Llama's do, whatever their family calls them, are four launches and attention here; in prompts
and batches one kernel stands between two matrix products. All other layers keep their family's code, and so do
sequences that the windows hold, in which a hybrid has the bits of its original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.models.llama import modeling_llama as llama

from nha.models.attention import LayerInputs, check_implementation, hybrid_attention, layer_cache
from nha.models.cache import NHACacheLayer, is_empty
from nha.models.config import FULL, smallest_window
from nha.models.linear import can_replace, forget_head, replace_linears
from nha.models.masks import HybridMask, cache_argument
from nha.models.rotary import RotaryStyle
from nha.models.same_code import ATTENTIONS, computes_as
from nha.models.segment import Reading, Segment
from nha.models.slots import SlotInputs
from nha.ops import RingState
from nha.ops.backends import HAS_TRITON, resolve_impl

if TYPE_CHECKING:
    from nha.ops.triton.token import Norm

CAPTURING = "transformers.utils.output_capturing"
KNOWN, REPLACED = "_nha_fused", "_nha_replaced"  # of a layer and of a decoder, beside their parameters
_fusing: ContextVar[bool] = ContextVar("fusing", default=True)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


def is_watched(module: nn.Module) -> bool:
    """Whether hooks run when a module is called, other than those with which transformers collects outputs."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks)


def is_fused(layer: Any) -> bool:
    """Whether `fused_forward` computes a layer: nothing in it is replaced or watched, and it has one dtype."""
    if any("forward" in vars(module) or (module is not layer and is_watched(module)) for module in layer.modules()):
        return False
    if len({x.dtype for x in layer.parameters()}) != 1:
        return False
    return has_plain_mlp(layer) and has_plain_attention(layer.self_attn)


def parts(layer: Any) -> tuple[Any, ...]:
    """The modules of a layer that `is_fused` looks at."""
    module, mlp = layer.self_attn, layer.mlp
    linears = (module.q_proj, module.k_proj, module.v_proj, module.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return layer, module, mlp, mlp.act_fn, *norms, module.nha, module.nha.g_proj, *linears


def is_fused_now(layer: Any) -> bool:
    """`is_fused`, looked up where nothing has changed since the last call: it takes longer than a layer's launches."""
    try:
        found, module = parts(layer), layer.self_attn
    except AttributeError:
        return False
    own = (module.window_size, module.ablation, module.slot_write, module.config.slots_from_start)
    own += (module.nha.initial is None, module.q_proj.weight.dtype)
    key = (
        own,
        *((type(x), id(x), "forward" in vars(x), len(x._forward_hooks), len(x._forward_pre_hooks)) for x in found),
    )
    known = vars(layer).get(KNOWN)
    if known is None or known[0] != key:
        known = vars(layer)[KNOWN] = key, is_fused(layer)
    return known[1]


def replace_forward(stack: Any) -> list[Any]:
    """Let `fused_forward` compute the layers of a decoder that it can compute; returns them."""
    layers = [layer for layer in stack.layers if is_fused_now(layer)]
    for layer in layers:
        vars(layer)["forward"] = partial(fused_forward, layer)
    return layers


def restore_forward(layers: list[Any]) -> None:
    """Let the family's code compute layers again."""
    for layer in layers:
        vars(layer).pop("forward", None)


@contextmanager
def fusing(enabled: bool) -> Iterator[None]:
    """Within the block, and in this thread, compute layers in few launches, the default, or by the family's code."""
    token = _fusing.set(enabled)
    try:
        yield
    finally:
        _fusing.reset(token)


def is_fusing() -> bool:
    """Whether layers are computed in few launches where they can be."""
    return _fusing.get()


def has_bits_of_original(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a decoder's forward pass begin sequences that every window holds.

    There a hybrid has the bits of its original, which the family's code alone computes; so has a model in which every
    layer is full.
    """
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    if given is None:
        return True
    window, length = smallest_window(stack.config.window_sizes), given.shape[1]
    return length > 1 if window == FULL else length <= window and is_empty(cache_argument(kwargs))


def before_layers(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass of a decoder without gradients: let its layers take fewer launches on a GPU.

    On a CPU the faster library multiplies (`nha.models.linear`).
    """
    if torch.compiler.is_compiling():
        return
    forget_head(stack)
    if torch.is_grad_enabled() or stack.training or not _fusing.get():
        return
    replace = replacement(stack)
    if replace is not None and not kwargs.get("output_attentions") and not has_bits_of_original(stack, args, kwargs):
        vars(stack)[REPLACED] = replace(stack)


def replacement(stack: Any) -> Callable[[Any], list[Any]] | None:
    """The function that replaces parts of a decoder for its next forward pass without gradients; None if none does."""
    device = stack.norm.weight.device if HAS_TRITON and hasattr(stack, "norm") else None
    if device is not None and resolve_impl("auto", device) == "triton":
        return None if torch.is_autocast_enabled(device.type) else replace_forward
    return replace_linears if can_replace(stack) else None


def after_layers(stack: Any, *_: Any) -> None:
    """After a forward pass, and after one that failed: undo `before_layers`."""
    if not torch.compiler.is_compiling():
        restore_forward(vars(stack).pop(REPLACED, []))


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
    layer: Any, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None, **kwargs: Any
) -> Tensor:
    """The forward pass of a decoder layer that is `is_fused`.

    What needs gradients or is observed, such as a call of another thread, is computed by the family's code.
    """
    module = layer.self_attn
    named = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
    watched = module.observer is not None or module.mass_observer is not None
    if torch.is_grad_enabled() or watched or hidden_states.dtype != module.q_proj.weight.dtype:
        return type(layer).forward(layer, hidden_states, **named, **kwargs)
    if follows_others(module, hidden_states, attention_mask, cache_argument(kwargs)):
        return fused_token(layer, hidden_states, **named, cache=cache_argument(kwargs))
    return fused_segment(layer, hidden_states, **named, **kwargs)


def norms_of(layer: Any) -> list[Norm]:
    """The norms before attention and MLP."""
    from nha.ops.triton.token import Norm

    return [Norm(x.weight, x.variance_epsilon) for x in (layer.input_layernorm, layer.post_attention_layernorm)]


def sink_of(slots: Any) -> tuple[Tensor, Tensor] | None:
    """The sink of a layer's slots, if it has one."""
    return (slots.sink_key, slots.sink_value) if slots.sink_key.shape[1] else None


def fused_segment(
    layer: Any, hidden_states: Tensor, *, attention_mask: Any, position_embeddings: Any, **kwargs: Any
) -> Tensor:
    """The forward pass of a decoder layer for any segment [B, T, hidden]: PyTorch's products, one kernel in between."""
    from nha.ops.triton.pointwise import add_norm, attention_inputs, silu_product

    module, mlp, slots, cache = layer.self_attn, layer.mlp, layer.self_attn.nha, cache_argument(kwargs)
    if module.layer_idx == 0:
        check_implementation(module.config)
    own = layer_cache(module, cache, hidden_states.shape[0])
    kwargs = {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values")}
    if not computes_as(module.family, llama.LlamaAttention):
        kwargs["sliding_window"] = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    before, after = norms_of(layer)
    hidden_states, x = add_norm(hidden_states, *before)
    q, k, v = (
        linear(x).unflatten(-1, (-1, module.head_dim)) for linear in (module.q_proj, module.k_proj, module.v_proj)
    )
    is_full = module.window_size == FULL
    logits = None if is_full else slots.g_proj(x).unflatten(-1, (-1, slots.num_slots))
    tables = slots.slot_cos, slots.slot_sin
    q, k, gate, q_slot, k_slot = attention_inputs(q, k, logits, position_embeddings, tables)
    given = LayerInputs(x, position_embeddings, own)
    if gate is not None:
        prepared = SlotInputs(gate, sink_of(slots), tables)
        given = LayerInputs(x, position_embeddings, own, prepared, q_slot, k_slot)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    if is_full and cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    out = hybrid_attention(module, q, k, v, attention_mask, scaling=module.scaling, nha=given, **kwargs)[0]
    out = module.o_proj(out.reshape(*x.shape[:2], -1))
    hidden_states, x = add_norm(out, *after, hidden_states)
    return hidden_states + mlp.down_proj(silu_product(mlp.gate_proj(x), mlp.up_proj(x)))


def fused_token(
    layer: Any, hidden_states: Tensor, *, attention_mask: Any, position_embeddings: Any, cache: Any
) -> Tensor:
    """The forward pass of a decoder layer for a token [1, 1, hidden] that follows others in a static cache."""
    from nha.ops.triton.token import token_inputs, token_linear, token_mlp

    module, mlp, slots = layer.self_attn, layer.mlp, layer.self_attn.nha
    before, after = norms_of(layer)
    is_full, sink = module.window_size == FULL, sink_of(slots)
    memory = None if is_full else cache.layers[module.layer_idx]
    q, k, v, gate = ((x.weight, x.bias) for x in (module.q_proj, module.k_proj, module.v_proj, slots.g_proj))
    inputs = token_inputs(
        hidden_states,
        before,
        (q, k, v),
        None if is_full else gate,
        position_embeddings,
        (slots.slot_cos, slots.slot_sin),
        head_dim=module.head_dim,
        num_slots=slots.num_slots,
        num_tokens=None if memory is None or sink is None else memory.state.num_tokens,
    )
    if memory is None:
        q, k, v = (x.transpose(1, 2) for x in inputs[:3])
        k, v = cache.update(k, v, module.layer_idx)
        given = LayerInputs(hidden_states, None, None)
        out = hybrid_attention(module, q, k, v, attention_mask, scaling=module.scaling, nha=given)[0]
    else:
        q, k, v, gate, q_slot, k_slot = inputs
        assert gate is not None
        reading = Reading(module.window_size, scale=module.scaling, sink=sink)
        out = memory.attend(Segment(q, k, v, gate, q_slot, k_slot, None, None), reading)
    hidden_states = token_linear(out.reshape(1, 1, -1), module.o_proj.weight, hidden_states)
    inner = token_mlp(hidden_states, after, mlp.gate_proj.weight, mlp.up_proj.weight)
    return token_linear(inner, mlp.down_proj.weight, hidden_states)
