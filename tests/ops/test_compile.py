"""The operator under `torch.compile`, `torch.export` and `torch.func`: whole graphs, few of them, the same numbers."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from nha import NHAState, nha_attention
from tests.inputs import Case, assert_close_to, make

LENGTHS = [19, 1, 2, 3, 5, 7, 8, 9, 10, 12, 15, 16, 17, 20, 31, 32, 33, 50, 100, 257]


@pytest.fixture
def graphs():
    """A backend that runs graphs as they are, and the graphs that it got."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    backend.seen = seen
    yield backend
    torch._dynamo.reset()


@pytest.mark.parametrize("window, gradients", [(-1, False), (0, True), (8, True)])
def test_twenty_lengths_compile_to_three_graphs(window, gradients, graphs):
    def run(inputs):
        output = nha_attention(**inputs, window_size=window, return_state=True)
        return output.out, output.state.slot_value, output.state.key

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=graphs)
    for length in LENGTHS:
        inputs = {n: x.requires_grad_(gradients) for n, x in make(Case(length=length), torch.float32).items()}
        ours, exact = compiled(inputs), run(inputs)
        for a, b in zip(ours, exact, strict=True):
            assert torch.equal(a, b)
        if gradients:
            ours, exact = (
                torch.autograd.grad(x[0].sum(), list(inputs.values()), allow_unused=True) for x in (ours, exact)
            )
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, exact, strict=True))
    assert len(graphs.seen) <= 3  # one token, a segment within the window, a longer one


@pytest.mark.parametrize("window", [0, 8])
def test_decoding_compiles_to_few_graphs_while_the_window_fills(window, graphs):
    def step(state, inputs):
        output = nha_attention(**inputs, window_size=window, state=state, return_state=True)
        return output.out, output.state

    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    inputs = make(Case(length=40), torch.float32)
    states: list[NHAState | None] = [None, None]
    with torch.no_grad():
        for t in range(40):
            token = {name: x[:, t : t + 1] for name, x in inputs.items()}
            ours, states[0] = compiled(states[0], token)
            exact, states[1] = step(states[1], token)
            assert torch.equal(ours, exact)
    assert len(graphs.seen) <= (2 if window == 0 else 5)  # no state, then one token, several, nearly W and W in it


def test_inductor_compiles_a_dynamic_length(request):
    if not request.config.getoption("--long"):
        pytest.skip("compiles C++: only with --long")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def run(q, k, v, log_gate):
        return nha_attention(q, k, v, log_gate, window_size=8).out

    for length in (20, 33):
        inputs = make(Case(length=length, separate=False), torch.float32)
        torch.testing.assert_close(run(**inputs), nha_attention(**inputs, window_size=8).out)


class Operator(torch.nn.Module):
    def forward(self, q, k, v, log_gate):
        return nha_attention(q, k, v, log_gate, window_size=8).out


def test_exports_with_a_dynamic_length():
    inputs = make(Case(length=30, separate=False), torch.float32)
    length = torch.export.Dim("length", min=9, max=4096)
    shapes = {name: {1: length} for name in inputs}
    exported = torch.export.export(Operator(), (), inputs, dynamic_shapes=shapes, strict=False).module()
    for other in (30, 9, 200):
        inputs = make(Case(length=other, separate=False), torch.float32)
        torch.testing.assert_close(exported(**inputs), Operator()(**inputs))


INPUTS = ("q", "k", "v", "log_gate")


def loss(q, k, v, log_gate, window=5, impl="auto"):
    return nha_attention(q, k, v, log_gate, window_size=window, impl=impl).out.sin().sum()


@pytest.mark.parametrize("window", [-1, 0, 5, 30])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_per_sample_gradients_equal_a_loop(window, impl):
    inputs = make(Case(batch=3, length=20, separate=False))
    samples = [inputs[name][:, None] for name in INPUTS]  # three batches of one
    ours = vmap(grad(lambda *x: loss(*x, window=window, impl=impl), argnums=(0, 1, 2, 3)))(*samples)
    for index in range(3):
        one = [x[index].clone().requires_grad_() for x in samples]
        exact = torch.autograd.grad(loss(*one, window=window, impl=impl), one, allow_unused=True)
        for a, b in zip(ours, exact, strict=True):
            assert_close_to(a[index], torch.zeros_like(a[index]) if b is None else b)


@pytest.mark.parametrize("window", [-1, 0, 5, 30])
def test_vmap_over_one_argument_equals_a_loop(window):
    inputs = make(Case(batch=2, length=20, separate=False))
    q, *rest = (inputs[name] for name in INPUTS)
    queries = torch.stack([q, 2 * q, -q])
    ours = vmap(lambda x: nha_attention(x, *rest, window_size=window).out)(queries)
    for x, out in zip(queries, ours, strict=True):
        assert_close_to(out, nha_attention(x, *rest, window_size=window).out)


def test_other_derivatives_are_refused_by_name_and_the_reference_has_them():
    inputs = tuple(make(Case(length=9, separate=False))[name] for name in INPUTS)

    def dual(impl):
        with forward_ad.dual_level():
            tangents = [forward_ad.make_dual(x, x) for x in inputs]
            return forward_ad.unpack_dual(loss(*tangents, impl=impl)).tangent

    def twice(impl):
        flat = [x.clone().requires_grad_() for x in inputs]
        first = torch.autograd.grad(loss(*flat, impl=impl), flat, create_graph=True)
        return torch.autograd.grad(sum((x * y).sum() for x, y in zip(first, inputs, strict=True)), flat)[0]

    def run(impl):
        def scalar(q):
            return loss(q, *inputs[1:], impl=impl)

        yield lambda: jvp(lambda *x: loss(*x, impl=impl), inputs, inputs)[1]
        yield lambda: dual(impl)
        yield lambda: twice(impl)
        yield lambda: grad(lambda q: (grad(scalar)(q) * inputs[0]).sum())(inputs[0])

    for refused, allowed in zip(run("chunked"), run("reference"), strict=True):
        with pytest.raises(NotImplementedError, match="impl='chunked'.*impl='reference'"):
            refused()
        assert allowed().isfinite().all()
