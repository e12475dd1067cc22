"""Keys and values of full attention in 8 bits: D numbers of 8 bits and a scale for each token and head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops.backends import can_skip_autograd, can_skip_dispatch
from nha.ops.packed_state import pack_rows
from nha.settings import KV_CACHE_DTYPES, check_choice


def check_kv_cache_dtype(kv_cache_dtype: object) -> None:
    """Raise ValueError for a name that is none of `KV_CACHE_DTYPES`.

    >>> check_kv_cache_dtype("fp8")
    Traceback (most recent call last):
    ValueError: expected kv_cache_dtype to be one of auto, int8, got 'fp8'
    """
    check_choice("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES)


def row_bytes(kv_cache_dtype: str, dim: int, itemsize: int) -> int:
    """Bytes of one token's key or value of a head in such a cache, `itemsize` those of a number of the model's dtype.

    >>> row_bytes("auto", 64, 2), row_bytes("int8", 64, 2)
    (128, 68)
    """
    return dim + torch.float32.itemsize if kv_cache_dtype == "int8" else dim * itemsize


class Int8Rows(NamedTuple):
    """Rows of D numbers [B, H, T, D] int8 and their scales [B, H, T, 1] float32, which are powers of 2."""

    numbers: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Int8Rows:
        """Round rows [..., D] to multiples of their scale, the least power of 2 with which all fit into 8 bits.

        The error of a number is at most half a scale, and so at most 1 / 127 of the largest number of its row. Rows
        that were rounded before stay as they are.

        >>> rows = Int8Rows.of(torch.tensor([[1.0, -0.503, 0.0]]))
        >>> rows.numbers.tolist(), rows.scale.tolist()
        ([[64, -32, 0]], [[0.015625]])
        """
        found = pack_rows("x", x.detach())
        numbers, scale = found["x"], found["x_scale"]
        assert numbers is not None and scale is not None
        return cls(numbers, scale.float())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The numbers times their scales: exact in bfloat16 and float32.

        >>> Int8Rows(torch.tensor([[64, -32]], dtype=torch.int8), torch.tensor([[0.5]])).dequantize(torch.bfloat16)
        tensor([[ 32., -16.]], dtype=torch.bfloat16)
        """
        return (self.numbers * self.scale).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.numbers.nbytes + self.scale.nbytes


def write_rows(x: Tensor, rows: Int8Rows, start: Tensor) -> None:
    """Round x [B, H, T, D] and write it into rows [B, H, Tmax, D] from token `start` on, a tensor of one int64.

    >>> rows = Int8Rows(torch.zeros(1, 1, 3, 2, dtype=torch.int8), torch.ones(1, 1, 3, 1))
    >>> write_rows(torch.ones(1, 1, 1, 2), rows, torch.tensor(2))
    >>> rows.dequantize(torch.float32).flatten().tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    """
    if can_skip_autograd([x]) and can_skip_dispatch([x, *rows]):
        from nha.ops.triton.int8_rows import write_rows as kernel

        kernel(x, *rows, start)
        return
    place = torch.arange(x.shape[2], device=x.device) + start
    for held, new in zip(rows, Int8Rows.of(x), strict=True):
        held.index_copy_(2, place, new)
