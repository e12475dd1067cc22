"""What the Triton kernels cannot run; needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DIM, MAX_SLOTS = 256, 128
# Beyond these, float32 kernels miss the law's bound on an H100 (heads of 256) or fail there (128 slots, Triton 3.6);
# the decoding kernel takes 128 slots.
MAX_EXACT_DIM, MAX_EXACT_SLOTS = 128, 64


def unsupported(q: Tensor, v: Tensor, log_gate: Tensor, softcap: float | None, decoding: bool) -> str | None:
    """Why the kernels, or that for decoding, cannot run these inputs, in one line, or None.

    >>> q = torch.empty(1, 9, 4, 512)
    >>> unsupported(q, q, torch.empty(1, 9, 4, 64), None, decoding=False)
    'head dims 512 and 512 in torch.float32: the kernels go up to 128'
    """
    if softcap is not None:
        return f"softcap={softcap}: the kernels have none"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {q.dtype}: the kernels know float32, bfloat16 and float16"
    exact = q.dtype == torch.float32
    dim, slots = MAX_EXACT_DIM if exact else MAX_DIM, MAX_EXACT_SLOTS if exact and not decoding else MAX_SLOTS
    if max(q.shape[-1], v.shape[-1]) > dim:
        return f"head dims {q.shape[-1]} and {v.shape[-1]} in {q.dtype}: the kernels go up to {dim}"
    if not 1 <= log_gate.shape[-1] <= slots:
        return f"{log_gate.shape[-1]} slots in {q.dtype}: the kernels take 1 to {slots}"
    return None
