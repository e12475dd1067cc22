"""Perplexity read in segments through the cache is that of one whole forward pass."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import nha.evaluate.perplexity as module
from nha.evaluate.perplexity import Perplexity, perplexity
from tests.models.families import hybrid, teacher, tokens


@pytest.mark.parametrize("model", [teacher(), hybrid("llama", [8, -1, 4])], ids=["full", "hybrid"])
@pytest.mark.parametrize("segment, most", [(7, 16), (16, 47), (47, 47), (16, 48), (16, 100), (16, 10_000)])
def test_neither_segments_nor_batches_change_the_losses(model, segment, most, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT", segment)
    ids = tokens(3, 48)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    whole = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert torch.allclose(perplexity(model, ids, max_batch_tokens=most).losses, whole, atol=2e-4)


def test_positions_are_those_of_the_predicted_tokens():
    losses = torch.arange(1.0, 8.0)[None]  # the loss at position p is p
    found = Perplexity(losses).by_position([0, 2, 4, 8])
    assert found == pytest.approx([math.exp(1), math.exp(2.5), math.exp(5.5)])


def test_the_error_is_that_of_the_mean_over_texts():
    measured = Perplexity(torch.tensor([[1.0, 3.0], [3.0, 5.0]]))
    assert measured.loss == 3.0
    assert measured.error == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert math.isnan(Perplexity(torch.ones(1, 3)).error)


def test_intervals_are_of_the_mean_over_texts():
    measured = Perplexity(torch.rand(40, 9, generator=torch.Generator().manual_seed(0)) + 1)
    low, high = measured.interval()
    assert low < measured.value < high
    spread = 1.96 * measured.error  # the normal interval, which the bootstrap's is near for 40 texts
    assert math.log(high / low) == pytest.approx(2 * spread, rel=0.2)


def test_progress_ends_at_the_number_of_tokens():
    seen = []
    for most in (10, 20, 1000):
        perplexity(teacher(), tokens(2, 20), max_batch_tokens=most, progress=lambda *x: seen.append(x))
        assert seen[-1] == (40, 40)


def test_texts_of_one_token_are_refused():
    with pytest.raises(ValueError, match=r"expected token ids \[N, T\] with T >= 2, got \[1, 1\]"):
        perplexity(teacher(), tokens(1, 1))
