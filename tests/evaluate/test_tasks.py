"""Tasks of lm-evaluation-harness run on hybrids, the package's own without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nha.evaluate.harness.offline import cloze_rows, passages, recall_rows
from nha.evaluate.tasks import FOLDER, OFFLINE, STANDARD, known_tasks, run_tasks, task_names
from nha.evaluate.variants import use_variant
from tests.convert.test_hybridize import byte_tokenizer
from tests.data.tokenizers import small_tokenizer
from tests.models.families import hybrid, teacher


def test_the_command_runs_offline_tasks_without_a_network(tmp_path):
    path = tmp_path / "tiny"
    hybrid("llama", 16, vocab_size=300).save_pretrained(path)
    byte_tokenizer(path)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "nothing")}
    arguments = ["eval", "tasks", str(path), "--tasks", "offline", "--limit", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "nha", *arguments],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["results"]["model"]["tasks"]
    assert set(found) == set(OFFLINE)
    for task, metric in (("nha_cloze", "acc"), ("nha_choice", "acc"), ("nha_recall", "exact_match")):
        score = found[task][metric]
        assert score["documents"] == 2 and score["interval"][0] <= score["value"] <= score["interval"][1]


def test_a_hybrid_with_full_attention_scores_as_the_original():
    tokenizer, model = small_tokenizer("digits"), hybrid("llama", 16, vocab_size=900)
    names = ["nha_cloze", "nha_choice"]
    manager = known_tasks(names)
    scores = run_tasks(teacher(vocab_size=900), tokenizer, names, limit=6, manager=manager)
    with use_variant(model, "full_attention"):
        same = run_tasks(model, tokenizer, names, limit=6, manager=manager)
    assert same["nha_choice"] == scores["nha_choice"]
    assert same["nha_cloze"]["perplexity"]["value"] == pytest.approx(scores["nha_cloze"]["perplexity"]["value"])
    assert scores["nha_cloze"]["perplexity"]["interval"] is None
    other = run_tasks(model, tokenizer, names, limit=6, manager=manager)
    assert other["nha_cloze"]["perplexity"] != scores["nha_cloze"]["perplexity"]


def test_every_standard_task_is_one_that_the_harness_knows():
    manager = known_tasks(STANDARD)
    assert set(STANDARD) <= set(manager.all_tasks)


def test_names_of_tasks():
    assert task_names("standard, nha_cloze") == [*STANDARD, "nha_cloze"]
    with pytest.raises(ValueError, match="expected names of tasks separated by commas, got ','"):
        task_names(",")
    with pytest.raises(ValueError, match="expected tasks that lm-eval knows, or offline or standard, got riddle"):
        known_tasks(["nha_cloze", "riddle"])


def test_offline_documents_are_fixed_and_have_their_answers():
    assert len(passages()) > 30 and len(cloze_rows()) > 60
    for line in (FOLDER / "passages.jsonl").read_text(encoding="utf-8").splitlines():
        assert "public domain" in json.loads(line)["source"]
    rows = recall_rows(count=8)
    assert rows == recall_rows(count=8) != recall_rows(count=8, seed=1)
    for row in rows:
        assert row["choices"][row["right"]] == row["answer"] and len(set(row["choices"])) == 4
        key = row["prompt"].rsplit("\n\n", 1)[1]
        assert f"{key} {row['answer']}." in row["prompt"]
        assert 500 <= len(row["prompt"].split()) <= 700


def test_without_the_harness_the_command_says_how_to_get_it(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from nha.cli import app

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(app, ["eval", "tasks", "/nowhere", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and "pip install 'nha[eval]'" in result.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/nowhere/at/all"], "expected a model directory or a Hub id"),
        (["{tiny}", "--tasks", "riddle"], "expected tasks that lm-eval knows"),
        (["{tiny}", "--tasks", ""], "expected names of tasks separated by commas"),
        (["{tiny}", "--limit", "0"], "expected --limit of at least 1, got 0"),
        (["{tiny}", "--batch-size", "0"], "expected --batch-size of at least 1, got 0"),
        (["{tiny}", "--ablations"], "expected a hybrid for --ablations"),
        (["{tiny}", "--output", "{tiny}"], "to be new or empty, it already holds files"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, tmp_path):
    from typer.testing import CliRunner

    from nha.cli import app

    tiny = tmp_path / "tiny"
    teacher(vocab_size=300).save_pretrained(tiny)
    before = sorted(path.name for path in tiny.iterdir())
    result = CliRunner().invoke(app, ["eval", "tasks", *(str(tiny) if a == "{tiny}" else a for a in arguments)])
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert sorted(path.name for path in tiny.iterdir()) == before
