"""Compile the kernels of one token's linear layers for a GPU that is not present, as `compile_decode` does."""

from typing import Any

import torch

from tests.triton import compile_chunk


def call(dtype="bfloat16", hidden=4096, inner=14336, dim=128, heads=(32, 8), slots=64, bias=False, **tiles):
    """The launches of one layer, without running anything."""
    from nha.ops.triton.token import TILES, Norm, token_inputs, token_linear, token_mlp

    def empty(*shape):
        return torch.empty(*shape, dtype=getattr(torch, dtype))

    own, x, norm = TILES._replace(**tiles), empty(1, 1, hidden), Norm(empty(hidden), 1e-5)
    linears: Any = [(empty(n, hidden), empty(n) if bias else None) for n in (dim * heads[0], *[dim * heads[1]] * 2)]
    gate, tables = (empty(heads[1] * slots, hidden), empty(heads[1] * slots)), (empty(1, 1, dim), empty(1, 1, dim))
    count = torch.zeros(1, dtype=torch.int64)
    for own_gate in (gate, None):
        options = {"head_dim": dim, "num_slots": slots, "num_tokens": count, "tiles": own}
        token_inputs(x, norm, tuple(linears), own_gate, tables, tables, **options)
    products = token_mlp(x, norm, empty(inner, hidden), empty(inner, hidden), own)
    token_linear(products, empty(hidden, inner), x, tiles=own)


if __name__ == "__main__":
    compile_chunk.report(lambda options: compile_chunk.record(lambda: call(**options)))
