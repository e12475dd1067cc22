"""A shift of the gates' biases makes slots forget more slowly, and every shift is measured once."""

from __future__ import annotations

import json
import math

import pytest
import torch

from experiments import slower_gates
from nha import hybridize
from nha.models.windows import attention_layers
from tests.data.tokenizers import small_tokenizer
from tests.evaluate.test_public import PROSE, lines
from tests.models.families import teacher, tokens

TEXT = tokens(4, 64, seed=3)


def test_a_shift_divides_small_log_gates_and_hardly_moves_large_ones():
    model = hybridize(teacher(), num_slots=4, window_size=8, init="soft", calibration=TEXT)
    slots = attention_layers(model)[0].nha
    with torch.no_grad():
        slots.g_proj.weight.zero_()
        slots.g_proj.bias.fill_(6.0)
        slots.g_proj.bias[:4] = -30.0
    hidden = torch.zeros(1, 1, slots.g_proj.in_features, dtype=slots.g_proj.weight.dtype)
    before = slots(hidden).log_gate[0, 0]
    slower_gates.shift_gates(model, 1.0)
    after = slots(hidden).log_gate[0, 0]
    assert (before[1] / after[1]).tolist() == pytest.approx([math.e] * 4, rel=2e-3)
    assert (before[0] / after[0]).tolist() == pytest.approx([30 / 29] * 4, rel=1e-6)


def test_exact_slots_are_refused():
    model = hybridize(teacher(), num_slots=4, window_size=8, slot_write="exact", calibration=TEXT)
    with pytest.raises(ValueError, match="'soft'.*'exact'"):
        slower_gates.shift_gates(model, 1.0)


def test_every_shift_is_measured_once_and_shown(tmp_path, capsys):
    tokenizer = small_tokenizer("digits")
    base = teacher(vocab_size=len(tokenizer), max_position_embeddings=1024).eval()
    hybridize(base, num_slots=4, window_size=16, calibration=TEXT).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "heldout.jsonl").write_text(lines(PROSE))
    given = ["--data", tmp_path, "--output", tmp_path / "out", "--model", tmp_path / "tiny"]
    given = [*map(str, given), "--needle-lengths", "256", "--needles", "1", "--lengths", "256", "--documents", "1"]
    given += ["--parts", "needle,perplexity", "--state-dtype", "int8"]
    assert slower_gates.main([*given, "--shifts", "0"]) == 0
    assert slower_gates.main([*given, "--shifts", "0,2"]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / slower_gates.RESULT).read_text())
    assert [row["shift"] for row in rows] == [0, 2] and shown.count("needle 256") == 2
    assert rows[0]["found"]["perplexity"]["256"]["ppl"] != rows[1]["found"]["perplexity"]["256"]["ppl"]
    assert all(row["versions"]["torch"] and row["about"]["state_dtype"] == "int8" for row in rows)
