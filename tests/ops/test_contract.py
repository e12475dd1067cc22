"""Which implementation runs, that the operator compiles, and what it keeps in memory."""

from dataclasses import replace

import pytest
import torch

from nha import NHAState, nha_attention
from nha.ops import implementations, resolve_impl
from tests.inputs import Case, make

CASE = Case(batch=2, length=6, query_heads=4, heads=2, dim=8, value_dim=6, slots=5, window=3)


def test_an_implementation_asked_for_by_name_never_falls_back():
    status = implementations()["triton"]
    if status != "available":
        with pytest.raises(NotImplementedError, match="triton.*use impl='chunked'"):
            nha_attention(**make(CASE), window_size=3, impl="triton")
    assert resolve_impl("reference") == "reference"
    assert set(implementations()) == {"reference", "chunked", "triton"}


@pytest.mark.parametrize("window", [0, 3])
def test_compiles_without_a_graph_break(window):
    inputs = {n: x.requires_grad_() for n, x in make(CASE, torch.float32).items()}

    def step(**tensors):
        output = nha_attention(**tensors, window_size=window, return_state=True)
        return output.out, output.state.slot_key, output.state.key

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, exact = compiled(**inputs), step(**inputs)
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(x[0].sum(), list(inputs.values())) for x in (ours, exact)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_memory_grows_with_the_state_only_when_decoding():
    inputs = make(Case(batch=1, length=300, window=8), torch.float32)
    sizes, after = [], None
    for t in range(0, 300, 50):
        part = {n: x[:, t : t + 50] for n, x in inputs.items()}
        after = nha_attention(**part, window_size=8, state=after, return_state=True).state
        sizes.append(after.nbytes)
    assert len(set(sizes)) == 1
    storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in after.tensors().values()}
    assert sum(storage.values()) <= 2 * sizes[0]  # views of one buffer at most, never the whole segment


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("given", [False, True], ids=["no slots", "slots of the caller"])
def test_a_wide_window_costs_memory_only_as_tokens_come(impl, given):
    inputs = make(Case(batch=2, length=7, separate=False), torch.float32)
    slots = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    start = NHAState.from_slots(*slots, 2**24) if given else None
    outputs = {}
    for window in (7, 200_000, 2**24):
        begin = replace(start, window_size=window) if start else None
        outputs[window] = nha_attention(**inputs, window_size=window, state=begin, return_state=True, impl=impl)
    narrow, *wide = outputs.values()
    for output in wide:
        torch.testing.assert_close(output.out, narrow.out)
        assert output.state.nbytes == narrow.state.nbytes
    more = {name: x[:, :5] for name, x in inputs.items()}
    after = nha_attention(**more, window_size=2**24, state=wide[-1].state, return_state=True, impl=impl)
    whole = {name: torch.cat([x, more[name]], 1) for name, x in inputs.items()}
    torch.testing.assert_close(after.out, nha_attention(**whole, window_size=2**24, state=start).out[:, 7:])
    assert after.state.key.shape[1] == 12


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("window", [0, 3, -1])
def test_inputs_need_not_be_contiguous(impl, window):
    inputs = make(CASE)
    strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    strided["q"] = torch.cat([inputs["q"]] * 2, -1)[..., : CASE.dim]
    strided["v"] = inputs["v"].mT.contiguous().mT
    strided["k"] = inputs["k"].flip(1).flip(1).as_strided_(inputs["k"].shape, inputs["k"].stride())
    options = {"window_size": window, "impl": impl, "return_state": True}
    ours, exact = nha_attention(**strided, **options), nha_attention(**inputs, **options)
    torch.testing.assert_close(ours.out, exact.out, rtol=1e-12, atol=1e-12)
    for name, x in exact.state.tensors().items():
        torch.testing.assert_close(ours.state.tensors()[name], x, rtol=1e-12, atol=1e-12)
    one = {name: x[:1].expand(2, *x.shape[1:]) for name, x in inputs.items()}
    ours, exact = (nha_attention(**x, **options).out for x in (one, {n: x.contiguous() for n, x in one.items()}))
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
