"""The attention that a family's layers had before the conversion, one sequence a row or packed."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nha.ops import full_decode, full_prefill
from nha.ops.int8_rows import Int8Rows
from nha.ops.sliding_window import GROUPED


def base_attention(
    module: Any,
    query: Tensor,
    key: Tensor | Int8Rows,
    value: Tensor | Int8Rows,
    mask: Tensor | None,
    *,
    softcap: float | None,
    appended: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention that a layer had before: SDPA, or the family's own code where scores are capped.

    With a mask transformers copies keys and values for every query head, and SDPA alone leaves a GPU idle where there
    are few sequences: a single token has an operator of its own.

    Args:
        query: [B, HQ, T, D].
        key, value: [B, H, Tk, D], those of a single token perhaps in 8 bits.
        mask: [B, 1, T, Tk] bool, or None for causal.
        softcap: of the scores.
        appended: without a mask, the last query sees the last of Tk keys; else the first query sees the first.

    Returns:
        output [B, T, HQ, D], and the weights where the family's code gives them.
    """
    length, scale, dropped = query.shape[2], kwargs.get("scaling"), kwargs.get("dropout") or 0.0
    if softcap is None and length == 1 and not dropped and kwargs.get("position_bias") is None:
        return full_decode(query, key, value, mask, scale), None
    if isinstance(key, Int8Rows) or isinstance(value, Int8Rows):
        key, value = (x if isinstance(x, Tensor) else x.dequantize(query.dtype) for x in (key, value))
    appended = appended and mask is None and 1 < length < key.shape[2]
    if softcap is None and appended:
        return full_prefill(query, key, value, scale, dropped), None
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if mask is None:
        diagonal = key.shape[2] - length if appended or length == 1 else 0
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(diagonal)[None, None]
    low = max(torch.finfo(query.dtype).min, torch.finfo(torch.float32).min)  # its softmax is in float32
    additive = torch.where(mask, torch.zeros((), dtype=query.dtype, device=mask.device), low)
    eager = sys.modules[module.family.__module__].eager_attention_forward
    return eager(module, query, key, value, additive, softcap=softcap, **kwargs)


def packed_base_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scaling: float | None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    max_seq_len: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`base_attention` of sequences packed into one row.

    One kernel on a GPU in 16-bit, else sequence by sequence with the very kernel of a sequence alone; never a mask of
    T x T.

    Args:
        query: [1, HQ, T, D].
        key, value: [1, H, T, D].
        cu_seqlens: [N + 1] int32.
        sliding_window: the family's own, in tokens.
        max_seq_len: at least as long as any sequence (default T).
    """
    length = query.shape[2]
    if query.is_cuda and softcap is None and query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest, left = max_seq_len or length, -1 if sliding_window is None else sliding_window - 1
        bounds = (cu_seqlens, cu_seqlens, longest, longest)
        out = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=(left, 0), **GROUPED)
        assert isinstance(out, Tensor)
        return out[None], None
    outs = []
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if start == stop:
            continue
        mask = None
        if sliding_window is not None and stop - start > sliding_window:
            whole = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device)
            mask = (whole.tril() & whole.triu(1 - sliding_window))[None, None]
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        outs.append(base_attention(module, q, k, v, mask, softcap=softcap, scaling=scaling, **kwargs)[0])
    return torch.cat(outs, 1), None
