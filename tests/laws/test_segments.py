"""Any split of a sequence, down to single tokens, gives the outputs and the state of one call."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nha import NHAState
from tests.inputs import TOKENWISE, assert_close_to, call, cases, gradients, leaves, make, random_loss


def run(flat, cuts, window, state=None, impl="chunked"):
    outs, masses = [], []
    output = None
    for start, stop in itertools.pairwise(cuts):
        part = {n: x[:, start:stop] if n in TOKENWISE else x for n, x in flat.items()}
        output = call(part, window_size=window, state=state, return_state=True, return_slot_mass=True, impl=impl)
        state = output.state
        outs.append(output.out)
        masses.append(output.slot_mass)
    assert output is not None
    return output._replace(out=torch.cat(outs, 1), slot_mass=torch.cat(masses, 1))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@given(case=cases(max_length=50), data=st.data())
def test_any_split_equals_one_call_in_outputs_states_and_gradients(impl, case, data):
    cuts = data.draw(st.lists(st.integers(1, case.length), max_size=5, unique=True).map(sorted))
    cuts = [0, *[c for c in cuts if c < case.length], case.length]
    window = data.draw(st.sampled_from([case.window, -1]))
    flat = leaves(make(case))
    split, whole = run(flat, cuts, window, impl=impl), run(flat, [0, case.length], window, impl="reference")
    assert_close_to(split.out, whole.out, "out")
    assert_close_to(split.slot_mass, whole.slot_mass, "mass")
    for name, tensor in whole.state.tensors().items():
        assert_close_to(split.state.tensors()[name], tensor, name)
    ours, theirs = gradients(flat, random_loss(split)), gradients(flat, random_loss(whole))
    for name in flat:
        assert_close_to(ours[name], theirs[name], name)


@given(case=cases(max_length=30, windows=st.sampled_from([0, 1, 4, 16])))
def test_one_token_at_a_time_equals_one_call(case):
    flat = {n: x.detach() for n, x in leaves(make(case)).items()}
    split = run(flat, list(range(case.length + 1)), case.window)
    whole = run(flat, [0, case.length], case.window)
    assert_close_to(split.out, whole.out)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@given(case=cases(max_length=30, windows=st.sampled_from([0, 1, 4, 16, 40])), data=st.data())
def test_slots_handed_in_live_from_the_first_token_and_get_gradients(impl, case, data):
    cut = data.draw(st.integers(0, case.length - 1))
    flat = leaves(make(case))
    size = (case.batch, case.heads, case.slots)
    slots = [torch.randn(*size, d, dtype=torch.float64, requires_grad=True) for d in (case.dim, case.value_dim)]

    def start():
        return NHAState.from_slots(*slots, case.window, shared_keys=not case.separate)

    cuts = [0, cut, case.length] if cut else [0, case.length]
    ours = run(flat, cuts, case.window, start(), impl)
    exact = run(flat, [0, case.length], case.window, start(), "reference")
    assert (ours.slot_mass > 0).all()
    assert_close_to(ours.out, exact.out)
    for a, b in zip(
        torch.autograd.grad(random_loss(ours), slots),
        torch.autograd.grad(random_loss(exact), slots),
        strict=True,
    ):
        assert_close_to(a, b)
