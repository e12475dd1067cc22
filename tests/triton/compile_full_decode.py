"""Compile the kernels of full attention for one token for a GPU that is not present, as `compile_decode` does."""

import torch

from tests.triton import compile_chunk

compile_chunk.NAMES.setdefault(torch.int8, "i8")


def call(
    dtype="bfloat16",
    batch=1,
    heads=8,
    groups=4,
    dim=128,
    value_dim=None,
    length=32768,
    masked=True,
    int8=False,
    shared=None,
):
    """The launches of one shape, without running anything; with `int8` those of a cache in 8 bits, which is written."""
    from nha.ops.triton import full_decode as op
    from nha.ops.triton.full_decode import full_decode
    from nha.ops.triton.int8_rows import write_rows

    q = torch.empty(batch, heads * groups, 1, dim, dtype=getattr(torch, dtype))
    k, v = (q.new_empty(batch, heads, length, d) for d in (dim, value_dim or dim))  # never touched
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool).expand(batch, 1, 1, length) if masked else None
    if shared is not None:  # bytes, where a GPU has less shared memory than an H100
        op.shared_memory = lambda device: shared
    if not int8:
        full_decode(q, k, v, mask, 0.1)
        return
    numbers = [x.new_empty(x.shape, dtype=torch.int8) for x in (k, v)]
    scale = torch.empty(batch, heads, length, 1)
    write_rows(k[:, :, :1], numbers[0], scale, torch.zeros((), dtype=torch.int64))
    full_decode(q, *numbers, mask, 0.1, scale, scale)


if __name__ == "__main__":
    compile_chunk.report(lambda options: compile_chunk.record(lambda: call(**options)))
