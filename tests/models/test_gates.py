"""A shift of the gates' biases makes slots forget more slowly."""

from __future__ import annotations

import math

import pytest
import torch

from nha import NHAConfig, NHAForCausalLM, hybridize
from nha.models.windows import attention_layers, shift_gates
from tests.models.families import teacher, tokens


def test_a_shift_divides_small_log_gates_and_hardly_moves_large_ones():
    model = hybridize(teacher(), num_slots=4, window_size=8, init="soft", calibration=tokens(4, 64, seed=3))
    slots = attention_layers(model)[0].nha
    with torch.no_grad():
        slots.g_proj.weight.zero_()
        slots.g_proj.bias.fill_(6.0)
        slots.g_proj.bias[:4] = -30.0
    hidden = torch.zeros(1, 1, slots.g_proj.in_features, dtype=slots.g_proj.weight.dtype)
    before = slots(hidden).log_gate[0, 0]
    shift_gates(model, 1.0)
    after = slots(hidden).log_gate[0, 0]
    assert (before[1] / after[1]).tolist() == pytest.approx([math.e] * 4, rel=2e-3)
    assert (before[0] / after[0]).tolist() == pytest.approx([30 / 29] * 4, rel=1e-6)


def test_gates_that_cannot_be_shifted_are_refused():
    model = hybridize(teacher(), num_slots=4, window_size=8, slot_write="exact", calibration=tokens(4, 64, seed=3))
    with pytest.raises(ValueError, match="'soft'.*'exact'"):
        shift_gates(model, 1.0)
    for other, named in ((teacher(), "Llama"), (NHAForCausalLM(NHAConfig.tiny()), "NHAForCausalLM")):
        with pytest.raises(ValueError, match=named):
            shift_gates(other, 1.0)
