"""The laws for the fused decoding kernel, in Triton's interpreter in float32, or on a GPU if there is one."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.utils.deterministic
from torch.utils._python_dispatch import TorchDispatchMode

from nha import NHAState, load_state, save_state
from nha.ops import RingState, nha_decode
from tests.inputs import TOKENWISE, Case, call, error, leaves, make, rounding
from tests.laws.test_implementations import exponent_rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PREFILL = 20
CUTS = [20, 21, 22, 23, 27, 43, 44, 46]
CASES = {
    "no window": Case(length=46, window=0, sinks=1),
    "no window, no slot keys of their own": Case(length=46, window=0, separate=False),
    "a window of one token": Case(length=46, window=1, sinks=2),
    "segments longer than the window": Case(length=46, window=5),
    "a window that fills up on the way": Case(length=46, window=33, sinks=1),
    "a window that is never full": Case(length=46, window=60, separate=False),
    "many query heads": Case(length=46, batch=1, window=5, query_heads=18, heads=2, separate=False),
    "several blocks of slots": Case(length=46, batch=1, window=7, slots=70, sinks=1, value_dim=16),
}


@pytest.fixture(autouse=True)
def _poison():
    """Memory that no kernel wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def inputs(case):
    return {n: x.detach().to(DEVICE) for n, x in leaves(make(case, torch.float32)).items()}


def double(flat):
    return {n: x.double() for n, x in flat.items()}


def part(flat, start, stop):
    return {n: x[:, start:stop] if n in TOKENWISE else x for n, x in flat.items()}


def decode(flat, state, **options):
    """One step of the fused kernel, into a ring where the state is one."""
    if not isinstance(state, RingState):
        return call(
            flat,
            window_size=state.window_size,
            state=state,
            impl="triton",
            return_state=True,
            return_slot_mass=True,
            **options,
        )
    sink = (flat["sink_key"], flat["sink_value"]) if "sink_key" in flat else None
    return nha_decode(
        **{n: x for n, x in flat.items() if n in TOKENWISE},
        sink=sink,
        state=state,
        scale=options.get("scale"),
        attention_mask=options.get("attention_mask"),
    )


def whole(flat, window, state=None, **options):
    output = call(
        flat, window_size=window, impl="reference", state=state, return_state=True, return_slot_mass=True, **options
    )
    return {"out": output.out, "mass": output.slot_mass, **output.state.padded().tensors()}


def steps(flat, state, cuts, first=None, masks=None):
    """The outputs and the final state of the segments between `cuts`, decoded one after the other."""
    outputs = [] if first is None else [first]
    for start, stop in itertools.pairwise(cuts):
        options = {} if masks is None else {"attention_mask": masks[:, start:stop]}
        outputs.append(decode(part(flat, start, stop), state, **options))
        state = outputs[-1].state
    if isinstance(state, RingState):
        assert not state.arrival_counter.any()
    found = {"out": torch.cat([o.out for o in outputs], 1), "mass": torch.cat([o.slot_mass for o in outputs], 1)}
    return found | state.aligned().padded().tensors()


def bounds(flat, exact, reference):
    """Twice the error of the reference in float32 and its rounding band, as for every implementation."""
    key, value = (flat[n].double().abs().max() for n in ("k_slot" if "k_slot" in flat else "k", "v"))
    sizes = {"out": value, "slot_key": key, "slot_value": value}
    band = exponent_rounding(flat["log_gate"])
    found = {}
    for name, x in exact.items():
        size = torch.maximum(sizes[name], x.abs().max()) if name in sizes else x.double()
        found[name] = 2 * (error(reference[name], x) + band * rounding(size, torch.float32))
    return found


def assert_within(got, exact, bound):
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert error(got[name], value) <= bound[name], (name, error(got[name], value), bound[name])


IN_RINGS = [(name, True) for name in CASES]


@pytest.mark.parametrize("name, in_place", [*IN_RINGS, *((name, False) for name in list(CASES)[::3])])
def test_a_prefill_and_any_steps_equal_one_call(name, in_place):
    case = CASES[name]
    flat = inputs(case)
    exact = whole(double(flat), case.window)
    bound = bounds(flat, exact, whole(flat, case.window))
    impl = "triton" if case.slots <= 64 else "chunked"
    first = call(part(flat, 0, PREFILL), window_size=case.window, impl=impl, return_state=True, return_slot_mass=True)
    state = RingState.of(first.state) if in_place else first.state
    assert_within(steps(flat, state, CUTS, first), exact, bound)


def test_a_long_window_is_read_in_many_splits():
    case = Case(batch=1, length=560, heads=1, query_heads=2, window=540, slots=70, sinks=1)
    flat = inputs(case)
    exact = whole(double(flat), 540)
    bound = bounds(flat, exact, whole(flat, 540))
    first = call(part(flat, 0, 538), window_size=540, impl="chunked", return_state=True, return_slot_mass=True)
    assert_within(steps(flat, RingState.of(first.state), [538, 539, 540, 541, 557, 560], first), exact, bound)


