"""The short training moves gates and sinks only, and each layer towards full attention."""

from __future__ import annotations

import pytest
import torch

from nha import hybridize, set_windows
from nha.convert import align as alignment
from nha.convert.align import align
from nha.models.windows import attention_layers
from tests.models.families import teacher, tokens

TEXT = tokens(4, 64, seed=3)


def converted(**options):
    return hybridize(teacher(), num_slots=6, window_size=8, calibration=TEXT, **options)


def test_every_layer_comes_nearer_and_nothing_else_moves():
    model = converted(full_layers=[1])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    errors = align(model, TEXT, steps=8)
    assert errors[1] == (0.0, 0.0)
    assert all(errors[layer][1] < errors[layer][0] for layer in (0, 2))
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved and all(".nha." in name for name in moved)
    assert model.config.window_sizes == [8, -1, 8]
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_bits():
    weights = []
    for _ in range(2):
        model = converted()
        align(model, TEXT, steps=3, seed=5)
        weights.append(attention_layers(model)[2].nha.g_proj.weight)
    assert torch.equal(*weights)


def test_compiling_kernels_ahead_changes_no_bit(monkeypatch):
    found, ahead = [], []
    for runs in (False, True):
        if runs:
            monkeypatch.setattr(alignment, "compile_kernels", lambda run, device: ahead.append(run()))
        model = hybridize(teacher(), num_slots=6, window_size=[-1, [8, 16], 8], calibration=TEXT)
        found.append((align(model, TEXT, steps=3, batch_size=2), model.state_dict()))
    assert len(ahead) == 1 and found[0][0] == found[1][0]
    assert all(torch.equal(weight, found[1][1][name]) for name, weight in found[0][1].items())


def test_texts_within_the_window_are_refused():
    with pytest.raises(ValueError, match="expected texts longer than the smallest window, got 8 tokens"):
        align(converted(), TEXT[:, :8])
    model = converted()
    set_windows(model, -1)
    with pytest.raises(ValueError, match="expected texts longer than the smallest window"):
        align(model, TEXT)
