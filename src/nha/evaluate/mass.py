"""The attention mass of slots and sinks, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.models.config import largest_window
from nha.models.head import hidden_states
from nha.models.observe import observe_mass
from nha.models.windows import hybrid_layers


@dataclass(frozen=True)
class SlotMass:
    """Fractions of the softmax, one per layer, None for layers without slots.

    Attributes:
        slots: the slots' fraction, mean over tokens and query heads.
        sink: the sink's fraction.
        max_head: the slots' fraction in the query head where it is largest.
    """

    slots: list[float | None]
    sink: list[float | None]
    max_head: list[float | None]

    @property
    def mean(self) -> float:
        """Mean of `slots` over the layers that have any (0 without)."""
        known = [mass for mass in self.slots if mass is not None]
        return sum(known) / len(known) if known else 0.0


@torch.no_grad()
def slot_mass(model: PreTrainedModel, ids: Tensor) -> SlotMass:
    """Attention mass while a hybrid reads ids [B, T], mean over the tokens whose slots are active (t >= W).

    Raises ValueError for a model that is not a hybrid.
    """
    windows = [largest_window([module.window_size]) for module in hybrid_layers(model)]
    found: dict[int, tuple[float, float, float]] = {}

    def observe(layer: int, slots: Tensor, sink: Tensor) -> None:
        if slots.shape[1] <= windows[layer]:
            return
        heads = slots[:, windows[layer] :].float().mean((0, 1))
        found[layer] = (heads.mean().item(), sink[:, windows[layer] :].float().mean().item(), heads.max().item())

    with observe_mass(model, observe):
        hidden_states(model, ids.to(model.device))
    columns = [found.get(layer, (None, None, None)) for layer in range(len(windows))]
    return SlotMass(*(list(column) for column in zip(*columns, strict=True)))
