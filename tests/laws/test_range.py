"""For every finite input everything returned is finite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inputs import Case, call, cases, error, gradients, leaves, make, random_loss

GATES = {
    "open": lambda g: torch.zeros_like(g),
    "floor": lambda g: torch.full_like(g, -5.0),
    "far below the floor": lambda g: torch.full_like(g, -1e4),
    "above zero": lambda g: torch.full_like(g, 1e4),
    "alternating": lambda g: torch.where(torch.arange(g.shape[1])[:, None, None] % 2 == 0, 0.0, -5.0).expand_as(g),
}


def everything(flat, window):
    output = call(flat, window_size=window, return_state=True, return_slot_mass=True)
    grads = gradients(flat, random_loss(output))
    return {"out": output.out, "mass": output.slot_mass, **output.state.tensors(), **grads}


@pytest.mark.parametrize("gates", GATES)
@given(case=cases(max_length=70), size=st.sampled_from([1.0, 100.0]))
def test_extreme_gates_and_scores_stay_finite_and_right(gates, case, size):
    inputs = make(case, torch.float32)
    inputs["log_gate"] = GATES[gates](inputs["log_gate"]).contiguous()
    for name in ("q", "k", "q_slot", "k_slot"):
        if name in inputs:
            inputs[name] = inputs[name] * size  # size 100 makes scores of about 1e4
    flat = leaves(inputs)
    for name, tensor in everything(flat, case.window).items():
        assert tensor.isfinite().all(), name
    if size == 1.0:
        out = call(flat, window_size=case.window).out
        exact = call({n: x.double() for n, x in flat.items()}, window_size=case.window, impl="reference").out
        assert error(out, exact) <= 1e4 * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("window", [0, 1, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_lengths_around_the_window_stay_finite(window, offset):
    case = Case(length=max(1, window + offset), window=window, sinks=1)
    for name, tensor in everything(leaves(make(case, torch.float32)), window).items():
        assert tensor.isfinite().all(), name


def test_gradient_of_a_clamped_gate_is_zero():
    flat = leaves(make(Case(length=40)))
    with torch.no_grad():
        flat["log_gate"][:, ::2] = -7.0
        flat["log_gate"][:, 1::4] = 1.0
    grads = gradients(flat, random_loss(call(flat, window_size=3, return_state=True)))
    assert not grads["log_gate"][:, ::2].any() and not grads["log_gate"][:, 1::4].any()
    assert grads["log_gate"][:, 3::4].any()
