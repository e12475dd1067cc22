"""Compile the kernels between the products of a layer, or parts of its attention, for a GPU that is not present."""

import torch

from tests.triton import compile_chunk


def call(dtype="bfloat16", length=4096, hidden=4096, inner=14336, dim=128, heads=(32, 8), slots=64):
    """The launches of one layer, without running anything."""
    from nha.ops.triton.merge import merge
    from nha.ops.triton.pointwise import add_norm, attention_inputs, silu_product

    def empty(*shape):
        return torch.empty(*shape, dtype=getattr(torch, dtype))

    x = empty(1, length, hidden)
    add_norm(x, empty(hidden), 1e-5)
    add_norm(x, empty(hidden), 1e-5, x)
    silu_product(empty(1, length, inner), empty(1, length, inner))
    q, k = (empty(1, length, n, dim) for n in heads)
    tables, distance = (empty(1, length, dim),) * 2, (empty(1, 1, dim),) * 2
    for logits in (empty(1, length, heads[1], slots), None):
        attention_inputs(q, k, logits, tables, distance)
    by_head, sums = q.transpose(1, 2), torch.empty(1, heads[0], length, 1)
    merge(by_head.float(), sums, by_head, sums)


if __name__ == "__main__":
    compile_chunk.report(lambda options: compile_chunk.record(lambda: call(**options)))
