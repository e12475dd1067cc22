"""Sequences packed with `cu_seqlens` equal the sequences run one by one, forward and backward."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inputs import TOKENWISE, assert_close_to, call, cases, gradients, leaves, make, random_loss


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@given(case=cases(max_length=50, batch=1), data=st.data())
def test_packed_sequences_equal_the_sequences_alone(impl, case, data):
    cuts = data.draw(st.lists(st.integers(0, case.length), max_size=4).map(sorted))
    bounds = [0, *cuts, case.length]
    window = data.draw(st.sampled_from([case.window, -1]))
    options = {"window_size": window, "return_state": True, "return_slot_mass": True}
    flat = leaves(make(case))
    packed = call(flat, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), impl=impl, **options)
    outs, masses = [], []
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            continue
        alone = {n: x[:, start:stop] if n in TOKENWISE else x for n, x in flat.items()}
        output = call(alone, impl="reference", **options)
        outs.append(output.out)
        masses.append(output.slot_mass)
        assert packed.state.num_tokens[row] == stop - start
        for name in ("slot_key", "slot_value"):
            assert_close_to(packed.state.tensors()[name][row : row + 1], output.state.tensors()[name], name)
    exact = packed._replace(out=torch.cat(outs, 1), slot_mass=torch.cat(masses, 1), state=None)
    assert_close_to(packed.out, exact.out)
    assert_close_to(packed.slot_mass, exact.slot_mass)
    ours = gradients(flat, random_loss(packed._replace(state=None)))
    theirs = gradients(flat, random_loss(exact))
    for name in flat:
        assert_close_to(ours[name], theirs[name], name)
