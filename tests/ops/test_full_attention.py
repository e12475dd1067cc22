"""Full attention of the last tokens of a sequence, computed in parts, equals attention with a mask."""

import pytest
import torch
import torch.nn.functional as F

from nha.ops import full_attention as module
from nha.ops import full_prefill


def make(length, seen, dim=8, value_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, length, dim), (2, 2, seen, dim), (2, 2, seen, value_dim)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def masked(q, k, v, scale=None):
    length, seen = q.shape[2], k.shape[2]
    mask = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("length, seen", [(5, 5), (5, 6), (5, 10), (5, 17), (1, 4)])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_parts_merge_to_attention_with_a_mask(length, seen, scale, monkeypatch):
    monkeypatch.setattr(module, "MIN_PART", 1)
    q, k, v = make(length, seen)
    torch.testing.assert_close(full_prefill(q, k, v, scale), masked(q, k, v, scale), rtol=1e-12, atol=1e-12)


def test_few_tokens_after_many_take_few_parts(monkeypatch):
    calls, kernel = [], module._square_kernel

    def counted(*given):
        attend = kernel(*given)
        return lambda *args: calls.append(args) or attend(*args)

    monkeypatch.setattr(module, "_square_kernel", counted)
    q, k, v = make(4, 2500)
    torch.testing.assert_close(full_prefill(q, k, v), masked(q, k, v), rtol=1e-12, atol=1e-12)
    assert len(calls) == 1 + 3


def test_half_precision_errs_no_more_than_twice_as_much_as_one_kernel():
    exact = masked(*make(7, 40))
    given = make(7, 40, dtype=torch.bfloat16)
    assert full_prefill(*given).dtype == torch.bfloat16
    errors = [(found.double() - exact).square().mean().sqrt() for found in (full_prefill(*given), masked(*given))]
    assert errors[0] <= 2 * errors[1]


def test_values_of_another_size_and_gradients_take_the_kernel_that_has_them():
    q, k, v = make(5, 12, value_dim=4)
    torch.testing.assert_close(full_prefill(q, k, v), masked(q, k, v))
    q, k, v = (x.requires_grad_() for x in make(5, 12))
    found, wanted = (torch.autograd.grad(read(q, k, v).square().sum(), (q, k, v)) for read in (full_prefill, masked))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
