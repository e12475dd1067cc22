"""Full causal attention: of a segment whose window holds every token, and of the last tokens of a long sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nha.ops import backends
from nha.ops.autocast import cast_for_autocast
from nha.ops.int8_rows import Int8Rows
from nha.ops.padding import align_left, restore
from nha.ops.state import NHAState, advance, slot_dtype
from nha.ops.validation import MAX_DIM, MAX_GROUPS, NARROW_DIM
from nha.ops.varlen import each_sequence

MIN_PART = 1024  # keys that `full_prefill` reads at a time, at least


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    k_slot: Tensor,
    *,
    scale: float,
    softcap: float | None,
    state: NHAState,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, NHAState]:
    """`nha_attention` where no token leaves the window: SDPA over window cache and segment, no slots.

    Returns outputs [B, T, HQ, Dv], a slot mass of zeros [B, T, HQ] and the state after the segment; without `keep` the
    state that was given.
    """
    if cu_seqlens is not None:
        return each_sequence(full_attention, (q, k, v, log_gate, k_slot), scale, softcap, state, cu_seqlens)
    count = None
    if attention_mask is not None:
        q, k, v, log_gate, k_slot = align_left(attention_mask, q, k, v, log_gate, k_slot)
        count = attention_mask.sum(1)
    past, length = state.key.shape[1], q.shape[1]
    keys, values, mask = k, v, None
    if past:
        keys, values = torch.cat([state.key, k], 1), torch.cat([state.value, v], 1)
        token = torch.arange(past + length, device=q.device)
        query = past + torch.arange(length, device=q.device)[:, None]
        mask = (token <= query) & (token >= past - state.num_tokens[:, None, None])
        mask = mask[:, None]
    out = causal_attention(q, keys, values, mask, scale=scale, softcap=softcap)
    mass = q.new_zeros((), dtype=slot_dtype(q.dtype)).expand(q.shape[:3])
    if keep:
        state = advance(state, k, v, log_gate, k_slot, (state.slot_key, state.slot_value), count)
    if attention_mask is not None:
        out = restore(attention_mask, out)
    return out, mass, state


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float, softcap: float | None
) -> Tensor:
    """Attention [B, T, HQ, Dv] of q [B, T, HQ, D] to k, v [B, Tk, H, ...]: causal, or where `mask` [B, 1, T, Tk] is."""
    heads = [aligned(x).transpose(1, 2) for x in (q, k, v)]
    if softcap is not None:
        return capped_attention(*heads, mask=mask, scale=scale, softcap=softcap).transpose(1, 2)
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}  # a comparison is no bool while compiling
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None, scale=scale, **grouped)
    return out.transpose(1, 2)


def aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy where rows [D] do not begin at multiples of 16 bytes.

    Fused attention kernels of a GPU load 16 bytes at a time. Given other layouts some return wrong numbers silently.
    """
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return x
    width = x.element_size()
    whole = x.stride(-1) == 1 and all(step * width % 16 == 0 for step in x.stride()[:-1])
    return x if whole and x.data_ptr() % 16 == 0 else x.contiguous()


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention with scores capped as c * tanh(score / c), which SDPA lacks: q [B, HQ, T, D], k, v [B, H, Tk, ...]."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    if mask is None:
        mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril()
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    score = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    weights = score.masked_fill(~mask, float("-inf")).softmax(-1, dtype=slot_dtype(q.dtype))
    return weights.to(v.dtype) @ v


