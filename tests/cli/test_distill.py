"""`nha distill` trains, resumes and saves; bad input is one line, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from experiments.cost import shape_config
from nha.cli import app
from nha.convert.heads import windows_from_plan
from nha.convert.search import SearchResult, save_search
from nha.distill import heads
from nha.distill.timeline import Timeline
from nha.errors import BadInput
from nha.models import loading
from tests.convert.test_hybridize import byte_tokenizer
from tests.data.test_corpus import texts
from tests.models.families import teacher

cli_distill = sys.modules["nha.cli.distill"]  # the package has the command by that name
runner = CliRunner()
SHORT = [
    "--window",
    "16",
    "--slots",
    "6",
    "--tokens",
    "1280",
    "--batch-size",
    "2",
    "--seq-len",
    "320",
    "--recall-fraction",
    "0.5",
    "--align-steps",
    "1",
    "--log-every",
    "1",
    "--compile=nothing",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny model that reads bytes, `tiny`, and text for it, `texts.jsonl`."""
    path = tmp_path_factory.mktemp("distill")
    teacher(vocab_size=300).save_pretrained(path / "tiny")
    byte_tokenizer(path / "tiny")
    (path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts()))
    return path


@pytest.fixture(scope="module")
def corpus(place):
    """The text as the command prepares it."""
    arguments = ["distill", place / "tiny", place / "unused", "--text", place / "texts.jsonl", "--corpus", place / "c"]
    result = runner.invoke(app, [*map(str, arguments), "--prepare-only", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["documents"] == 40 and found["held_out"]["documents"] >= 1
    assert not (place / "unused").exists()
    return place / "c"


def test_from_a_teacher_and_text_to_a_hybrid_that_writes(place, corpus, tmp_path):
    run = tmp_path / "run"
    arguments = ["distill", str(place / "tiny"), str(run), "--corpus", str(corpus), *SHORT]
    stopped = runner.invoke(app, [*arguments, "--budget", "0", "--json"])
    assert stopped.exit_code == 3, stopped.output
    assert not json.loads(stopped.stdout)["finished"] and not (run / "hybrid").exists()
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["finished"] and found["steps"] == 2 and found["last"]["tokens"] == 1280
    names = {path.name for path in (run / "hybrid").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "distillation.json"} <= names
    again = runner.invoke(app, ["generate", str(run / "hybrid"), "Hello there", "--max-new-tokens", "4"])
    assert again.exit_code == 0, again.output
    table = runner.invoke(app, arguments)
    assert table.exit_code == 0 and "saved in" in table.stdout and "tokens/s" in table.stdout


def test_windows_come_from_a_search(place, corpus, tmp_path):
    save_search(SearchResult({}, windows=[16, -1, 16], full_layers=[1]), tmp_path / "search.json")
    arguments = ["distill", place / "tiny", tmp_path / "run", "--corpus", corpus, "--windows", tmp_path / "search.json"]
    result = runner.invoke(app, [*map(str, arguments), *SHORT[2:], "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "hybrid" / "config.json").read_text())["window_sizes"] == [16, -1, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tiny}", "{new}"], "expected --text to train on, or --corpus"),
        (["{tiny}", "{new}", "--text", "/nowhere"], "there is nothing at /nowhere"),
        (["{tiny}", "{new}", "--corpus", "/nowhere"], "expected a corpus in /nowhere"),
        (["{tiny}", "{new}", "--corpus", "{tiny}"], "it has no meta.json that can be read"),
        (
            ["{tiny}", "{new}", "--corpus", "{corpus}", "--window", "-2"],
            "expected --window of at least -1 and at most 16777216, got -2",
        ),
        (["{tiny}", "{new}", "--corpus", "{corpus}", "--windows", "/nowhere"], "there is no file at /nowhere"),
        (["{tiny}", "{new}", "--corpus", "{corpus}", "--tokens", "0"], "expected --tokens of at least 1"),
        (
            ["{tiny}", "{new}", "--corpus", "{corpus}", "--trainable", "all"],
            "expected --trainable to be one of attention",
        ),
        (
            ["{tiny}", "{new}", "--corpus", "{corpus}", "--lr", "inf"],
            "expected --lr of at least 0 and at most 1, got inf",
        ),
        (["{tiny}", "{new}", "--corpus", "{corpus}", "--budget", "nan"], "expected --budget of at least 0"),
        (["{tiny}", "{new}", "--corpus", "{corpus}", "--full-layers", "1,x"], "got '1,x' for --full-layers"),
        (["{tiny}", "{new}", "--corpus", "{corpus}", "--dtype", "int8"], "expected --dtype to be auto"),
        (
            ["{tiny}", "{new}", "--corpus", "{corpus}", "--window", "8", "--seq-len", "40"],
            "expected recall sequences of at least",
        ),
        (
            ["{tiny}", "{new}", "--corpus", "{corpus}", "--window", "5000", "--seq-len", "6000"],
            "expected documents longer than the window",
        ),
        (
            ["{tiny}", "{new}", "--corpus", "{corpus}", "--seq-len", "64"],
            "expected --seq-len above the smallest window, 64, got 64",
        ),
        (
            ["{tiny}", "{new}", "--text", "/nowhere", "--dry-run", "--full-layers", "0,1", "--seq-len", "32"],
            "expected --seq-len above the smallest window, 64, got 32",
        ),
        (["{tiny}", "{tiny}", "--corpus", "{corpus}"], "got other files such as config.json"),
        (["/nowhere/at/all", "{new}", "--corpus", "{corpus}"], "expected a model directory or a Hub id"),
        (["{gpt}", "{new}", "--corpus", "{corpus}"], "got gpt2: its positions are added to the embeddings"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, place, corpus, tmp_path):
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    shutil.copy(place / "tiny" / "model.safetensors", tmp_path / "gpt")
    places = {"{tiny}": place / "tiny", "{corpus}": corpus, "{new}": tmp_path / "new", "{gpt}": tmp_path / "gpt"}
    result = runner.invoke(app, ["distill", *[str(places.get(argument, argument)) for argument in arguments]])
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert result.stderr.strip().splitlines()[-1].startswith("error:")
    assert not (tmp_path / "new").exists()


def test_a_corpus_of_another_tokenizer_or_with_damage_is_refused(place, corpus, tmp_path):
    shutil.copytree(place / "tiny", tmp_path / "other")
    tokenizer = byte_tokenizer(tmp_path / "other")
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(tmp_path / "other")
    broken = tmp_path / "broken"
    shutil.copytree(corpus, broken)
    data = bytearray((broken / "tokens.bin").read_bytes())
    data[100] ^= 1
    (broken / "tokens.bin").write_bytes(data)
    for model, text, message in (
        (tmp_path / "other", corpus, "to be of the model's tokenizer"),
        (place / "tiny", broken, "is damaged: prepare the corpus again"),
    ):
        result = runner.invoke(app, ["distill", str(model), str(tmp_path / "new"), "--corpus", str(text)])
        assert result.exit_code == 2 and message in result.stderr.replace("\n", " "), result.output
        assert not (tmp_path / "new").exists()


def test_an_empty_corpus_is_refused(place, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    arguments = ["distill", place / "tiny", tmp_path / "run", "--text", tmp_path / "empty.txt"]
    result = runner.invoke(app, [*map(str, arguments)])
    assert result.exit_code == 2 and "expected text in" in result.stderr.replace("\n", " ")
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt"}


def test_resuming_with_other_settings_is_refused(place, corpus, tmp_path):
    arguments = ["distill", str(place / "tiny"), str(tmp_path / "run"), "--corpus", str(corpus), *SHORT]
    assert runner.invoke(app, [*arguments, "--budget", "0"]).exit_code == 3
    result = runner.invoke(app, [*arguments, "--lr", "0.1"])
    assert result.exit_code == 2 and "lr not set, got 0.1" in result.stderr.replace("\n", " ")
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_the_command_has_help_with_an_example():
    result = runner.invoke(app, ["distill", "--help"])
    assert result.exit_code == 0 and "Example" in result.stdout


def test_a_control_is_trained_beside_the_hybrid_and_shared_with_others(place, corpus, tmp_path):
    base = ["distill", str(place / "tiny")]
    rest = ["--corpus", str(corpus), *SHORT]
    result = runner.invoke(app, [*base, str(tmp_path / "run"), *rest, "--control", "also", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    row = found["relative_to_control"][0]
    assert row["ratio"] == pytest.approx(row["value"] / row["control"])
    control = tmp_path / "run" / "control"
    assert (control / "model" / "model.safetensors").is_file()
    assert "relative to control" in (tmp_path / "run" / "hybrid" / "README.md").read_text()
    wide = [*rest, "--window", "24", "--control", str(control)]
    again = runner.invoke(app, [*base, str(tmp_path / "other"), *wide])
    assert again.exit_code == 0 and "relative to control" in again.stdout, again.output
    alone = runner.invoke(app, [*base, str(tmp_path / "alone"), *rest, "--control", "only", "--json"])
    assert alone.exit_code == 0 and json.loads(alone.stdout)["hybrid"] is None, alone.output
    assert not (tmp_path / "alone" / "hybrid").exists()
    after = runner.invoke(app, [*base, str(tmp_path / "alone"), *rest, "--control", "also", "--json"])
    assert after.exit_code == 0 and json.loads(after.stdout)["relative_to_control"], after.output
    other = runner.invoke(app, [*base, str(tmp_path / "third"), *rest, "--seed", "1", "--control", str(control)])
    assert other.exit_code == 2 and "expected a control of the same batches" in other.stderr.replace("\n", " ")
    none = runner.invoke(app, [*base, str(tmp_path / "third"), *rest, "--control", "both"])
    assert none.exit_code == 2 and "expected --control to be also, only" in none.stderr.replace("\n", " ")
    assert not (tmp_path / "third").exists()


def test_a_dry_run_reads_the_configuration_alone_and_options_override_a_recipe(place, tmp_path):
    (tmp_path / "shapes").mkdir()
    shutil.copy(place / "tiny" / "config.json", tmp_path / "shapes")
    shutil.copy(place / "tiny" / "model.safetensors", tmp_path / "shapes")  # checked, never loaded
    arguments = ["distill", str(tmp_path / "shapes"), str(tmp_path / "run"), "--dry-run", "--json"]
    result = runner.invoke(app, [*arguments, "--recipe", "constant"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["settings"]["long_tokens"] == 3e7 and found["steps"] > 0 and found["on_h100"]["seconds"] > 0
    again = runner.invoke(app, [*arguments, "--recipe", "constant", "--recall-fraction", "0.125", "--tokens", "1e6"])
    settings = json.loads(again.stdout)["settings"]
    assert (settings["recall_fraction"], settings["long_tokens"], settings["long_range_fraction"]) == (0.125, 6e5, 0.75)
    assert settings["window_size"] == [[1088, 64], 64, 64] and "spread evenly" in again.stderr.replace("\n", " ")
    table = runner.invoke(app, arguments[:-1])
    assert table.exit_code == 0 and all(word in table.stdout for word in ("memory", "on one H100", "measured"))
    long = runner.invoke(app, [*arguments, "--seq-len", "500000"])
    assert "500,000 tokens are longer than" in long.stderr and "longer than" not in table.stderr
    wrong = runner.invoke(app, [*arguments, "--recipe", "best"])
    assert wrong.exit_code == 2 and "quality, balanced, constant" in wrong.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--text", "nowhere"], "nothing at nowhere"),
        (["--corpus", "nowhere"], "expected a corpus in nowhere"),
        (["--text", "a.txt", "--corpus", "tiny"], "expected a new directory or a corpus at tiny"),
        (["--text", "a.txt", "--held-out", "1"], "--held-out"),
        (["--text", "a.txt", "--control", "nowhere"], "--control"),
        (["--corpus", "other"], "of the model's tokenizer"),
        (["--corpus", "whole", "--window", "9000", "--seq-len", "9001"], "expected documents longer than the window"),
        (["--corpus", "whole", "--window", "64,9000,64", "--seq-len", "9001"], "documents of at least 9001 tokens"),
        (["--corpus", "whole", "--seq-len", "128"], "expected recall sequences of at least"),
        (["--corpus", "whole", "--seq-len", "128", "--control", "only"], "expected recall sequences of at least"),
        (["--corpus", "whole", "--seq-len", "128", "--control", "also"], "expected recall sequences of at least"),
        (["--corpus", "wide"], "at most 300 different tokens"),
    ],
    ids=str,
)
def test_a_dry_run_refuses_what_the_run_itself_would_refuse_to_read(
    place, corpus, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    shutil.copytree(place / "tiny", "tiny")
    shutil.copytree(corpus, "other")
    shutil.copytree(corpus, "whole")
    shutil.copytree(corpus, "wide")
    meta = tmp_path / "other" / "meta.json"
    meta.write_text(meta.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    meta = tmp_path / "wide" / "meta.json"
    wide = json.loads(meta.read_text())
    wide["tokenizer"]["vocabulary"] = 301
    meta.write_text(json.dumps(wide))
    options = ["distill", "tiny", "run", *arguments]
    real, dry = (runner.invoke(app, [*options, *more]) for more in ([], ["--dry-run"]))
    assert real.exit_code == dry.exit_code == 2 and words in dry.stderr.replace("\n", " ")
    assert dry.stderr.partition("error: ")[2] == real.stderr.partition("error: ")[2]
    assert not dry.stdout and not (tmp_path / "run").exists()


def test_a_control_and_full_attention_are_trained_on_sequences_of_any_length(place, corpus, tmp_path):
    base = ["distill", str(place / "tiny"), str(tmp_path / "run"), "--corpus", str(corpus), "--seq-len", "64"]
    base += ["--recall-fraction", "0"]
    for more in (["--control", "only"], ["--window", "-1"], ["--full-layers", "0,1,2"], ["--window", "64,63,-1"]):
        assert runner.invoke(app, [*base, *more, "--dry-run"]).exit_code == 0


def test_a_recipe_ranks_the_heads_of_a_model_once_and_keeps_the_plan(place, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "SEARCHES", tuple(replace(one, steps=1) for one in heads.SEARCHES))
    run = tmp_path / "run"
    arguments = ["distill", str(place / "tiny"), str(run), "--corpus", str(corpus), *SHORT[2:], "--long-tokens", "0"]
    arguments += ["--recipe", "balanced", "--teacher-tokens", "0", "--json"]
    with pytest.warns(UserWarning, match="built-in text"):  # the documents are too short for clozes
        result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    windows = json.loads(result.stdout)["settings"]["window_size"]
    assert windows == windows_from_plan(tmp_path / "run.heads.json")
    assert sorted({w for own in windows for w in ([own] if isinstance(own, int) else own)}) == [-1, 64, 896, 2144]
    monkeypatch.setattr(heads, "search_heads", lambda *_, **__: pytest.fail("searched again"))
    assert json.loads(runner.invoke(app, arguments).stdout)["settings"]["window_size"] == windows


def test_a_teacher_is_trained_first_and_the_summary_says_so(place, corpus, tmp_path):
    run = tmp_path / "run"
    arguments = ["distill", str(place / "tiny"), str(run), "--corpus", str(corpus), *SHORT, "--teacher-tokens", "640"]
    dry = runner.invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0 and "trained on the first 640" in dry.stdout and not run.exists()
    stopped = runner.invoke(app, [*arguments, "--budget", "0"])
    assert stopped.exit_code == 3 and "after 1 of 2 steps" in stopped.stderr.replace("\n", " ")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "the first 640 of 1,280 tokens" in result.stdout.replace("\n", " ")
    about = json.loads((run / "hybrid" / "distillation.json").read_text())
    assert about["settings"]["teacher_tokens"] == 640 and about["teacher_log"][0]["tokens"] == 640
    assert "trained the original with full attention" in (run / "hybrid" / "README.md").read_text()
    wrong = runner.invoke(app, [*arguments, "--trainable", "lora"])
    assert wrong.exit_code == 2 and "--teacher-tokens" in wrong.stderr and "'lora'" in wrong.stderr


def test_the_original_is_loaded_while_text_is_read(monkeypatch):
    begun, timeline = threading.Event(), Timeline()

    def load(source, dtype):
        begun.set()
        return "model", dtype

    def read():
        assert begun.wait(60)
        return "corpus"

    monkeypatch.setattr(cli_distill.loading, "load", load)
    source = loading.Source("name", None, None)
    assert cli_distill.load_beside(source, "auto", timeline, read) == ("corpus", ("model", "float32"))
    assert list(timeline.stages) == ["text read", "model loaded"]


def test_text_that_cannot_be_read_and_a_model_that_cannot_be_loaded_are_errors(monkeypatch):
    def refuse(*_, **__):
        raise BadInput("no model")

    monkeypatch.setattr(cli_distill.loading, "load", refuse)
    source = loading.Source("name", None, None)
    with pytest.raises(BadInput, match="no model"):
        cli_distill.load_beside(source, "float32", Timeline(), lambda: "corpus")
    with pytest.raises(ZeroDivisionError):
        cli_distill.load_beside(source, "float32", Timeline(), lambda: 1 / 0)


def test_a_dry_run_of_8_billion_parameters_says_what_fits(tmp_path):
    """Windows per head give every layer gates, 8 M of them more than with four full layers, and 0.1 GiB."""
    config = shape_config("8B")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "8b")
    save_file({"x": torch.zeros(1)}, tmp_path / "8b" / "model.safetensors")  # never loaded
    arguments = ["distill", str(tmp_path / "8b"), str(tmp_path / "run"), "--recipe", "quality", "--dry-run"]
    shown = runner.invoke(app, arguments).stdout
    assert "8,097 M parameters" in shown and shown.replace("\n", "").count("--gradient-checkpointing") == 2
    fits = runner.invoke(app, [*arguments, "--batch-size", "4", "--gradient-checkpointing"]).stdout
    assert "--gradient-checkpointing" not in fits and "41.3 GiB" in fits and "3B and 8B" in " ".join(fits.split())
    two = [*arguments, "--batch-size", "4", "--gradient-checkpointing", "--gpu", "H200:2"]
    sharded = " ".join(runner.invoke(app, two).stdout.split())
    assert "on 2 x H200" in sharded and "measured with 3B and 8B" in sharded and "on one H100" not in sharded
    for wrong, message in (("P100", "to be one of H100, H200"), ("H100:no", "as NAME or NAME:COUNT")):
        refused = runner.invoke(app, [*arguments, "--gpu", wrong])
        assert refused.exit_code == 2 and message in refused.stderr.replace("\n", " ")
