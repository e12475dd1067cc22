"""Compile the kernel that undoes rotary positions for a GPU that is not present, as `compile_decode` does."""

import torch

from tests.triton import compile_chunk


def call(dtype="bfloat16", batch=1, length=4096, dim=128, rotated=128):
    """The launch of one shape, without running anything."""
    from nha.ops.triton.unrotate import unrotate_for_slots

    q, k = (torch.empty(batch, length, heads, dim, dtype=getattr(torch, dtype)) for heads in (32, 8))
    tables, distance = (torch.empty(1, n, rotated, dtype=q.dtype) for n in (length, 1))
    unrotate_for_slots(q, k, tables, tables, distance, distance)


if __name__ == "__main__":
    compile_chunk.report(lambda options: compile_chunk.record(lambda: call(**options)))
