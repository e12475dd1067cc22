"""W = 0 is Gated Slot Attention: two gated linear recurrences around a softmax."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inputs import assert_close_to, call, cases, gradients, leaves, make


def gated_slot_attention(q, k, v, log_gate, q_slot=None, k_slot=None):
    """The parallel form, O(T^2): both recurrences unrolled into decay-weighted sums."""
    q, k = (q if q_slot is None else q_slot), (k if k_slot is None else k_slot)
    groups = q.shape[2] // k.shape[2]
    gate = log_gate.clamp(-5, 0)
    total = gate.cumsum(1)
    causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    decay = (total[:, :, None] - total[:, None]).masked_fill(~causal[None, :, :, None, None], -torch.inf).exp()
    write = decay * -torch.expm1(gate)[:, None]  # [B, T, T, H, M]: share of token j in slot m at time t
    slot_key = torch.einsum("btjhm,bjhd->bthmd", write, k)
    slot_value = torch.einsum("btjhm,bjhd->bthmd", write, v)
    score = torch.einsum("bthgd,bthmd->bthgm", q.unflatten(2, (-1, groups)), slot_key) * q.shape[-1] ** -0.5
    out = torch.einsum("bthgm,bthmd->bthgd", score.softmax(-1), slot_value)
    return out.flatten(2, 3), slot_key[:, -1], slot_value[:, -1]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@given(case=cases(max_length=40, windows=st.just(0)))
def test_window_zero_is_gated_slot_attention(impl, case):
    inputs = make(case)
    inputs.pop("sink", None)
    flat = leaves(inputs)
    output = call(flat, window_size=0, impl=impl, return_state=True)
    out, slot_key, slot_value = gated_slot_attention(**flat)
    assert_close_to(output.out, out, "out")
    assert output.state is not None
    assert_close_to(output.state.slot_key, slot_key, "slot_key")
    assert_close_to(output.state.slot_value, slot_value, "slot_value")
    weights = [torch.randn_like(x) for x in (out, slot_key, slot_value)]

    def loss(results):
        return sum((x * w).sum() for x, w in zip(results, weights, strict=True))

    ours = gradients(flat, loss((output.out, output.state.slot_key, output.state.slot_value)))
    theirs = gradients(flat, loss((out, slot_key, slot_value)))
    for name in flat:
        assert_close_to(ours[name], theirs[name], name)
