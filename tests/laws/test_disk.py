"""Save and load a state: the same bits, and a clear error for what is not a state."""

import pytest
import torch

from nha import NHAState
from tests.inputs import Case, call, leaves, make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("separate", [True, False])
def test_a_saved_state_goes_on_with_the_same_bits(tmp_path, dtype, separate):
    flat = {n: x.detach() for n, x in leaves(make(Case(separate=separate), dtype)).items()}
    state = call(flat, window_size=7, return_state=True).state
    state.save(tmp_path / "state.safetensors")
    loaded = NHAState.load(tmp_path / "state.safetensors")
    assert loaded.window_size == 7 and loaded.slots_active == state.slots_active
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, loaded.tensors()[name]), name
    ours, theirs = (call(flat, window_size=7, state=s).out for s in (loaded, state))
    assert torch.equal(ours, theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_truncated_and_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    flat = leaves(make(Case()))
    path = tmp_path / "state.safetensors"
    call(flat, window_size=7, return_state=True).state.save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        NHAState.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="expected a state of format"):
        NHAState.load(path)
    with pytest.raises(FileNotFoundError):
        NHAState.load(tmp_path / "absent")