@pytest.mark.parametrize("window, in_place", [(0, True), (1, True), (5, True), (5, False)])
def test_padded_rows_equal_the_rows_alone(window, in_place):
    case = Case(batch=4, length=46, query_heads=2, heads=1, window=window, sinks=1)
    flat = inputs(case)
    mask = torch.ones(4, 46, dtype=torch.bool, device=DEVICE)
    mask[1, :17] = False  # a left-padded prompt
    mask[2, :33] = False  # one whose first token comes in a segment
    mask[3, 21], mask[3, 25:27], mask[3, 36:43] = False, False, False  # a step of nothing, segments padded on the right
    cuts = CUTS

    def run(flat):
        state, outputs = None, []
        for start, stop in itertools.pairwise([0, *cuts]):
            options = {"state": state, "attention_mask": mask[:, start:stop], "impl": "reference"}
            outputs.append(
                call(part(flat, start, stop), window_size=window, return_state=True, return_slot_mass=True, **options)
            )
            state = outputs[-1].state
        found = {"out": torch.cat([o.out for o in outputs], 1), "mass": torch.cat([o.slot_mass for o in outputs], 1)}
        return found | state.tensors(), outputs[0]

    exact, _ = run(double(flat))
    reference, first = run(flat)
    state = RingState.of(first.state) if in_place else first.state
    got = steps(flat, state, cuts, first, mask)
    assert_within(got, exact, bounds(flat, exact, reference))
    assert not got["out"][~mask].any() and not got["mass"][~mask].any()


@pytest.mark.parametrize("window", [0, 6])
def test_given_slots_are_active_from_the_first_token(window):
    case = Case(length=22, window=window)
    flat = inputs(case)
    generator = torch.Generator().manual_seed(3)
    slots = [torch.randn(2, 2, 5, d, generator=generator).to(DEVICE) for d in (case.dim, case.value_dim)]
    state = NHAState.from_slots(*slots, window, shared_keys=False)
    twice = NHAState.from_slots(*(x.double() for x in slots), window, shared_keys=False)
    exact = whole(double(flat), window, twice)
    got = steps(flat, RingState.of(state), [0, 1, 2, 3, 19, 22])
    assert_within(got, exact, bounds(flat, exact, whole(flat, window, state)))
    assert (got["mass"] > 0).all()


@pytest.mark.parametrize("gate", [0.0, -5.0, -1e4, 1e4])
@pytest.mark.parametrize("window", [0, 7])
def test_extreme_gates_and_scores_stay_finite(gate, window):
    flat = inputs(Case(batch=1, length=28, window=window, sinks=1))
    flat["log_gate"] = torch.full_like(flat["log_gate"], gate)
    flat["q"], flat["q_slot"] = flat["q"] * 1e4, flat["q_slot"] * 1e4
    first = call(part(flat, 0, 5), window_size=window, impl="reference", return_state=True, return_slot_mass=True)
    for name, value in steps(flat, RingState.of(first.state), [5, 6, 7, 12, 28], first).items():
        assert value.isfinite().all(), name


def test_a_ring_keeps_its_addresses_and_two_runs_give_the_same_bits():
    flat = inputs(Case(batch=1, length=46, window=5))
    first = call(part(flat, 0, PREFILL), window_size=5, impl="chunked", return_state=True, return_slot_mass=True)
    before = {n: x.clone() for n, x in first.state.tensors().items()}
    found = []
    for _ in range(2):
        ring = RingState.of(first.state)
        addresses = [x.data_ptr() for x in ring.tensors().values()]
        found.append(steps(flat, ring, CUTS[-3:], first))
        assert addresses == [x.data_ptr() for x in ring.tensors().values()]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    for name, value in before.items():
        assert torch.equal(value, first.state.tensors()[name]), name


def test_layouts_with_heads_before_tokens_are_read_in_place():
    flat = inputs(Case(length=24, window=5, sinks=1))
    transposed = {n: x.transpose(1, 2).contiguous().transpose(1, 2) if n in TOKENWISE else x for n, x in flat.items()}
    first = call(part(flat, 0, PREFILL), window_size=5, impl="chunked", return_state=True, return_slot_mass=True)
    plain, other = (steps(x, RingState.of(first.state), [20, 21, 24], first) for x in (flat, transposed))
    for name, value in plain.items():
        assert torch.equal(value, other[name]), name


