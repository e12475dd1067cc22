"""Kernels between a layer's products against PyTorch's operators, in the interpreter or on a GPU."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nha.layer import log_gate
from nha.ops import rotary
from tests.triton.compilation import compiled
from tests.triton.test_token import HIDDEN, assert_near, norm, normed, random, tables

LENGTH, D, M = 19, 16, 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_and_products(dtype):
    from nha.ops.triton.pointwise import add_norm, silu_product

    x, y, own = random(2, LENGTH, HIDDEN, dtype=dtype), random(2, LENGTH, HIDDEN, dtype=dtype, seed=1), norm(dtype)
    total, out = add_norm(x, *own)
    assert total is x
    assert_near((out,), lambda kind: (normed(x, own, kind),), dtype)

    def added(kind):
        both = x.to(kind) + y.to(kind)
        return both, normed(both, own, kind)

    assert_near(add_norm(x, *own, y), added, dtype)
    assert_near((silu_product(x.clone(), y),), lambda kind: (F.silu(x.to(kind)) * y.to(kind),), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("length", [1, LENGTH])
def test_inputs_of_attention(dtype, length):
    from nha.ops.triton.pointwise import attention_inputs

    q, k = (random(2, length, heads, D, dtype=dtype, seed=heads) for heads in (6, 2))
    logits = random(2, length, 2, M, dtype=dtype, seed=7)
    position: Any = [torch.cat([t] * length, 1).expand(2, -1, -1) for t in tables(1, 1.3)]
    distance = tables(2, 1.1)

    def plain(kind):
        rotated = [rotary.rotate(x.to(kind), *(t.to(kind) for t in position)) for x in (q, k)]
        gates = log_gate(logits.to(kind).flatten(2), 2)
        return *rotated, gates, *rotary.unrotate_for_slots(rotated[0], rotated[1], position, distance)

    found = attention_inputs(q, k, logits, position, distance)
    assert_near(found, plain, dtype)
    without = attention_inputs(q, k, None, position, distance)
    assert without[2:] == (None, None, None) and torch.equal(without[0], found[0]) and torch.equal(without[1], found[1])


def test_the_kernels_compile_without_spills():
    shapes: list[dict] = [{}, {"hidden": 576, "inner": 1536, "dim": 64, "heads": [9, 3], "capability": 120}]
    shapes += [{"capability": capability} for capability in (80, 89, 100)]
    for row in compiled("compile_pointwise", *shapes):
        assert row["stack"] == 0 and row["shared"] <= 99 << 10, row
