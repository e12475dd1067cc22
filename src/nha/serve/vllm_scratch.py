"""Around attention in models that were trained from scratch: norms, activations and the output's gate, in vLLM."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nha.models.nha import FEATURES


class LayerOptions(nn.Module):
    """The parts of an `NHAForCausalLM` layer that vLLM's Llama does not have, each as the configuration says.

    Args:
        config: of the model.
        heads: query heads.
        dim: head dim.
    """

    def __init__(self, config: Any, heads: int, dim: int):
        super().__init__()
        self.dim, self.config, width = dim, config, heads * dim
        self.q_norm, self.k_norm = (
            nn.RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.output_norm = nn.Identity() if config.output_norm == "none" else nn.RMSNorm(width, config.rms_norm_eps)
        self.output_gate = nn.Linear(config.hidden_size, width, bias=False) if config.output_gate else None
        self.requires_grad_(False)

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [T, HQ * D] and keys [T, H * D] before they are rotated."""
        return tuple(
            norm(x.unflatten(-1, (-1, self.dim))).flatten(-2) for norm, x in ((self.q_norm, query), (self.k_norm, key))
        )

    def activate(self, value: Tensor) -> Tensor:
        """Values [T, H * D] before they are stored."""
        return FEATURES[self.config.value_activation](value)

    def finish(self, out: Tensor, hidden: Tensor) -> Tensor:
        """The outputs of attention [T, HQ * D], normalized, and gated by hidden states [T, hidden]."""
        out = self.output_norm(F.silu(out) if self.config.output_norm == "silu_rms" else out)
        return out if self.output_gate is None else out * torch.sigmoid(self.output_gate(hidden))


def needs_options(config: Any) -> bool:
    """Whether the layers of a model compute more than vLLM's Llama around attention.

    >>> from nha import NHAConfig
    >>> needs_options(NHAConfig.tiny()), needs_options(NHAConfig.tiny(qk_norm=True))
    (False, True)
    """
    if config.model_type != "nha":  # a converted model's family computes all of it
        return False
    return config.qk_norm or config.output_gate or config.output_norm != "none" or config.value_activation != "none"
