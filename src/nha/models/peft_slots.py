"""Learned initial memory: what the slots of a hybrid hold before the first token, trained through peft.

A hybrid's slots need not start empty. `SlotsConfig` is a method of the peft library: `get_peft_model` gives every
hybrid layer slots that are active from token 0, as trainable parameters; everything else is frozen. A few hundred
kilobytes hold what an adapter learned; there is nothing to merge, and no token of the window is spent.

Import this module before `PeftModel.from_pretrained` reads such an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from nha.models.cache import layer_parts
from nha.models.config import FULL, largest_window
from nha.models.slots import SlotInputs
from nha.models.windows import hybrid_layers
from nha.ops.exact import WriteOrder
from nha.ops.heads import head_groups, per_head

METHOD, PREFIX = "NHA_SLOTS", "nha_slots_"
STARTS = ("zeros", "random")


@dataclass
class SlotsConfig(PeftConfig):
    """Which layers get slots to start with, and how these start.

    Attributes:
        layers_to_transform: numbers of the layers; default: every hybrid layer.
        start: "zeros", or "random": keys of deviation 0.02. `read` starts them from a text instead.
    """

    layers_to_transform: list[int] | None = field(default=None, metadata={"help": "Layers; default: all hybrid ones."})
    start: str = field(default="zeros", metadata={"help": "How slots start: zeros or random."})
    target_modules: Any = field(default_factory=lambda: ["nha"], metadata={"help": "Where a hybrid keeps its gates."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = METHOD  # type: ignore[assignment]
        if self.start not in STARTS:
            raise ValueError(f"expected start to be one of {STARTS}, got {self.start!r}")


class SlotsLayer(nn.Module, BaseTunerLayer):
    """Gate and sink of one attention layer, with slots to start with: key [H, M, D] and value [H, M, Dv], float32."""

    adapter_layer_names = ("nha_slots_key", "nha_slots_value")

    def __init__(self, base_layer: nn.Module, attention: Any, adapter_name: str, config: SlotsConfig):
        super().__init__()
        self.base_layer = base_layer
        model: Any = attention.config
        self.shape = (model.num_key_value_heads, model.num_slots, attention.head_dim)
        self.nha_slots_key, self.nha_slots_value = nn.ParameterDict(), nn.ParameterDict()
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SlotsConfig) -> None:
        """Add the slots of one more adapter."""
        device = next(self.base_layer.parameters()).device
        for slots in (self.nha_slots_key, self.nha_slots_value):
            slots[adapter_name] = nn.Parameter(torch.zeros(self.shape, device=device))
        if config.start == "random":
            nn.init.normal_(self.nha_slots_key[adapter_name], std=0.02)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def initial(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the slots before the first token; None where no adapter is active."""
        if self.disable_adapters:
            return None
        active = [name for name in self.active_adapters if name in self.nha_slots_key]
        if len(active) > 1:
            raise ValueError(f"expected one active adapter of initial slots, got {active}")
        return (self.nha_slots_key[active[0]], self.nha_slots_value[active[0]]) if active else None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, hidden: Tensor, order: WriteOrder | None = None, *, fill: bool = True) -> SlotInputs:
        """Gate, sink and tables of the layer, with this adapter's slots to start with: then none is free."""
        initial = self.initial
        return self.base_layer(hidden, order, fill=fill and initial is None)._replace(initial=initial)


class SlotsModel(BaseTuner):
    """The tuner behind `SlotsConfig`."""

    prefix = PREFIX
    tuner_layer_cls = SlotsLayer

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SlotsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: Any,
        current_key: str,
        **_: Any,
    ) -> None:
        if getattr(parent, "window_size", FULL) == FULL:
            return
        if isinstance(target, SlotsLayer):
            target.update_layer(adapter_name, peft_config)
            return
        new = SlotsLayer(target, parent, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _replace_module(self, parent: Any, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # peft's own looks for a weight, which gates and sinks have none of

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        hybrid_layers(self.model)  # raises for any other model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible: the model itself has no place for initial slots. `unload` gives it back without them."""
        raise NotImplementedError("initial slots cannot be merged into the weights: keep the adapter, or call unload()")


def register() -> None:
    """Make peft know the method, once. peft's own `register_peft_method` takes names of its enumeration only."""
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[METHOD] = SlotsConfig  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[METHOD] = SlotsModel  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[METHOD] = PREFIX  # type: ignore[index]


register()


@torch.no_grad()
def read(model: Any, ids: Tensor, adapter_name: str = "default") -> None:
    """Start the slots of an adapter from a text ids [1, T]: what the slots hold after reading it, without the adapter.

    The text's last tokens, which are still in the window, are read over as well: T must be longer than the largest
    window. Raises ValueError for a model without such an adapter and for a text that is too short.
    """
    layers = [module for module in model.modules() if isinstance(module, SlotsLayer)]
    if not layers:
        raise ValueError(f"expected a model with initial slots (SlotsConfig), got {type(model).__name__}")
    causal = model.get_base_model()
    largest = largest_window(causal.config.window_sizes)
    if ids.shape[0] != 1 or ids.shape[1] <= largest:
        raise ValueError(f"expected one text of more than {largest} tokens, got {list(ids.shape)}")
    with model.disable_adapter():
        cache = causal.get_decoder()(ids.to(causal.device), use_cache=True).past_key_values
    for module, layer in zip(hybrid_layers(causal), cache.layers, strict=True):
        if isinstance(module.nha, SlotsLayer):
            windows = per_head(module.window_size, module.config.num_key_value_heads)
            for group, part in zip(head_groups(windows), layer_parts(layer), strict=True):
                if group.window_size != FULL:  # heads with full attention have no slots
                    heads = list(group.heads)
                    module.nha.nha_slots_key[adapter_name][heads] = part.state.slot_key[0]
                    module.nha.nha_slots_value[adapter_name][heads] = part.state.slot_value[0]
