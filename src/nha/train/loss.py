"""The mean cross-entropy of a language model, without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nha.distill.loss import Head
from nha.train.rows import IGNORED

MAX_LOGITS = 1 << 28  # in one chunk, on a GPU
MAX_LOGITS_CPU = 1 << 24  # copies of more are fetched from memory again and again

Chunk = tuple[Tensor, Tensor, Tensor]


def chunk_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor, scale: float, cap: float | None
) -> Chunk:
    """Summed loss [] of n tokens and its gradients with respect to hidden [n, hidden] and weight [V, hidden]."""
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    raw, token_weight = (hidden @ weight.T).to(exact) * scale, token_weight.to(exact)
    slope = None
    if cap is not None:
        capped = torch.tanh(raw / cap)
        raw, slope = capped * cap, 1 - capped.square()
    log_p = raw - raw.logsumexp(-1, keepdim=True)
    loss = -(log_p.gather(1, targets[:, None])[:, 0] * token_weight).sum()
    grad = log_p.exp() * token_weight[:, None]
    grad = grad.scatter_add(1, targets[:, None], -token_weight[:, None])
    if slope is not None:
        grad = grad * slope
    grad = (grad * scale).to(hidden.dtype)
    return loss, grad @ weight, grad.T @ hidden


@cache
def _compiled_chunk_loss() -> Callable[..., Chunk]:
    return torch.compile(chunk_loss, dynamic=False)


class _CrossEntropy(torch.autograd.Function):
    """Gradients are computed in the forward pass, while a chunk's logits exist."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weight, scale, cap, size):  # type: ignore[override]
        function = _compiled_chunk_loss() if hidden.is_cuda and hidden.dtype != torch.float64 else chunk_loss
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        compute = weight.to(hidden.dtype)
        grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device)
        grads, loss = [], torch.zeros((), dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), size):
            cut = slice(start, start + size)
            part, grad, own = function(hidden[cut], compute, targets[cut], token_weight[cut], scale, cap)
            loss, grad_weight = loss + part, grad_weight.add_(own)
            grads.append(grad)
        ctx.save_for_backward(torch.cat(grads), grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        return hidden * grad_loss.to(hidden.dtype), weight * grad_loss.to(weight.dtype), *[None] * 5


def cross_entropy(hidden: Tensor, head: Head, targets: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """Mean cross-entropy [] in nats of the targets that count; differentiable in `hidden` and in the head's weight.

    Logits exist for `chunk_size` tokens at a time, under autocast in its dtype. Sums are float32, or float64 next to
    float64.

    Args:
        hidden: [N, hidden], before the head.
        head: with `weight` [V, hidden].
        targets: [N] int64; -100 does not count.
        chunk_size: tokens at a time; default: 2^28 logits, 2^24 on a CPU.

    >>> hidden = torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    >>> round(cross_entropy(hidden, Head(torch.eye(2)), torch.tensor([0, -100])).item(), 4)  # log(1 + exp(-1))
    0.3133
    """
    counted = targets != IGNORED
    token_weight = counted / counted.sum().clamp_min(1)
    limit = MAX_LOGITS if hidden.is_cuda else MAX_LOGITS_CPU
    size = chunk_size or max(64, 1 << max(0, (limit // head.weight.shape[0]).bit_length() - 1))
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        options = (targets.clamp_min(0), token_weight, head.scale, head.cap, size)
        return _CrossEntropy.apply(hidden, head.weight, *options)  # type: ignore[return-value]


class LanguageModel(nn.Module):
    """A causal language model in training; `forward` is its loss.

    Args:
        causal: any causal language model of transformers' interface, with float32 weights.
        dtype: to compute in.

    Raises ValueError for a head with a bias.
    """

    def __init__(self, causal: PreTrainedModel, dtype: torch.dtype = torch.float32):
        super().__init__()
        Head.of(causal)
        self.causal: Any = causal
        self._no_split_modules = causal._no_split_modules
        self.residual_hook = None
        if dtype != torch.float32:  # autocast would leave the residual stream in the embeddings' float32
            embeddings: Any = causal.get_input_embeddings()
            self.residual_hook = embeddings.register_forward_hook(lambda module, args, out: out.to(dtype))

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.causal.config

    def compile_layers(self) -> None:
        """Run decoder layers compiled from now on; one graph serves all layers of a kind.

        DDP would split the graph of a layer where a bucket of gradients is full. That is left out: gradients are sent
        as each layer's backward pass ends.
        """
        torch._dynamo.config.optimize_ddp = False
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for layer in self.causal.get_decoder().layers:
            layer.compile(dynamic=False)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> Tensor:
        """Mean cross-entropy [] of the targets that count.

        Args:
            ids, targets: [B, T]; targets of -100 do not count.
            position_ids: [1, N], with packed documents.
            cu_seqlens: [documents + 1] int32, where packed documents begin and end; empty ones may follow the last.
            max_seq_len: at least the length of every packed document.
        """
        packed: dict[str, Any] = {}
        if cu_seqlens is not None:
            packed = {"position_ids": position_ids, "max_length_q": max_seq_len, "max_length_k": max_seq_len}
            packed |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        hidden = self.causal.get_decoder()(input_ids=ids, use_cache=False, **packed).last_hidden_state
        head = Head.of(self.causal)  # read each time: sharding replaces parameters
        return cross_entropy(hidden.flatten(0, 1), head, targets.flatten())

    def release(self) -> PreTrainedModel:
        """The model in plain, uncompiled modules with float32 weights."""
        if self.residual_hook is not None:
            self.residual_hook.remove()
        for layer in self.causal.get_decoder().layers:
            layer._compiled_call_impl = None
        return self.causal
