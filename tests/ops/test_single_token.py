"""A step for one token on a CPU: the reference's numbers, in place, and a state that anything else can go on with."""

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nha import NHAState, nha_attention
from nha.ops import single_token
from nha.ops.single_token import FusedRing, read_rows, read_token, supports_step
from tests.builders import exponent_rounding
from tests.inputs import TOKENWISE, Case, assert_close_to, cases, error, leaves, make, rounding, slice_tokens

WINDOWS = st.sampled_from([0, 1, 2, 5, 16])
attention: Any = nha_attention  # whose state is there where it was asked for


def pieces(inputs) -> list[Any]:
    """The arguments of `read_token` besides the state."""
    return [inputs.get(name) for name in TOKENWISE]


def stepped(inputs, state: Any, start, stop, **options):
    """Outputs of tokens start..stop, one step each, and the state after them."""
    ring = FusedRing.of(state, inputs.get("sink"))
    outs = [read_token(ring, *pieces(slice_tokens(inputs, t, t + 1)), **options) for t in range(start, stop)]
    return torch.cat(outs, 1), ring


def halves(case, dtype=torch.float64, impl="chunked", **options) -> Any:
    """Outputs and states of a sequence whose second half is read token by token, and of one call."""
    inputs, cut = make(case, dtype), case.window + 1 + case.length // 2
    options |= {"window_size": case.window, "return_state": True}
    before = attention(**slice_tokens(inputs, 0, cut), impl="chunked", **options).state
    options |= {"impl": impl}
    whole = attention(**inputs, **options)
    options = {name: options[name] for name in ("scale", "softcap") if name in options}
    out, ring = stepped(inputs, before, cut, whole.out.shape[1], **options)
    return inputs, (out, ring), (whole.out[:, cut:], whole.state), cut


def longer(case):
    """A case whose tokens fill the window, with some more."""
    return Case(**vars(case) | {"length": 2 * (case.window + case.length) + 3})


@given(case=cases(max_length=20, windows=WINDOWS), softcap=st.sampled_from([None, 0.7]))
def test_single_tokens_equal_one_call_of_the_reference(case, softcap):
    _, (out, ring), (exact, state), _ = halves(longer(case), impl="reference", softcap=softcap, scale=0.3)
    assert_close_to(out, exact, "out")
    tensors = ring.tensors()
    assert list(tensors) == list(state.tensors())
    for name, x in state.tensors().items():
        assert tensors[name].dtype == x.dtype
        assert_close_to(tensors[name], x, name)


@given(case=cases(max_length=20, windows=st.sampled_from([3, 16, 40])), cut=st.integers(1, 2), spare=st.integers(0, 9))
def test_single_tokens_fill_a_window_as_the_reference_does(case, cut, spare):
    inputs = make(longer(case), torch.float64)
    options: Any = {"window_size": case.window, "return_state": True, "impl": "reference"}
    before = attention(**slice_tokens(inputs, 0, cut), **options).state
    assert supports_step(before, (inputs["q"][:, :1],), may_be_filling=True)
    assert not supports_step(before, (inputs["q"][:, :1],))
    whole = attention(**inputs, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_token, "SPARE", spare)
        out, ring = stepped(inputs, before, cut, whole.out.shape[1])
        _, part = stepped(inputs, before, cut, case.window)
    assert_close_to(out, whole.out[:, cut:], "out")
    tensors = ring.tensors()
    for name, x in whole.state.tensors().items():
        assert_close_to(tensors[name], x, name)
    filled = attention(**slice_tokens(inputs, 0, case.window), **options).state
    for name, x in filled.tensors().items():
        assert_close_to(part.tensors()[name], x, name)


