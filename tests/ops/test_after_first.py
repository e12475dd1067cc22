"""States after a prompt, made with few operations, are those that the general code makes."""

import pytest
import torch

from nha.ops import NHAState
from nha.ops.state import advance, after_first


def assert_same(found, wanted):
    assert type(found) is type(wanted) and found.window_size == wanted.window_size
    wanted = wanted.tensors()
    assert found.tensors().keys() == wanted.keys()
    for name, x in found.tensors().items():
        assert torch.equal(x, wanted[name]) and x.dtype == wanted[name].dtype and x.is_contiguous(), name


@pytest.mark.parametrize("length, window", [(9, 4), (8, 4), (4, 4), (5, 1), (7, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_state_after_a_prompt(length, window, shared):
    generator = torch.Generator().manual_seed(0)
    k, v, slot_key = (torch.randn(2, length, 3, 5, generator=generator) for _ in range(3))
    gate, slots = -torch.rand(2, length, 3, 6), (torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5))
    empty = NHAState.empty(window, key=k, value=v, log_gate=gate, shared=shared)
    wanted = advance(empty, k, v, gate, slot_key, slots, None)
    found = after_first(window, k, v, gate, None if shared else slot_key, slots)
    assert_same(found, wanted)
    assert found.key.untyped_storage().nbytes() == 4 * found.key.numel()  # the prompt's keys are not kept alive


@pytest.mark.parametrize("past, length", [(3, 1), (3, 4), (3, 9), (0, 2)])
def test_a_long_segment_pushes_the_window_cache_out(past, length):
    k, v = torch.randn(1, past + length, 2, 4), torch.randn(1, past + length, 2, 4)
    gate, slots = -torch.rand(1, past + length, 2, 3), (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    state = NHAState.empty(4, key=k, value=v, log_gate=gate, shared=True)
    whole = advance(state, k, v, gate, k, slots, None)
    for start, stop in ((0, past), (past, past + length)):
        state = advance(state, k[:, start:stop], v[:, start:stop], gate[:, start:stop], k[:, start:stop], slots, None)
    assert_same(state, whole)
