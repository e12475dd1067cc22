"""Save and load a state: the same bits, and a clear error for what is not a whole and consistent state."""

import contextlib
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from nha import NHAState, load_state, save_state
from nha.io import OLD_ACTIVE, OLD_NAMES, write_tensors
from nha.ops import RingState
from tests.inputs import Case, call, leaves, make

META = {"format": "nha-state-v2", "window_size": "7", "slots_active": "0"}
OLD_META = {"format": "nha-state-v1", "window_size": "7", OLD_ACTIVE: "0"}


def some_state(window=7, dtype=torch.float64, **sizes) -> NHAState:
    flat = leaves(make(Case(**sizes), dtype))
    state = call(flat, window_size=window, return_state=True).state
    assert state is not None
    return state.detach()


def assert_same(loaded, state):
    assert (loaded.window_size, loaded.slots_active) == (state.window_size, state.slots_active)
    assert loaded.tensors().keys() == state.tensors().keys()
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, loaded.tensors()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("window", [7, 0, -1, 50])
def test_a_saved_state_goes_on_with_the_same_bits(tmp_path, dtype, separate, window):
    flat = {n: x.detach() for n, x in leaves(make(Case(separate=separate), dtype)).items()}
    state = call(flat, window_size=window, return_state=True).state
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors")
    assert_same(loaded, state)
    ours, theirs = (call(flat, window_size=window, state=s).out for s in (loaded, state))
    assert torch.equal(ours, theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_states_whose_tensors_share_memory_are_saved(tmp_path):
    slots = torch.randn(1, 1, 1, 4)
    for state in (NHAState.from_slots(slots, slots, 3), some_state(batch=1, query_heads=1, heads=1, slots=1)):
        save_state(state, tmp_path / "state")
        assert_same(load_state(tmp_path / "state"), state)


def test_a_ring_is_saved_in_order(tmp_path):
    state = some_state()
    save_state(RingState.of(state), tmp_path / "state")
    assert_same(load_state(tmp_path / "state"), state)


def test_a_loaded_state_owns_its_memory(tmp_path):
    path = tmp_path / "state"
    state = some_state()
    save_state(state, path)
    loaded = load_state(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    path.write_bytes(b"")
    assert_same(loaded, state)


def test_a_state_of_the_first_format_is_read(tmp_path):
    state, path = some_state(), tmp_path / "state"
    old = {new: old for old, new in OLD_NAMES.items()}
    save_file({old.get(n, n): x.contiguous().clone() for n, x in state.tensors().items()}, path, metadata=OLD_META)
    assert_same(load_state(path), state)


def refused(path, *words):
    with pytest.raises(ValueError) as caught:
        load_state(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message, message


def test_truncated_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(some_state(), path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path)
    save_file({"x": torch.zeros(1)}, path)
    refused(path, "nha-state-v2", "None")
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "absent")


def changed(**changes):
    return lambda tensors: tensors | changes


BAD_TENSORS = {
    "a window of another length": (lambda t: t | {n: t[n][:, 1:] for n in ("key", "value")}, "key", "7", "6"),
    "no tensor of counts": (lambda t: {n: x for n, x in t.items() if n != "num_tokens"}, "num_tokens"),
    "a tensor too many": (changed(x=torch.zeros(1)), "x"),
    "a scalar count": (changed(num_tokens=torch.tensor(20)), "num_tokens", "[B]"),
    "counts of another batch": (changed(num_tokens=torch.tensor([20])), "num_tokens", "[2]", "[1]"),
    "counts below zero": (changed(num_tokens=torch.tensor([-1, 20])), "num_tokens", "-1"),
    "counts that are no integers": (changed(num_tokens=torch.tensor([1.0, 2.0])), "num_tokens", "int64", "float32"),
    "slots of another dtype": (lambda t: t | {"slot_key": t["slot_key"].float()}, "slot_key", "float64", "float32"),
    "values of another dtype": (lambda t: t | {"value": t["value"].float()}, "value", "float64", "float32"),
    "integer keys": (lambda t: t | {n: t[n].long() for n in ("key", "value", "window_slot_key")}, "int64"),
    "integer gates": (lambda t: t | {"window_log_gate": t["window_log_gate"].long()}, "window_log_gate", "int64"),
    "gates of other slots": (lambda t: t | {"window_log_gate": t["window_log_gate"][..., 1:]}, "window_log_gate", "4"),
    "slot keys of other heads": (lambda t: t | {"window_slot_key": t["window_slot_key"][:, :, 1:]}, "window_slot_key"),
    "slots of three dimensions": (lambda t: t | {"slot_value": t["slot_value"][0]}, "slot_value"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_do_not_fit_together_are_refused(tmp_path, name):
    change, *words = BAD_TENSORS[name]
    write_tensors(tmp_path / "state", change(some_state().tensors()), META)
    refused(tmp_path / "state", *words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"window_size": "6"}, ["window", "6", "7"]),
        ({"window_size": "seven"}, ["window_size", "seven"]),
        ({"window_size": "-2"}, ["window_size", "-2"]),
        ({"window_size": str(2**40)}, ["window_size", str(2**40)]),
        ({"slots_active": "yes"}, ["slots_active", "yes"]),
        ({"more": "1"}, ["metadata", "more"]),
        ({"format": "nha-cache-v1"}, ["nha-state-v2", "nha-cache-v1"]),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, changes, words):
    write_tensors(tmp_path / "state", some_state().tensors(), META | changes)
    refused(tmp_path / "state", *words)


@pytest.mark.parametrize("meta", [META, OLD_META], ids=["new", "old"])
def test_metadata_that_is_missing_is_refused(tmp_path, meta):
    path, old = tmp_path / "state", {new: old for old, new in OLD_NAMES.items()}
    tensors = {n: x.clone() for n, x in some_state().tensors().items()}
    for name in meta:
        rest = {n: x for n, x in meta.items() if n != name}
        save_file({old.get(n, n) if meta is OLD_META else n: x for n, x in tensors.items()}, path, metadata=rest)
        refused(path)
    if meta is META:
        save_file(tensors, path, metadata=meta)  # without a checksum
        refused(path, "sha256")


def test_edited_tensors_are_refused(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "state"
    save_state(some_state(), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {"num_tokens": tensors["num_tokens"] - 1}, path, metadata=metadata)
    refused(path, "checksum")


def test_random_corruption_is_refused(tmp_path, request):
    path, chance = tmp_path / "state", random.Random(0)
    state = some_state(batch=1, length=9, query_heads=1, heads=1, dim=2, value_dim=2, slots=2, window=3)
    save_state(state, path)
    whole = path.read_bytes()
    for _ in range(20_000 if request.config.getoption("--long") else 500):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.2:
            start = chance.randrange(len(data))
            del data[start : start + chance.choice([1, 8, 100])]
        if bytes(data) == whole:
            continue
        path.write_bytes(data)
        with contextlib.suppress(ValueError):  # no other error
            assert_same(load_state(path), state)  # blanks between the header's fields may have become other blanks