def test_a_copy_of_a_window_that_fills_goes_on_with_the_same_bits():
    inputs = make(Case(length=60, window=40, sinks=1), torch.float32)
    before = attention(**slice_tokens(inputs, 0, 9), window_size=40, return_state=True).state
    whole, _ = stepped(inputs, before, 9, 60)
    _, ring = stepped(inputs, before, 9, 21)
    assert tuple(ring.aligned().key.shape[:2]) == (2, 21)
    again, _ = stepped(inputs, ring.aligned(), 21, 60)
    assert torch.equal(again, whole[:, 12:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(case=cases(max_length=20, windows=WINDOWS))
def test_single_tokens_err_at_most_twice_as_much_as_the_reference(dtype, case):
    case = longer(case)
    low, (out, ring), _, cut = halves(case, dtype)
    double = {n: tuple(x.double() for x in v) if n == "sink" else v.double() for n, v in low.items()}
    options = {"window_size": case.window, "impl": "reference", "return_state": True}
    exact, reference = attention(**double, **options), attention(**low, **options)
    size = {"out": low["v"].double().abs().max()}
    size |= {
        f"slot_{n}": low[m if m in low else n[0]].double().abs().max() for n, m in (("key", "k_slot"), ("value", "v"))
    }
    band = exponent_rounding(low["log_gate"])
    for name, got, own, true in (
        ("out", out, reference.out[:, cut:], exact.out[:, cut:]),
        ("slot_key", ring.slot_key, reference.state.slot_key, exact.state.slot_key),
        ("slot_value", ring.slot_value, reference.state.slot_value, exact.state.slot_value),
    ):
        units = max(
            band * rounding(size[name], torch.float32), rounding(size[name], dtype if name == "out" else torch.float32)
        )
        assert error(got, true) <= 2 * (error(own, true) + units), name


@pytest.mark.parametrize("gate", [0.0, -5.0, -1e4, 1e4])
@pytest.mark.parametrize("size", [1e-4, 100.0])
def test_everything_stays_finite(gate, size):
    case = Case(length=30, window=5, sinks=1)
    inputs = {n: x if n == "sink" else x * size for n, x in make(case, torch.float32).items()}
    inputs["log_gate"] = torch.full_like(inputs["log_gate"], gate)
    before = attention(**slice_tokens(inputs, 0, 9), window_size=5, return_state=True).state
    out, ring = stepped(inputs, before, 9, 30)
    assert out.isfinite().all() and ring.memory.isfinite().all()


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), FusedRing.aligned], ids=range(3)
)
def test_a_copy_goes_on_with_the_same_bits(again, dtype, window):
    inputs = make(Case(length=30, window=window, sinks=1), dtype)
    before = attention(**slice_tokens(inputs, 0, 9), window_size=window, return_state=True).state
    whole, _ = stepped(inputs, before, 9, 30)
    _, ring = stepped(inputs, before, 9, 16)
    state = again(ring)
    assert type(state) is NHAState
    assert torch.equal(stepped(inputs, state, 16, 30)[0], whole[:, 7:])
    assert torch.equal(ring.aligned().num_tokens, torch.full((2,), 16))  # the copy was written, not the ring


def test_a_step_writes_into_the_buffer_and_copies_no_state():
    inputs = make(Case(length=30, window=5), torch.float32)
    before = attention(**slice_tokens(inputs, 0, 9), window_size=5, return_state=True).state
    kept = {name: x.clone() for name, x in before.tensors().items()}
    ring = FusedRing.of(before)
    address = ring.memory.data_ptr()
    for t in range(9, 20):
        read_token(ring, *pieces(slice_tokens(inputs, t, t + 1)))
    assert ring.memory.data_ptr() == address and ring.cursor == 20 % 5
    assert ring.num_tokens.tolist() == [20, 20]
    assert all(torch.equal(x, kept[name]) for name, x in before.tensors().items())


def deferred(inputs, ring, weight, start, stop, calls):
    """Outputs of tokens whose gates are `hidden @ weight`, computed a block at a time."""
    hidden = inputs["log_gate"].flatten(2)

    def gates(rows):
        calls.append(rows.shape[1])
        return (rows @ weight).view(*rows.shape[:2], *inputs["log_gate"].shape[2:])

    outs = []
    for t in range(start, stop):
        part = slice_tokens(inputs, t, t + 1)
        if ring.pending is None:
            ring.defer_gates(gates, hidden[:, t : t + 1])
        q, q_slot = ring.rows(part["q"]), ring.rows(part["q_slot"])
        k, v, k_slot = (part[name].transpose(1, 2) for name in ("k", "v", "k_slot"))
        rows = read_rows(ring, q, q_slot, torch.cat((k, v, k_slot), 3), hidden=hidden[:, t : t + 1])
        outs.append(rows.view(part["q"].shape[0], 1, -1, rows.shape[2]))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("window, block", [(1, 1), (6, 6), (16, 16), (25, 13), (32, 16)])
