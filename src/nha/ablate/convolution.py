"""An ablation of the layer: short causal convolutions of queries, keys and values, as linear RNNs often have.

For tables alone: these layers train and are measured, but keep no cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nha.ablate.fusion import UncachedAttention
from nha.models.config import NHAConfig
from nha.models.windows import decoder


class ConvolvedAttention(UncachedAttention):
    """As `NHAAttention`; queries, keys and values are mixed over the last `taps` tokens, each channel by itself.

    Begins as the layer without convolutions.
    """

    def __init__(self, config: NHAConfig, layer_idx: int, taps: int):
        super().__init__(config, layer_idx)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        self.q_taps, self.k_taps, self.v_taps = (identity_taps(count * self.head_dim, taps) for count in heads)

    @property
    def kept_numbers(self) -> int:
        """Inputs of the convolutions that continuing a sequence needs."""
        return sum(taps.shape[0] * (taps.shape[2] - 1) for taps in (self.q_taps, self.k_taps, self.v_taps))

    def to_heads(self, projected: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As in `NHAAttention`, after the convolutions."""
        kept = super().to_heads(projected)
        q, k, v = (mix(y, taps) for y, taps in zip(kept, (self.q_taps, self.k_taps, self.v_taps), strict=True))
        return q, k, v


def identity_taps(channels: int, taps: int) -> nn.Parameter:
    """Weights [channels, 1, taps] of a convolution that changes nothing."""
    weight = torch.zeros(channels, 1, taps)
    weight[..., -1] = 1.0
    return nn.Parameter(weight)


def mix(x: Tensor, taps: Tensor) -> Tensor:
    """x [B, T, H, D] convolved over time with taps [H * D, 1, K], of which the last is of the token itself.

    >>> x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    >>> mix(x, torch.tensor([[[10.0, 1.0]]])).flatten().tolist()
    [1.0, 12.0, 23.0]
    """
    flat = F.pad(x.flatten(2).transpose(1, 2), (taps.shape[2] - 1, 0))
    return F.conv1d(flat, taps, groups=taps.shape[0]).transpose(1, 2).unflatten(-1, x.shape[2:])


def convolve(model: PreTrainedModel, taps: int) -> None:
    """Replace the attention of all layers by `ConvolvedAttention`, with the same projections."""
    for index, layer in enumerate(decoder(model).layers):
        module = ConvolvedAttention(model.config, index, taps)  # type: ignore[arg-type]
        module.load_state_dict(layer.self_attn.state_dict(), strict=False)
        module.ablation = layer.self_attn.ablation
        layer.self_attn = module
