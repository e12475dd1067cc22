"""A padded row equals the row alone; padding gets and gives no gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nha.ops.state import WINDOW_CACHE
from tests.inputs import TOKENWISE, Case, assert_close_to, call, cases, gradients, leaves, make, random_loss


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@given(case=cases(max_length=40), data=st.data())
def test_padded_rows_equal_the_rows_alone(impl, case, data):
    window = data.draw(st.sampled_from([case.window, -1]))
    counts = [data.draw(st.integers(1, case.length)) for _ in range(case.batch)]
    sides = [data.draw(st.booleans()) for _ in range(case.batch)]
    mask = torch.zeros(case.batch, case.length, dtype=torch.bool)
    spans = []
    for row, (count, left) in enumerate(zip(counts, sides, strict=True)):
        spans.append(slice(case.length - count, None) if left else slice(0, count))
        mask[row, spans[-1]] = True
    options = {"window_size": window, "return_state": True, "return_slot_mass": True}
    flat = leaves(make(case))
    padded = call(flat, attention_mask=mask, impl=impl, **options)
    assert not padded.out[~mask].any()
    ours = gradients(flat, random_loss(padded._replace(state=None)))
    weights = padded._replace(state=None)
    exact_out, exact_mass = torch.zeros_like(padded.out), torch.zeros_like(padded.slot_mass)
    for row, span in enumerate(spans):
        alone = {n: x[row : row + 1, span] if n in TOKENWISE else x for n, x in flat.items()}
        output = call(alone, impl="reference", **options)
        exact_out[row, span], exact_mass[row, span] = output.out[0], output.slot_mass[0]
        for name, tensor in output.state.tensors().items():
            got = padded.state.tensors()[name][row : row + 1]
            if name in WINDOW_CACHE:
                assert not got[:, : max(got.shape[1] - counts[row], 0)].any()  # unused entries
                got = got[:, got.shape[1] - tensor.shape[1] :]
            assert_close_to(got, tensor, name)
    assert_close_to(padded.out, exact_out)
    assert_close_to(padded.slot_mass, exact_mass)
    theirs = gradients(flat, random_loss(weights._replace(out=exact_out, slot_mass=exact_mass)))
    for name in flat:
        assert_close_to(ours[name], theirs[name], name)
        if name in TOKENWISE:
            assert not ours[name][~mask].any(), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_unlike_length_go_on_from_a_padded_prefill(side):
    case = Case(batch=2, length=20, window=4)
    flat = {n: x.detach() for n, x in leaves(make(case)).items()}
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, slice(0, 9) if side == "left" else slice(3, None)] = False
    prompt = {n: x[:, :12] for n, x in flat.items()}
    step = {n: x[:, 12:] for n, x in flat.items()}
    first = call(prompt, window_size=4, attention_mask=mask, return_state=True)
    then = call(step, window_size=4, state=first.state).out
    alone = {n: torch.cat([prompt[n][1:][:, mask[1]], step[n][1:]], 1) for n in flat}
    assert_close_to(then[1:], call(alone, window_size=4, impl="reference").out[:, 3:])
