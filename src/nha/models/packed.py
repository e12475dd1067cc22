"""Matrices in 2 or 8 bits a number with a scale per row, for small files."""

from __future__ import annotations

import torch
from torch import Tensor

# Of 2 bits: the levels of least squared error for normally distributed numbers of deviation 1 (Max 1960).
NORMAL_LEVELS = (-1.5104, -0.4528, 0.4528, 1.5104)
REFINEMENTS = 4  # of a row's scale; the error changes by under 0.1 % after these
BITS = (2, 8)


def levels_of(bits: int) -> Tensor:
    """The levels of all codes [2 ** bits] float32, ascending; rows are scaled by them.

    >>> [round(x, 2) for x in levels_of(2).tolist()], levels_of(8)[[0, 128, 255]].tolist()
    ([-1.51, -0.45, 0.45, 1.51], [-128.0, 0.0, 127.0])
    """
    if bits not in BITS:
        raise ValueError(f"expected bits out of {BITS}, got {bits}")
    return torch.tensor(NORMAL_LEVELS) if bits == 2 else torch.arange(-128.0, 128.0)


def pack_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns * bits / 8] uint8 and scales [rows] float32, on the CPU, of a matrix [rows, columns].

    Raises ValueError where a row does not fill whole bytes.

    >>> codes, scale = pack_rows(torch.tensor([[-3.0, -1.0, 1.0, 3.0]]), 2)
    >>> [round(x, 2) for x in unpack_rows(codes, scale, 2)[0].tolist()]
    [-3.03, -0.91, 0.91, 3.03]
    """
    levels, per_byte = levels_of(bits), 8 // bits
    if x.dim() != 2 or x.shape[1] % per_byte:
        raise ValueError(f"expected a matrix with a multiple of {per_byte} columns, got shape {list(x.shape)}")
    x, levels = x.detach().float(), levels.to(x.device)
    if bits == 8:
        scale = x.abs().amax(1) / 127
        codes = _nearest(x, scale, levels)
    else:
        scale = x.square().mean(1).sqrt()
        codes = _nearest(x, scale, levels)
        for _ in range(REFINEMENTS):  # the scale of least error for the codes, then the codes for that scale
            chosen = levels[codes.long()]
            scale = (x * chosen).sum(1) / chosen.square().sum(1)
            codes = _nearest(x, scale, levels)
    shifts = bits * torch.arange(per_byte, device=x.device)
    packed = (codes.reshape(len(x), -1, per_byte) << shifts).sum(-1)
    return packed.to(torch.uint8).cpu(), scale.cpu()


def _nearest(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    borders = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(x / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None], borders)


def unpack_rows(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The matrix [rows, columns] float32 of `pack_rows`."""
    shifts = bits * torch.arange(8 // bits)
    each = (codes.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)
    return levels_of(bits)[each].reshape(len(codes), -1) * scale.float()[:, None]
