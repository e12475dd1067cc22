"""The ring after a prompt, written by one kernel, is that of the state after the prompt."""

import pytest
import torch

from nha.ops import RingState, nha_attention, nha_prefill
from nha.ops.state import after_first
from tests.triton.compilation import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_same(found, wanted):
    wanted = wanted.tensors()
    assert found.tensors().keys() == wanted.keys()
    for name, x in found.tensors().items():
        assert torch.equal(x, wanted[name]) and x.dtype == wanted[name].dtype and x.is_contiguous(), name


@pytest.mark.parametrize("length, window", [(9, 4), (8, 4), (5, 1), (7, 0), (33, 32)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_kernel_writes_the_last_tokens_in_order(length, window, shared):
    from nha.ops.triton.ring import ring_after_prompt

    k, slot_key = (draw(2, 3, length, 24, seed=i, dtype=torch.float16).transpose(1, 2) for i in range(2))
    v, gate = draw(2, length, 3, 40, seed=2, dtype=torch.float16), -draw(2, length, 3, 6, seed=3).abs()
    slots = draw(2, 3, 6, 24, seed=4), draw(2, 3, 6, 40, seed=5)
    given = None if shared else slot_key
    found = ring_after_prompt(k, v, gate, given, slots, window)
    assert_same(found, RingState.of(after_first(window, k, v, gate, given, slots)))


@pytest.mark.parametrize("window", [8, 0])
def test_a_prompt_read_with_few_operations(window, monkeypatch):
    from nha.ops import backends

    monkeypatch.setattr(backends, "resolve_impl", lambda impl, device="cpu": "triton")
    q, k, v = draw(2, 20, 4, 16), draw(2, 20, 2, 16, seed=1), draw(2, 20, 2, 16, seed=2)
    gate, slot_key = -draw(2, 20, 2, 16, seed=3).abs(), draw(2, 20, 2, 16, seed=4)
    sink = draw(2, 1, 16, seed=5), draw(2, 1, 16, seed=6)
    options = {"window_size": window, "k_slot": slot_key, "sink": sink}
    found = nha_prefill(q, k, v, gate, **options)
    wanted = nha_attention(q, k, v, gate, return_state=True, impl="triton", **options)
    assert torch.equal(found.out, wanted.out)
    assert_same(found.state, RingState.of(wanted.state))


@pytest.mark.parametrize("window", [8, 0])
def test_a_prompt_padded_on_the_right_is_the_prompt_alone(window, monkeypatch):
    from nha.ops import backends

    monkeypatch.setattr(backends, "resolve_impl", lambda impl, device="cpu": "triton")
    lengths = torch.tensor([9, 33, 3], device=DEVICE)  # the last within the window
    q, k, v = draw(3, 40, 4, 16), draw(3, 40, 2, 16, seed=1), draw(3, 40, 2, 16, seed=2)
    gate, slot_key = -draw(3, 40, 2, 16, seed=3).abs(), draw(3, 40, 2, 16, seed=4)
    sink = draw(2, 1, 16, seed=5), draw(2, 1, 16, seed=6)
    found = nha_prefill(q, k, v, gate, window_size=window, k_slot=slot_key, sink=sink, num_tokens=lengths)
    for row, length in enumerate(lengths.tolist()):
        *given, own_slot_key = (x[row : row + 1, :length] for x in (q, k, v, gate, slot_key))
        options = {"window_size": window, "k_slot": own_slot_key, "sink": sink, "impl": "triton"}
        wanted = nha_attention(*given, return_state=True, **options)
        assert torch.allclose(found.out[row : row + 1, :length], wanted.out, atol=1e-6)
        ring = RingState.of(wanted.state).tensors()
        for name, x in found.state.tensors().items():
            same = torch.equal if not name.startswith("slot") else torch.allclose
            assert same(x[row : row + 1], ring[name]), name


def test_the_kernel_compiles_for_a_gpu():
    shapes: list[dict] = [{}, {"padded": True}, {"dtype": "float32", "dim": 64, "window": 512}]
    shapes += [{"capability": capability} for capability in (80, 89, 100, 120)]
    for row in compiled("compile_ring", *shapes):
        assert row["stack"] == 0 and row["shared"] <= 99 << 10, row
