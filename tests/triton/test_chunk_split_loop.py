"""Long windows, most of whose keys are read in a loop without masks (SPLIT_INNER_LOOP).

The kernels split the loop for 16-bit dtypes, where the interpreter computes the gates' gradients and bfloat16 wrong. So
most tests split it in float32, with smaller blocks and windows.
"""

import itertools

import pytest
import torch

from tests.builders import TOKENWISE, Case, call, gradients, leaves, make, random_loss
from tests.triton.test_chunk import DEVICE, assert_within, bounds, double, inputs, results

ODD = Case(batch=1, length=187, query_heads=3, heads=1, window=77, sinks=1)
EVEN = Case(batch=2, length=150, query_heads=2, heads=1, window=96, separate=False)


@pytest.fixture
def changed(monkeypatch):
    """A function that changes some block sizes of the calls that follow."""
    from nha.ops.triton.chunk import call

    original = call.block_sizes

    def change(**sizes):
        monkeypatch.setattr(call, "block_sizes", lambda *args: original(*args)._replace(**sizes))

    return change


@pytest.fixture
def split_loop(changed):
    changed(split_inner_loop=True, warps=4, stages=3, block_h=2, block_n=32)


def assert_within_twice_the_error_of_the_reference(flat, case, **options):
    exact = results(double(flat), case.window, "reference", **options)
    bound = bounds(flat, case, exact, results(flat, case.window, "reference", **options))
    got = results(flat, case.window, "triton", **options)
    assert_within(got, exact, bound)
    return got


@pytest.mark.parametrize("case, block_h, block_n", [(ODD, 1, 16), (EVEN, 2, 32)], ids=["odd sizes", "two heads"])
def test_sequences_longer_than_the_window(case, block_h, block_n, changed):
    changed(split_inner_loop=True, warps=4, stages=3, block_h=block_h, block_n=block_n)
    assert_within_twice_the_error_of_the_reference(inputs(case), case)


@pytest.mark.usefixtures("split_loop")
def test_a_padded_row():
    mask = torch.ones(2, EVEN.length, dtype=torch.bool, device=DEVICE)
    mask[1, :31] = False
    got = assert_within_twice_the_error_of_the_reference(inputs(EVEN), EVEN, attention_mask=mask)
    assert not got["out"][~mask].any()


@pytest.mark.usefixtures("split_loop")
def test_packed_sequences():
    cu = torch.tensor([0, 3, 3, 140, 187], dtype=torch.int32, device=DEVICE)
    assert_within_twice_the_error_of_the_reference(inputs(ODD), ODD, cu_seqlens=cu)


@pytest.mark.usefixtures("split_loop")
def test_segments_continue_from_a_window_cache_whether_full_or_not():
    def split(flat, cuts, impl):
        outs, state = [], None
        for start, stop in itertools.pairwise(cuts):
            part = {n: x[:, start:stop] if n in TOKENWISE else x for n, x in flat.items()}
            options = {"state": state, "return_state": True, "return_slot_mass": True, "impl": impl}
            outs.append(call(part, window_size=ODD.window, **options))
            state = outs[-1].state
        whole = outs[-1]._replace(
            out=torch.cat([o.out for o in outs], 1), slot_mass=torch.cat([o.slot_mass for o in outs], 1)
        )
        found = {"out": whole.out, "mass": whole.slot_mass, **whole.state.tensors()}
        return found | {"d" + n: g for n, g in gradients(flat, random_loss(whole)).items()}

    flat = inputs(ODD)
    exact = split(double(flat), [0, ODD.length], "reference")
    bound = bounds(flat, ODD, exact, split(flat, [0, ODD.length], "reference"))
    assert_within(split(flat, [0, 20, 104, ODD.length], "triton"), exact, bound)


def test_float16_without_changes():
    case = Case(batch=1, length=389, query_heads=1, heads=1, window=260)
    flat = {n: x.detach().to(DEVICE, torch.float16).requires_grad_() for n, x in leaves(make(case)).items()}
    exact = results(double(flat), case.window, "reference")
    bound = bounds(flat, case, exact, results(flat, case.window, "reference"))
    del exact["dlog_gate"]
    assert_within(results(flat, case.window, "triton"), exact, bound)


def test_the_loop_is_split_in_16_bits_from_a_window_of_256_on():
    from nha.ops.triton.chunk.tiling import H100_SHARED_MEMORY, block_sizes

    def sizes(window, dtype=torch.bfloat16, groups=4, dim=128):
        return block_sizes(dtype, dim, dim, 64, 0, H100_SHARED_MEMORY, window, groups)

    assert sizes(256).split_inner_loop and not sizes(255).split_inner_loop
    assert sizes(512, torch.float16).split_inner_loop
    assert not sizes(512, torch.float32).split_inner_loop and not sizes(512, dim=256).split_inner_loop
    assert [sizes(512, groups=n).block_h for n in (1, 2, 3, 4, 5, 7)] == [1, 2, 1, 2, 2, 2]
    assert sizes(255) == block_sizes(torch.bfloat16, 128, 128, 64, 0, groups=4)
    for made in (sizes(512), sizes(512, torch.float16)):
        assert made.chunk % made.block_n == 0 and made.chunk % made.bwd_block_n == 0
