"""Learning rate and gradients of a step: those of text and of recall text are scaled apart and added."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Gradients = list[Tensor | None]  # one for each parameter


def whole(tensor: Tensor) -> Tensor:
    """A parameter or gradient, sharded over devices or not, as one plain tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def local(tensor: Tensor) -> Tensor:
    """The part of a parameter or gradient that lies on this device."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def lr_factor(step: int, steps: int, warmup_fraction: float, floor: float = 0.05) -> float:
    """Learning rate of a step relative to its peak: a linear warm-up, then a cosine down to `floor`.

    >>> [round(lr_factor(step, 10, 0.2), 3) for step in (0, 1, 2, 9)]
    [0.5, 0.977, 0.909, 0.073]
    """
    warmup = min(1.0, (step + 1) / max(1.0, warmup_fraction * steps))
    return warmup * ((1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)) + floor)


def combine_gradients(
    parts: Mapping[str, Gradients],
    parameters: list[nn.Parameter],
    *,
    how: str,
    max_norm: float,
    recall_norm: float,
) -> dict[str, Tensor]:
    """Set `grad` of the parameters to the sum of the parts' gradients, text first and recall text second.

    Args:
        parts: gradients of each part, by name; they are scaled in place.
        parameters: what the gradients belong to.
        how: "clip" clips each part to `max_norm`; "normalise" clips the first and scales the second to `recall_norm`
            times the norm that is left to the first; "together" is "clip" of a single part.
        max_norm: the largest norm of a part.
        recall_norm: as above.

    Returns:
        The norms before, by name, as tensors [] that nothing has waited for.

    >>> p = nn.Parameter(torch.zeros(1))
    >>> parts = {"text": [torch.tensor([2.0])], "recall": [torch.tensor([8.0])]}
    >>> norms = combine_gradients(parts, [p], how="normalise", max_norm=1.0, recall_norm=0.5)
    >>> p.grad.item(), norms["recall"].item()
    (1.5, 8.0)
    """
    norms: dict[str, Tensor] = {}
    for name, grads in parts.items():
        given = [g for g in grads if g is not None]
        norms[name] = whole(torch.nn.utils.get_total_norm(given)) if given else torch.zeros(())
    scales = {name: (max_norm / norm.clamp_min(1e-12)).clamp_max(1.0) for name, norm in norms.items()}
    if how == "normalise" and len(parts) == 2:
        text, recall = parts
        scales[recall] = recall_norm * scales[text] * norms[text] / norms[recall].clamp_min(1e-12)
    for name, grads in parts.items():
        torch._foreach_mul_([local(g) for g in grads if g is not None], scales[name])  # pyright: ignore[reportPrivateImportUsage]
    for parameter in parameters:
        parameter.grad = None
    for grads in parts.values():
        _add(parameters, grads)
    return norms


def _add(parameters: list[nn.Parameter], grads: Gradients) -> None:
    """Add gradients to those of the parameters, which take over the tensor where they have none yet."""
    pairs = [(p.grad, g) for p, g in zip(parameters, grads, strict=True) if p.grad is not None and g is not None]
    if pairs:
        sums, others = ([local(x) for x in column] for column in zip(*pairs, strict=True))
        torch._foreach_add_(sums, others)  # pyright: ignore[reportPrivateImportUsage]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad if parameter.grad is None else parameter.grad
