"""Full attention for one token against the definition, in Triton's interpreter, or on a GPU if there is one."""

import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.deterministic

import nha.ops.backends
from nha.ops import full_decode
from nha.ops.validation import MAX_GROUPS
from tests.inputs import error, rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = ["none", "left padding", "static cache", "scattered", "one key"]


@pytest.fixture(autouse=True)
def _kernel(monkeypatch):
    """ "auto" is the kernel, and memory that no kernel wrote is NaN."""
    monkeypatch.setattr(nha.ops.backends, "resolve_impl", lambda impl, device="cpu": "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make(length, groups, batch=2, heads=2, dim=16, value_dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads * groups, 1, dim), (batch, heads, length, dim), (batch, heads, length, value_dim)
    return [(2 * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for shape in shapes]


def mask_of(name, length, batch=2):
    """[B, 1, 1, Tk]; each row sees other keys."""
    place, row = torch.arange(length, device=DEVICE), torch.arange(batch, device=DEVICE)[:, None]
    if name == "none":
        return None
    if name == "left padding":
        seen = place >= (row * length) // 3
    elif name == "static cache":
        seen = place <= length // 3 - row
    elif name == "scattered":
        seen = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.1
    else:
        seen = place == length - 1 - row
    seen[:, -1] |= ~seen.any(1)
    return seen[:, None, None]


def definition(q, k, v, mask, scale=None):
    """The softmax, in the dtype of its inputs."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    score = (q @ k.mT) * (q.shape[3] ** -0.5 if scale is None else scale)
    score = score if mask is None else score.masked_fill(~mask, -math.inf)
    return (score.softmax(-1) @ v).transpose(1, 2)


def low(q, k, v, mask):
    """The definition with operands in the dtype of the inputs, and sums in float32 as in every kernel."""
    dtype, groups = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = q.float(), *(x.float().repeat_interleave(groups, 1) for x in (k, v))
    score = (q @ k.mT) * q.shape[3] ** -0.5
    score = score if mask is None else score.masked_fill(~mask, -math.inf)
    weight = (score - score.amax(-1, keepdim=True)).exp()
    read = weight.to(dtype).float() @ v / weight.sum(-1, keepdim=True)
    return read.to(dtype).transpose(1, 2)


def assert_right(q, k, v, mask):
    """Twice the error of the definition in the low precision, and its rounding, judged by float64."""
    exact = definition(*(x.double() for x in (q, k, v)), mask)
    found = full_decode(q, k, v, mask)
    assert found.shape == exact.shape and found.dtype == v.dtype and found.is_contiguous()
    assert error(found, exact) <= 2 * (error(low(q, k, v, mask), exact) + rounding(v, q.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length, groups", [(1, 4), (5, 7), (64, 3), (64, 16), (300, 1), (1025, 4)])
def test_one_token_equals_the_definition(length, groups, mask, dtype):
    assert_right(*make(length, groups, dtype=dtype), mask_of(mask, length))


@pytest.mark.parametrize("dim, value_dim", [(8, 24), (80, 48), (128, 128)])
def test_any_head_size(dim, value_dim):
    assert_right(*make(700, 2, dim=dim, value_dim=value_dim), mask_of("left padding", 700))


@pytest.mark.parametrize("programs, min_blocks, splits", [(1, 1, 1), (12, 1, 3), (528, 1, 35), (528, 4, 8)])
@pytest.mark.parametrize("mask", ["none", "static cache"])
def test_any_number_of_splits(programs, min_blocks, splits, mask, monkeypatch):
    from nha.ops.triton import full_decode as op

    monkeypatch.setattr(op, "PROGRAMS", programs)
    monkeypatch.setattr(op, "MIN_BLOCKS", min_blocks)
    q, k, v = make(1100, 2, dim=128, value_dim=128)
    assert op.count_splits(1100, 4, op.block_sizes(q.dtype, 128, 128).block_n) == splits
    assert_right(q, k, v, mask_of(mask, 1100))


def test_few_sequences_fill_a_gpu_and_many_end_in_small_waves():
    from nha.ops.triton.full_decode import count_splits

    assert [count_splits(n, 8, 64) for n in (1, 448, 512, 4096, 2**15, 2**17)] == [1, 1, 2, 16, 66, 66]
    assert [count_splits(2**15, pairs, 64) for pairs in (64, 264, 265, 872, 5280)] == [8, 16, 16, 5, 1]
    assert [count_splits(n, 872, 64) for n in (1, 1024, 2048, 4096, 2**17)] == [1, 1, 1, 2, 5]


def test_offsets_beyond_32_bits(monkeypatch):
    """Keys whose heads, and values whose tokens, are more than 2^31 elements apart, in memory that is never touched."""
    q, k, v = make(300, 2, batch=1, dtype=torch.float16)
    wanted = full_decode(q, k, v, None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    wide_key = q.new_empty(2**31 + 2**16).as_strided(k.shape, (0, 2**31, 16, 1))
    wide_value = q.new_empty(300 * 2**23).as_strided(v.shape, (0, 16, 2**23, 1))
    assert torch.equal(full_decode(q, wide_key.copy_(k), wide_value.copy_(v), None), wanted)


@pytest.mark.parametrize("length", [70, 1100])
def test_masked_keys_are_not_read(length):
    q, k, v = make(length, 3)
    mask = mask_of("scattered", length)
    wanted = full_decode(q, k, v, mask)
    hidden = ~mask[:, 0, 0, None, :].expand(-1, k.shape[1], -1)
    for x in (k, v):
        x[hidden] = math.nan
    assert torch.equal(full_decode(q, k, v, mask), wanted)
    hidden[:] = False
    k[0, 0, length // 2], mask[0, ..., length // 2] = math.nan, True
    assert full_decode(q, k, v, mask)[0, 0, :3].isnan().all()  # keys that are not masked are read


@pytest.mark.parametrize("length", [70, 1100])
def test_a_row_that_sees_no_key_gets_zeros(length):
    q, k, v = make(length, 2)
    mask = mask_of("left padding", length)
    mask[1] = False
    found = full_decode(q, k, v, mask)
    assert not found[1].any()
    assert torch.equal(found[:1], full_decode(q[:1], k[:1], v[:1], mask[:1]))


def test_splits_without_a_key_have_no_weight():
    """Scores far below zero: if an empty split's maximum were 0, it would outweigh all others."""
    q, k, v = make(2048, 2)
    q, k = 60 * q.abs(), -k.abs()
    mask = mask_of("one key", 2048)
    wanted = torch.stack([v[i, :, 2047 - i].repeat_interleave(2, 0)[None] for i in range(2)])
    assert error(full_decode(q, k, v, mask), wanted) <= rounding(wanted, torch.float32)


def test_views_of_caches_and_masks_are_read_in_place():
    q, k, v = make(1000, 4)
    mask = mask_of("left padding", 1000)
    wanted = full_decode(q, k, v, mask)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 3, 1100, 40), math.nan, device=DEVICE)
    view = wide[:, 1:, 50:1050, 3:19]
    view.copy_(v)
    rows = torch.zeros(2, 1, 5, 1200, dtype=torch.bool, device=DEVICE)
    rows[:, :, 3:4, 7:1007] = mask
    assert torch.equal(full_decode(q, k, view, rows[:, :, 3:4, 7:1007]), wanted)
    assert torch.equal(full_decode(q, k, view, mask[:1]), full_decode(q, k, v, mask[:1].expand(2, -1, -1, -1)))


