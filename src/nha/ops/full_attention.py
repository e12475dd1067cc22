"""Full attention of the last tokens of a text, one or a segment, for layers that keep every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nha.ops import api
from nha.ops.autocast import in_region
from nha.ops.validation import MAX_DIM, MAX_GROUPS, NARROW_DIM


def full_decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Softmax attention of one token, [B, 1, HQ, Dv], that reads keys and values once and copies none.

    On a GPU a kernel reads only what is not masked and fills the GPU at any batch; its work depends on Tk and B, never
    on the mask, so that a CUDA graph can replay it. Elsewhere, and for gradients, it is SDPA.

    Args:
        q: [B, HQ, 1, D]; query head h reads KV head h // (HQ / H).
        k: [B, H, Tk, D], any strides.
        v: [B, H, Tk, Dv], any strides.
        mask: [B, 1, 1, Tk] or [1, 1, 1, Tk] bool, True where a key is seen, or None for all.
        scale: of the scores, by default D ** -0.5.

    >>> q, k = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 3, 8)
    >>> v = torch.arange(6.0).view(1, 2, 3, 1)
    >>> full_decode(q, k, v, torch.tensor([True, True, False]).view(1, 1, 1, 3)).flatten().tolist()
    [0.5, 0.5, 3.5, 3.5]
    """
    q, k, v = in_region(q, k, v)
    batch, query_heads, _, dim = q.shape
    heads = k.shape[1]
    if _has_kernel(q, k, v):
        from nha.ops.triton.full_decode import full_token

        return full_token(q, k, v, mask, dim**-0.5 if scale is None else float(scale))
    rows = q.reshape(batch, heads, query_heads // heads, dim)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, query_heads, v.shape[3])


def _has_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not api.can_skip_autograd([q, k, v]):
        return False
    most = {torch.float32: NARROW_DIM, torch.bfloat16: MAX_DIM, torch.float16: MAX_DIM}.get(q.dtype, 0)
    known = q.dtype == k.dtype == v.dtype and max(q.shape[3], v.shape[3]) <= most
    return known and q.shape[1] // k.shape[1] <= MAX_GROUPS and k.shape[2] > 0


def full_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """Causal attention of the last T of Tk tokens, [B, T, HQ, Dv], without a mask of T x Tk.

    PyTorch has one kernel for that, FlashAttention-2. cuDNN's is faster, but knows squares and their lower triangles
    alone: without gradients it reads the tokens T at a time, and the parts are merged by their log-sum-exps.

    Args:
        q: [B, HQ, T, D]; query head h reads KV head h // (HQ / H).
        k: [B, H, Tk, D].
        v: [B, H, Tk, Dv].
        scale: of the scores, by default D ** -0.5.
        dropout: of the weights.

    >>> q, k = torch.zeros(1, 2, 2, 8), torch.zeros(1, 1, 3, 8)
    >>> full_prefill(q, k, torch.arange(3.0).view(1, 1, 3, 1)).flatten().tolist()
    [0.5, 0.5, 1.0, 1.0]
    """
    q, k, v = in_region(q, k, v)
    length, seen = q.shape[2], k.shape[2]
    read = None if dropout or length == seen else _square_kernel(q, k, v)
    if read is None:
        bias: Tensor = causal_lower_right(length, seen)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale, enable_gqa=grouped).transpose(1, 2)
    own = seen - length
    out, total = read(q, k[:, :, own:], v[:, :, own:], True, scale)
    for start in range(0, own, length):
        stop = min(start + length, own)
        part, lse = read(q, k[:, :, start:stop], v[:, :, start:stop], False, scale)
        out = torch.lerp(out, part, torch.sigmoid(lse - total))
        total = torch.logaddexp(total, lse)
    return out.to(q.dtype).transpose(1, 2)


Read = Callable[[Tensor, Tensor, Tensor, bool, "float | None"], tuple[Tensor, Tensor]]


def _square_kernel(q: Tensor, k: Tensor, v: Tensor) -> Read | None:
    """A kernel that gives, in float32, outputs [B, HQ, T, D] and their log-sum-exps [B, HQ, T, 1], causal or not."""
    if api.needs_grad([q, k, v]) or q.shape[3] != v.shape[3]:
        return None
    if q.device.type == "cpu":
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

        def read(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
            out, lse = operator(q, k, v, 0.0, causal, scale=scale)
            return out.to(lse.dtype), lse[..., None]

        return read
    grouped = q.shape[1] != k.shape[1]
    if q.device.type != "cuda" or not torch.backends.cuda.can_use_cudnn_attention(
        torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, grouped)
    ):
        return None

    def read_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        return found[0].float(), found[1].reshape(*q.shape[:3], 1)

    return read_cudnn
