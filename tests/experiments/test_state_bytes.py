"""The measurement of packed states: rows read token by token, and formats compared row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from experiments.state_bytes import KV_INT8, Row, joined, measure, summary, use_format, with_full_layers
from tests.models.families import hybrid, tokens


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_rows_cost_what_they_cost_in_one_forward_pass(state_dtype):
    model: Any = hybrid("llama", [8, -1, 3])
    model.config.state_dtype = state_dtype
    ids = tokens(3, 60)
    rows = [Row(ids[0, :53].tolist(), 50), Row(ids[1].tolist(), 55), Row(ids[2, :50].tolist(), 48)]
    found = measure(model, rows, math.inf)
    assert found is not None
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 59)
    near = 1e-4 if state_dtype == "float32" else 0.1
    for number, (row, last) in enumerate(zip(rows, (52, 59, 49), strict=True)):
        assert found["text"][number] == pytest.approx(loss[number, :last].sum().item(), rel=near)
        assert found["answer"][number] == pytest.approx(loss[number, row.answer - 1 : last].sum().item(), rel=near)
    assert found["bytes per sequence, full layers"] > 0
    assert measure(model, rows, 0.0) is None


def test_keys_and_values_of_full_layers_in_8_bits():
    model: Any = hybrid("llama", [8, 8, 3])
    with_full_layers(model, 3)
    assert model.config.window_sizes == [-1, -1, -1]
    found: list[dict[str, Any]] = []
    for name in ("float32", KV_INT8):
        use_format(model, name)
        read = measure(model, [Row(tokens(1, 40)[0].tolist(), 35)], math.inf)
        assert read is not None
        found.append(read)
    assert found[0]["text"] != found[1]["text"] == pytest.approx(found[0]["text"], rel=0.05)
    assert found[1]["bytes per sequence, full layers"] < found[0]["bytes per sequence, full layers"] / 2


def test_formats_are_compared_row_by_row():
    first = {"text": [10.0, 20.0], "answer": [2.0, 4.0], "right": [True, False], "tokens": [10, 10], "seconds": 1.0}
    first |= {"bytes per sequence, hybrid layers": 9, "bytes per sequence, full layers": 0}
    other = joined([first | {"text": [11.0, 21.0], "answer": [3.0, 5.0], "right": [True, True]}])
    found = summary(other, first)
    assert found["nats per answer, change"] == [1.0, 1.0, 1.0]
    assert found["clozes right here alone, there alone"] == [1, 0]
    assert found["perplexity, change in %"][0] == pytest.approx(100 * math.expm1(0.1), abs=1e-3)
