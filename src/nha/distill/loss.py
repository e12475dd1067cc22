"""KL divergence from a teacher and cross-entropy, without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nha.models.head import logit_factors

MAX_LOGITS = 1 << 28  # in one chunk

# KL and cross-entropy [n] float32, correct [n] bool, gradient [n, hidden]
ChunkLoss = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Head:
    """How a model computes logits: `cap * tanh(scale * hidden @ weight.T / cap)`, or without a cap.

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
        factor, divisor = logit_factors(config)
        return cls(layer.weight, factor / divisor, getattr(config, "final_logit_softcapping", None))  # Gemma


class HeadLoss(NamedTuple):
    """`loss` [] is differentiable; per token [N]: KL, cross-entropy, and whether the target had the top logit."""

    loss: Tensor
    kl: Tensor
    cross_entropy: Tensor
    correct: Tensor


def chunk_loss(
    student: Tensor,
    teacher: Tensor | None,
    weight: Tensor,
    target: Tensor,
    kl_weight: Tensor,
    ce_weight: Tensor,
    scale: float,
    cap: float | None,
) -> ChunkLoss:
    """KL, cross-entropy and top-1 accuracy of n tokens [n], and the gradient [n, hidden] of their weighted sum."""
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    kl_weight, ce_weight = kl_weight.to(exact), ce_weight.to(exact)

    def logits(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        raw = (hidden @ weight.T).to(exact) * scale
        if cap is None:
            return raw, None
        capped = torch.tanh(raw / cap)
        return capped * cap, 1 - capped.square()

    log_p, slope = logits(student)
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    target_log_p = log_p.gather(1, target[:, None])[:, 0]
    correct = target_log_p >= log_p.amax(-1)
    p = log_p.exp()
    if teacher is None:
        kl = torch.zeros_like(target_log_p)
        grad = ce_weight[:, None] * p
    else:
        teacher_log_p, _ = logits(teacher)
        teacher_log_p = teacher_log_p - teacher_log_p.logsumexp(-1, keepdim=True)
        teacher_p = teacher_log_p.exp()
        kl = (teacher_p * (teacher_log_p - log_p)).sum(-1)
        grad = (kl_weight + ce_weight)[:, None] * p - kl_weight[:, None] * teacher_p
    grad.scatter_add_(1, target[:, None], -ce_weight[:, None])
    if slope is not None:
        grad = grad * slope
    return kl, -target_log_p, correct, (grad * scale).to(student.dtype) @ weight


@cache
def _compiled_chunk_loss() -> Callable[..., ChunkLoss]:
    return torch.compile(chunk_loss, dynamic=False)


def resolve_chunk_loss(hidden: Tensor) -> Callable[..., ChunkLoss]:
    """`chunk_loss`, compiled on a GPU: eager, a whole step takes 1.8 times as long there."""
    return _compiled_chunk_loss() if hidden.is_cuda and hidden.dtype != torch.float64 else chunk_loss


class _Loss(torch.autograd.Function):
    """The weighted sum; its gradient is computed in the forward pass, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx, student, teacher, weight, target, kl_weight, ce_weight, scale, cap, size, function):  # type: ignore[override]
        chunks = []
        for start in range(0, len(student), size):
            cut = slice(start, start + size)
            other = None if teacher is None else teacher[cut]
            per_token = (target[cut], kl_weight[cut], ce_weight[cut])
            chunks.append(function(student[cut], other, weight, *per_token, scale, cap))
        kl, cross_entropy, correct, grad = (torch.cat(x) for x in zip(*chunks, strict=True))
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(kl, cross_entropy, correct)
        loss = (kl_weight * kl).sum() + (ce_weight * cross_entropy).sum()
        return loss, kl, cross_entropy, correct

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), *[None] * 9


def head_loss(
    student: Tensor,
    teacher: Tensor | None,
    head: Head,
    target: Tensor,
    kl_weight: Tensor,
    ce_weight: Tensor,
    *,
    chunk_size: int | None = None,
) -> HeadLoss:
    """sum_n kl_weight[n] KL(teacher_n || student_n) - ce_weight[n] log student_n(target_n), in nats.

    Logits exist for `chunk_size` tokens at a time (default: 2^28 logits), in the dtype of the hidden states; sums are
    in float32 (float64 next to float64). The gradient goes to `student` alone.

    Args:
        student, teacher: hidden states [N, hidden] before the head; without a teacher the KL divergence is 0.
        head: the frozen head that both share.
        target: [N] int64, the token that follows each.
        kl_weight, ce_weight: weights [N], 0 for tokens that do not count.
        chunk_size: tokens at a time.

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
    for name, x in (("target", target), ("kl_weight", kl_weight), ("ce_weight", ce_weight)):
        if x.shape != count:
            raise ValueError(f"expected {name} of shape {list(count)}, one per token, got {list(x.shape)}")
    if teacher is not None and teacher.shape != student.shape:
        raise ValueError(f"expected the teacher's hidden states {list(student.shape)}, got {list(teacher.shape)}")
    size = chunk_size or max(64, 1 << max(0, (MAX_LOGITS // head.weight.shape[0]).bit_length() - 1))
    options = (head.scale, head.cap, size, resolve_chunk_loss(student))
    weight = head.weight.detach()
    return HeadLoss(*_Loss.apply(student, teacher, weight, target, kl_weight, ce_weight, *options))  # type: ignore[misc]
