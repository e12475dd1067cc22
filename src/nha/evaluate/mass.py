"""How much of the softmax goes to slots and sink, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.models.adapter import hybrid_layers, observe_mass
from nha.models.head import hidden_states


@dataclass(frozen=True)
class SlotMass:
    """Shares of the softmax, one per layer, None for layers without slots.

    Attributes:
        slots: what went to the slots, mean over tokens and query heads.
        sink: what went to the sink.
        top_head: what went to the slots in the query head where that is most.
    """

    slots: list[float | None]
    sink: list[float | None]
    top_head: list[float | None]

    @property
    def mean(self) -> float:
        """Mean of `slots` over the layers that have any (0 without)."""
        known = [share for share in self.slots if share is not None]
        return sum(known) / len(known) if known else 0.0


@torch.no_grad()
def slot_mass(model: PreTrainedModel, ids: Tensor) -> SlotMass:
    """Shares of the softmax while a hybrid reads ids [B, T], over the tokens that have slots to read (t >= W).

    Raises ValueError for a model that is not a hybrid.
    """
    windows = [module.window_size for module in hybrid_layers(model)]
    shares: dict[int, tuple[float, float, float]] = {}

    def see(layer: int, slots: Tensor, sink: Tensor) -> None:
        if slots.shape[1] <= windows[layer]:
            return
        heads = slots[:, windows[layer] :].float().mean((0, 1))
        shares[layer] = (heads.mean().item(), sink[:, windows[layer] :].float().mean().item(), heads.max().item())

    with observe_mass(model, see):
        hidden_states(model, ids.to(model.device))
    rows = [shares.get(layer, (None, None, None)) for layer in range(len(windows))]
    return SlotMass(*(list(column) for column in zip(*rows, strict=True)))
