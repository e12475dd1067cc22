"""Every input that does not fit is refused in one line, before anything runs."""

import pytest
import torch

from nha import NHAState, nha_attention
from nha.ops import implementations, resolve_impl
from tests.inputs import Case, make

CASE = Case(batch=2, length=6, query_heads=4, heads=2, dim=8, value_dim=6, slots=5, window=3)
BAD = {
    "q of three dimensions": (
        lambda i: i | {"q": i["q"][0]},
        ValueError,
        r"q to be a tensor of 4 dimensions",
    ),
    "v is no tensor": (lambda i: i | {"v": [1]}, ValueError, "expected v to be a tensor.*got list"),
    "no tokens": (
        lambda i: {n: x[:, :0] for n, x in i.items()},
        ValueError,
        "at least one row and one token",
    ),
    "heads do not divide": (
        lambda i: i | {"q": i["q"][:, :, :3]},
        ValueError,
        "multiple of KV heads, got 3 and 2",
    ),
    "k of another length": (
        lambda i: i | {"k": i["k"][:, :4]},
        ValueError,
        r"expected k of shape \[2, 6, 2, 8\]",
    ),
    "v of other heads": (
        lambda i: i | {"v": i["v"][:, :, :1]},
        ValueError,
        r"expected v of shape \[2, 6, 2, 6\]",
    ),
    "gate of other heads": (
        lambda i: i | {"log_gate": i["log_gate"][:, :, :1]},
        ValueError,
        "expected log_gate of",
    ),
    "no gate": (
        lambda i: i | {"log_gate": None},
        ValueError,
        "expected log_gate .* with window_size=3, got None",
    ),
    "slot query of other dim": (
        lambda i: i | {"q_slot": i["q"][..., :4]},
        ValueError,
        "expected q_slot of shape",
    ),
    "slot key of other heads": (lambda i: i | {"k_slot": i["q"]}, ValueError, "expected k_slot of shape"),
    "two dtypes": (lambda i: i | {"k": i["k"].float()}, TypeError, "share one floating dtype"),
    "integers": (lambda i: {n: x.long() for n, x in i.items()}, TypeError, "share one floating dtype"),
    "integer gate": (lambda i: i | {"log_gate": i["log_gate"].long()}, TypeError, "log_gate to be floating"),
    "two devices": (
        lambda i: i | {"k": i["k"].to("meta")},
        ValueError,
        "every tensor on cpu like q, got k on meta",
    ),
    "sink is no pair": (lambda i: i | {"sink": i["k"]}, ValueError, "expected sink to be a pair"),
    "sink of other heads": (
        lambda i: i | {"sink": (torch.zeros(3, 1, 8), torch.zeros(3, 1, 6))},
        ValueError,
        r"expected sink key of shape \[2, 1, 8\], got \[3, 1, 8\]",
    ),
    "mask of another length": (
        lambda i: i | {"attention_mask": torch.ones(2, 9, dtype=torch.bool)},
        ValueError,
        r"attention_mask to be bool \[2, 6\]",
    ),
    "mask of integers": (
        lambda i: i | {"attention_mask": torch.ones(2, 6)},
        ValueError,
        "attention_mask to be bool",
    ),
    "mask with a hole": (
        lambda i: i | {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]]).bool()},
        ValueError,
        "holes in row 1; use cu_seqlens",
    ),
    "packing with two rows": (
        lambda i: i | {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)},
        ValueError,
        r"cu_seqlens to be int32 \[N \+ 1\] with B = 1",
    ),
    "packing of int64": (
        lambda i: {n: x[:1] for n, x in i.items()} | {"cu_seqlens": torch.tensor([0, 6])},
        ValueError,
        "cu_seqlens to be int32",
    ),
    "packing that ends early": (
        lambda i: {n: x[:1] for n, x in i.items()} | {"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
        ValueError,
        r"rise from 0 to T = 6, got \[0, 5\]",
    ),
    "unknown implementation": (
        lambda i: i | {"impl": "cuda"},
        ValueError,
        "expected impl to be 'auto' or one of",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_states_what_was_expected_and_what_came(name):
    change, error, message = BAD[name]
    inputs = make(CASE)
    for own in ("q_slot", "k_slot"):
        inputs.pop(own)
    with pytest.raises(error, match=message) as caught:
        nha_attention(**change(inputs), window_size=3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [-2, 1.5, True, None])
def test_a_window_that_is_no_size_is_refused(window):
    with pytest.raises(ValueError, match=r"expected window_size to be an int >= -1"):
        nha_attention(**make(CASE), window_size=window)


def test_window_zero_needs_slots():
    inputs = make(CASE)
    inputs["log_gate"] = inputs["log_gate"][..., :0]
    with pytest.raises(ValueError, match="at least one slot"):
        nha_attention(**inputs, window_size=0)


def test_mask_and_packing_together_are_refused():
    inputs = {n: x[:1] for n, x in make(CASE).items()}
    mask, bounds = torch.ones(1, 6, dtype=torch.bool), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="padding.*or cu_seqlens.*got both"):
        nha_attention(**inputs, window_size=3, attention_mask=mask, cu_seqlens=bounds)


def state(**changes):
    inputs = make(CASE) | changes
    window = inputs.pop("window_size", 3)
    return nha_attention(**inputs, window_size=window, return_state=True).state


STATES = {
    "another window": (lambda: state(window_size=4), ValueError, "a state of window_size=3, got one of 4"),
    "another batch": (
        lambda: state().select(torch.tensor([0])),
        ValueError,
        r"state.slot_key of shape \[2, 2, 5, 8\]",
    ),
    "shared keys": (lambda: state(k_slot=None), ValueError, "the state was made without k_slot"),
    "another precision": (
        lambda: nha_attention(**make(CASE, torch.float32), window_size=3, return_state=True).state,
        TypeError,
        "a state of torch.float64 inputs, got one of torch.float32",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_another_call_is_refused(name):
    make_state, error, message = STATES[name]
    with pytest.raises(error, match=message):
        nha_attention(**make(CASE), window_size=3, state=make_state())


def test_slots_handed_in_must_fit():
    with pytest.raises(ValueError, match=r"expected slot_key \[B, H, M, D\]"):
        NHAState.from_slots(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), 8)
    with pytest.raises(ValueError, match="window_size >= 0, got -1"):
        NHAState.from_slots(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), -1)


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
