"""One adapter for every family: attention modules keep their own code and gain slots, a sink and a window.

A family's attention projects, normalises and rotates as it always did and then calls the attention function that
its configuration names. Here that function is "nha". Each attention module's class is swapped for a subclass that
hands over what slots need as well: the hidden states (for the gate), the rotary tables and the cache layer.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from functools import cache as memoize
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from nha.models.attention import LayerInputs, cache_windows, check_implementation, layer_cache
from nha.models.cache import allow_rollback, prepare_cache
from nha.models.call import check_call
from nha.models.checkpoint import CheckpointMixin, in_memory_name, public_name
from nha.models.config import (
    check_sizes,
    check_windows,
    config_class_of,
    hybrid_config_class,
    hybrid_multimodal_config_class,
)
from nha.models.decode_graph import UNPADDED, end_steps, graph_of, plan
from nha.models.families import FAMILIES, MODEL_NAMES, MULTIMODAL, check_family, rotates
from nha.models.fused_step import after_layers, before_layers
from nha.models.generate_batch import generate_in_batches
from nha.models.head import watch_head
from nha.models.masks import NAME, cache_argument, mark_packing
from nha.models.next_token import token_attention
from nha.models.prompt import in_pieces
from nha.models.prompt_graph import record_lengths, replay_prompt
from nha.models.rotary import rotary_style
from nha.models.slots import SlotParameters
from nha.models.windows import attention_layers, decoder, follow_config, freeze_unused, set_module_window
from nha.ops.heads import Window
from nha.ops.state import MAX_ROLLBACK


class HybridGenerationMixin:
    """Gives `generate` a cache of NHA layers, and a mask that is padding."""

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        parent: Any = super()
        given = cache_argument(model_kwargs)
        made = parent._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = cache_argument(model_kwargs)
        if isinstance(cache, Cache):
            config = decoder(self).config
            windows = cache_windows(attention_layers(self)[0])
            prepare_cache(cache, windows, config.state_dtype, config.kv_cache_dtype)
            if generation_config.is_assistant:
                cache.activate_past_recording()
                raise_rollback(cache, generation_config.max_new_tokens)
            plan(
                self,
                generation_config,
                model_kwargs,
                generation_mode,
                batch_size,
                max_cache_length,
                before_decoder,
                handed_in=given is not None,
            )
        return made

    def _prefill(
        self: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Read the prompts of `generate`: short ones as CUDA graphs, long ones in pieces."""
        parent, given = super(), (input_ids, generation_config, model_kwargs)
        found = replay_prompt(self, *given, before_decoder)
        if found is not None:
            return found
        with in_pieces(self, *given):
            return parent._prefill(*given, *args, **kwargs)  # type: ignore[misc]

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample; behind the tokens of the first prompts of a model the lengths of later ones are recorded."""
        parent: Any = super()
        try:
            found = parent._sample(*args, **kwargs)
        finally:
            end_steps(kwargs)
        record_lengths(self)
        return found

    def prepare_inputs_for_generation(
        self: Any, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The inputs of a step; assisted decoding from a filled cache would read the whole prompt again.

        `inputs_embeds` has a name of its own since `generate` takes embeddings only where this method names them.
        """
        cache = cache_argument(kwargs)
        if kwargs.get("is_first_iteration") and isinstance(cache, Cache) and inputs_embeds is None:
            past = cache.get_seq_length()
            unread = kwargs.get("next_sequence_length") is None and not args and isinstance(past, int)
            if unread and 0 < past < input_ids.shape[1]:
                kwargs["next_sequence_length"] = input_ids.shape[1] - past
        graph = graph_of(kwargs)
        if graph is not None and graph.steps and not graph.padded:
            kwargs["attention_mask"] = UNPADDED
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        parent: Any = super()
        return parent.prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' continuous batching, whose paged cache holds keys and values and no slots."""
        raise NotImplementedError(
            f"expected {type(self).__name__}.generate_batch, for left-padded batches, or vLLM with the plugin of nha, "
            "got continuous batching: its paged cache has no slots"
        )

    def generate_batch(
        self: Any,
        inputs: list[list[int]],
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Write after many prompts of token ids, in left-padded batches (`nha.models.generate_batch`).

        Of `continuous_batching_config` only `max_requests_per_batch` and `return_logprobs` count; progress, warming up
        and keeping a manager mean nothing here. Raises ValueError for `record_timestamps` and for unknown arguments,
        NotImplementedError for a paged cache.
        """
        if str(kwargs.get("cache_implementation")).startswith("paged"):
            self.init_continuous_batching()  # `generate` passes such a cache on to this method
        new = kwargs.pop("max_new_tokens", None)
        if kwargs or record_timestamps:
            got = sorted(kwargs) or "record_timestamps"
            raise ValueError(f"expected prompts, a generation config and max_new_tokens, got {got}")
        return generate_in_batches(
            self,
            inputs,
            self.generation_config if generation_config is None else generation_config,
            max_new_tokens=new,
            max_rows=getattr(continuous_batching_config, "max_requests_per_batch", None),
            return_logprobs=bool(getattr(continuous_batching_config, "return_logprobs", False)),
        )

    def _get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The source of drafts for assisted decoding; the cache takes back as many at no cost."""
        parent: Any = super()
        drafter = parent._get_candidate_generator(*args, **kwargs)
        cache = cache_argument(kwargs.get("model_kwargs", {}))
        if isinstance(cache, Cache):
            drafts = (getattr(drafter, name, None) for name in ("num_assistant_tokens", "num_output_tokens"))
            raise_rollback(cache, next((int(number) for number in drafts if number), None))
        return drafter

    def _valid_auto_compile_criteria(self: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        parent: Any = super()
        planned = graph_of(model_kwargs) is not None
        return planned or parent._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self: Any, compile_config: Any) -> Any:
        """The decoding step of `generate`: the graph of the cache if it has one, else the compiled forward pass."""
        parent: Any = super()

        def step(**kwargs: Any) -> Any:
            graph = graph_of(kwargs)
            return parent.get_compiled_call(compile_config)(**kwargs) if graph is None else graph(**kwargs)

        return step

    def _prepare_attention_mask_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The mask of a prompt that came without one: pad tokens at its ends are padding, one inside is text."""
        parent: Any = super()
        mask = parent._prepare_attention_mask_for_generation(*args, **kwargs)
        return mask.cummax(1).values & mask.flip(1).cummax(1).values.flip(1)


def raise_rollback(cache: Cache, drafts: int | None) -> None:
    """Let a cache take back a number of drafts, which are read together with one more token, if it does not yet."""
    places = min((drafts or 0) + 1, MAX_ROLLBACK)
    if places > max(1, getattr(cache, "max_rollback", 0)):
        allow_rollback(cache, places)


@memoize
def hybrid_class(family: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a family's attention class that hands over what slots need."""
    name_of_cache = "cache" if "cache" in inspect.signature(family.forward).parameters else "past_key_values"

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # All layers share the configuration, which is slow to read. Compiled code, in which the number of a layer would
        # be a constant and every layer a graph of its own, is made after a check of the same configuration.
        if not torch.compiler.is_compiling() and self.layer_idx == 0:
            check_implementation(self.config)
        cache = cache_argument(kwargs)
        own = layer_cache(self, cache, hidden_states.shape[0])
        for name in ("cache", "past_key_values"):
            kwargs.pop(name, None)
        # The family's own code updates the cache of layers with full attention alone.
        kwargs[name_of_cache] = cache if self.is_full else None
        tables = None
        if position_embeddings is not None and self.rotates:
            tables = self.rotary_style.standard_tables(position_embeddings)
        if own is not None and not torch.compiler.is_compiling() and kwargs.get("cu_seq_lens_q") is None:
            out = token_attention(self, hidden_states, tables, attention_mask, own)
            if out is not None:
                return out, None
        return family.forward(
            self,
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            nha=LayerInputs(hidden_states, tables, own),
            **kwargs,
        )

    def __reduce_ex__(self, protocol: int) -> Any:
        return _rebuild, (family,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    name = f"NHA{family.__name__}"
    body = {"forward": forward, "__reduce_ex__": __reduce_ex__, "family": family, "__module__": __name__}
    body["rotary_style"] = rotary_style(family)
    return type(name, (family,), body)


def _rebuild(family: type[nn.Module]) -> nn.Module:
    new = hybrid_class(family)
    return new.__new__(new)


def layer_tables(model: PreTrainedModel, x: Tensor, position: Tensor) -> list[Any]:
    """Per layer, the cosines and sines that a decoder hands to its attention for states x [B, T, ...].

    Positions are [B, T]. In families of several kinds of layers the tables are those of the layer's kind.
    """
    stack = decoder(model)
    config = stack.config
    with torch.device(x.device):
        rotary = type(stack.rotary_emb)(config)  # a fresh one: the model's may not be filled in yet
    if hasattr(rotary, "mrope_section"):  # positions in time, height and width
        position = position.expand(3, -1, -1)
    typed = "layer_type" in inspect.signature(rotary.forward).parameters
    kinds = config.layer_types if typed else [None] * config.num_hidden_layers
    made = {kind: rotary(x, position, kind) if typed else rotary(x, position) for kind in dict.fromkeys(kinds)}
    return [made[kind] for kind in kinds]


def slot_tables(model: PreTrainedModel, distance: int) -> list[Tensor]:
    """Per layer, cosines and sines [2, 1, 1, R] of the family's rotary embedding at a distance, for `rotate`."""
    device = next(model.parameters()).device
    x = torch.zeros(1, 1, 1, device=device, dtype=torch.float32)
    found = layer_tables(model, x, torch.full((1, 1), distance, device=device))
    attention = type(attention_layers(model)[0])
    style = rotary_style(getattr(attention, "family", attention))
    return [torch.stack(style.standard_tables(tables)) for tables in found]


def reset_slots(model: PreTrainedModel) -> None:
    """Give the slots of every layer their first values, except where a checkpoint brought some."""
    modules = attention_layers(model)
    if not hasattr(modules[0], NAME):
        return
    tables = slot_tables(model, decoder(model).config.slot_distance)
    for module, (cos, sin) in zip(modules, tables, strict=True):
        module.nha.reset_parameters()
        module.nha.reset_tables(cos, sin)


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of a model's hidden states: that of its embeddings or norms, which are never in 4 or 8 bits."""
    embeddings: Any = model.get_input_embeddings()
    for weight in (*embeddings.parameters(), *model.parameters()):
        if weight.is_floating_point() and weight.dtype.itemsize > 1:
            return weight.dtype
    return torch.float32


def install(model: PreTrainedModel) -> None:
    """Give every attention module of a model whose configuration is a hybrid's the class and parameters it needs.

    The modules' weights stay as they are. Parameters of the slots start as in `SlotParameters.reset_parameters`.
    """
    stack = decoder(model)
    config: Any = stack.config
    config.check_hybrid()
    tables, dtype = slot_tables(model, config.slot_distance), compute_dtype(model)
    for module, window, table in zip(attention_layers(model), config.window_sizes, tables, strict=True):
        if not hasattr(module, NAME):
            heads = config.num_key_value_heads
            sizes = (config.hidden_size, heads, module.head_dim, config.num_slots, config.num_sinks)
            new = SlotParameters(*sizes, table, config.slot_write)
            module.nha = new.to(device=next(module.parameters()).device, dtype=dtype)
        module.__class__ = hybrid_class(getattr(type(module), "family", type(module)))
        set_module_window(module, window)
        module.ablation, module.observer, module.mass_observer = None, None, None
        module.rotates, module.slots_frozen, module.attention_outside_graph = rotates(config, module), False, False
        module.slot_write = config.slot_write
    watch_decoder(stack)
    watch_head(model)
    freeze_unused(model)
    config._attn_implementation = NAME


def watch_decoder(stack: nn.Module) -> None:
    """Before every forward pass of a decoder, let layers follow the configuration and find packed sequences."""
    if not any(hook is before_decoder for hook in stack._forward_pre_hooks.values()):
        stack.register_forward_pre_hook(before_decoder, with_kwargs=True)
        stack.register_forward_hook(after_layers, always_call=True)


def before_decoder(stack: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a decoder's forward pass with the boundaries of packed sequences among them."""
    follow_config(stack)
    before_layers(stack, args, kwargs)
    if len(args) > 1:  # a mask or positions that came without a name
        names = list(inspect.signature(type(stack).forward).parameters)[1:]
        args, kwargs = args[:1], dict(zip(names[1:], args[1:], strict=False)) | kwargs
    check_call(stack, kwargs)
    return args, mark_packing(kwargs)


class HybridModelMixin(CheckpointMixin):
    """Turns a model class of a family into that of its hybrids."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self)  # type: ignore[arg-type]

    def initialize_weights(self) -> None:
        """Fill in what a checkpoint lacks; the family's decoder initialises its own modules and knows no slots."""
        super().initialize_weights()  # type: ignore[misc]
        reset_slots(self)  # type: ignore[arg-type]


class HybridWriterMixin(HybridModelMixin, HybridGenerationMixin):
    """The same for model classes with a language head."""


TASKS = {
    "base": MODEL_MAPPING,
    "causal-lm": MODEL_FOR_CAUSAL_LM_MAPPING,
    "image-text-to-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "sequence-classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
WRITERS = ("causal-lm", "image-text-to-text")


@memoize
def hybrid_model_class(config_class: type[PreTrainedConfig], task: str = "causal-lm") -> type[PreTrainedModel]:
    """The model class for a task of a hybrid configuration class: a subclass of the family's own.

    Raises KeyError where the family has none.
    """
    family = config_class.model_type.removeprefix("nha-")
    base: Any = TASKS[task][CONFIG_MAPPING[family]]
    name = name_in_module(family, base.__name__)
    body = {"config_class": config_class, "config": None, "__module__": __name__, "__qualname__": name}
    mixin = HybridWriterMixin if task in WRITERS else HybridModelMixin
    new = type(f"NHA{base.__name__}", (mixin, base), body)
    setattr(sys.modules[__name__], name, new)
    return new


def name_in_module(family: str, base: str) -> str:
    """The name by which this module holds a hybrid class, and a pickled model refers to it.

    Some families take the model class of another, whose hybrids have the plain name.

    >>> name_in_module("llama", "LlamaForCausalLM"), name_in_module("exaone", "LlamaForCausalLM")
    ('NHALlamaForCausalLM', 'NHALlamaForCausalLM_exaone')
    """
    own = base.startswith(CONFIG_MAPPING_NAMES[family].removesuffix("Config"))
    return f"NHA{base}" if own else f"NHA{base}_{family}"


def __getattr__(name: str) -> Any:
    """The model class of this name: a pickled model refers to one that its process may not have made yet."""
    for task, names in MODEL_NAMES.items():
        for family in (*FAMILIES, *MULTIMODAL):
            if family in names and family in CONFIG_MAPPING_NAMES and name == name_in_module(family, names[family]):
                return hybrid_model_class(config_class_of(family), task)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def hybrid_config(old: Any, changes: dict[str, Any]) -> Any:
    """A copy of a model's configuration, for its hybrid; that of a multimodal model holds one for its text model.

    Raises ValueError, or what loading the saved model would raise, for settings that cannot be.
    """
    text = old.get_text_config()
    config_class = hybrid_config_class(text.model_type)
    config_class(**(text.to_dict() | changes))
    config = copy.deepcopy(old)
    inner = config.get_text_config()
    inner.__class__ = config_class
    for name, value in changes.items():
        setattr(inner, name, value)
    if inner is not config:
        config.__class__ = hybrid_multimodal_config_class(old.model_type)
    return config


def to_hybrid(
    model: PreTrainedModel,
    windows: Sequence[Window],
    *,
    num_slots: int = 64,
    num_sinks: int = 1,
    slot_distance: int = 128,
    slots_from_start: bool = False,
    slot_write: str = "soft",
) -> None:
    """Turn a model into its family's hybrid, in place: class, configuration and attention modules.

    All weights are shared with what the model was; gates and sinks are not calibrated yet (`hybridize` does that).
    The configuration is a new object: models that share the old one stay what they are. In a multimodal model the
    text model becomes a hybrid, and the rest stays.

    Raises:
        ValueError: an unsupported family or numbers that cannot be; nothing has changed.
    """
    old: Any = model.config
    text = old.get_text_config()
    check_family(text)
    changes = {
        "num_slots": num_slots,
        "num_sinks": num_sinks,
        "slot_distance": slot_distance,
        "slots_from_start": slots_from_start,
        "slot_write": slot_write,
        "window_sizes": check_windows(text, windows),
    }
    check_sizes(SimpleNamespace(**changes))
    task = "causal-lm" if text is old else "image-text-to-text"
    expected: Any = TASKS[task].get(type(old), None)
    if expected is None or type(model).__name__ != expected.__name__:
        wanted = "a causal language model" if text is old else "a model for images and text"
        raise ValueError(f"expected {wanted}, got {type(model).__name__}")
    config = hybrid_config(old, changes)
    new_class = hybrid_model_class(type(config), task)
    config.architectures = [new_class.__name__]
    config.converted_from = public_name(old.name_or_path)
    config.name_or_path = model.name_or_path = in_memory_name(old)
    renewed = {id(old): config, id(text): config.get_text_config()}
    for module in model.modules():
        own = getattr(module, "config", None)
        if id(own) in renewed:
            module.config = renewed[id(own)]
    model.__class__ = new_class
    install(model)
