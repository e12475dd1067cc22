"""`nha eval recall` and `nha eval all`: tables, JSON and a picture, whole or not at all."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from nha.cli import app
from tests.convert.test_hybridize import byte_tokenizer
from tests.models.families import hybrid, teacher

runner = CliRunner()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories with a tiny model, a hybrid of it, and a model with another tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name, model in (("tiny", teacher(vocab_size=300)), ("hybrid", hybrid("llama", 16, vocab_size=300))):
        model.save_pretrained(root / name)
        byte_tokenizer(root / name)
    other = root / "other"
    teacher(vocab_size=300).save_pretrained(other)
    tokenizer = byte_tokenizer(other)
    tokenizer.add_tokens(["longer"])
    tokenizer.save_pretrained(other)
    return root


def run(places, *arguments):
    return runner.invoke(app, ["eval", *(str(places / a[1:]) if a.startswith("@") else a for a in arguments)])


def test_recall_of_every_form_and_of_another_model(places, tmp_path):
    options = ["--tasks", "one_fact,copy", "--length", "900", "--questions", "2", "--distances", "300,600"]
    compare = ["--ablations", "--compare", f"teacher={places / 'tiny'}", "--output", str(tmp_path / "out")]
    result = run(places, "recall", "@hybrid", *options, *compare, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    forms = {"model", "slots off", "window off", "longer window", "full attention", "teacher"}
    assert set(found["results"]) == forms
    for row in found["results"].values():
        assert set(row["recall"]) == {"one_fact", "copy"}
        assert set(row["recall"]["copy"]) == {"300", "600"}
        assert set(row["recall"]["copy"]["300"]) >= {"digits", "exact", "generated", "generated_interval"}
    assert json.loads((tmp_path / "out" / "recall.json").read_text()) == found
    assert (tmp_path / "out" / "recall.png").read_bytes()[:4] == b"\x89PNG"
    table = run(places, "recall", "@hybrid", *options, "--metric", "digits", "--no-generate")
    assert table.exit_code == 0, table.output
    assert "one fact" in table.stdout and "300" in table.stdout and "[" in table.stdout


def test_the_same_seed_gives_the_same_numbers(places):
    options = ["--tasks", "one_fact", "--length", "700", "--questions", "3", "--distances", "300", "--json"]
    rows = [
        json.loads(run(places, "recall", "@hybrid", *options, "--seed", seed).stdout)["results"]["model"]["recall"]
        for seed in ("0", "0", "1")
    ]
    assert rows[0] == rows[1]


def test_everything_is_saved_whole(places, tmp_path):
    output = tmp_path / "results"
    options = ["--lengths", "700,1200", "--documents", "2", "--questions", "1", "--tasks", "one_fact,mqar"]
    result = run(places, "all", "@hybrid", str(output), *options, "--compare", f"teacher={places / 'tiny'}")
    assert result.exit_code == 0, result.output
    assert {path.name for path in output.iterdir()} == {"evaluation.json", "recall.png"}
    found = json.loads((output / "evaluation.json").read_text())
    assert set(found["results"]) == {"model", "teacher"} and found["documents"] == {"700": 2, "1200": 2}
    assert {"ppl_700", "ppl_1200", "repeats_700", "recall", "slot_mass"} <= set(found["results"]["model"])
    assert "teacher" in result.stdout and "one fact" in result.stdout
    again = run(places, "all", "@hybrid", str(output), *options)
    assert again.exit_code == 2 and "it already holds files" in again.stderr.replace("\n", " ")
    assert json.loads((output / "evaluation.json").read_text()) == found


def test_an_interrupted_evaluation_resumes_with_the_same_numbers(places, tmp_path, monkeypatch):
    import nha.evaluate.compare as module

    options = ["--lengths", "700", "--documents", "2", "--questions", "2", "--tasks", "one_fact"]
    compare = ["--compare", f"[teacher]={places / 'tiny'}"]
    whole = run(places, "all", "@hybrid", str(tmp_path / "whole"), *options, *compare)
    assert whole.exit_code == 0, whole.output
    assert "[teacher]" in whole.stdout
    real, loaded = module.loading.load, []

    def stopped(source, **given):
        loaded.append(source.name)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return real(source, **given)

    output = tmp_path / "[out]"
    with monkeypatch.context() as patch:
        patch.setattr(module.loading, "load", stopped)
        interrupted = run(places, "all", "@hybrid", str(output), *options, *compare)
    assert interrupted.exit_code == 130 and not output.exists()
    other = run(places, "all", "@hybrid", str(output), *options, *compare, "--seed", "1")
    assert other.exit_code == 2 and "seed = 0, got 1" in other.stderr.replace("\n", " ")
    again = run(places, "all", "@hybrid", str(output), *options, *compare)
    assert again.exit_code == 0, again.output
    assert "resuming: 1 parts" in again.stderr and str(output) in again.stderr.replace("\n", "")
    found, wanted = (json.loads((path / "evaluation.json").read_text()) for path in (output, tmp_path / "whole"))
    for results in (found, wanted):
        for row in results["results"].values():
            row.pop("seconds")
    assert found == wanted
    assert not list(tmp_path.glob("*.partial.jsonl"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["recall", "@tiny", "--tasks", "riddle"], "expected --tasks out of one_fact"),
        (
            ["recall", "@tiny", "--dtype", "int8"],
            "expected --dtype to be auto, float32, bfloat16 or float16, got 'int8'",
        ),
        (["recall", "@tiny", "--questions", "0"], "expected --questions of at least 1, got 0"),
        (["recall", "@tiny", "--metric", "vibes"], "expected --metric out of digits, exact, generated, got 'vibes'"),
        (["recall", "@tiny", "--metric", "generated", "--no-generate"], "expected --metric out of digits, exact, got"),
        (["recall", "@tiny", "--distances", "near"], "expected --distances to be integers"),
        (["recall", "@tiny", "--distances", "5", "--length", "900"], "a value too near"),
        (["recall", "@tiny", "--length", "160"], "expected sequences long enough for a question"),
        (["recall", "@tiny", "--ablations"], "expected a hybrid for --ablations"),
        (["recall", "@tiny", "--compare", "teacher"], "expected --compare as NAME=MODEL"),
        (["recall", "@tiny", "--compare", "model=x"], "expected --compare as NAME=MODEL with a name of its own"),
        (["recall", "@tiny", "--compare", "a=/nowhere/at/all"], "expected a model directory or a Hub id"),
        (["recall", "@tiny", "--output", "@tiny"], "to be new or empty, it already holds files"),
        (["recall", "@tiny", "--text", "/nowhere"], "expected a text file, there is none at"),
        (["recall", "@tiny", "--window", "8"], "expected a hybrid for --window"),
        (["perplexity", "@tiny", "--length", "400000"], "expected text for 4 blocks of 400000 tokens"),
        (["perplexity", "@tiny", "--output", "@tiny"], "to be new or empty, it already holds files"),
        (["all", "@tiny", "@new", "--lengths", ""], "expected --lengths to name at least one length"),
        (["all", "@tiny", "@new", "--lengths", "100"], "expected --lengths of at least 256, got 100"),
        (["all", "@tiny", "@new", "--lengths", "400000"], "expected a document of at least 400000 tokens"),
        (["all", "@tiny", "@new", "--tasks", ","], "expected --tasks out of"),
    ],
)
def test_bad_input_is_one_line_before_weights_are_read_and_writes_nothing(places, arguments, message, monkeypatch):
    monkeypatch.setattr("nha.evaluate.compare.load_planned", None)
    result = run(places, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert result.stderr.strip().splitlines()[-1].startswith("error:")
    assert not (places / "new").exists()


def test_a_model_with_another_tokenizer_is_not_compared(places, tmp_path):
    options = ["--tasks", "one_fact", "--length", "700", "--questions", "1", "--distances", "300"]
    output = ["--output", str(tmp_path / "out")]
    result = run(places, "recall", "@tiny", *options, "--compare", f"other={places / 'other'}", *output)
    assert result.exit_code == 2
    assert "to have the tokenizer of" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval recall", "eval all"])
def test_every_command_has_help_with_an_example(command):
    result = runner.invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout
