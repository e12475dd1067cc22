"""The reference equals the definition that fits on one screen, head by head and sequence by sequence."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from nha.ops.reference import definition
from tests.inputs import assert_close_to, call, cases, gradients, leaves, make


def by_head(flat, window):
    """Outputs [B, T, HQ, Dv] by the definition."""
    batch, length, query_heads = flat["q"].shape[:3]
    groups = query_heads // flat["k"].shape[2]
    window = length if window < 0 else window
    q_slot, k_slot = flat.get("q_slot", flat["q"]), flat.get("k_slot", flat["k"])
    rows = []
    for b in range(batch):
        heads = []
        for head in range(query_heads):
            h = head // groups
            tokens = [x[b, :, h] for x in (flat["k"], flat["v"], flat["log_gate"])]
            none = [x.new_zeros(0, x.shape[-1]) for x in tokens[:2]]
            sink = [flat["sink_key"][h], flat["sink_value"][h]] if "sink_key" in flat else none
            own = [q_slot[b, :, head], k_slot[b, :, h], *sink]
            heads.append(definition(flat["q"][b, :, head], *tokens, *own, window, flat["q"].shape[-1] ** -0.5))
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


@given(case=cases(max_length=30, windows=st.sampled_from([-1, 0, 1, 2, 5, 16, 40])))
def test_the_reference_equals_the_definition(case):
    flat = leaves(make(case))
    ours, exact = call(flat, window_size=case.window, impl="reference").out, by_head(flat, case.window)
    assert_close_to(ours, exact)
    weight = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).view_as(exact)
    ours, theirs = (gradients(flat, (x * weight).sum()) for x in (ours, exact))
    for name in flat:
        assert_close_to(ours[name], theirs[name], name)


def test_the_definition_fits_on_one_screen():
    from inspect import getsource

    assert len(getsource(definition).splitlines()) <= 40  # with its signature and docstring
