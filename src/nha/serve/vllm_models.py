"""vLLM's own model of every family with hybrid layers in the place of its attention.

No family's code is copied: the model is built as vLLM builds it, then each hybrid layer's attention module gets a
subclass that hands over hidden states and positions, and a mixer where it had `Attention`. Classes are made when they
are asked for: `nha.serve.vllm_models.NHALlamaForCausalLM`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from nha.models.config import FULL
from nha.serve.experts import EXPERT_NAMES, split_experts
from nha.serve.layout import lay_out, nbytes
from nha.serve.plugin import SCRATCH, base_architecture
from nha.serve.rooms import max_places, plan_heads
from nha.serve.vllm_cpu import register_copies
from nha.serve.vllm_mixer import NHAMixer, SlotWeights
from nha.serve.vllm_scratch import LayerOptions, needs_options

SAVED = re.compile(
    r"layers\.(\d+)\.self_attn\.(?:nha\.)?(?:g_proj\.(weight|bias)|(sink_key|sink_value|slot_cos|slot_sin))"
)


LAYER_OPTIONS = "layer_options"  # of an attention module


class FamilySelf:
    """Stands in for an attention module while its family's code runs: everything is the module's, but `attn` and
    `rotary_emb` also hand over what slots need, and apply the options of a model trained from scratch. An object of one
    call, so that torch.compile sees no side effect."""

    def __init__(self, module: Any, hidden: Tensor):
        self.module, self.hidden, self.options = module, hidden, module.layer_options
        self.logits = None if module.nha is None else module.nha(hidden)
        self.positions: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def rotary_emb(self, positions: Tensor, query: Tensor, key: Tensor) -> Any:
        """Rotate as the family does; a layer that never calls this has no positions."""
        self.positions = positions
        if self.options is not None:
            query, key = self.options.normalize(query, key)
        return self.module.rotary_emb(positions, query, key)

    def attn(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Read slots and window, or all keys in a layer without slots."""
        value = value if self.options is None else self.options.activate(value)
        slots = () if self.logits is None else (self.logits, self.positions)
        out = self.module.attn(query, key, value, *slots)
        return out if self.options is None else self.options.finish(out, self.hidden)


@cache
def hybrid_attention_class(family: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a family's attention class that hands over what slots need."""

    def forward(self: Any, positions: Tensor, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        stand_in = FamilySelf(self, hidden_states)
        return family.forward(stand_in, positions, hidden_states, *args, **kwargs)  # type: ignore[arg-type]

    return type(f"NHA{family.__name__}", (family,), {"forward": forward, "__module__": __name__})


def check_rotary(rotary: Any) -> None:
    """Raise ValueError for rotary positions that slots cannot take back."""
    has_table = hasattr(rotary, "cos_sin_cache") and hasattr(rotary, "is_neox_style")
    if not has_table or isinstance(rotary, MRotaryEmbedding):
        raise ValueError(f"expected rotary positions with one table of angles, got {type(rotary).__name__}")


def install(model: nn.Module, config: Any) -> None:
    """Put a mixer into every attention module of a model that has heads whose window is not -1."""
    converted = config.model_type != "nha"
    found: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "attn", None), Attention)]
    windows, heads = config.window_sizes, config.num_key_value_heads
    if len(found) != len(windows):
        raise ValueError(f"expected {len(windows)} attention layers in {type(model).__name__}, got {len(found)}")
    rank, processes = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    for module in found:
        layer, old, rotary = extract_layer_index(module.attn.layer_name), module.attn, module.rotary_emb
        module.nha = module.layer_options = None
        if needs_options(config):
            module.layer_options = LayerOptions(config, old.num_heads, old.head_size)
        if windows[layer] != FULL:
            check_rotary(rotary)
            plan = plan_heads(windows, layer, heads, rank, processes)
            module.nha = SlotWeights(config, old.num_kv_heads, old.head_size, rotary.rotary_dim, converted)
            module.attn = NHAMixer(old, config, plan, rotary, module.nha, converted)
        if module.layer_options is not None or module.nha is not None:
            module.__class__ = hybrid_attention_class(type(module))


class HybridModelMixin:
    """Turns vLLM's model class of a family into that of its hybrids."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        install(self, vllm_config.model_config.hf_config)  # type: ignore[arg-type]
        if current_platform.is_cpu():
            register_copies()

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Bytes of a layer's states, the same for all, to which vLLM fits its blocks."""
        model, config = vllm_config.model_config, vllm_config.model_config.hf_config
        processes = vllm_config.parallel_config.tensor_parallel_size
        places = max_places(config.window_sizes, config.num_key_value_heads, processes)
        heads = model.get_num_kv_heads(vllm_config.parallel_config)
        sizes = heads, model.get_head_size(), config.num_slots, places
        return ((nbytes(lay_out(*sizes, model.dtype, config.state_dtype)),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How prefix caching copies states: whole."""
        return (get_temporal_copy_spec,)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load gates and sinks, and let the family load all else. Raises ValueError where some are missing."""
        modules = {name: module for name, module in self.named_modules() if isinstance(module, SlotWeights)}  # type: ignore[attr-defined]
        by_layer = {extract_layer_index(name): (name, module) for name, module in modules.items()}
        options = {name: x for name, x in self.named_parameters() if f".{LAYER_OPTIONS}." in name}  # type: ignore[attr-defined]
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                match, option = SAVED.search(name), name.replace(".self_attn.", f".self_attn.{LAYER_OPTIONS}.")
                if option in options:
                    options[option].data.copy_(tensor)
                    loaded.add(option)
                elif match is None:
                    yield name, tensor
                elif int(match[1]) in by_layer:  # layers with full attention need no slots
                    prefix, module = by_layer[int(match[1])]
                    parameter = match[2] or match[3]
                    module.load(parameter, tensor)
                    loaded.add(f"{prefix}.{parameter}")

        names = EXPERT_NAMES.get(self.config.model_type.removeprefix("nha-"))  # type: ignore[attr-defined]
        rest = others() if names is None else split_experts(others(), names)
        loaded |= super().load_weights(rest)  # type: ignore[misc]
        wanted = {f"{prefix}.{name}" for prefix, module in modules.items() for name, _ in module.named_parameters()}
        wanted |= options.keys()
        if wanted - loaded:
            raise ValueError(f"expected saved weights for {sorted(wanted - loaded)[0]}, got none")
        return loaded


@cache
def hybrid_class(architecture: str) -> type[nn.Module]:
    """The class of a hybrid by its name in `config.architectures`."""
    base = ModelRegistry.models[base_architecture(architecture)].load_model_cls()
    # Protocols last: the first of them would end the chain of __init__.
    bases = (HybridModelMixin, base, HasInnerState, IsHybrid, SupportsMambaPrefixCaching)
    return type(architecture, bases, {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    if name == SCRATCH or (name.startswith("NHA") and name.endswith("ForCausalLM")):
        return hybrid_class(name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
