"""Rotary positions undone for the slots: the kernel against the formula, in the interpreter or on a GPU."""

import pytest
import torch

from nha.ops import rotary
from tests.triton.compilation import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tables(batch, length, size, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    angle = 100 * torch.rand(batch, length, size // 2, generator=generator).repeat(1, 1, 2)
    return [(scale * f(angle)).to(DEVICE, dtype) for f in (torch.cos, torch.sin)]


@pytest.mark.parametrize(
    ("length", "heads", "groups", "dim", "size", "dtype"),
    [(1, 2, 3, 16, 16, torch.float32), (37, 1, 2, 24, 24, torch.float16), (20, 2, 1, 16, 12, torch.float32)],
    ids=["token", "odd", "part of the head"],
)
@pytest.mark.parametrize("alike", [True, False], ids=["one table", "a table per row"])
def test_the_kernel_equals_the_formula(length, heads, groups, dim, size, dtype, alike):
    from nha.ops.triton.unrotate import unrotate_for_slots

    generator = torch.Generator().manual_seed(1)
    q, k = (
        torch.randn(3, h, length, dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for h in (heads * groups, heads)
    )
    positions = tables(1 if alike else 3, length, size, scale=1.3)
    distance = tables(1, 1, size, seed=2)
    found = unrotate_for_slots(q, k, *positions, *distance)
    exact = rotary.unrotate_for_slots(q.double(), k.double(), positions, distance)
    for out, wanted, x in zip(found, exact, (q, k), strict=True):
        assert out.shape == x.shape and out.dtype == dtype and out.is_contiguous()
        assert (out.double() - wanted).abs().max() <= 8 * torch.finfo(dtype).eps * x.abs().max()


@pytest.mark.parametrize("size", [16, 12], ids=["whole", "part of the head"])
def test_gradients_equal_those_of_the_formula(size):
    from nha.ops.triton.unrotate import unrotate_for_slots

    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 9, 4, 16), (2, 9, 2, 16))
    pair, grads = ([torch.randn(*s, generator=generator).to(DEVICE) for s in shapes] for _ in range(2))
    positions, distance = tables(1, 9, size, scale=1.3), tables(1, 1, size, seed=2)
    found = []
    for view, dtype in (
        (lambda q, k: unrotate_for_slots(q, k, *positions, *distance), torch.float32),
        (lambda q, k: rotary.unrotate_for_slots(q, k, positions, distance), torch.float64),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in pair]
        found.append(torch.autograd.grad(view(*leaves), leaves, [g.to(dtype) for g in grads]))
    for grad, wanted in zip(*found, strict=True):
        assert (grad.double() - wanted).abs().max() <= 8 * torch.finfo(torch.float32).eps * wanted.abs().max()


def test_the_operator_passes_opcheck():
    import nha.ops.triton.unrotate  # noqa: F401  (registers it)

    q, k = (torch.randn(1, 5, heads, 16, device=DEVICE, requires_grad=True) for heads in (4, 2))
    operator = torch.ops.nha.unrotate_for_slots.default
    torch.library.opcheck(operator, (q, k, *tables(1, 5, 16), *tables(1, 1, 16, seed=2)))


def test_the_kernel_runs_on_a_gpu(monkeypatch):
    monkeypatch.setattr(rotary.backends, "resolve_impl", lambda impl, device: "triton")
    q = torch.zeros(1, 2, 1, 4, dtype=torch.bfloat16)
    assert rotary._has_kernel(q, q) and rotary._has_kernel(q.clone().requires_grad_(), q)
    assert not rotary._has_kernel(q.double(), q.double()) and not rotary._has_kernel(q.float(), q)


def test_the_kernel_compiles_without_spills():
    shapes: list[dict] = [{}, {"length": 1}, {"dtype": "float32", "dim": 96, "rotated": 48}]
    shapes += [{"dtype": "float16", "capability": capability} for capability in (80, 89, 100, 120)]
    for row in compiled("compile_unrotate", *shapes):
        assert row["stack"] == 0 and row["shared"] <= 99 << 10, row
