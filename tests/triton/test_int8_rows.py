"""Keys and values in 8 bits: written by a kernel and read by the kernel of one token, in Triton's interpreter."""

import pytest
import torch

from nha.ops.full_attention import full_decode
from nha.ops.int8_rows import Int8Rows, write_rows
from tests.inputs import error, rounding
from tests.triton.test_full_decode import DEVICE, _kernel, definition, low, make, mask_of  # noqa: F401


def cache(batch, heads, length, dim):
    numbers = torch.full((batch, heads, length, dim), 99, dtype=torch.int8, device=DEVICE)
    return Int8Rows(numbers, torch.full((batch, heads, length, 1), 7.0, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("dim", [16, 80])
def test_the_kernel_writes_the_bits_of_the_definition(dtype, dim):
    generator = torch.Generator().manual_seed(0)
    size = 10.0 ** torch.randint(-4, 5, (2, 3, 5, 1), generator=generator)
    x = (torch.randn(2, 5, 3, dim, generator=generator).transpose(1, 2) * size).to(DEVICE, dtype)
    x[0, 0, 0], x[1, 0, 0, :4] = 0, torch.tensor([127.5, 0.5, 1.5, -2.5])  # a row of zeros, and ties
    rows, wanted = cache(2, 3, 9, dim), Int8Rows.of(x)
    write_rows(x, rows, torch.tensor(3, device=DEVICE))
    for found, new, untouched in zip(rows, wanted, (99, 7.0), strict=True):
        assert torch.equal(found[:, :, 3:8], new)
        assert (found[:, :, :3] == untouched).all() and (found[:, :, 8:] == untouched).all()


@pytest.mark.parametrize("mask", ["none", "static cache", "left padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("length, groups, dim", [(5, 7, 16), (2100, 2, 128), (1100, 1, 80)])
def test_one_token_reads_the_rounded_keys_and_values(length, groups, dim, dtype, mask):
    q, k, v = make(length, groups, dim=dim, value_dim=dim, dtype=dtype)
    rows = Int8Rows.of(k), Int8Rows.of(v)
    k, v = (x.dequantize(dtype) for x in rows)
    mask = mask_of(mask, length)
    exact = definition(*(x.double() for x in (q, k, v)), mask)
    found = full_decode(q, *rows, mask)
    assert found.dtype == dtype and error(found, exact) <= 2 * (error(low(q, k, v, mask), exact) + rounding(v, dtype))


def test_the_operator_on_8_bits_passes_opcheck():
    from nha.ops.triton.full_decode import full_decode as op

    q, k, v = make(300, 2)
    k, v = Int8Rows.of(k), Int8Rows.of(v)
    torch.library.opcheck(op, (q, k.numbers, v.numbers, None, 0.25, k.scale, v.scale))
