"""What the Triton kernels cannot run; needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM, MAX_SLOTS = 256, 128
# In float32 wide heads leave room for fewer slots, and the decoding kernel takes none.
NARROW_DIM, WIDE_SLOTS = 128, 64
MAX_GROUPS = 16  # query heads of a KV head that the kernel of one token under full attention takes


def unsupported(q: Tensor, v: Tensor, log_gate: Tensor, softcap: float | None, decoding: bool) -> str | None:
    """Why the kernels, or that for decoding, cannot run these inputs, in one line, or None.

    >>> q = torch.empty(1, 9, 4, 512)
    >>> unsupported(q, q, torch.empty(1, 9, 4, 64), None, decoding=False)
    'head dims 512 and 512 in torch.float32: the kernels go up to 256'
    """
    if softcap is not None:
        return f"softcap={softcap}: the kernels have none"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: the kernels know float32, bfloat16 and float16"
    exact, width, slots = q.dtype == torch.float32, max(q.shape[-1], v.shape[-1]), log_gate.shape[-1]
    most = NARROW_DIM if exact and decoding else MAX_DIM
    if width > most:
        return f"head dims {q.shape[-1]} and {v.shape[-1]} in {q.dtype}: the kernels go up to {most}"
    most = WIDE_SLOTS if exact and width > NARROW_DIM else MAX_SLOTS
    if not 1 <= slots <= most:
        beside = f" with head dims {q.shape[-1]} and {v.shape[-1]}" if most < MAX_SLOTS else ""
        return f"{slots} slots in {q.dtype}{beside}: the kernels take 1 to {most}"
    return None
