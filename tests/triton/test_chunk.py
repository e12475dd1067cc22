"""The laws for impl="triton", in Triton's interpreter on small float32 shapes, or on a GPU if there is one."""

import itertools

import pytest
import torch

from nha import NHAState
from tests.builders import (
    TOKENWISE,
    Case,
    call,
    error,
    exponent_rounding,
    gradients,
    leaves,
    make,
    random_loss,
    rounding,
    terms_behind,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "grouped heads, odd sizes": Case(length=37, window=7, sinks=2),
    "no window": Case(length=50, query_heads=3, heads=1, window=0, separate=False),
    "several chunks and segments": Case(
        batch=1, length=150, heads=1, query_heads=1, window=5, slots=17, separate=False
    ),
    "window longer than a tile": Case(batch=1, length=75, window=33, sinks=1),
    "one token more than the window": Case(length=17, window=16, sinks=1, separate=False),
    "many query heads": Case(batch=1, length=30, query_heads=9, heads=1, window=1),
}


def results(flat, window, impl, **options):
    output = call(flat, window_size=window, impl=impl, return_state=True, return_slot_mass=True, **options)
    found = {"out": output.out, "mass": output.slot_mass}
    found |= {"slot_key": output.state.slot_key, "slot_value": output.state.slot_value}
    return found | {"d" + n: g for n, g in gradients(flat, random_loss(output)).items()}


def inputs(case):
    return {n: x.detach().to(DEVICE).requires_grad_() for n, x in leaves(make(case, torch.float32)).items()}


def double(flat):
    return {n: x.detach().double().requires_grad_() for n, x in flat.items()}


def bounds(flat, case, exact, reference):
    """Twice the error of the reference in the inputs' precision and its rounding band, as for every implementation."""
    sizes = terms_behind(flat, exact)
    found = {}
    for name, value in exact.items():
        terms = case.length * case.query_heads if name.startswith("d") else 1
        size = torch.maximum(sizes[name], value.abs().max()) if name in sizes else value
        band = exponent_rounding(flat["log_gate"]) * terms**0.5 * rounding(size, flat["q"].dtype)
        found[name] = 2 * (error(reference[name], value) + band)
    return found


def assert_within(got, exact, bound):
    for name, value in exact.items():
        assert error(got[name], value) <= bound[name], (name, error(got[name], value), bound[name])


@pytest.mark.parametrize("name", CASES)
def test_the_error_is_at_most_twice_that_of_the_reference(name):
    case = CASES[name]
    flat = inputs(case)
    exact = results(double(flat), case.window, "reference")
    bound = bounds(flat, case, exact, results(flat, case.window, "reference"))
    assert_within(results(flat, case.window, "triton"), exact, bound)


@pytest.mark.parametrize("name", ["q_slot", "k_slot"])
def test_slots_may_see_only_queries_or_only_keys_of_their_own(name):
    case = Case(batch=1, length=37, window=20)
    flat = inputs(case)
    del flat[name]
    exact = results(double(flat), case.window, "reference")
    bound = bounds(flat, case, exact, results(flat, case.window, "reference"))
    assert_within(results(flat, case.window, "triton"), exact, bound)


def test_scores_of_a_few_blocks_at_a_time_give_the_same_gradients(monkeypatch):
    from nha.ops.triton.chunk import host

    case, counts, dq = CASES["window longer than a tile"], [], host._dq
    flat = inputs(case)
    whole = results(flat, case.window, "triton")
    monkeypatch.setattr(host, "SLAB", 2 * case.query_heads)
    monkeypatch.setattr(host, "_dq", lambda *args: (counts.append(args[-1]), dq(*args)))
    found = results(flat, case.window, "triton")
    assert len(counts) > 1 and max(counts) == 2
    for name, value in whole.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 16, 32, 33])
def test_sixteen_bit_operands_fill_rows_of_128_bytes(dtype, size):
    from nha.ops.triton.chunk.tiling import block_sizes

    sizes = block_sizes(dtype, dim=size, value_dim=size, slots=size, sinks=0)
    assert min(sizes.block_m, sizes.block_d, sizes.block_dv) * dtype.itemsize >= 128


