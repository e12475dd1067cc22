"""Compile the kernel of the loss for a GPU that is not there, as `decode_only` does."""

import torch

from tests.triton import compile_only


def call(dtype="bfloat16", vocabulary=49152, taught=True, cap=None):
    """The launch of one shape, without running anything."""
    from nha.ops.triton.loss import chunk_loss

    hidden, weight = (torch.empty(n, 16, dtype=getattr(torch, dtype)) for n in (64, vocabulary))
    by = torch.empty(64)
    chunk_loss(hidden, hidden if taught else None, weight, torch.empty(64, dtype=torch.int64), by, by, 1.0, cap)


if __name__ == "__main__":
    compile_only.report(lambda options: compile_only.record(lambda: call(**options)))