def test_a_ring_continues_in_nha_attention_and_from_disk(tmp_path):
    flat = inputs(Case(length=46, window=7))
    state = call(part(flat, 0, PREFILL), window_size=7, impl="chunked", return_state=True).state
    ring = RingState.of(state)
    state = call(part(flat, 20, 23), window_size=7, impl="triton", state=state, return_state=True).state
    steps(flat, ring, [20, 23])
    rest = part(flat, 23, 46)
    wanted = call(rest, window_size=7, impl="reference", state=state).out
    save_state(ring, tmp_path / "state")
    for other in (ring, load_state(tmp_path / "state", DEVICE), ring.select(torch.arange(2)), ring.to(DEVICE)):
        assert torch.equal(call(rest, window_size=7, impl="reference", state=other).out, wanted)


class OperatorRecorder(TorchDispatchMode):
    """Records the operators of this library that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nha":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_short_segments_without_gradients_use_the_fused_kernel():
    flat = inputs(Case(length=46, window=5, sinks=1))
    state = call(part(flat, 0, 20), window_size=5, impl="chunked", return_state=True).state

    def called(stop, flat=flat, state=state):
        with OperatorRecorder() as recorder:
            call(part(flat, 20, stop), window_size=5, impl="triton", state=state)
        return recorder.names

    assert called(21) == called(36) == ["nha::decode"]
    assert called(37) == ["nha::triton"]
    with_grad = {n: x.requires_grad_() for n, x in inputs(Case(length=46, window=5, sinks=1)).items()}
    assert called(21, with_grad) == ["nha::triton"]
    with torch.no_grad():
        assert called(21, with_grad) == ["nha::decode"]
    assert called(21, state=replace(state, slot_key=state.slot_key.clone().requires_grad_())) == ["nha::triton"]


def test_unsupported_inputs_are_refused_in_one_line():
    case = Case(batch=1, length=17, window=3, separate=False)
    flat = inputs(case)

    def ring(flat):
        return RingState.of(call(flat, window_size=3, impl="chunked", return_state=True).state)

    def refused(kind, message, flat, state, **changes):
        with pytest.raises(kind, match=message) as caught:
            nha_decode(**(flat | changes), state=state)
        assert "\n" not in str(caught.value)

    step, state = part(flat, 0, 1), ring(flat)
    before = {n: x.clone() for n, x in state.tensors().items()}
    refused(ValueError, "at most 16 new tokens, got 17", flat, state)
    refused(TypeError, "expected a RingState, got NHAState", step, state.aligned())
    refused(ValueError, "no gradients", step, state, q=step["q"].clone().requires_grad_())
    refused(ValueError, "expected k of shape", step, state, k=step["k"][:, :, :, :1])
    refused(NotImplementedError, "float64", double(step), ring(double(flat)))
    wide = inputs(replace(case, dim=130))
    refused(NotImplementedError, "130 and 6 in torch.float32: the kernels go up to 128", part(wide, 0, 1), ring(wide))
    wider = {n: x.half() for n, x in inputs(replace(case, dim=8, value_dim=257)).items()}
    refused(NotImplementedError, "257 in torch.float16: the kernels go up to 256", part(wider, 0, 1), ring(wider))
    many = inputs(replace(case, slots=129))
    refused(NotImplementedError, "129 slots in torch.float32: the kernels take 1 to 128", part(many, 0, 1), ring(many))
    for name, value in before.items():
        assert torch.equal(value, state.tensors()[name]), name
    with pytest.raises(ValueError, match="window_size >= 0, got one of -1"):
        RingState.of(call(flat, window_size=-1, return_state=True).state)


@pytest.mark.parametrize("separate, masked", [(True, False), (False, True)])
def test_the_operators_are_well_formed(separate, masked):
    case = Case(batch=1, length=20, query_heads=2, heads=1, slots=2, window=3, sinks=1, separate=separate)
    flat = inputs(case)
    state = call(part(flat, 0, 18), window_size=3, impl="chunked", return_state=True).state
    ring, step = RingState.of(state), part(flat, 18, 20)
    decode(step, RingState.of(state))  # registers the operators
    mask = torch.ones(1, 2, dtype=torch.bool, device=DEVICE) if masked else None
    tokens = (step["q"], step["k"], step["v"], step.get("q_slot"), step.get("k_slot"), step["log_gate"])
    last = (mask, step["sink_key"], step["sink_value"], 3, 0.5, False)

    def tensors(state):
        return (
            state.slot_key,
            state.slot_value,
            state.key,
            state.value,
            state.window_slot_key,
            state.window_log_gate,
            state.num_tokens,
        )

    for keep in (True, False):
        torch.library.opcheck(torch.ops.nha.decode.default, (*tokens, *tensors(state), *last, keep))
    for one in (ring, RingState.of(state, max_rollback=4)):
        counters = (one.num_written, one.arrival_counter)
        arguments = (*tokens, *tensors(one), *counters, *last, one.max_rollback)
        torch.library.opcheck(torch.ops.nha.decode_in_place.default, arguments)
