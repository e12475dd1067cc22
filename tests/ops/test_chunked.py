"""The exponents of the chunked implementation are bounded, and docs/math.md says what the code does."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nha import nha_attention
from nha.ops import NHAState, chunk_groups, fused_window
from nha.ops.chunk_groups import CHUNK, GATE_FLOOR, Sizes, Workspace, decays, make_plan
from nha.ops.packed_state import PackedState
from nha.ops.state import MAX_WINDOW
from nha.settings import MAX_WINDOW as MAX_OPTION
from nha.settings import STATE_DTYPES
from tests.inputs import Case, assert_close_to, call, gradients, leaves, make, random_loss

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "math.md").read_text()


@pytest.mark.parametrize("length", [1, 5, 16, 100])
@pytest.mark.parametrize("gate", [0.0, -5.0, -1e4, 1e4, "random"])
def test_no_exponent_exceeds_half_a_chunk_at_the_floor(length, gate):
    gates = torch.full((1, length, 1, 3), 0.0 if gate == "random" else gate)
    if gate == "random":
        gates = -8 * torch.rand(gates.shape, generator=torch.Generator().manual_seed(0))
    plan = make_plan(Sizes(1, 1, 1, 3, 2), length, 0)
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
    assert MAX_OPTION == MAX_WINDOW == 2**24 and "2 ** 24" in PAGE
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
                assert state is not None
                for state_dtype in STATE_DTYPES:
                    PackedState.of(state, state_dtype).unpack()
                if grad:
                    out.sum().backward()
    assert {"bmm", "addcmul", "_softmax_backward_data"} <= operators
    assert torch.float64 not in dtypes and "_local_scalar_dense" not in operators


@pytest.mark.parametrize("window, length", [(1, 40), (7, 33), (31, 70), (32, 64), (40, 75), (64, 97)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("slots", [3, 0])
def test_windows_of_the_fused_kernel_equal_the_reference(window, length, padded, slots, monkeypatch):
    """Outputs, slot mass, states and gradients, over segments, with sinks and padding, and without any slot."""
    monkeypatch.setattr(fused_window, "MIN_WINDOW", 1)
    case = Case(length=length, query_heads=6, heads=2, dim=4, value_dim=4, slots=slots, sinks=1 if slots else 0)
    mask = torch.arange(length) < torch.tensor([[length], [length - 9]]) if padded else None
    found = {}
    for impl in ("chunked", "reference"):
        flat, losses, kept = leaves(make(case)), [], []
        state: Any = None
        for start, stop in ((0, 12), (12, 13), (13, length)):
            part = {n: x[:, start:stop] if x.dim() == 4 and x.shape[1] == length else x for n, x in flat.items()}
            options = {"window_size": window, "return_state": True, "return_slot_mass": True, "impl": impl}
            padding = None if mask is None else mask[:, start:stop]
            result = call(part, nha_attention, state=state, attention_mask=padding, **options)
            state = result.state
            losses.append(random_loss(result))
            kept += [result.out, result.slot_mass]
        found[impl] = [*kept, state.slot_key, state.slot_value, *gradients(flat, torch.stack(losses).sum()).values()]
        with torch.no_grad():
            whole = call(flat, nha_attention, attention_mask=mask, **options)
        assert whole.state is not None
        found[impl] += [whole.out, whole.slot_mass, whole.state.slot_key]
    for ours, exact in zip(*found.values(), strict=True):
        assert_close_to(ours, exact)


def test_results_outlive_the_memory_that_passes_share():
    """A pass writes where the one before it did: neither outputs nor states are views of that memory."""
    options = {"window_size": 5, "return_state": True, "return_slot_mass": True, "impl": "chunked"}
    for dim, window in ((4, 5), (4, 130)):
        options["window_size"] = window
        inputs = make(Case(length=150, dim=dim, value_dim=dim), torch.float32)
        first = nha_attention(**inputs, **options)
        assert first.state is not None
        results = [first.out, first.slot_mass, *first.state.tensors().values()]
        copies = [x.clone() for x in results]
        assert any(space.nbytes for space in chunk_groups._spare.values())
        nha_attention(**{name: 2 * x for name, x in inputs.items()}, **options)
        assert all(torch.equal(x, copy) for x, copy in zip(results, copies, strict=True))


def test_the_memory_of_a_large_pass_is_given_back(monkeypatch):
    monkeypatch.setattr(chunk_groups, "_spare", {})
    monkeypatch.setattr(chunk_groups, "MAX_SPARE", 100)
    nha_attention(**make(Case(length=50), torch.float32), window_size=5, impl="chunked")
    assert not chunk_groups._spare
