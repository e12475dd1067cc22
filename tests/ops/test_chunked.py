"""The exponents of the chunked implementation are bounded, and docs/math.md says what the code does."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nha.ops import NHAState
from nha.ops.chunk_groups import CHUNK, GATE_FLOOR, Workspace, decays, make_plan
from nha.ops.packed_state import PackedState
from nha.ops.state import MAX_WINDOW
from nha.settings import STATE_DTYPES
from tests.inputs import Case, call, leaves, make

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "math.md").read_text()


@pytest.mark.parametrize("length", [1, 5, 16, 100])
@pytest.mark.parametrize("gate", [0.0, -5.0, -1e4, 1e4, "random"])
def test_no_exponent_exceeds_half_a_chunk_at_the_floor(length, gate):
    gates = torch.full((1, length, 1, 3), 0.0 if gate == "random" else gate)
    if gate == "random":
        gates = -8 * torch.rand(gates.shape, generator=torch.Generator().manual_seed(0))
    plan = make_plan(1, length, 1, 3, 0)
    size = -(-length // plan.tile) * plan.tile
    q_decay, k_decay, half_decay = decays(gates, plan, size, (0, length), Workspace(gates))
    bound = -GATE_FLOOR * CHUNK / 2
    for factor in (q_decay, k_decay[k_decay > 0] if k_decay.any() else q_decay, half_decay):
        assert factor.isfinite().all()
        assert factor.log().max() <= bound * (1 + 1e-6)
    assert q_decay.log().min() >= -bound * (1 + 1e-6)


def test_the_page_has_the_numbers_of_the_code():
    assert f"in chunks of {CHUNK}." in PAGE
    assert f"{CHUNK} * {-GATE_FLOOR:.0f} / 2 = {-GATE_FLOOR * CHUNK / 2:.0f}" in PAGE
    assert MAX_WINDOW == 2**24 and "2 ** 24" in PAGE
    kernels = (ROOT / "src/nha/ops/triton/primitives.py").read_text()
    max_decay = re.search(r"MAX_DECAY = tl.constexpr\((\d+)", kernels)
    subchunk = re.search(r"SUBCHUNK = tl.constexpr\((\d+)", kernels)
    assert max_decay and f"at least -{max_decay[1]}, with exponents up to\n{int(max_decay[1]) // 2}" in PAGE
    assert subchunk and f"sub-chunks of {subchunk[1]} tokens" in PAGE
    assert NHAState.from_slots.__name__ in PAGE


def test_no_operation_needs_float64_or_a_number_from_the_device(monkeypatch):
    """Apple's GPUs have no float64, and reading a number stalls a device: neither is asked for."""
    dtypes, operators = set(), set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            operators.add(function.overloadpacket.__name__)
            dtypes.update(x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    chunked = sys.modules["nha.ops.chunked"]
    flat = leaves(make(Case(length=50, window=5, sinks=1), torch.float32))
    options = {"window_size": 5, "return_state": True}
    for name, grad in (("_forward", False), ("_backward", True)):
        with monkeypatch.context() as patch, torch.set_grad_enabled(grad):
            patch.setattr(chunked, name, getattr(chunked, name)._init_fn)  # seen inside, not as one operator
            with Recorder():
                out, state, _ = call(flat, **options)
                for state_dtype in STATE_DTYPES:
                    PackedState.of(state, state_dtype).unpack()
                if grad:
                    out.sum().backward()
    assert {"bmm", "addcmul", "_softmax_backward_data"} <= operators
    assert torch.float64 not in dtypes and "_local_scalar_dense" not in operators
