"""Linear layers that read the same input, such as the projections to queries, keys and values, as one product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out] of a linear layer

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as the families name them


@torch.library.custom_op("nha::beside", mutates_args=())
def beside(parts: list[Tensor]) -> Tensor:
    """Tensors [..., n_i] side by side, [..., sum of n_i], by a copy that no compiler merges with what comes before.

    PyTorch 2.11 would compute all parts in one kernel that finds out for every element whose it is: five times slower.

    >>> beside([torch.ones(1, 2), torch.zeros(1, 1)])
    tensor([[1., 1., 0.]])
    """
    return torch.cat(parts, -1)


@beside.register_fake
def _(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, -1)


class _Split(torch.autograd.Function):
    """Parts of a product, whose gradients are put `beside` each other."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *sizes: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        return whole.split(sizes, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return beside(list(grads)), *[None] * len(grads)


class Joint:
    """Several layers as one: whichever is called first with an input computes all, and the others take their parts.

    Args:
        layers: linear layers that hand their inputs to `read`; `pair(dtype)` is what one computes with in training.
        frozen: what each computes with while nothing is trained, None for one that is not called then.
        idle: whether nothing is trained now.
    """

    def __init__(self, layers: Sequence[Any], frozen: Sequence[Pair | None], idle: Callable[[], bool]):
        self.layers, self.idle = list(layers), idle
        self.frozen = list(frozen)
        self.weight = torch.cat([pair[0] for pair in frozen if pair is not None])
        self.input: Tensor | None = None
        self.parts: list[Tensor | None] = []

    def read(self, place: int, input: Tensor) -> Tensor:
        """The outputs of layer number `place` for an input [..., in]."""
        if self.input is not input:
            self.parts, self.input = self._parts(input), input
        part, self.parts[place] = self.parts[place], None
        if all(other is None for other in self.parts):
            self.input = None
        assert part is not None
        return part

    def _parts(self, input: Tensor) -> list[Tensor | None]:
        """The outputs of all layers that are called now."""
        idle = self.idle()
        pairs = self.frozen if idle else [layer.pair(input.dtype) for layer in self.layers]
        called = [pair for pair in pairs if pair is not None]
        whole = F.linear(input, self.weight if idle else torch.cat([weight for weight, _ in called]))
        sizes = [len(weight) for weight, _ in called]
        split = _Split.apply(whole, *sizes) if len(sizes) > 2 and not idle else whole.split(sizes, -1)
        pieces = iter(split)  # pyright: ignore[reportArgumentType]
        biased = (next(pieces) if bias is None else next(pieces) + bias for _, bias in called)
        return [None if pair is None else next(biased) for pair in pairs]


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
    share(joint, [layer.weight for layer in layers])
    for place, layer in enumerate(layers):
        layer.__class__ = FrozenLinear
        layer.joint = joint  # type: ignore[assignment]
        layer.place = place  # type: ignore[assignment]


def share(joint: Joint, weights: Sequence[Tensor]) -> None:
    """Let the frozen weights of the layers that are called be views of the joint one."""
    for weight, view in zip(weights, joint.weight.split([len(weight) for weight in weights]), strict=True):
        weight.data = view


def part(layer: nn.Linear) -> None:
    """Make a layer of `join_frozen` a plain one again, with memory of its own."""
    layer.__class__ = nn.Linear
    del layer.joint, layer.place
    layer.weight.data = layer.weight.detach().clone()
