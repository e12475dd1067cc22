"""The sweep trains and measures runs of a tiny model, keeps those that are done, and names those that are not."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from nha.convert.search import SearchResult, save_search
from nha.data.prepare import prepare
from tests.convert.test_hybridize import byte_tokenizer
from tests.data.test_corpus import WORDS
from tests.models.families import teacher

SCRIPT = Path(__file__).parents[2] / "experiments" / "distill.py"


@pytest.fixture(scope="module")
def sweep():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    teacher(vocab_size=300).save_pretrained(path / "tiny")
    tokenizer = byte_tokenizer(path / "tiny")
    generator = np.random.default_rng(0)
    for i in range(12):
        (path / f"{i}.txt").write_text(f"{i}: " + " ".join(generator.choice(WORDS, 300)))
    prepare([str(path)], path / "corpus", tokenizer, held_out_fraction=0.3)
    return path


def arguments(place, out, *more):
    return [
        "--model",
        str(place / "tiny"),
        "--corpus",
        str(place / "corpus"),
        "--output",
        str(out),
        "--work",
        str(out / "work"),
        "--tokens",
        "2560",
        "--lengths",
        "1024",
        "--texts",
        "2",
        "--rows",
        "1",
        "--tasks",
        "one_fact",
        "--eval-s",
        "0",
        "--set",
        "window_size=16",
        "--set",
        "num_slots=6",
        "--set",
        "batch_size=2",
        "--set",
        "seq_len=640",
        "--set",
        "recall_fraction=0.5",
        "--set",
        "align_steps=1",
        "--set",
        "align_sequences=1",
        *more,
    ]


def test_runs_are_trained_and_measured_once(sweep, place, tmp_path, capsys):
    given = arguments(place, tmp_path, "--runs", "teacher,hybrid,sink")
    assert sweep["main"](given) == 0
    rows = {row["run"]: row for row in json.loads((tmp_path / "summary.json").read_text())}
    assert set(rows) == {"teacher", "hybrid", "sink"}
    wanted = {"run", "seed", "tokens", "windows", "slots", "ppl_1k", "recall", "tokens_per_s", "gpu", "versions"}
    assert all(wanted <= row.keys() for row in rows.values())
    assert rows["hybrid"]["windows"] == [16, 16, 16] and rows["hybrid"]["slots"] == 6
    assert len(rows["hybrid"]["slot_mass"]["slots"]) == 3
    assert rows["hybrid"]["slots_off"]["ppl_1k"] != rows["hybrid"]["ppl_1k"] != rows["hybrid"]["window_off"]["ppl_1k"]
    assert rows["sink"]["slots"] == 0 and "slots_off" not in rows["sink"]
    assert {"digits", "exact", "generated"} <= rows["hybrid"]["recall"]["one_fact"]["128"].keys()
    logs = [json.loads(line) for line in (tmp_path / "logs.jsonl").read_text().splitlines()]
    assert [log["run"] for log in logs] == ["hybrid", "sink"]
    before = (tmp_path / "summary.json").read_text()
    capsys.readouterr()
    assert sweep["main"](given) == 0
    assert capsys.readouterr().out.count("is there already") == 3
    assert (tmp_path / "summary.json").read_text() == before


def test_a_budget_stops_it_and_the_same_command_resumes(sweep, place, tmp_path, capsys):
    given = arguments(place, tmp_path, "--runs", "hybrid", "--no-eval")
    assert sweep["main"]([*given, "--budget-s", "0"]) == 3
    assert "no time for: hybrid-0" in capsys.readouterr().out
    assert sweep["main"](given) == 0


def test_steps_are_timed_one_by_one(sweep, place, tmp_path, capsys):
    assert sweep["main"](arguments(place, tmp_path, "--runs", "hybrid", "--profile")) == 0
    told = capsys.readouterr().out
    assert told.count("done in") == 20 and "tokens/s without logs and data" in told and "cpu: " in told


def test_the_settings_of_every_recipe_are_within_bounds(sweep):
    for name in sweep["RECIPES"]:
        sweep["settings_of"](name, 0, 1e6, (3,), {})
    assert sweep["settings_of"]("hybrid4", 1, 1e6, (3, 11), {"batch_size": 4}).full_layers == (3, 11)


def test_full_layers_come_from_a_search(sweep, tmp_path):
    save_search(SearchResult({}, windows=[64, -1, 64, -1], full_layers=[1, 3]), tmp_path / "search.json")
    assert sweep["full_layers"](str(tmp_path / "search.json")) == (1, 3)
    assert sweep["full_layers"](None) == (3, 11, 18, 26)


def test_unknown_runs_and_settings_are_refused(sweep, place, tmp_path):
    with pytest.raises(SystemExit):
        sweep["main"](arguments(place, tmp_path, "--runs", "nothing"))
    with pytest.raises(SystemExit, match="expected --set with one of"):
        sweep["main"](arguments(place, tmp_path, "--set", "speed=1"))
