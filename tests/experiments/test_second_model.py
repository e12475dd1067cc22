"""Originals of two kinds, rows in which spans are read again, and a report relative to the fair control."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from experiments import second_model
from experiments.second_model import Plan, RepeatingText, make_original, order, repeat_spans, run_name
from experiments.second_model_report import above_chance, cell, summary_rows, write_report
from nha.models.plain import is_plain
from tests.train.material import material


def test_the_originals_are_two_kinds_of_model():
    llama, nha = (make_original(f"{kind}-tiny", 320, 256) for kind in ("llama", "nha"))
    assert (llama.config.model_type, llama.config.num_key_value_heads) == ("llama", 2)
    assert is_plain(nha.config) and nha.config.qk_norm
    assert llama.config.max_position_embeddings == nha.config.max_position_embeddings == 256


def test_spans_stand_again_later():
    ids = np.arange(2049)
    repeat_spans(ids, np.random.default_rng(0))
    changed = ids != np.arange(2049)
    assert 0.05 < changed.mean() < 0.9
    assert (ids[changed] < np.arange(2049)[changed]).all()  # what stands there stood before


def test_rows_are_a_function_of_their_number(tmp_path):
    corpus, _ = material(tmp_path)
    plan = Plan(seq_len=128, repeat_fraction=1.0)
    one, other = (RepeatingText(corpus, plan) for _ in range(2))
    for index in (0, 7):
        for a, b in zip(one.row(index), other.row(index), strict=True):
            assert a.shape == (128,) and np.array_equal(a, b)
    plain = RepeatingText(corpus, Plan(seq_len=128, repeat_fraction=0.0))
    assert plain.identity != one.identity and not np.array_equal(plain.row(0)[0], one.row(0)[0])


def test_a_second_reading_is_right_where_a_model_copies():
    model = make_original("llama-tiny", 320, 64)
    first, second = second_model.second_reading(model, torch.arange(32).view(2, 16))
    assert len(first) == len(second) == 2 and all(0 <= x <= 1 for x in (*first, *second))


def run_of(kind: str, recipe: str | None, right: float) -> dict:
    digits = "".join("1" if i < right * 100 else "0" for i in range(100))
    sets = {"piqa": {"accuracy": right, "interval": [right - 0.1, right + 0.1], "count": 100, "correct": digits}}
    losses = [3.0, 3.2, 3.1]
    measured = {"ppl": 20.0, "interval": [18.0, 22.0], "count": 3, "by_text": losses}
    repeats = {"128": {"first": [0.1, 0.2, 0.1], "second": [right] * 3}}
    data = {"sets": sets, "perplexity": {"2048": measured}, "needle": {}, "repeats": repeats}
    row = {"model": "nha-tiny", "recipe": recipe, "kind": kind, "seed": 0, "tokens": 8, "full_layers": []}
    return {"row": row, "plan": {}, "log": [{"loss": 4.0}, {"loss": 3.0}], "eval": data}


def test_a_hybrid_is_shown_relative_to_the_control_of_its_recipe(tmp_path):
    runs = [
        run_of("original", None, 0.5),
        run_of("control", "constant", 0.8),
        run_of("hybrid", "constant", 0.4),
        run_of("hybrid", "constant:2", 0.6),
    ]
    rows = summary_rows(runs)
    assert [row.get("relative", {}).get("PIQA", {}).get("ratio") for row in rows] == [
        None,
        None,
        0.5,
        pytest.approx(0.75),
    ]
    assert rows[2]["relative"]["read twice, 128"]["ratio"] == pytest.approx(0.5)
    assert rows[2]["above_chance"] == ["perplexity 2,048", "read twice, 128", "PIQA"]
    assert cell(rows[2], "perplexity 2,048") == "1.000 times"
    (tmp_path / "runs").mkdir()
    for number, run in enumerate(runs):
        (tmp_path / "runs" / f"{number}.json").write_text(json.dumps(run))
    assert write_report(tmp_path).count("\n") == 2 + len(runs)
    assert len(json.loads((tmp_path / "summary.json").read_text())) == len(runs)


def test_a_control_at_chance_measures_nothing():
    low = [run_of("control", "constant", 0.5), run_of("hybrid", "constant", 0.5)]
    assert not above_chance(low[0]["eval"]["sets"]["piqa"] | {"chance": 0.5})
    assert cell(summary_rows(low)[1], "PIQA") == "at chance"


def test_runs_have_names_and_an_order():
    assert order(["constant", "constant:2"])[1:] == [("constant", True), ("constant", False), ("constant:2", False)]
    assert run_name("llama-20m", "constant:2", False, Plan()) == "llama-20m-constantx2-hybrid-4M-0"
    with pytest.raises(SystemExit):
        second_model.parse_options(["--data", ".", "--models", "gpt-20m"])
