"""Which implementation runs, that the operator compiles, and what it keeps in memory."""

import pytest
import torch

from nha import nha_attention
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