def test_two_runs_give_the_same_bits():
    flat = inputs(CASES["grouped heads, odd sizes"])
    first, second = (results(flat, 7, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("window", [0, 4, 20])
def test_segments_equal_one_call_in_outputs_states_and_gradients(window):
    case = Case(batch=2, length=41, window=window, sinks=1)
    flat = inputs(case)

    def split(flat, cuts, impl):
        outs, state = [], None
        for start, stop in itertools.pairwise(cuts):
            part = {n: x[:, start:stop] if n in TOKENWISE else x for n, x in flat.items()}
            output = call(part, window_size=window, state=state, return_state=True, return_slot_mass=True, impl=impl)
            state = output.state
            outs.append(output)
        whole = output._replace(
            out=torch.cat([o.out for o in outs], 1), slot_mass=torch.cat([o.slot_mass for o in outs], 1)
        )
        found = {"out": whole.out, "mass": whole.slot_mass, **whole.state.tensors()}
        return found | {"d" + n: g for n, g in gradients(flat, random_loss(whole)).items()}

    exact = split(double(flat), [0, 41], "reference")
    bound = bounds(flat, case, exact, split(flat, [0, 41], "reference"))
    assert_within(split(flat, [0, 3, 4, 30, 41], "triton"), exact, bound)


def test_given_slots_are_active_from_the_first_token_and_get_gradients():
    case = Case(batch=2, length=20, window=6, separate=False)
    flat = inputs(case)
    generator = torch.Generator().manual_seed(3)
    for name, dim in (("slot_key", case.dim), ("slot_value", case.value_dim)):
        slots = torch.randn(case.batch, case.heads, case.slots, dim, generator=generator)
        flat[name] = slots.to(DEVICE).requires_grad_()

    def run(flat, impl):
        own = {n: x for n, x in flat.items() if n not in ("slot_key", "slot_value")}
        state = NHAState.from_slots(flat["slot_key"], flat["slot_value"], case.window)
        output = call(own, window_size=6, state=state, impl=impl, return_state=True, return_slot_mass=True)
        found = {"out": output.out, "mass": output.slot_mass}
        return found | {"d" + n: g for n, g in gradients(flat, random_loss(output)).items()}

    exact = run(double(flat), "reference")
    bound = bounds(flat, case, exact, run(flat, "reference"))
    assert_within(run(flat, "triton"), exact, bound)


@pytest.mark.parametrize("window", [0, 5])
def test_packed_sequences_equal_the_sequences_alone(window):
    case = Case(batch=1, length=60, window=window)
    flat = inputs(case)
    cu = torch.tensor([0, 3, 3, 40, 60], dtype=torch.int32, device=DEVICE)
    exact = results(double(flat), window, "reference", cu_seqlens=cu)
    bound = bounds(flat, case, exact, results(flat, window, "reference", cu_seqlens=cu))
    assert_within(results(flat, window, "triton", cu_seqlens=cu), exact, bound)


@pytest.mark.parametrize("window", [0, 5])
def test_packed_sequences_continue_from_a_state(window):
    case = Case(batch=1, length=50, window=window)
    flat = inputs(case)
    cuts = [torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in ([0, 3, 20], [0, 12, 30])]

    def run(flat, impl):
        parts = [{n: x[:, s] for n, x in flat.items()} for s in (slice(0, 20), slice(20, 50))]
        options = {"window_size": window, "return_state": True, "return_slot_mass": True, "impl": impl}
        one = call(parts[0], cu_seqlens=cuts[0], **options)
        two = call(parts[1], cu_seqlens=cuts[1], state=one.state, **options)
        found = {"out": two.out, "mass": two.slot_mass, **two.state.tensors()}
        return found | {"d" + n: g for n, g in gradients(flat, random_loss(two)).items()}

    exact = run(double(flat), "reference")
    bound = bounds(flat, case, exact, run(flat, "reference"))
    assert_within(run(flat, "triton"), exact, bound)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_rows_alone(side):
    case = Case(batch=2, length=30, window=5)
    flat = inputs(case)
    mask = torch.ones(2, 30, dtype=torch.bool, device=DEVICE)
    mask[1, slice(0, 13) if side == "left" else slice(17, None)] = False
    exact = results(double(flat), 5, "reference", attention_mask=mask)
    bound = bounds(flat, case, exact, results(flat, 5, "reference", attention_mask=mask))
    got = results(flat, 5, "triton", attention_mask=mask)
    assert_within(got, exact, bound)
    assert not got["out"][~mask].any()
    for name in flat:
        assert not got["d" + name][~mask].any(), name


@pytest.mark.parametrize("gate", [0.0, -5.0, -1e4, 1e4])
@pytest.mark.parametrize("window", [0, 7])
def test_extreme_gates_and_scores_stay_finite(gate, window):
    case = Case(batch=1, length=40, window=window, sinks=1)
    made = make(case, torch.float32)
    made["log_gate"] = torch.full_like(made["log_gate"], gate)
    made["q"], made["q_slot"] = made["q"] * 1e4, made["q_slot"] * 1e4
    flat = {n: x.detach().to(DEVICE).requires_grad_() for n, x in leaves(made).items()}
    for name, value in results(flat, window, "triton").items():
        assert value.isfinite().all(), name


def test_layouts_with_heads_before_tokens_are_read_in_place():
    case = Case(length=33, window=5)
    flat = inputs(case)
    transposed = {n: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for n, x in flat.items()}
    for name, value in results(transposed, 5, "triton").items():
        assert torch.equal(value, results(flat, 5, "triton")[name]) if name == "out" else value.isfinite().all(), name


def test_unsupported_inputs_are_refused_in_one_line():
    flat = inputs(Case(length=9, window=3))
    for message, options in {
        "softcap": {"softcap": 1.0},
        "float64": {"flat": double(flat)},
    }.items():
        own = options.pop("flat", flat)
        with pytest.raises(NotImplementedError, match=message) as caught:
            call(own, window_size=3, impl="triton", **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "decoding", "dim", "slots"),
    [("float32", False, 256, 64), ("float32", True, 128, 128), ("bfloat16", False, 256, 128)],
)
def test_shapes_beyond_the_kernels_are_refused_with_the_limit(dtype, decoding, dim, slots):
    from nha.ops.validation import unsupported

    def reason(dim, slots):
        q = torch.empty(1, 1, 1, dim, dtype=getattr(torch, dtype))
        return unsupported(q, q, torch.empty(1, 1, 1, slots), None, decoding=decoding)

    beside = f" with head dims {dim} and {dim}" if slots < 128 else ""
    assert reason(dim, slots) is None and reason(128, 128) is None
    assert reason(dim + 1, slots) == f"head dims {dim + 1} and {dim + 1} in torch.{dtype}: the kernels go up to {dim}"
    assert reason(dim, slots + 1) == f"{slots + 1} slots in torch.{dtype}{beside}: the kernels take 1 to {slots}"


def test_wide_heads_in_float32_are_refused_before_a_launch_on_a_gpu_with_less_memory(monkeypatch):
    from nha.ops.validation import unsupported

    def reason(dim, dtype=torch.float32, slots=64):
        q = torch.empty(1, 1, 1, dim, dtype=dtype)
        return unsupported(q, q, torch.empty(1, 1, 1, slots), None, decoding=False)

    assert reason(256) is None
    monkeypatch.setattr("nha.ops.validation.shared_memory", lambda device: 99 << 10)
    text = reason(256)
    assert text and "201728" in text and str(99 << 10) in text and "head dims 256 and 256 in torch.float32" in text
    assert reason(128) is None and reason(256, torch.bfloat16) is None and reason(256, slots=16) is None
    flat = inputs(Case(length=3, window=2, dim=144, slots=40))
    with pytest.raises(NotImplementedError, match="201728"):
        call(flat, window_size=2, impl="triton")


@pytest.mark.parametrize("packed", [None, [0, 3, 17, 17, 20]])
def test_the_operators_are_well_formed(packed):
    case = Case(batch=1, length=20, query_heads=2, heads=1, slots=2)
    boundaries = None if packed is None else torch.tensor(packed, dtype=torch.int32)
    flat = {n: x.detach() for n, x in inputs(case).items()}
    call(flat, window_size=3, impl="triton")  # registers the operators
    args = (
        flat["q"],
        flat["k"],
        flat["v"],
        flat["q_slot"],
        None,
        flat["log_gate"],
        None,
        None,
        None,
        None,
        None,
        boundaries,
        3,
        0,
        0.5,
        False,
    )
    torch.library.opcheck(torch.ops.nha.triton.default, args)