def test_gates_of_a_block_are_computed_at_once(window, block):
    inputs = make(Case(length=100, window=window, sinks=1, separate=True), torch.float64)
    unit = torch.eye(inputs["log_gate"][0, 0].numel(), dtype=torch.float64)
    cut, calls = window + 5, []
    before = attention(**slice_tokens(inputs, 0, cut), window_size=window, return_state=True).state
    ring = FusedRing.of(before, inputs["sink"])
    out = deferred(inputs, ring, unit, cut, 100, calls)
    whole = attention(**inputs, window_size=window, return_state=True)
    assert_close_to(out, whole.out[:, cut:])
    ends = {(t % window) // block for t in range(window)}
    wanted = sum((t + 1) % window % block == 0 for t in range(cut, 100))
    assert set(calls) == {block} and len(calls) == wanted and len(ends) == -(-window // block)
    for name, x in whole.state.tensors().items():
        assert_close_to(ring.tensors()[name], x, name)


@pytest.mark.parametrize("again", [copy.deepcopy, FusedRing.aligned], ids=range(2))
def test_a_copy_within_a_block_goes_on_with_the_same_bits(again):
    inputs = make(Case(length=100, window=16, sinks=1, separate=True), torch.float32)
    size = inputs["log_gate"][0, 0].numel()
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size
    before = attention(**slice_tokens(inputs, 0, 37), window_size=16, return_state=True).state
    whole = deferred(inputs, FusedRing.of(before, inputs["sink"]), weight, 37, 100, [])
    ring = FusedRing.of(before, inputs["sink"])
    first = deferred(inputs, ring, weight, 37, 57, [])
    copied = FusedRing.of(again(ring), inputs["sink"])
    for found in (copied, ring):
        assert torch.equal(torch.cat([first, deferred(inputs, found, weight, 57, 100, [])], 1), whole)


def test_a_sink_that_changes_is_read_again():
    inputs = make(Case(length=30, window=5, sinks=1), torch.float32)
    before = attention(**slice_tokens(inputs, 0, 9), window_size=5, return_state=True).state
    ring = FusedRing.of(before, inputs["sink"])
    token = pieces(slice_tokens(inputs, 9, 10))
    for x in inputs["sink"]:
        x.mul_(-2)
    assert ring.hold_sink(inputs["sink"])
    exact, _ = stepped(inputs, before, 9, 10)
    assert torch.equal(read_token(ring, *token), exact)
    other = tuple(x + 1 for x in inputs["sink"])
    assert ring.hold_sink(other) and ring.sink is other
    assert not ring.hold_sink(tuple(x.repeat(1, 2, 1) for x in other)) and not ring.hold_sink(None)


def test_rows_with_tokens_of_their_own_number_step_together():
    inputs = make(Case(batch=2, length=30, window=5), torch.float64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :3] = False
    before = attention(**slice_tokens(inputs, 0, 12), window_size=5, return_state=True, attention_mask=mask[:, :12])
    whole = attention(**inputs, window_size=5, attention_mask=mask)
    assert before.state.num_tokens.tolist() == [12, 9]
    assert_close_to(stepped(inputs, before.state, 12, 30)[0], whole.out[:, 12:])


def test_what_a_step_supports():
    flat = leaves(make(Case(length=30, window=5), torch.float32))
    one = {n: x[:, :1].detach() for n, x in flat.items()}
    options = {"window_size": 5, "return_state": True}

    def state(length, **more):
        inputs = {n: x[:, :length].detach() for n, x in flat.items()}
        return attention(**inputs, **options, **more).state

    full = state(9)
    assert supports_step(full, tuple(pieces(one)))
    assert supports_step(FusedRing.of(full), tuple(pieces(one)))
    two = {n: x[:, :2].detach() for n, x in flat.items()}
    refused = [(state(3), one), (None, one), (full, two), (full, {n: x[:, :1] for n, x in flat.items()})]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :6] = False
    refused += [(state(9, attention_mask=mask), one), (full, {n: x.to("meta") for n, x in one.items()})]
    for case, inputs in refused:
        assert not supports_step(case, tuple(pieces(inputs)))
    with torch.no_grad():
        assert supports_step(full, tuple(pieces({n: x[:, :1] for n, x in flat.items()})))
    with torch.inference_mode():
        ring = FusedRing.of(full)
        assert supports_step(ring, tuple(pieces(one)))
    assert not supports_step(ring, tuple(pieces(one)))  # what inference mode made is not written outside it


def test_segments_and_single_tokens_take_turns():
    inputs = make(Case(length=60, window=5, sinks=1))
    state: Any = None
    outs = []
    for start, stop in itertools.pairwise([0, 9, 10, 11, 20, 21, 22, 40, 41, 60]):
        part = slice_tokens(inputs, start, stop)
        if stop - start == 1:
            ring = state if isinstance(state, FusedRing) else FusedRing.of(state, inputs["sink"])
            outs.append(read_token(ring, *pieces(part)))
            state = ring
        else:
            found = attention(**part, window_size=5, state=state, return_state=True)
            outs.append(found.out)
            state = found.state
    assert_close_to(torch.cat(outs, 1), attention(**inputs, window_size=5).out)
