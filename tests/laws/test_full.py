"""W = -1, and any W >= T, is causal softmax attention."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nha import nha_attention
from tests.inputs import Case, assert_close_to, call, cases, gradients, leaves, make, random_loss


def sdpa(q, k, v, **_):
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@given(case=cases(max_length=40), extra=st.sampled_from([-1, 0, 1, 50]))
def test_a_window_that_covers_the_sequence_is_full_attention(impl, case, extra):
    flat = leaves(make(case))
    window = -1 if extra == -1 else case.length + extra
    output = call(flat, window_size=window, impl=impl, return_slot_mass=True)
    exact = sdpa(**flat)
    assert_close_to(output.out, exact)
    assert output.slot_mass is not None and not output.slot_mass.any()
    weight = torch.randn_like(exact)
    ours = gradients(flat, (output.out * weight).sum())
    theirs = gradients(flat, (exact * weight).sum())
    for name in flat:
        assert_close_to(ours[name], theirs[name], name)


def test_full_attention_needs_no_gates():
    inputs = make(Case())
    a = nha_attention(inputs["q"], inputs["k"], inputs["v"], None, window_size=-1)
    assert_close_to(a.out, sdpa(**inputs))


@given(case=cases(max_length=40, windows=st.just(3)))
def test_slots_change_the_result_once_a_token_leaves_the_window(case):
    inputs = make(case)
    ours = nha_attention(**inputs, window_size=3).out
    exact = sdpa(**inputs)
    assert_close_to(ours[:, :3], exact[:, :3])


def test_random_loss_covers_states():
    flat = leaves(make(Case()))
    grads = gradients(flat, random_loss(call(flat, window_size=7, return_state=True)))
    assert all(g.abs().sum() > 0 for g in grads.values())
