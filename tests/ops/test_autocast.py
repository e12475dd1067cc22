"""In a region of autocast the operator takes what SDPA takes, and computes in the region's dtype."""

import pytest
import torch

from nha import nha_attention
from tests.inputs import Case, make

CASE = Case(batch=2, length=20, query_heads=4, heads=2, dim=8, value_dim=6, slots=5, window=3)


@pytest.fixture
def flat():
    return {name: x.float().requires_grad_() for name, x in make(CASE).items() if name in ("q", "k", "v", "log_gate")}


def lowered(flat):
    return {name: x if name == "log_gate" else x.bfloat16() for name, x in flat.items()}


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_mixed_inputs_give_what_inputs_of_the_regions_dtype_give(flat, impl):
    options = {"window_size": 3, "impl": impl, "return_state": True}
    wanted = nha_attention(**lowered(flat), **options)
    mixed = flat | {"v": flat["v"].bfloat16()}
    sink = [torch.ones(2, 1, size) for size in (8, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        found = nha_attention(mixed["q"], mixed["k"], mixed["v"], mixed["log_gate"], **options)
        sunk = nha_attention(**mixed, sink=(sink[0], sink[1]), q_slot=flat["q"], k_slot=flat["k"], **options)
    assert found.out.dtype == torch.bfloat16
    assert torch.equal(found.out, wanted.out)
    assert torch.equal(found.state.slot_value, wanted.state.slot_value)
    assert sunk.out.dtype == torch.bfloat16 and not torch.equal(sunk.out, wanted.out)


def test_gradients_keep_the_dtype_of_their_inputs(flat):
    with torch.autocast("cpu", torch.bfloat16):
        nha_attention(**flat, window_size=3).out.float().sum().backward()
    for name, x in flat.items():
        assert x.grad.dtype == torch.float32, name


def test_double_precision_is_left_alone(flat):
    double = {name: x.detach().double() for name, x in flat.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = nha_attention(**double, window_size=3).out
    assert torch.equal(found, nha_attention(**double, window_size=3).out)


def test_inputs_that_do_not_fit_are_still_refused(flat):
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="expected q of.*got torch.int64"):
            nha_attention(**{name: x.detach().long() for name, x in flat.items()}, window_size=3)
        with pytest.raises(ValueError, match="expected q to be a tensor.*got list"):
            nha_attention(**flat | {"q": [1]}, window_size=3)


def test_a_region_of_autocast_compiles_without_a_break(flat):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v, log_gate):
        with torch.autocast("cpu", torch.bfloat16):
            return nha_attention(q, k, v, log_gate, window_size=3).out

    held = {name: x.detach() for name, x in flat.items()}
    with torch.autocast("cpu", torch.bfloat16):
        wanted = nha_attention(**held, window_size=3).out
    assert torch.equal(run(**held), wanted)
