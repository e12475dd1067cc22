"""The measurement of packed states reads token by token what one forward pass reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from experiments.state_bytes import measure
from tests.models.families import hybrid, tokens


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_perplexity_and_answers_are_those_of_one_forward_pass(state_dtype):
    model: Any = hybrid("llama", [8, -1, 3])
    model.config.state_dtype = state_dtype
    ids, places = tokens(3, 60), [(50, 53), (55, 60), (48, 50)]
    found = measure(model, ids, places, 40, math.inf)
    assert found is not None
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 59)
    near = 1e-4 if state_dtype == "float32" else 0.1
    assert found["perplexity"] == pytest.approx(math.exp(loss[:, :39].mean()), rel=near)
    answers = sum(loss[row, a - 1 : b - 1].sum().item() for row, (a, b) in enumerate(places)) / 3
    assert found["nats per cloze answer"] == pytest.approx(answers, rel=near)
    assert found["bytes per sequence, full layers"] > 0
    assert measure(model, ids, places, 40, 0.0) is None
