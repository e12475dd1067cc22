"""`nha train` trains, resumes and saves; bad input is one line, exit code 2, and nothing is written."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from nha.cli import app
from nha.train import estimate
from tests.convert.test_hybridize import byte_tokenizer
from tests.data.test_corpus import texts

runner = CliRunner()
SETTINGS = """
preset: tiny
window_size: 8
num_slots: 6
tokens: 7e2
batch_size: 4
seq_len: 32
log_every: 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tokenizer of bytes, `bytes`, text for it, `texts.jsonl`, and settings, `settings.yaml`."""
    path = tmp_path_factory.mktemp("train")
    byte_tokenizer(path / "bytes")
    (path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts()))
    (path / "settings.yaml").write_text(SETTINGS)
    return path


def call(place, *arguments: str):
    common = ["--tokenizer", place / "bytes", "--settings", place / "settings.yaml", "--corpus", place / "corpus"]
    return runner.invoke(app, ["train", *map(str, [*arguments, *common])])


def test_a_run_stops_resumes_and_saves_a_model(place):
    text = ("--text", place / "texts.jsonl", "--json")
    stopped = call(place, place / "run", *text, "--budget", "0")
    assert stopped.exit_code == 3 and json.loads(stopped.stdout)["steps"] == 1
    done = call(place, place / "run", *text, "--lr", "2e-3")
    assert done.exit_code == 2 and "lr" in done.stderr
    done = call(place, place / "run", *text)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["finished"] and found["steps"] == round(700 / 128)
    assert found["settings"]["window_size"] == 8 and found["settings"]["tokens"] == 700
    model = AutoModelForCausalLM.from_pretrained(found["model"])
    assert model.config.window_sizes == [8, 8] and model.config.vocab_size == 320
    assert json.loads((place / "run" / "model" / "training.json").read_text())["summary"]["steps"] == 5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--schedule", "linear"], "--schedule"),
        (["--window", "8,8,8"], "2"),
        (["--batch-size", "5", "--micro-batch-size", "2"], "--batch-size"),
        (["--optimizer", "muon", "--parallel", "fsdp"], "muon"),
        (["--seq-len", "1000000", "--tokens", "1e7"], "1000000"),
        (["--window", "1000", "--seq-len", "1001"], "expected documents longer than the window, 1000 tokens"),
        (["--window", "32"], "expected --seq-len above the smallest window, 32, got 32"),
        (["--random-windows", "-1,40,33"], "expected --seq-len above the smallest window, 33, got 32"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(place, arguments, words):
    result = call(place, place / "refused", "--text", place / "texts.jsonl", *arguments)
    assert result.exit_code == 2 and words in result.stderr, result.output
    assert len(result.stderr.strip().splitlines()[-1]) < 400 and not (place / "refused").exists()


def test_a_run_that_cannot_fit_is_refused_before_text_is_read_and_weights_are_made(place, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "device_bytes", lambda: 1 << 30)
    arguments = [tmp_path / "run", "--tokenizer", place / "bytes", "--text", place / "texts.jsonl"]
    arguments += ["--corpus", tmp_path / "corpus", "--preset", "1.3b", "--micro-batch-size", "1"]
    result = runner.invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 2 and "1.0 GiB" in result.stderr and "reading text" not in result.stderr
    assert "--gradient-checkpointing" in result.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_a_spike_stops_the_command_and_names_the_checkpoint_that_is_kept(place):
    arguments = ["--text", place / "texts.jsonl", "--lr", "1", "--tokens", "1e4", "--save-every", "1"]
    result = call(place, place / "spiked", *arguments, "--max-spike", "0.05")
    line = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == 2 and "checkpoint-" in line and "loss" in line
    kept = line.partition("checkpoint-")[2].split()[0].rstrip(".,;")
    assert (place / "spiked" / f"checkpoint-{kept}").is_dir() and not (place / "spiked" / "model").exists()


def test_a_settings_file_with_an_unknown_name_is_refused(place, tmp_path):
    for content, word in (
        ("learning_rate: 1", "learning_rate"),
        ("- 1", "mapping"),
        ("a: [", "YAML"),
        ("lr: 1\ntokens: 2\nlr: 3", "lr again in line 3"),
    ):
        (tmp_path / "wrong.yaml").write_text(content)
        result = runner.invoke(app, ["train", str(tmp_path / "run"), "--settings", str(tmp_path / "wrong.yaml")])
        assert result.exit_code == 2 and word in result.stderr


def test_a_dry_run_estimates_the_papers_run_without_text(place):
    arguments = [
        "--dry-run",
        "--preset",
        "1.3b",
        "--tokens",
        "100e9",
        "--batch-size",
        "1024",
        "--micro-batch-size",
        "8",
    ]

    def dry(*more):
        return runner.invoke(
            app, ["train", *map(str, (place / "dry", "--tokenizer", place / "bytes")), *arguments, *more]
        )

    result = dry("--gpu", "H100:32", "--json")
    found = json.loads(result.stdout)
    assert 1.2e9 < found["parameters"] < 1.5e9 and found["seconds"] > 0 and found["total_bytes"] > 16 * 1.2e9
    assert not (place / "dry").exists()
    shown = dry("--gpu", "H100")
    assert shown.exit_code == 0 and "about" in shown.stdout
    for wrong in ("unheard-of", "H100:many", "H100:0"):
        assert dry("--gpu", wrong).exit_code == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--text", "nowhere"], "nothing at nowhere"),
        (["--text", "."], "expected text files"),
        (["--text", "a.txt", "--text", "nowhere"], "nothing at nowhere"),
        (["--corpus", "nowhere"], "expected a corpus in nowhere"),
        (["--corpus", "a.txt"], "expected a corpus in a.txt"),
        (["--text", "a.txt", "--corpus", "other"], "expected a new directory or a corpus at other"),
        (["--text", "a.txt", "--tokenizer", "nowhere"], "nowhere"),
        (["--text", "a.txt", "--held-out", "1"], "--held-out"),
        (["--text", "datasets:"], "datasets:NAME"),
    ],
    ids=str,
)
def test_a_dry_run_refuses_what_the_run_itself_would_refuse_to_read(place, tmp_path, monkeypatch, arguments, words):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.bin").touch()
    if "." not in arguments:
        (tmp_path / "a.txt").write_text("some text")
    monkeypatch.chdir(tmp_path)
    options = ["run", "--tokenizer", str(place / "bytes"), "--settings", str(place / "settings.yaml"), *arguments]
    real, dry = (runner.invoke(app, ["train", *options, *more]) for more in ([], ["--dry-run"]))
    assert real.exit_code == dry.exit_code == 2 and words in dry.stderr.replace("\n", " ")
    assert dry.stderr.partition("error: ")[2] == real.stderr.partition("error: ")[2]
    assert not dry.stdout and not (tmp_path / "run").exists()


def test_a_dry_run_takes_text_and_a_corpus_that_the_run_would_take(place, tmp_path):
    options = [str(tmp_path / "run"), "--tokenizer", str(place / "bytes"), "--settings", str(place / "settings.yaml")]
    text, corpus = ["--text", str(place / "texts.jsonl")], ["--corpus", str(tmp_path / "corpus")]
    dry = runner.invoke(app, ["train", *options, *text, *corpus, "--dry-run"])
    assert dry.exit_code == 0 and "parameters" in dry.stdout and not list(tmp_path.iterdir())
    assert runner.invoke(app, ["train", *options, *text, *corpus, "--prepare-only"]).exit_code == 0
    for given in ([*text, *corpus], corpus):
        assert runner.invoke(app, ["train", *options, *given, "--dry-run"]).stdout == dry.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--seq-len", "1000000", "--tokens", "1e7"], "expected more than 1000000 tokens to train on"),
        (["--window", "1000", "--seq-len", "1001"], "expected documents longer than the window, 1000 tokens"),
    ],
    ids=str,
)
def test_a_dry_run_refuses_a_corpus_that_is_too_small_as_the_run_itself_does(place, tmp_path, arguments, words):
    text, corpus = ["--text", str(place / "texts.jsonl")], ["--corpus", str(tmp_path / "corpus")]
    options = [str(tmp_path / "run"), "--tokenizer", str(place / "bytes"), "--settings", str(place / "settings.yaml")]

    def go(*more):
        return runner.invoke(app, ["train", *options, *arguments, *more])

    assert go(*text, *corpus, "--dry-run").exit_code == go("--dry-run").exit_code == 0
    assert go(*text, *corpus, "--prepare-only").exit_code == 0
    for given in ([*text, *corpus], corpus):
        real, dry = go(*given), go(*given, "--dry-run")
        assert real.exit_code == dry.exit_code == 2 and words in dry.stderr.replace("\n", " ") and not dry.stdout
        assert dry.stderr.partition("error: ")[2] == real.stderr.partition("error: ")[2]
    (tmp_path / "corpus" / "tokens.bin").write_bytes(b"")
    assert go(*text, *corpus, "--dry-run").exit_code == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--window", "32"],
        ["--batch-size", "5", "--micro-batch-size", "2"],
        ["--full-layers", "9"],
        ["--window", "8,8,8"],
    ],
    ids=str,
)
def test_a_dry_run_names_the_option_of_a_setting_as_the_run_itself_does(place, arguments):
    text = ["--text", place / "texts.jsonl"]
    real, dry = (call(place, place / "never", *text, *arguments, *more) for more in ([], ["--dry-run"]))
    assert real.exit_code == dry.exit_code == 2 and not (place / "never").exists()
    assert dry.stderr.partition("error: ")[2] == real.stderr.partition("error: ")[2]
    assert "expected --" in dry.stderr or "expected 2 window sizes" in dry.stderr


def test_a_corpus_of_another_tokenizer_is_refused(place):
    call(place, place / "unused", "--text", place / "texts.jsonl", "--prepare-only")
    other = place / "other"
    tokenizer = byte_tokenizer(other)
    tokenizer.add_tokens(["quick"])
    tokenizer.save_pretrained(other)
    result = runner.invoke(
        app,
        ["train", str(place / "refused"), "--tokenizer", str(other), "--corpus", str(place / "corpus")],
    )
    assert result.exit_code == 2 and "tokenizer" in result.stderr
