"""Compile the kernel of what slots see for a GPU that is not there, as `decode_only` does."""

import torch

from tests.triton import compile_only


def call(dtype="bfloat16", batch=1, length=4096, dim=128, size=128):
    """The launch of one shape, without running anything."""
    from nha.ops.triton.unrotate import unrotate_for_slots

    q, k = (torch.empty(batch, length, heads, dim, dtype=getattr(torch, dtype)) for heads in (32, 8))
    tables, distance = (torch.empty(1, n, size, dtype=q.dtype) for n in (length, 1))
    unrotate_for_slots(q, k, tables, tables, distance, distance)


if __name__ == "__main__":
    compile_only.report(lambda options: compile_only.record(lambda: call(**options)))
