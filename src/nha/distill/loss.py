"""Kullback-Leibler divergence to a teacher and cross-entropy, without the logits of all tokens at any time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nha.ops import resolve_impl

LOGITS = 1 << 28  # in one chunk


@dataclass(frozen=True)
class Head:
    """How a model makes logits of hidden states: `cap * tanh(scale * h @ weight.T / cap)`, or without a cap.

    `weight` [V, hidden] is frozen; it may be the embeddings.
    """

    weight: Tensor
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a causal language model. Raises ValueError for one with a bias."""
        layer, config = model.get_output_embeddings(), model.config
        if getattr(layer, "bias", None) is not None:
            raise ValueError("expected a language model head without a bias, got one with a bias")
        scale = 1 / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
        return cls(layer.weight, scale, getattr(config, "final_logit_softcapping", None))  # Gemma


class HeadLoss(NamedTuple):
    """`loss` is differentiable; per token [N]: the divergence, the cross-entropy, and whether the target came first."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    hit: Tensor


def chunk_loss(
    student: Tensor,
    teacher: Tensor | None,
    weight: Tensor,
    target: Tensor,
    by_divergence: Tensor,
    by_cross_entropy: Tensor,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergence, cross-entropy and hits [n] of n tokens, and the gradient [n, hidden] of their weighted sum."""
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    by_divergence, by_cross_entropy = by_divergence.to(exact), by_cross_entropy.to(exact)

    def logits(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        raw = (hidden @ weight.T).to(exact) * scale
        if cap is None:
            return raw, None
        bent = torch.tanh(raw / cap)
        return bent * cap, 1 - bent.square()

    found, slope = logits(student)
    found = found - found.logsumexp(-1, keepdim=True)
    own = found.gather(1, target[:, None])[:, 0]
    hit = own >= found.amax(-1)
    probability = found.exp()
    if teacher is None:
        divergence = torch.zeros_like(own)
        grad = by_cross_entropy[:, None] * probability
    else:
        wanted, _ = logits(teacher)
        wanted = wanted - wanted.logsumexp(-1, keepdim=True)
        shares = wanted.exp()
        divergence = (shares * (wanted - found)).sum(-1)
        grad = (by_divergence + by_cross_entropy)[:, None] * probability - by_divergence[:, None] * shares
    grad.scatter_add_(1, target[:, None], -by_cross_entropy[:, None])
    if slope is not None:
        grad = grad * slope
    return divergence, -own, hit, (grad * scale).to(student.dtype) @ weight


def best_for(hidden: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`chunk_loss`, or the kernel that does the same on a GPU."""
    if hidden.dtype == torch.float64 or resolve_impl("auto", hidden.device) != "triton":
        return chunk_loss
    from nha.ops.triton.loss import chunk_loss as kernel

    return kernel


class _Loss(torch.autograd.Function):
    """The weighted sum; its gradient is found in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, student, teacher, weight, target, by_divergence, by_cross_entropy, scale, cap, size, function):  # type: ignore[override]
        parts = []
        for start in range(0, len(student), size):
            cut = slice(start, start + size)
            chunk = None if teacher is None else teacher[cut]
            given = (target[cut], by_divergence[cut], by_cross_entropy[cut])
            parts.append(function(student[cut], chunk, weight, *given, scale, cap))
        divergence, cross_entropy, hit, grad = (torch.cat(x) for x in zip(*parts, strict=True))
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(divergence, cross_entropy, hit)
        loss = (by_divergence * divergence).sum() + (by_cross_entropy * cross_entropy).sum()
        return loss, divergence, cross_entropy, hit

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), *[None] * 9


def head_loss(
    student: Tensor,
    teacher: Tensor | None,
    head: Head,
    target: Tensor,
    by_divergence: Tensor,
    by_cross_entropy: Tensor,
    *,
    chunk: int | None = None,
) -> HeadLoss:
    """sum_n by_divergence[n] KL(teacher_n || student_n) - by_cross_entropy[n] log student_n(target_n), in nats.

    Logits exist for `chunk` tokens at a time (default: 2^28 logits), in the dtype of the hidden states; sums are in
    float32 (float64 next to float64). The gradient goes to `student` alone.

    Args:
        student, teacher: hidden states [N, hidden] before the head; without a teacher there is no divergence.
        head: the frozen head that both share.
        target: [N] int64, the token that follows each.
        by_divergence, by_cross_entropy: weights [N], 0 for tokens that do not count.
        chunk: tokens at a time.

    Raises:
        ValueError: shapes that do not fit together.

    >>> h, head = torch.tensor([[1.0, 0.0]]), Head(torch.eye(2))
    >>> one, none = torch.ones(1), torch.zeros(1)
    >>> head_loss(h, h, head, torch.tensor([0]), one, none).loss.item()
    0.0
    >>> round(head_loss(h, None, head, torch.tensor([0]), none, one).loss.item(), 4)  # log(1 + exp(-1))
    0.3133
    """
    count = student.shape[:1]
    for name, x in (("target", target), ("by_divergence", by_divergence), ("by_cross_entropy", by_cross_entropy)):
        if x.shape != count:
            raise ValueError(f"expected {name} of shape {list(count)}, one per token, got {list(x.shape)}")
    if teacher is not None and teacher.shape != student.shape:
        raise ValueError(f"expected the teacher's hidden states {list(student.shape)}, got {list(teacher.shape)}")
    size = chunk or max(64, 1 << max(0, (LOGITS // head.weight.shape[0]).bit_length() - 1))
    options = (head.scale, head.cap, size, best_for(student))
    weight = head.weight.detach()
    return HeadLoss(*_Loss.apply(student, teacher, weight, target, by_divergence, by_cross_entropy, *options))  # type: ignore[misc]
