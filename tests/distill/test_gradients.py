"""Gradients of text and recall text are scaled apart, and learning rates warm up and fall."""

import pytest
import torch

from nha.distill.gradients import combine_gradients, lr_factor


@pytest.fixture
def parameters():
    return [torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 1)]


@pytest.fixture
def parts():
    text = [torch.tensor([3.0, 4.0]), None, None]
    return {"text": text, "recall": [torch.tensor([0.0, 8.0]), torch.tensor([6.0]), None]}


def combined(parts, parameters, how):
    norms = combine_gradients(parts, parameters, how=how, max_norm=1.0, recall_norm=0.5)
    return {name: norm.item() for name, norm in norms.items()}, [p.grad for p in parameters]


def test_each_part_is_clipped(parts, parameters):
    norms, grads = combined(parts, parameters, "clip")
    assert norms == {"text": 5.0, "recall": 10.0}
    assert torch.allclose(grads[0], torch.tensor([0.6, 0.8 + 0.8])) and torch.allclose(grads[1], torch.tensor([0.6]))
    assert grads[2] is None


def test_recall_is_scaled_to_text(parts, parameters):
    _, grads = combined(parts, parameters, "normalise")
    assert torch.allclose(grads[0], torch.tensor([0.6, 0.8 + 0.4])) and torch.allclose(grads[1], torch.tensor([0.3]))


def test_the_sum_is_clipped(parameters):
    _, grads = combined({"text": [torch.tensor([3.0, 12.0]), torch.tensor([6.0]), None]}, parameters, "together")
    assert torch.cat(grads[:2]).norm().item() == pytest.approx(1.0)


def test_learning_rates_warm_up_and_fall():
    factors = [lr_factor(step, 100, 0.1) for step in range(100)]
    assert factors[9] == max(factors) == pytest.approx(1.0, abs=0.03) and factors[0] == pytest.approx(0.1, abs=1e-2)
    assert factors[9:] == sorted(factors[9:], reverse=True) and 0.05 <= factors[-1] < 0.06
