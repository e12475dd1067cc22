"""The linear layers of one token: kernels against PyTorch's operators, in the interpreter or on a GPU."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nha.layer import log_gate
from nha.ops import rotary
from tests.inputs import error, rounding
from tests.triton.compilation import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, INNER, D, M = 72, 40, 16, 8


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def weight(rows, seed, dtype):
    return random(rows, HIDDEN, dtype=dtype, seed=seed) / HIDDEN**0.5


def norm(dtype):
    from nha.ops.triton.token import Norm

    return Norm(1 + random(HIDDEN, dtype=dtype, seed=9) / 4, 1e-5)


def normed(x, own, dtype):
    x, gain = x.to(dtype), own.weight.to(dtype)
    return gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + own.eps))


def tables(seed, scale) -> Any:
    angle = 6 * torch.rand(1, 1, D // 2, generator=torch.Generator().manual_seed(seed)).repeat(1, 1, 2)
    return [(scale * f(angle)).to(DEVICE) for f in (torch.cos, torch.sin)]


def assert_near(got, function, dtype):
    """Twice the error of PyTorch in the same dtype and its rounding, judged by float64."""
    exact, plain = function(torch.float64), function(dtype)
    for name, (found, wanted, same) in enumerate(zip(got, exact, plain, strict=True)):
        assert found.shape == wanted.shape and found.dtype == dtype
        assert error(found, wanted) <= 2 * (error(same, wanted) + rounding(wanted, dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("groups", [3, 1])
def test_inputs_of_attention(dtype, bias, groups):
    from nha.ops.triton.token import TILES, token_inputs

    x, own, heads = random(1, 1, HIDDEN, dtype=dtype), norm(dtype), 2
    rows = [heads * groups * D, heads * D, heads * D, heads * M]
    biases = [random(n, dtype=dtype, seed=n) if bias else None for n in rows]
    linears: Any = [(weight(n, i, dtype), b) for i, (n, b) in enumerate(zip(rows, biases, strict=True))]
    projections, gate = tuple(linears[:3]), linears[3]
    position, distance = tables(1, 1.3), tables(2, 1.1)

    def plain(kind):
        y = normed(x, own, kind)
        q, k, v, logits = (F.linear(y, w.to(kind), None if b is None else b.to(kind)) for w, b in linears)
        q, k, v = (z.unflatten(-1, (-1, D)) for z in (q, k, v))
        turned = [rotary.rotate(z, *(t.to(kind) for t in position)) for z in (q, k)]
        return *turned, v, log_gate(logits, heads), *rotary.unrotate_for_slots(turned[0], turned[1], position, distance)

    options: dict[str, Any] = {"head_dim": D, "num_slots": M, "tiles": TILES._replace(block_k=32)}
    found: Any = token_inputs(x, own, projections, gate, position, distance, **options)
    assert_near(found, plain, dtype)
    for seen in (0, 1):
        count = torch.tensor([seen], device=DEVICE)
        gated = token_inputs(x, own, projections, gate, position, distance, num_tokens=count, **options)
        assert gated.log_gate is not None and torch.equal(gated.log_gate, seen * found.log_gate)
    without = token_inputs(x, own, projections, None, position, distance, **options)
    assert without[3:] == (None, None, None)
    assert all(torch.equal(a, b) for a, b in zip(without[:3], found[:3], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products(dtype):
    from nha.ops.triton.token import TILES, token_linear, token_mlp

    x, own, residual = random(1, 1, HIDDEN, dtype=dtype), norm(dtype), random(1, 1, INNER, dtype=dtype, seed=5)
    gate, up = weight(INNER, 1, dtype), weight(INNER, 2, dtype)
    tiles = TILES._replace(block_k=32)

    def mlp(kind):
        y = normed(x, own, kind)
        return (F.silu(F.linear(y, gate.to(kind))) * F.linear(y, up.to(kind)),)

    assert_near((token_mlp(x, own, gate, up, tiles=tiles),), mlp, dtype)
    for one, other in ((None, None), (residual, None), (None, own)):

        def linear(kind, one=one, other=other):
            y = x.to(kind) if other is None else normed(x, other, kind)
            return (F.linear(y, gate.to(kind)) + (0 if one is None else one.to(kind)),)

        assert_near((token_linear(x, gate, one, other, tiles),), linear, dtype)


def test_the_kernels_compile_without_spills():
    small = {"hidden": 576, "inner": 1536, "dim": 64, "heads": [9, 3]}
    shapes: list[dict] = [small | {"bias": True}, small | {"capability": 120, "dtype": "float32"}]
    shapes += [small | {"capability": capability} for capability in (80, 89, 100)]
    for row in compiled("compile_token", *shapes):
        assert row["stack"] == 0 and row["shared"] <= 99 << 10, row
