"""Linear layers that read the same input, such as the projections to queries, keys and values, as one product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out] of a linear layer

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as the families name them


def join(pairs: Sequence[Pair]) -> Pair:
    """Weight and bias of one layer that has the outputs of all; a bias that some lack is zero there.

    >>> weight, bias = join([(torch.ones(2, 3), None), (torch.zeros(1, 3), torch.ones(1))])
    >>> weight.shape, bias
    (torch.Size([3, 3]), tensor([0., 0., 1.]))
    """
    weight = torch.cat([weight for weight, _ in pairs])
    if all(bias is None for _, bias in pairs):
        return weight, None
    return weight, torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in pairs])


class Joint:
    """Several layers as one: whichever is called first with an input computes all, and the others take their parts.

    Args:
        layers: linear layers that hand their inputs to `read`; `pair(dtype)` is what one computes with in training.
        frozen: what each computes with while nothing is trained, None for one that is not called then.
        idle: whether nothing is trained now.
    """

    def __init__(self, layers: Sequence[Any], frozen: Sequence[Pair | None], idle: Callable[[], bool]):
        self.layers, self.idle = list(layers), idle
        self.sizes = [layer.out_features for layer in layers]
        self.called = [pair is not None for pair in frozen]
        self.frozen = join([pair for pair in frozen if pair is not None])
        self.input: Tensor | None = None
        self.parts: list[Tensor | None] = []

    def read(self, place: int, input: Tensor) -> Tensor:
        """The outputs of layer number `place` for an input [..., in]."""
        if self.input is not input:
            idle = self.idle()
            called = self.called if idle else [True] * len(self.layers)
            weight, bias = self.frozen if idle else join([layer.pair(input.dtype) for layer in self.layers])
            sizes = [size for size, one in zip(self.sizes, called, strict=True) if one]
            pieces = iter(F.linear(input, weight, bias).split(sizes, -1))
            self.parts, self.input = [next(pieces) if one else None for one in called], input
        part, self.parts[place] = self.parts[place], None
        if all(other is None for other in self.parts):
            self.input = None
        assert part is not None
        return part


class FrozenLinear(nn.Linear):
    """A linear layer that is never trained, as one of a `Joint`."""

    joint: Joint
    place: int

    def forward(self, input: Tensor) -> Tensor:
        return self.joint.read(self.place, input)


def join_frozen(layers: Iterable[nn.Linear]) -> None:
    """From now on compute frozen layers that read the same input as one, until `part` is called with each."""
    layers = list(layers)
    with torch.no_grad():
        joint = Joint(layers, [(layer.weight, layer.bias) for layer in layers], lambda: True)
    share(joint, [[p for p in (layer.weight, layer.bias) if p is not None] for layer in layers])
    for place, layer in enumerate(layers):
        layer.__class__ = FrozenLinear
        layer.joint = joint  # type: ignore[assignment]
        layer.place = place  # type: ignore[assignment]


def share(joint: Joint, parameters: Sequence[Sequence[Tensor]]) -> None:
    """Let the frozen parameters (weight, and bias if any) of the layers that are called be views of the joint ones."""
    at = 0
    for mine, size in zip(parameters, joint.sizes, strict=True):
        for parameter, whole in zip(mine, joint.frozen, strict=False):
            parameter.data = whole[at : at + size]  # pyright: ignore[reportOptionalSubscript]
        at += size if mine else 0


def part(layer: nn.Linear) -> None:
    """Make a layer of `join_frozen` a plain one again, with memory of its own."""
    layer.__class__ = nn.Linear
    del layer.joint, layer.place
    for parameter in layer.parameters():
        parameter.data = parameter.detach().clone()