def full_decode(
    q: Tensor, k: Tensor | Int8Rows, v: Tensor | Int8Rows, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Softmax attention of one token, [B, 1, HQ, Dv], that reads keys and values once and copies none.

    On a GPU a kernel loads only keys that are not masked and fills the GPU at any batch; its grid depends on Tk and B,
    never on the mask, so that a CUDA graph can replay it. Elsewhere, and for gradients, it is SDPA.

    Args:
        q: [B, HQ, 1, D]; query head h reads KV head h // (HQ / H).
        k: [B, H, Tk, D], any strides, or such rows in 8 bits.
        v: [B, H, Tk, Dv], as `k`.
        mask: [B, 1, 1, Tk] or [1, 1, 1, Tk] bool, True = attend, or None for all keys.
        scale: of the scores, by default D ** -0.5.

    >>> q, k = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 3, 8)
    >>> v = torch.arange(6.0).view(1, 2, 3, 1)
    >>> full_decode(q, k, v, torch.tensor([True, True, False]).view(1, 1, 1, 3)).flatten().tolist()
    [0.5, 0.5, 3.5, 3.5]
    """
    if isinstance(k, Int8Rows):
        assert isinstance(v, Int8Rows)
        (q,) = cast_for_autocast(q)
        if not _has_kernel(q, k.numbers, v.numbers):
            return full_decode(q, k.dequantize(q.dtype), v.dequantize(q.dtype), mask, scale)
        from nha.ops.triton.full_decode import full_decode as kernel

        scale = q.shape[3] ** -0.5 if scale is None else float(scale)
        return kernel(q, k.numbers, v.numbers, mask, scale, k.scale, v.scale)
    query, key, value = cast_for_autocast(q, k, v)
    batch, query_heads, _, dim = query.shape
    if _has_kernel(query, key, value):
        from nha.ops.triton.full_decode import full_decode as kernel

        return kernel(query, key, value, mask, dim**-0.5 if scale is None else float(scale))
    rows = query.reshape(batch, key.shape[1], query_heads // key.shape[1], dim)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, query_heads, value.shape[3])


def _has_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not backends.can_skip_autograd([q, k, v]):
        return False
    max_dim = {torch.float32: NARROW_DIM, torch.bfloat16: MAX_DIM, torch.float16: MAX_DIM}.get(q.dtype, 0)
    supported = k.dtype in (q.dtype, torch.int8) and k.dtype == v.dtype and max(q.shape[3], v.shape[3]) <= max_dim
    return supported and q.shape[1] // k.shape[1] <= MAX_GROUPS and k.shape[2] > 0


def full_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """Causal attention of the last T of Tk tokens, [B, T, HQ, Dv], without a mask of T x Tk.

    PyTorch has one kernel for it, FlashAttention-2. cuDNN's is faster but takes T x T scores only, causal or not:
    without gradients it attends to T keys at a time, and the parts are merged by their log-sum-exps. Few tokens after
    many would make thousands of parts, so they take the first kernel, or on a CPU parts of `MIN_PART` keys.

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
    q, k, v = (aligned(x) for x in cast_for_autocast(q, k, v))
    length, keys = q.shape[2], k.shape[2]
    short = q.device.type != "cpu" and length < MIN_PART
    attend = None if dropout or short or length == keys else _square_kernel(q, k, v)
    if attend is None:
        bias: Tensor = causal_lower_right(length, keys)
        grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale, **grouped).transpose(1, 2)
    past, size = keys - length, max(length, MIN_PART)
    out, total = attend(q, k[:, :, past:], v[:, :, past:], True, scale)
    out, total = out.to(total.dtype), total.contiguous()
    for start in range(0, past, size):
        stop = min(start + size, past)
        merge_parts(out, total, *attend(q, k[:, :, start:stop], v[:, :, start:stop], False, scale))
    return out.to(q.dtype).transpose(1, 2)


def merge_parts(out: Tensor, total: Tensor, part: Tensor, lse: Tensor) -> None:
    """Let attention to some keys include a further part of them, in place.

    Args:
        out: [B, HQ, T, D], in the dtype of `total`.
        total: log-sum-exps of the scores, [B, HQ, T, 1] contiguous.
        part: [B, HQ, T, D], the outputs of the part.
        lse: [B, HQ, T, 1], its log-sum-exps.

    >>> out, total = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1)
    >>> merge_parts(out, total, torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 1))
    >>> out.flatten().tolist(), round(total.item(), 4)
    ([0.5, 0.5], 0.6931)
    """
    if backends.can_skip_autograd([out]) and backends.can_skip_dispatch([out, part]):
        from nha.ops.triton.merge import merge

        merge(out, total, part, lse)
        return
    out.lerp_(part.to(out.dtype), torch.sigmoid(lse - total))
    torch.logaddexp(total, lse, out=total)


SquareKernel = Callable[[Tensor, Tensor, Tensor, bool, "float | None"], tuple[Tensor, Tensor]]


def _square_kernel(q: Tensor, k: Tensor, v: Tensor) -> SquareKernel | None:
    """A kernel that returns outputs [B, HQ, T, D] and log-sum-exps [B, HQ, T, 1], causal or not; or None."""
    if backends.needs_grad([q, k, v]) or q.shape[3] != v.shape[3]:
        return None
    if q.device.type == "cpu":
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

        def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
            out, lse = operator(q, k, v, 0.0, causal, scale=scale)
            return out, lse[..., None]

        return attend
    grouped = q.shape[1] != k.shape[1]
    if q.device.type != "cuda" or not torch.backends.cuda.can_use_cudnn_attention(
        torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, grouped)
    ):
        return None

    def attend_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
        results = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
        return results[0], results[1].reshape(*q.shape[:3], 1)

    return attend_cudnn
