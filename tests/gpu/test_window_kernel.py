"""PyTorch's kernel of a window equals the matrix products of `sliding_window_attention`, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nha.ops.sliding_window import has_window_kernel, sliding_window_attention, windowed_kernel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [1, 64, 120, 256])
@pytest.mark.parametrize("query_heads", [2, 4])
def test_the_kernel_errs_no_more_than_matrix_products_in_the_same_dtype(window, query_heads):
    length = 512
    cu = torch.arange(0, 3 * length + 1, length, dtype=torch.int32, device="cuda")
    shapes = [(query_heads, 64), (2, 64), (2, 64)]
    exact = [torch.randn(1, 3 * length, *s, device="cuda", dtype=torch.float64, requires_grad=True) for s in shapes]
    weight = torch.randn(1, 3 * length, query_heads, 64, device="cuda", dtype=torch.float64)
    options: dict[str, Any] = dict(window_size=window, cu_seqlens=cu, scale=64**-0.5)

    def run(inputs, kernel):
        q, k, v = inputs
        if kernel:
            assert has_window_kernel(q, v, None, None)
            out = windowed_kernel(q, k, v, **options, max_seq_len=length)
        else:
            out = sliding_window_attention(q, k, v, q, None, **options)
        return [out, *torch.autograd.grad((out * weight).sum(), inputs)]

    wanted = run(exact, False)
    # Where a gradient cancels, as in a window of one key, the rounding of the sums that cancel is left.
    largest = weight.abs().max() * max(x.abs().max() for x in exact)
    sums = 64 * torch.finfo(torch.float32).eps * largest
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    for found, products, right in zip(run(rounded, True), run(rounded, False), wanted, strict=True):
        bound = 2 * (products.double() - right).abs().max() + torch.finfo(torch.bfloat16).eps * right.abs().max()
        assert (found.double() - right).abs().max() <= bound + sums
