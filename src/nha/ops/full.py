"""Full attention of one token per text, the step of layers that keep every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nha.ops import api
from nha.ops.autocast import in_region
from nha.ops.limits import MAX_DIM, MAX_GROUPS, NARROW_DIM


def token_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
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
    >>> token_attention(q, k, v, torch.tensor([True, True, False]).view(1, 1, 1, 3)).flatten().tolist()
    [0.5, 0.5, 3.5, 3.5]
    """
    q, k, v = in_region(q, k, v)
    batch, query_heads, _, dim = q.shape
    heads = k.shape[1]
    if _has_kernel(q, k, v):
        from nha.ops.triton.full_op import full_token

        return full_token(q, k, v, mask, dim**-0.5 if scale is None else float(scale))
    rows = q.reshape(batch, heads, query_heads // heads, dim)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, query_heads, v.shape[3])


def _has_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not api.infers([q, k, v]):
        return False
    most = {torch.float32: NARROW_DIM, torch.bfloat16: MAX_DIM, torch.float16: MAX_DIM}.get(q.dtype, 0)
    known = q.dtype == k.dtype == v.dtype and max(q.shape[3], v.shape[3]) <= most
    return known and q.shape[1] // k.shape[1] <= MAX_GROUPS and k.shape[2] > 0
