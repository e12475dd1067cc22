"""The exponents of the chunked implementation are bounded, and docs/math.md says what the code does."""

import re
from pathlib import Path

import pytest
import torch

from nha.ops import NHAState
from nha.ops.chunk_groups import CHUNK, GATE_FLOOR, decays, make_plan
from nha.ops.state import MAX_WINDOW

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
    q_decay, k_decay, half_decay = decays(gates, plan, size, (0, length))
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
