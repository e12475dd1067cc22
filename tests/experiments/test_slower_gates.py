"""Every shift of the gates' biases is measured once, and shown."""

from __future__ import annotations

import copy
import json

from experiments import slower_gates
from experiments.ship import make_delta
from nha import hybridize
from tests.data.tokenizers import small_tokenizer
from tests.evaluate.test_public import PROSE, lines
from tests.models.families import teacher, tokens

TEXT = tokens(4, 64, seed=3)

SMALL = ["--needle-lengths", "256", "--needles", "1", "--lengths", "256", "--documents", "1"]


def test_every_shift_is_measured_once_and_shown(tmp_path, capsys):
    tokenizer = small_tokenizer("digits")
    base = teacher(vocab_size=len(tokenizer), max_position_embeddings=1024).eval()
    hybridize(base, num_slots=4, window_size=16, calibration=TEXT).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "heldout.jsonl").write_text(lines(PROSE))
    given = ["--data", tmp_path, "--output", tmp_path / "out", "--model", tmp_path / "tiny"]
    given = [*map(str, given), *SMALL, "--parts", "needle,perplexity", "--state-dtype", "int8"]
    assert slower_gates.main([*given, "--shifts", "0"]) == 0
    assert slower_gates.main([*given, "--shifts", "0,2"]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / slower_gates.RESULT).read_text())
    assert [row["shift"] for row in rows] == [0, 2] and shown.count("needle 256") == 2
    assert rows[0]["found"]["perplexity"]["256"]["ppl"] != rows[1]["found"]["perplexity"]["256"]["ppl"]
    assert all(row["versions"]["torch"] and row["about"]["state_dtype"] == "int8" for row in rows)


def test_a_small_file_makes_the_hybrid_that_is_measured(tmp_path):
    tokenizer = small_tokenizer("digits")
    base = teacher(vocab_size=len(tokenizer), max_position_embeddings=1024).eval()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    hybrid = hybridize(copy.deepcopy(base), num_slots=4, window_size=16, calibration=TEXT)
    make_delta(tmp_path / "small.safetensors", base, hybrid, {}, None, None)
    (tmp_path / "heldout.jsonl").write_text(lines(PROSE))
    given = ["--data", tmp_path, "--output", tmp_path, "--model", tmp_path / "base"]
    given += ["--file", tmp_path / "small.safetensors", "--parts", "perplexity", "--shifts", "0,4"]
    assert slower_gates.main([*map(str, given), *SMALL]) == 0
    rows = json.loads((tmp_path / slower_gates.RESULT).read_text())
    assert [row["about"]["model"] for row in rows] == [f"{tmp_path / 'base'} small.safetensors"] * 2
    assert rows[0]["found"]["perplexity"]["256"]["ppl"] != rows[1]["found"]["perplexity"]["256"]["ppl"]
