"""Originals of two kinds, rows in which spans are read again, and a report relative to the fair control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import second_model
from experiments.second_model import Plan, RepeatingText, make_config, make_original, repeat_spans
from experiments.second_model_report import (
    above_chance,
    cell,
    find_control,
    longest,
    read_runs,
    summary_rows,
    table,
    write_report,
)
from nha.models.plain import is_plain
from tests.train.material import material

ROOT = Path(__file__).parents[2]


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


def run_of(kind: str, recipe: str | None, right: float) -> dict[str, Any]:
    digits = "".join("1" if i < right * 100 else "0" for i in range(100))
    sets = {"piqa": {"accuracy": right, "interval": [right - 0.1, right + 0.1], "count": 100, "correct": digits}}
    losses = [3.0, 3.2, 3.1]
    measured = {"ppl": 20.0, "interval": [18.0, 22.0], "count": 3, "by_text": losses}
    repeats = {"128": {"first": [0.1, 0.2, 0.1], "second": [right] * 3}}
    data = {"sets": sets, "perplexity": {"2048": measured}, "needle": {}, "repeats": repeats}
    row = {"model": "nha-tiny", "recipe": recipe, "kind": kind, "seed": 0, "full_layers": []}
    row |= {} if recipe is None else {"tokens": 8, "control": "abc"}
    return {"row": row, "plan": {}, "log": [{"loss": 4.0}, {"loss": 3.0}], "eval": data}


def test_a_hybrid_is_shown_relative_to_the_control_of_its_batches(tmp_path):
    runs = [
        run_of("original", None, 0.5),
        run_of("control", "constant", 0.8),
        run_of("hybrid", "balanced", 0.4),
        run_of("hybrid", "constant:2", 0.6),
    ]
    rows = summary_rows(runs)
    shares = [row.get("relative", {}).get("PIQA", {}).get("ratio") for row in rows]
    assert shares == [None, None, 0.5, pytest.approx(0.75)]
    assert rows[2]["relative"]["read twice, 128"]["ratio"] == pytest.approx(0.5)
    assert rows[2]["above_chance"] == ["perplexity 2,048", "read twice, 128", "PIQA"]
    assert cell(rows[2], "perplexity 2,048") == "1.000 times (1.000 to 1.000)"
    (tmp_path / "runs").mkdir()
    for number, run in enumerate(runs):
        (tmp_path / "runs" / f"{number}.json").write_text(json.dumps(run))
    assert write_report(tmp_path).count("\n") == 2 + len(runs)
    assert len(json.loads((tmp_path / "summary.json").read_text())) == len(runs)
    other = run_of("hybrid", "balanced", 0.4)
    other["row"]["control"] = "def"
    assert "relative" not in summary_rows([runs[1], other])[1]


def test_the_control_of_the_same_original_and_rates_is_taken():
    hybrid = run_of("hybrid", "constant:2", 0.6)
    controls = [run_of("control", recipe, 0.5) for recipe in ("constant", "constant:2")]
    for run, rate, tokens in zip([hybrid, *controls], (4e-3, 2e-3, 4e-3), (20, 20, 20), strict=True):
        run["row"] |= {"learning_rates": [rate, 4 * rate], "train_tokens": tokens}
    assert find_control(hybrid, controls) is controls[1]
    assert find_control(hybrid, controls[:1]) is controls[0]
    rows = summary_rows([controls[0], hybrid])
    assert "constant:2 *" in table(rows) and "*" not in table(summary_rows([controls[1], hybrid]))
    controls[1]["row"]["train_tokens"] = 10
    assert find_control(hybrid, controls[1:]) is None
    assert longest([run["row"] for run in controls]) == [controls[0]["row"]]


def test_a_control_at_chance_measures_nothing():
    low = [run_of("control", "constant", 0.5), run_of("hybrid", "constant", 0.5)]
    assert not above_chance(low[0]["eval"]["sets"]["piqa"] | {"chance": 0.5})
    assert cell(summary_rows(low)[1], "PIQA") == "at chance"


def test_the_page_shows_the_rows_of_the_record():
    folder = ROOT / "results" / "generality"
    page = (ROOT / "docs" / "generality.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- second models -->\n")[2].partition("<!-- /second models -->")[0]
    rows = summary_rows(read_runs(folder))
    assert shown == table(longest(rows)) == (folder / "table.md").read_text(encoding="utf-8")
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == rows


def test_runs_have_names_and_an_order():
    options = second_model.parse_options(["--data", ".", "--output", "unused"])
    names = Naming(options)
    assert names.run_name("llama-20m", "constant:2", False) == "llama-20m-40M-constantx2-4M-0"
    assert names.run_name("llama-20m", "constant:2", True).endswith("x2-4M-0")
    controls = {names.run_name("nha-20m", recipe, True) for recipe in ("constant", "balanced")}
    assert len(controls) == 1  # one mixture
    config = make_config("nha-20m", 64, 2048)
    lr = names.recipe("constant", config).learning_rates(256)[0]
    assert names.recipe("constant:0.5", config).learning_rates(256)[0] == lr / 2
    with pytest.raises(SystemExit):
        second_model.parse_options(["--data", ".", "--models", "gpt-20m"])


class Naming(second_model.Sweep):
    """A sweep that makes no folder."""

    def __init__(self, options: Any):
        self.options, self.plan = options, options.plan
