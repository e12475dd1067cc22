"""Other sequences in a batch change no bit of a sequence; other shapes change it by rounding."""

import itertools

import pytest
import torch

from nha import nha_attention
from tests.inputs import Case, make

LENGTHS = [1, 20, 100, 300]
WINDOWS = [0, 16, -1]


def inputs(length, dtype, batch=4):
    case = Case(batch=batch, length=length, query_heads=8, heads=2, dim=32, value_dim=32, slots=16, separate=False)
    return make(case, dtype)


def replaced(values, keep):
    """Other numbers wherever `keep` [B, T] is False."""
    other = {name: -x.abs() - 0.1 if name == "log_gate" else x.flip(-1) * 3 + 1 for name, x in values.items()}
    return {name: torch.where(keep[:, :, None, None], x, other[name]) for name, x in values.items()}


def left_padding(counts, length):
    return torch.arange(length) >= length - torch.tensor(counts)[:, None]


def assert_rounded(actual, exact):
    bound = 4 * torch.finfo(exact.dtype).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS)
def test_other_contents_of_the_batch_change_no_bit(window, length, dtype):
    values = inputs(length, dtype)
    mask = left_padding([length, max(1, length // 2), max(1, length - 3), max(1, length // 3)], length)
    row = torch.zeros(4, length, dtype=torch.bool)
    row[1] = mask[1]
    options = {"window_size": window, "return_state": True, "attention_mask": mask}
    ours, theirs = (nha_attention(**x, **options) for x in (values, replaced(values, row)))
    assert torch.equal(ours.out[1], theirs.out[1])
    assert torch.equal(ours.state.slot_value[1], theirs.state.slot_value[1])


@pytest.mark.parametrize("window", WINDOWS)
def test_other_packed_sequences_change_no_bit(window):
    values = inputs(100, torch.float32, batch=1)
    keep = torch.zeros(1, 100, dtype=torch.bool)
    keep[:, 30:75] = True
    options = {"window_size": window, "cu_seqlens": torch.tensor([0, 30, 75, 100], dtype=torch.int32)}
    ours, theirs = (nha_attention(**x, **options).out for x in (values, replaced(values, keep)))
    assert torch.equal(ours[:, 30:75], theirs[:, 30:75])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_row_alone_differs_from_the_row_in_a_batch_by_rounding(window, length, dtype):
    values = inputs(length, dtype)
    counts = [length, max(1, length // 2), max(1, length - 3), max(1, length // 3)]
    padded = nha_attention(**values, window_size=window, attention_mask=left_padding(counts, length)).out
    for b, count in enumerate(counts):
        alone = {name: x[b : b + 1, length - count :] for name, x in values.items()}
        assert_rounded(padded[b : b + 1, length - count :], nha_attention(**alone, window_size=window).out)
    bounds = [0, max(1, length // 3), length]
    one = {name: x[:1] for name, x in values.items()}
    packed = nha_attention(**one, window_size=window, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).out
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            alone = {name: x[:, start:stop] for name, x in one.items()}
            assert_rounded(packed[:, start:stop], nha_attention(**alone, window_size=window).out)
