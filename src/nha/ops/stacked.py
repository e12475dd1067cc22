"""Several linear layers of one input as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def can_stack(layers: Sequence[nn.Module]) -> bool:
    """Whether `stacked_linear` computes what calling the layers does: PyTorch's own, without biases and hooks.

    >>> can_stack([nn.Linear(4, 2, bias=False), nn.Linear(4, 3, bias=False)]), can_stack([nn.Linear(4, 2)])
    (True, False)
    """
    plain = all(type(layer) is nn.Linear and layer.bias is None for layer in layers)
    return plain and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def stacked_linear(x: Tensor, layers: Sequence[nn.Linear]) -> list[Tensor]:
    """The outputs [..., N_i] of linear layers without biases for one input [..., K], as views of one product.

    The gradient of x is one product too, where layers one by one give one each to add up. Stacking the weights costs a
    copy of them, which compiled code fuses with autocast's.

    >>> layers = [nn.Linear(4, 2, bias=False), nn.Linear(4, 3, bias=False)]
    >>> x = torch.randn(5, 4)
    >>> [torch.allclose(y, layer(x), atol=1e-6) for y, layer in zip(stacked_linear(x, layers), layers)]
    [True, True]
    """
    weights = [layer.weight for layer in layers]
    return list(F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], -1))
