"""One token under full attention as a PyTorch operator."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops.triton.chunk.tiling import DTYPES, width
from nha.ops.triton.full_decode_kernel import full_kernel, merge_kernel
from nha.ops.triton.launcher import launch
from nha.ops.triton.primitives import LOG2_E
from nha.ops.validation import MAX_GROUPS

PROGRAMS = 528  # the most into which a small batch is cut: four for every multiprocessor, which holds two at a time
LEAST_BLOCKS = 4  # blocks of keys that are worth a program
TILE_BYTES = 2**15  # keys and values of a block


class Sizes(NamedTuple):
    """What the kernel is compiled for; nothing depends on the number of texts or of tokens."""

    key: int
    value: int
    block: int  # keys of a block
    together: int  # parts that are put together at a time


@cache
def sizes(dtype: torch.dtype, dim: int, value_dim: int) -> Sizes:
    """Sizes within the registers and shared memory of a current GPU, also of one with 100 KB."""
    exact = dtype == torch.float32
    key, value = (width(d, 16 if exact else 64) for d in (dim, value_dim))  # see `plan.blocks`
    block = 1 << (TILE_BYTES // ((key + value) * dtype.itemsize)).bit_length() - 1
    return Sizes(key, value, min(max(16, block), 64 if exact else 128), min(4096 // value, 32))


def parts_of(length: int, pairs: int, block: int) -> int:
    """Into how many parts `length` keys of each of `pairs` (row, KV head) are cut."""
    blocks = -(-length // block)
    return max(min(PROGRAMS // pairs, blocks // LEAST_BLOCKS), 1)


def _alike(number: int) -> tuple[bool, bool, bool]:
    """What Triton compiles for in an integer argument."""
    return number == 1, number % 16 == 0, number < 2**31


@torch.library.custom_op("nha::full_token", mutates_args=())
def full_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """out [B, 1, HQ, Dv] of q [B, HQ, 1, D], k [B, H, Tk, D], v [B, H, Tk, Dv]; mask [B, 1, 1, Tk] bool."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, query_heads, _, dim = q.shape
    heads, length, value_dim = k.shape[1], k.shape[2], v.shape[3]
    groups, size = query_heads // heads, sizes(q.dtype, dim, value_dim)
    parts = parts_of(length, batch * heads, size.block)
    out = v.new_empty(batch, 1, query_heads, value_dim)
    left = (batch * heads, parts, groups)
    whole = parts == 1
    partial = out if whole else q.new_empty(*left, value_dim, dtype=torch.float32)
    peaks, norms = (out if whole else q.new_empty(left, dtype=torch.float32) for _ in range(2))
    at = None if mask is None else mask.expand(batch, 1, 1, length).view(torch.int8)
    strides = (
        q.stride(0),
        q.stride(1),
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0) if at is None else at.stride()[::3]),
    )
    kind = (q.dtype, q.device, *map(_alike, strides))
    launch(
        full_kernel,
        (batch * heads * parts,),
        kind,
        q,
        k,
        v,
        at,
        partial,
        peaks,
        norms,
        out,
        *strides,
        scale * LOG2_E.value,
        length,
        parts,
        heads,
        groups,
        D=dim,
        DV=value_dim,
        KEY=size.key,
        VALUE=size.value,
        ROWS=MAX_GROUPS,
        BLOCK=size.block,
        DTYPE=DTYPES[q.dtype],
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        MASKED=at is not None,
        WHOLE=whole,
        num_warps=4,
        num_stages=3,
    )
    if not whole:
        launch(
            merge_kernel,
            (batch * query_heads,),
            (out.dtype, out.device),
            partial,
            peaks,
            norms,
            out,
            parts,
            groups,
            DV=value_dim,
            VALUE=size.value,
            TOGETHER=size.together,
            num_warps=4,
        )
    return out


@full_token.register_fake
def _(q, k, v, mask, scale):
    return v.new_empty(q.shape[0], 1, q.shape[1], v.shape[3])
