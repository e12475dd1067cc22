"""Every implementation is as exact as the reference run in the same precision, judged by float64."""

import pytest
import torch
from hypothesis import given

from tests.builders import exponent_rounding, terms_behind
from tests.inputs import (
    Case,
    assert_close_to,
    call,
    cases,
    error,
    gradients,
    leaves,
    make,
    random_loss,
    rounding,
)

PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def results(flat, window, impl):
    output = call(flat, window_size=window, impl=impl, return_state=True, return_slot_mass=True)
    found = {"out": output.out, "mass": output.slot_mass}
    found |= {"slot_key": output.state.slot_key, "slot_value": output.state.slot_value}
    return found | {"d" + n: g for n, g in gradients(flat, random_loss(output)).items()}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=lambda d: str(d).removeprefix("torch."))
@given(case=cases(max_length=60))
def test_chunked_errs_at_most_twice_as_much_as_the_reference(dtype, case):
    low = leaves(make(case, dtype))
    exact = results({n: x.detach().double().requires_grad_() for n, x in low.items()}, case.window, "reference")
    reference = results(low, case.window, "reference")
    sizes = terms_behind(low, exact)
    for name, got in results(low, case.window, "chunked").items():
        # A gradient sums one rounded term per query that reads the token.
        terms = case.length * case.query_heads if name.startswith("d") else 1
        size = torch.maximum(sizes[name], exact[name].abs().max()) if name in sizes else exact[name]
        band = exponent_rounding(low["log_gate"]) * terms**0.5 * rounding(size, torch.float32)
        bound = 2 * (error(reference[name], exact[name]) + max(band, terms**0.5 * rounding(size, dtype)))
        assert error(got, exact[name]) <= bound, (name, error(got, exact[name]), bound)


@given(case=cases(max_length=60))
def test_capped_scores_agree_in_float64(case):
    flat = leaves(make(case))
    found = []
    for impl in ("reference", "chunked"):
        output = call(flat, window_size=case.window, impl=impl, softcap=0.7, return_state=True, return_slot_mass=True)
        found.append({"out": output.out, "mass": output.slot_mass} | gradients(flat, random_loss(output)))
    for name, exact in found[0].items():
        assert_close_to(found[1][name], exact, name)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=lambda d: str(d).removeprefix("torch."))
def test_states_stay_float32_and_outputs_keep_their_dtype(dtype):
    flat = leaves(make(Case(), dtype))
    output = call(flat, window_size=3, return_state=True)
    assert output.out.dtype == dtype
    assert output.state.slot_key.dtype == output.state.slot_value.dtype == torch.float32
    assert output.state.key.dtype == dtype


@pytest.mark.parametrize("window", [0, 1, 5, 16, 21])
@pytest.mark.parametrize("sinks", [0, 2])
def test_gradcheck_in_float64(window, sinks):
    flat = leaves(make(Case(batch=1, length=21, query_heads=2, heads=1, dim=3, value_dim=2, slots=2, sinks=sinks)))

    def function(*tensors):
        output = call(
            dict(zip(flat, tensors, strict=True)),
            window_size=window,
            return_state=True,
            return_slot_mass=True,
        )
        return output.out, output.slot_mass, output.state.slot_key, output.state.slot_value

    assert torch.autograd.gradcheck(function, tuple(flat.values()), fast_mode=False)


def test_chunked_operators_are_well_formed():
    case = Case(batch=1, length=20, query_heads=2, heads=1, dim=3, value_dim=2, slots=2)
    flat = leaves(make(case))
    state = call(flat, window_size=3, return_state=True).state
    assert state is not None
    args = (
        flat["q"],
        torch.cat([state.key, flat["k"]], 1),
        torch.cat([state.value, flat["v"]], 1),
        flat["q_slot"],
        flat["k_slot"],
        flat["log_gate"],
        torch.cat([state.slot_key, state.slot_value], -1),
        flat["k"].new_zeros(1, 0, 3),
        flat["v"].new_zeros(1, 0, 2),
        torch.zeros(1, dtype=torch.int64),
        3,
        0.5,
        0.0,
        False,
        True,
        True,
    )
    torch.library.opcheck(torch.ops.nha.chunked.default, [a.detach() if torch.is_tensor(a) else a for a in args])
