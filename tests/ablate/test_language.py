"""Language tables: every model trains on the same text and is measured; a run that has no time keeps its checkpoint."""

from __future__ import annotations

import json

import pytest
import yaml

from nha.ablate.language import LanguagePlan, open_sources
from nha.ablate.record import read_rows
from nha.ablate.run import RUNS, run_table
from nha.ablate.summary import compare, remember, write_summary
from nha.ablate.table import Claim, parse_table
from tests.evaluate.test_public import PROSE, lines
from tests.train.material import material

TABLE = """
name: text
title: Tiny language models
kind: language
match: nha
lrs: [3e-3]
models:
  nha: {windows: 8, num_slots: 6}
  transformer: {windows: -1}
  two: {windows: 8, num_slots: 6, fusion: average}
  random: {windows: 8, num_slots: 6, train: {random_windows: [0, 8]}}
language:
  preset: tiny
  train: {tokens: 512, seq_len: 32, batch_size: 4, log_every: 1, save_every: 2}
  lengths: [128]
  documents: 2
  sets: [piqa, cloze_near]
  limit: 4
  clozes: 2
  needle_lengths: [192]
  needles: 1
  knob: [0, 8, -1]
claims:
  - {says: better, model: nha, against: transformer, measure: perplexity}
  - {says: one for every window, model: random, against: nha, measure: window, sizes: [window 8]}
"""


@pytest.fixture
def table():
    return parse_table(yaml.safe_load(TABLE))


@pytest.fixture
def sources(table, tmp_path):
    corpus, tokenizer = material(tmp_path)
    items = [{"query": "abc", "choices": ["def", "ghi"], "gold": 0}] * 4
    (tmp_path / "piqa.jsonl").write_text(lines(items))
    (tmp_path / "heldout.jsonl").write_text(lines(PROSE))
    return open_sources(table.language, corpus, tokenizer, tmp_path)


def test_every_model_is_trained_on_as_many_tokens_and_measured(table, sources, tmp_path):
    out = tmp_path / "out"
    progress = run_table(table, out, sources=sources)
    assert len(progress.made) == 4 and not progress.failed
    rows = {row["model"]: row for row in read_rows(out)}
    assert {row["tokens"] for row in rows.values()} == {512}
    tasks = {model: {size["task"] for size in row["sizes"]} for model, row in rows.items()}
    assert tasks["nha"] == tasks["transformer"] == {"perplexity", "piqa", "cloze_near", "needle", "window"}
    assert tasks["two"] == {"perplexity", "piqa", "window"}  # writes nothing: it has no cache
    windows = {model: [s["size"] for s in row["sizes"] if s["task"] == "window"] for model, row in rows.items()}
    assert windows == {"nha": ["0", "8", "-1"], "random": ["0", "8", "-1"], "two": ["8"], "transformer": ["-1"]}
    found = compare(list(rows.values()), Claim("x", "nha", "transformer", measure="perplexity"))
    assert found is not None and found.count == 2
    remember(table, out)
    page = write_summary(out).read_text()
    assert "perplexity 128" in page and "nha ablate text --corpus CORPUS --data DATA" in page
    assert "| model | 0 | 8 | full |" in page and "needle 192" in page and "one for every window" in page
    assert (out / "text-windows.png").read_bytes()[:4] == b"\x89PNG"
    entries = json.loads((out / "summary.json").read_text())
    assert {"ppl", "by_position"} <= next(e for e in entries if e["task"] == "perplexity").keys()


def test_a_line_for_each_stage_says_where_a_row_is(table, sources, tmp_path):
    lines = []
    run_table(table.only(["nha"]), tmp_path / "out", sources=sources, log=lines.append)
    starts = ["starts", "step 1 of 4, loss ", "step 2 of 4", "step 3 of 4", "trained in ", "piqa: ", "cloze_near: "]
    starts += ["needle: ", "perplexity: ", "windows 0, 8, -1: "]
    name = table.rows[0].name("text")
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"{name}: {start}")


def test_a_run_without_time_is_late_and_resumes(table, sources, tmp_path, monkeypatch):
    one = table.only(["nha"])
    name = one.rows[0].name("text")
    assert run_table(one, tmp_path / "out", sources=sources, budget=60.0, reserve=60.0).late == [name]
    assert (tmp_path / "out" / RUNS / name).exists()
    assert run_table(one, tmp_path / "out", sources=sources).made == [name]
    assert not (tmp_path / "out" / RUNS / name).exists()


@pytest.mark.parametrize(
    "changes, name",
    [(dict(train={"tokenz": 1}), "tokenz"), (dict(sets=("mmlu",)), "mmlu"), (dict(knob=(-2,)), "-2")],
)
def test_plans_that_cannot_be_are_refused_by_name(changes, name):
    with pytest.raises(ValueError, match=name):
        LanguagePlan(**changes)


@pytest.mark.parametrize("name", ["lr", "seed", "window_size", "preset"])
def test_a_setting_of_the_rows_is_refused_under_train(name):
    found = yaml.safe_load(TABLE)
    model = next(iter(found["models"]))
    own = found | {"models": found["models"] | {model: (found["models"][model] or {}) | {"train": {name: 1}}}}
    shared = found | {"language": found["language"] | {"train": found["language"]["train"] | {name: 1}}}
    for table in (own, shared):
        with pytest.raises(ValueError, match=f"expected {name} as the plan, the models and the rows have it"):
            parse_table(table)
