"""Compile the kernel that writes a ring for a GPU that is not present, as `compile_decode` does."""

import torch

from tests.triton import compile_chunk


def call(dtype="bfloat16", batch=1, length=4096, dim=128, window=64, slots=64, padded=False):
    """The launch of one shape, without running anything."""
    from nha.ops.triton.ring import ring_after_prompt

    k, gate = (torch.empty(batch, length, 8, size, dtype=getattr(torch, dtype)) for size in (dim, slots))
    filled = torch.empty(batch, 8, slots, dim)
    count = torch.empty(batch, dtype=torch.int64) if padded else None
    ring_after_prompt(k, k, gate, k, (filled, filled), window, count)


if __name__ == "__main__":
    compile_chunk.report(lambda options: compile_chunk.record(lambda: call(**options)))
