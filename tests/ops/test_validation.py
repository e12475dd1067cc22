"""Every input that does not fit is refused in one line with its name and values, before anything runs."""

from dataclasses import replace

import pytest
import torch

from nha import NHAState, nha_attention
from nha.ops import RingState
from nha.ops.padding import align_left
from tests.inputs import Case, make

CASE = Case(batch=2, length=6, query_heads=4, heads=2, dim=8, value_dim=6, slots=5, window=3)
MASK = torch.ones(2, 6, dtype=torch.bool)
INF, NAN = float("inf"), float("nan")


def int32(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def one_row(inputs, **more):
    return {name: x[:1] for name, x in inputs.items()} | more


def sink(heads=2, count=1, dim=8, value_dim=6, **options):
    return torch.zeros(heads, count, dim, **options), torch.zeros(heads, count, value_dim, **options)


BAD = {
    "q of three dimensions": (lambda i: i | {"q": i["q"][0]}, ValueError, "q", "[B, T, HQ, D]", "[6, 4, 8]"),
    "v is no tensor": (lambda i: i | {"v": [1]}, ValueError, "v", "[B, T, H, Dv]", "list"),
    "k is missing": (lambda i: i | {"k": None}, ValueError, "k", "NoneType"),
    "no tokens": (lambda i: {n: x[:, :0] for n, x in i.items()}, ValueError, "token", "[2, 0, 4, 8]"),
    "no sequences": (lambda i: {n: x[:0] for n, x in i.items()}, ValueError, "sequence", "[0, 6, 4, 8]"),
    "no query heads": (lambda i: i | {"q": i["q"][:, :, :0]}, ValueError, "head", "[2, 6, 0, 8]"),
    "no KV heads": (lambda i: i | {"k": i["k"][:, :, :0]}, ValueError, "head", "[2, 6, 0, 8]"),
    "no head dim": (lambda i: i | {"q": i["q"][..., :0], "k": i["k"][..., :0]}, ValueError, "head dim", "[2, 6, 4, 0]"),
    "no value dim": (lambda i: i | {"v": i["v"][..., :0]}, ValueError, "head dim", "[2, 6, 2, 0]"),
    "heads do not divide": (lambda i: i | {"q": i["q"][:, :, :3]}, ValueError, "3", "2"),
    "k of another length": (lambda i: i | {"k": i["k"][:, :4]}, ValueError, "k", "[2, 6, 2, 8]", "[2, 4, 2, 8]"),
    "v of other heads": (lambda i: i | {"v": i["v"][:, :, :1]}, ValueError, "v", "[2, 6, 2, 6]", "[2, 6, 1, 6]"),
    "gate of other heads": (
        lambda i: i | {"log_gate": i["log_gate"][:, :, :1]},
        ValueError,
        "log_gate",
        "[2, 6, 1, 5]",
    ),
    "no gate": (lambda i: i | {"log_gate": None}, ValueError, "log_gate", "window_size=3", "None"),
    "slot query of other dim": (lambda i: i | {"q_slot": i["q"][..., :4]}, ValueError, "q_slot", "[2, 6, 4, 4]"),
    "slot key of other heads": (lambda i: i | {"k_slot": i["q"]}, ValueError, "k_slot", "[2, 6, 2, 8]", "[2, 6, 4, 8]"),
    "k of another dtype": (lambda i: i | {"k": i["k"].float()}, TypeError, "k", "torch.float64", "torch.float32"),
    "q_slot of another dtype": (lambda i: i | {"q_slot": i["q"].half()}, TypeError, "q_slot", "float64", "float16"),
    "integers": (lambda i: {n: x.long() for n, x in i.items()}, TypeError, "q", "torch.int64"),
    "complex numbers": (lambda i: {n: x.cfloat() for n, x in i.items()}, TypeError, "q", "torch.complex64"),
    "integer gate": (lambda i: i | {"log_gate": i["log_gate"].long()}, TypeError, "log_gate", "torch.int64"),
    "k elsewhere": (lambda i: i | {"k": i["k"].to("meta")}, ValueError, "k", "cpu", "meta"),
    "gate elsewhere": (lambda i: i | {"log_gate": i["log_gate"].to("meta")}, ValueError, "log_gate", "cpu", "meta"),
    "sink is no pair": (lambda i: i | {"sink": i["k"]}, ValueError, "sink", "Tensor"),
    "sink of three": (lambda i: i | {"sink": (*sink(), 1)}, ValueError, "sink", "3"),
    "sink of integers": (lambda i: i | {"sink": (1, 2)}, ValueError, "sink key", "[H, S, D]", "int"),
    "sink of integer tensors": (lambda i: i | {"sink": sink(dtype=torch.int64)}, TypeError, "sink key", "torch.int64"),
    "sink elsewhere": (lambda i: i | {"sink": sink(device="meta")}, ValueError, "sink key", "cpu", "meta"),
    "sink value elsewhere": (
        lambda i: i | {"sink": (sink()[0], sink(device="meta")[1])},
        ValueError,
        "sink value",
        "cpu",
        "meta",
    ),
    "sink of other heads": (lambda i: i | {"sink": sink(heads=3)}, ValueError, "sink key", "[2, 1, 8]", "[3, 1, 8]"),
    "sinks of unlike number": (
        lambda i: i | {"sink": (sink()[0], sink(count=2)[1])},
        ValueError,
        "sink value",
        "[2, 1, 6]",
        "[2, 2, 6]",
    ),
    "mask of another length": (
        lambda i: i | {"attention_mask": torch.ones(2, 9, dtype=torch.bool)},
        ValueError,
        "attention_mask",
        "[2, 6]",
        "[2, 9]",
    ),
    "mask of numbers": (
        lambda i: i | {"attention_mask": torch.ones(2, 6)},
        ValueError,
        "attention_mask",
        "torch.bool",
        "torch.float32",
    ),
    "mask is a list": (lambda i: i | {"attention_mask": [[True] * 6] * 2}, ValueError, "attention_mask", "list"),
    "mask elsewhere": (lambda i: i | {"attention_mask": MASK.to("meta")}, ValueError, "attention_mask", "cpu", "meta"),
    "packing with two rows": (lambda i: i | {"cu_seqlens": int32(0, 6)}, ValueError, "cu_seqlens", "B = 1", "B = 2"),
    "packing of int64": (lambda i: one_row(i, cu_seqlens=int32(0, 6).long()), ValueError, "cu_seqlens", "torch.int64"),
    "packing is a list": (lambda i: one_row(i, cu_seqlens=[0, 6]), ValueError, "cu_seqlens", "list"),
    "packing of one bound": (lambda i: one_row(i, cu_seqlens=int32(0)), ValueError, "cu_seqlens", "[1]"),
    "packing that ends early": (lambda i: one_row(i, cu_seqlens=int32(0, 5)), ValueError, "T = 6", "[0, 5]"),
    "packing that falls": (lambda i: one_row(i, cu_seqlens=int32(0, 4, 2, 6)), ValueError, "[0, 4, 2, 6]"),
    "padding and packing": (
        lambda i: one_row(i, cu_seqlens=int32(0, 6), attention_mask=MASK[:1]),
        ValueError,
        "attention_mask",
        "cu_seqlens",
    ),
    "unknown implementation": (lambda i: i | {"impl": "cuda"}, ValueError, "impl", "cuda", "chunked"),
    "scale of zero": (lambda i: i | {"scale": 0.0}, ValueError, "scale", "0.0"),
    "scale below zero": (lambda i: i | {"scale": -0.5}, ValueError, "scale", "-0.5"),
    "scale is NaN": (lambda i: i | {"scale": NAN}, ValueError, "scale", "nan"),
    "scale without end": (lambda i: i | {"scale": INF}, ValueError, "scale", "inf"),
    "scale is a word": (lambda i: i | {"scale": "auto"}, TypeError, "scale", "str"),
    "softcap of zero": (lambda i: i | {"softcap": 0}, ValueError, "softcap", "0"),
    "softcap below zero": (lambda i: i | {"softcap": -1.0}, ValueError, "softcap", "-1.0"),
    "softcap is NaN": (lambda i: i | {"softcap": NAN}, ValueError, "softcap", "nan"),
    "softcap without end": (lambda i: i | {"softcap": INF}, ValueError, "softcap", "inf"),
    "state of another kind": (lambda i: i | {"state": {"key": 1}}, TypeError, "state", "dict"),
}
WINDOWS = [3, 0, 6, 100, -1]  # slots are read, slots alone, and three that hold all tokens


def plain_inputs():
    return {name: x for name, x in make(CASE).items() if name not in ("q_slot", "k_slot")}


def refused(error, words, call):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_with_what_was_expected_and_given(name, impl):
    change, error, *words = BAD[name]
    for window in WINDOWS:
        if name == "no gate" and window != 3:
            continue
        inputs = {"impl": impl} | change(plain_inputs())
        refused(error, words, lambda inputs=inputs, window=window: nha_attention(**inputs, window_size=window))


@pytest.mark.parametrize("hole", [[1, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 1]])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_mask_with_holes_is_refused_on_every_path(window, hole):
    mask = torch.tensor([[1] * 6, hole]).bool()
    inputs = plain_inputs()
    words = ["row 1", "cu_seqlens"]
    refused(ValueError, words, lambda: nha_attention(**inputs, window_size=window, attention_mask=mask))
    refused(ValueError, words, lambda: align_left(mask, inputs["k"]))
    state = nha_attention(**inputs, window_size=window, return_state=True).state
    refused(ValueError, words, lambda: nha_attention(**inputs, window_size=window, attention_mask=mask, state=state))


@pytest.mark.parametrize("window", [-2, 1.5, True, None, "3", 2**31, 2**63, 2**24 + 1])
def test_a_window_that_is_no_size_is_refused(window):
    words = ["window_size", repr(window), str(2**24)]
    refused(ValueError, words, lambda: nha_attention(**make(CASE), window_size=window))
    slots = torch.zeros(1, 2, 3, 4)
    refused(ValueError, words, lambda: NHAState.from_slots(slots, slots, window))


def test_window_zero_needs_slots():
    inputs = make(CASE)
    inputs["log_gate"] = inputs["log_gate"][..., :0]
    refused(ValueError, ["slot", "window_size=0"], lambda: nha_attention(**inputs, window_size=0))


@pytest.mark.parametrize("scale", [1e-3, 1, 7.5])
@pytest.mark.parametrize("window", WINDOWS)
def test_every_scale_above_zero_gives_finite_outputs(window, scale):
    found = [nha_attention(**make(CASE), window_size=window, scale=scale, impl=x).out for x in ("chunked", "reference")]
    assert all(out.isfinite().all() for out in found)
    torch.testing.assert_close(*found)


def state(window=3, **changes) -> NHAState:
    found = nha_attention(**make(CASE) | changes, window_size=window, return_state=True).state
    assert found is not None
    return found


def changed(**changes):
    return lambda: replace(state(), **{name: change(getattr(state(), name)) for name, change in changes.items()})


STATES = {
    "another window": (lambda: state(4), ValueError, "window_size=3", "4"),
    "another batch": (
        lambda: state().select(torch.tensor([0])),
        ValueError,
        "slot_key",
        "[2, 2, 5, 8]",
        "[1, 2, 5, 8]",
    ),
    "shared keys": (lambda: state(k_slot=None), ValueError, "k_slot", "without"),
    "another precision": (
        lambda: nha_attention(**make(CASE, torch.float32), window_size=3, return_state=True).state,
        TypeError,
        "torch.float64",
        "torch.float32",
    ),
    "another device": (lambda: state().to("meta"), ValueError, "state", "cpu", "meta"),
    "a tensor elsewhere": (changed(value=lambda x: x.to("meta")), ValueError, "state.value", "cpu", "meta"),
    "keys of another length": (changed(key=lambda x: x[:, 1:]), ValueError, "state.", "3", "2"),
    "a window cut short": (
        changed(**dict.fromkeys(("key", "value", "window_slot_key", "window_log_gate"), lambda x: x[:, 1:])),
        ValueError,
        "state.",
        "3",
        "2",
    ),
    "a window too long": (
        changed(
            **dict.fromkeys(("key", "value", "window_slot_key", "window_log_gate"), lambda x: x.repeat(1, 2, 1, 1))
        ),
        ValueError,
        "state.key",
        "3",
        "6",
    ),
    "gates of other slots": (changed(window_log_gate=lambda x: x[..., 1:]), ValueError, "window_log_gate", "4"),
    "a scalar count": (changed(num_tokens=lambda x: torch.tensor(20)), ValueError, "num_tokens", "[B]", "[]"),
    "a count below zero": (changed(num_tokens=lambda x: x - 100), ValueError, "num_tokens", "-94"),
    "a count in floating point": (changed(num_tokens=lambda x: x.float()), TypeError, "num_tokens", "torch.float32"),
    "slots in half precision": (changed(slot_value=lambda x: x.half()), TypeError, "slot_value", "torch.float16"),
    "slots of another head dim": (changed(slot_key=lambda x: x[..., 1:]), ValueError, "state.", "7", "8"),
    "a tensor that is none": (changed(key=lambda x: x.tolist()), ValueError, "state.key", "list"),
    "a window that is no number": (lambda: replace(state(), window_size="3"), ValueError, "window_size", "'3'"),
}


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("name", STATES)
def test_a_state_that_does_not_fit_is_refused(name, impl):
    make_state, error, *words = STATES[name]
    refused(error, words, lambda: nha_attention(**make(CASE), window_size=3, state=make_state(), impl=impl))


def test_a_window_cache_of_full_attention_holds_all_its_tokens():
    short = replace(state(-1), num_tokens=torch.tensor([6, 7]))
    refused(ValueError, ["num_tokens", "6", "7"], lambda: nha_attention(**make(CASE), window_size=-1, state=short))


def test_slots_given_by_the_caller_must_fit():
    good = torch.zeros(1, 2, 3, 4)
    for slots, error, words in (
        ((good[0], good[0]), ValueError, ["slot_key", "[B, H, M, D]", "[2, 3, 4]"]),
        ((good, good[:, :1]), ValueError, ["slot_value", "[1, 1, 3, 4]"]),
        ((good, good.to("meta")), ValueError, ["slot_value", "cpu", "meta"]),
        ((good.long(), good), TypeError, ["slot_key", "torch.int64"]),
        ((good, [1.0]), TypeError, ["slot_value", "list"]),
    ):
        refused(error, words, lambda slots=slots: NHAState.from_slots(*slots, 8))
    refused(ValueError, ["window_size", "-1"], lambda: NHAState.from_slots(good, good, -1))
    refused(ValueError, ["window_size", "-1"], lambda: RingState.of(state(-1)))