def test_the_operator_passes_opcheck():
    from nha.ops.triton.full_decode import full_decode as op

    for mask in (None, mask_of("scattered", 300)):
        torch.library.opcheck(op, (*make(300, 2), mask, 0.25))


@pytest.mark.parametrize("groups, dtype", [(MAX_GROUPS + 1, torch.float32), (2, torch.float64)])
def test_unsupported_inputs_go_through_sdpa(groups, dtype):
    q, k, v = make(40, groups, dtype=dtype)
    mask = mask_of("left padding", 40)
    exact = definition(*(x.double() for x in (q, k, v)), mask)
    bound = 2 * (error(definition(q, k, v, mask), exact) + rounding(v, dtype))
    assert error(full_decode(q, k, v, mask), exact) <= bound


def test_gradients_go_through_sdpa():
    inputs = [x.requires_grad_() for x in make(40, 2)]
    mask = mask_of("left padding", 40)

    def gradients(function, inputs):
        return torch.autograd.grad(function(*inputs, mask).square().sum(), inputs)

    def separate(q, k, v, mask):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    wide = [x.detach().double().requires_grad_() for x in inputs]
    every = (gradients(f, x) for f, x in ((full_decode, inputs), (separate, inputs), (definition, wide)))
    for found, other, exact in zip(*every, strict=True):
        assert error(found, exact) <= 2 * (error(other, exact) + rounding(exact, torch.float32))


def test_autocast():
    q, k, v = make(100, 2)
    with torch.autocast(DEVICE, torch.float16):
        found = full_decode(q, k, v, None)
    assert torch.equal(found, full_decode(q.half(), k.half(), v.half(), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_parts_of_attention_are_merged_by_one_kernel(dtype):
    from nha.ops.triton.merge import merge

    generator = torch.Generator().manual_seed(0)
    out, part = (torch.randn(2, 37, 3, 24, generator=generator).transpose(1, 2).to(DEVICE) for _ in range(2))
    total, lse = (20 * torch.randn(2, 3, 37, 1, generator=generator).to(DEVICE) for _ in range(2))
    part = part.to(dtype)
    weight = torch.sigmoid((lse - total).double())
    exact = torch.lerp(out.double(), part.double(), weight), torch.logaddexp(total.double(), lse.double())
    merge(out, total, part, lse)
    for found, wanted in zip((out, total), exact, strict=True):
        assert error(found, wanted) <= 4 * rounding(wanted, torch.float32)
