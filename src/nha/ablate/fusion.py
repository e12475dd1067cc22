"""Ablations of the one softmax over slots and window: two softmaxes, averaged or mixed by a learned gate.

For tables alone: these layers train and are measured, but keep no cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nha.layer import write_order
from nha.models.config import NHAConfig
from nha.models.masks import cache_argument, read_mask
from nha.models.nha import FEATURES, NHAAttention
from nha.models.segment import Reading, Segment, attend
from nha.models.windows import decoder
from nha.ops import nha_attention
from nha.ops.rotary import rotate


class UncachedAttention(NHAAttention):
    """`NHAAttention` that refuses a cache, padding and packed sequences; ablations change `read`."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """As in `NHAAttention`. Raises ValueError for a cache, padding and packed sequences."""
        check_plain(self, hidden_states, attention_mask, kwargs)
        return self.read(hidden_states, position_embeddings), None

    def read(self, hidden_states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """The layer's output [B, T, hidden] for hidden states [B, T, hidden] and rotary tables [B, T, D]."""
        return super().forward(hidden_states, tables)[0]


class AveragedAttention(UncachedAttention):
    """Slots and window are read by a softmax each; from the first written token on, the output is their mean.

    Slots hold the same tokens as in `NHAAttention`: those that have left the window.
    """

    def read(self, hidden_states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """As in `UncachedAttention`."""
        q_slot, k_slot, v = self.project(hidden_states)
        q, k = rotate(q_slot, *tables), rotate(k_slot, *tables)
        features = FEATURES[self.config.slot_features]
        q_slot, k_slot = features(q_slot), features(k_slot)
        order = write_order(hidden_states, None, None, None)
        gate, window = self.gates(self.g_proj(hidden_states), order)[0], self.window_size
        assert isinstance(window, int)  # a table gives one window for all heads of a layer
        near = attend(Segment(q, k, v, gate[..., :0], None, None, None, None), Reading(window))[0]
        delayed = [delay(x, window) for x in (k_slot, v, gate)]
        far = nha_attention(q_slot, delayed[0], delayed[1], delayed[2], window_size=0).out
        written = torch.arange(q.shape[1], device=q.device) >= window
        share = torch.where(written[:, None], self.slot_share(hidden_states), 0.0)[..., None].to(near.dtype)
        return self.output(near + share * (far - near), hidden_states)

    def slot_share(self, hidden_states: Tensor) -> Tensor:
        """The weight of the slots' output, [B, T, HQ] or broadcast to it."""
        return hidden_states.new_full((1, 1, self.num_heads), 0.5)


class GatedAttention(AveragedAttention):
    """As `AveragedAttention`, with a learned weight for every token and head instead of one half."""

    def __init__(self, config: NHAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mix_proj = nn.Linear(config.hidden_size, self.num_heads)
        nn.init.zeros_(self.mix_proj.weight)
        nn.init.zeros_(self.mix_proj.bias)

    def slot_share(self, hidden_states: Tensor) -> Tensor:
        """As in `AveragedAttention`."""
        return self.mix_proj(hidden_states).sigmoid()


def check_plain(module: Any, hidden_states: Tensor, attention_mask: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a cache, padding and packed sequences, which an ablation cannot read."""
    mask = read_mask(module, attention_mask, hidden_states.shape[1], kwargs.get("cu_seq_lens_q"))
    given = {"a cache": cache_argument(kwargs), "packed sequences": kwargs.get("cu_seq_lens_q")}
    given["padding"] = mask.padding
    refused = [name for name, value in given.items() if value is not None]
    if refused:
        raise ValueError(f"expected plain sequences in an ablation of the layer, got {refused[0]}")


FUSIONS: dict[str, type[AveragedAttention]] = {"average": AveragedAttention, "gate": GatedAttention}


def delay(x: Tensor, steps: int) -> Tensor:
    """x [B, T, ...] moved `steps` tokens later; zeros come first (a log-gate of 0 writes nothing).

    >>> delay(torch.tensor([[1, 2, 3]])[..., None, None], 2).flatten().tolist()
    [0, 0, 1]
    """
    steps = min(steps, x.shape[1])
    return F.pad(x[:, : x.shape[1] - steps], (0, 0, 0, 0, steps, 0))


def fuse(model: PreTrainedModel, name: str) -> None:
    """Replace the attention of all layers by one of `FUSIONS`, with the same projections."""
    for index, layer in enumerate(decoder(model).layers):
        module = FUSIONS[name](model.config, index)  # type: ignore[arg-type]
        module.load_state_dict(layer.self_attn.state_dict(), strict=False)
        layer.self_attn = module
