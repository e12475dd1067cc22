"""`nha eval public`: tables, JSON and a picture; a control model beside; resumption; one line for bad input."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from nha.cli import app
from tests.convert.test_hybridize import byte_tokenizer
from tests.evaluate.test_public import data  # noqa: F401
from tests.models.families import hybrid, teacher

runner = CliRunner()
PARTS = ["--sets", "piqa,lambada_openai,squad_qa,needle,perplexity"]
SMALL = [*PARTS, "--limit", "6", "--questions", "2", "--needle-lengths", "512", "--needles", "1"]
SMALL += ["--lengths", "256", "--count", "2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories with a tiny model and a hybrid of it."""
    root = tmp_path_factory.mktemp("models")
    for name, model in (("tiny", teacher(vocab_size=300)), ("hybrid", hybrid("llama", 16, vocab_size=300))):
        model.save_pretrained(root / name)
        byte_tokenizer(root / name)
    return root


def run(*arguments):
    return runner.invoke(app, ["eval", "public", *map(str, arguments)])


def test_results_stand_beside_those_of_the_control(models, data, tmp_path):  # noqa: F811
    output = tmp_path / "[results]"
    compare = ["--compare", f"control={models / 'tiny'}", "--compare", f"[other]={models / 'tiny'}"]
    result = run(models / "hybrid", "--data", data, "--output", output, *SMALL, *compare)
    assert result.exit_code == 0, result.output
    assert "of control" in result.stdout and "[other]" in result.stdout and "piqa" in result.stdout
    found = json.loads((output / "public.json").read_text())
    assert set(found["results"]) == {"model", "control", "[other]"} and set(found["relative"]) == {"model", "[other]"}
    assert found["relative"]["[other]"]["piqa"]["ratio"] in (1.0, None)
    assert found["summary"]["model"]["sets"]["piqa"][1] == 6
    assert (output / "public.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_an_interrupted_evaluation_resumes(models, data, tmp_path, monkeypatch):  # noqa: F811
    import nha.evaluate.public.run as module

    output = tmp_path / "results"
    arguments = [models / "hybrid", "--data", data, "--output", output, *SMALL]
    with monkeypatch.context() as patch:

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(module, "write", interrupted)
        assert run(*arguments).exit_code == 130
    other = run(*arguments, "--seed", "1")
    assert other.exit_code == 2 and "seed = 0, got 1" in other.stderr.replace("\n", " ")
    result = run(*arguments)
    assert result.exit_code == 0 and "resuming: 2 parts" in result.stderr, result.output
    fresh = run(models / "hybrid", "--data", data, *SMALL, "--json")
    found, expected = json.loads((output / "public.json").read_text()), json.loads(fresh.stdout)
    assert found["results"]["model"]["sets"] == expected["results"]["model"]["sets"]
    assert found["summary"] == expected["summary"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sets", "riddle"], "expected sets out of"),
        (["--sets", ","], "expected sets out of"),
        (["--needles", "0"], "expected --needles of at least 1, got 0"),
        (["--limit", "0"], "expected --limit of at least 1, got 0"),
        (["--needle-lengths", "4096,64"], "expected --needle-lengths of at least 128, got 64"),
        (["--needle-lengths", "x"], "expected --needle-lengths to be integers"),
        (["--batch-tokens", "0"], "expected --batch-tokens of at least 1"),
        (["--dtype", "int8"], "expected --dtype to be"),
        (["--documents", "/nowhere.jsonl"], "expected a file of held-out documents, there is none at /nowhere.jsonl"),
        (["--data", "/nowhere"], "expected a directory of test sets, there is none at /nowhere"),
        (["--output", "{models}"], "to be new or empty, it already holds files"),
        (["--lengths", "999999"], "expected a document of at least 999999 tokens"),
        (["--lengths", "999999"], "in the longest of heldout.jsonl"),
    ],
)
def test_bad_input_is_one_line(models, data, arguments, message):  # noqa: F811
    given = [str(models) if a == "{models}" else a for a in arguments]
    result = run(models / "tiny", "--data", data, *SMALL, *given)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert result.stderr.strip().splitlines()[-1].startswith("error:")


def test_lengths_beyond_the_context_are_said_before_the_first_part(models, data, monkeypatch):  # noqa: F811
    import nha.evaluate.public.compare as module

    def stop(*args, **kwargs):
        raise ValueError("stopped before the first part")

    monkeypatch.setattr(module, "compare_public", stop)
    config = json.loads((models / "tiny" / "config.json").read_text()) | {"max_position_embeddings": 300}
    short = models / "short"
    shutil.copytree(models / "tiny", short)
    (short / "config.json").write_text(json.dumps(config))
    result = run(short, "--data", data, *SMALL)
    assert "512 tokens, the model's context is 300" in result.stderr and "256" not in result.stderr
