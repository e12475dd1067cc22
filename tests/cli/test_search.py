"""`nha search`: from a model to windows that `nha hybridize` takes; unfinished searches go on."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from nha.cli import app
from nha.convert import head_counts, heads
from nha.convert.heads import CopyRow
from nha.models import loading
from tests.convert.test_hybridize import byte_tokenizer
from tests.models.families import hybrid, teacher

runner = CliRunner()
SMALL = ["--seq-len", "400", "--text-sequences", "1", "--recall-sequences", "2"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories with a tiny model and a hybrid of it."""
    root = tmp_path_factory.mktemp("models")
    for name, model in (("tiny", teacher(vocab_size=300)), ("hybrid", hybrid("llama", 16, vocab_size=300))):
        model.save_pretrained(root / name)
        byte_tokenizer(root / name)
    return root


def run(places, *arguments):
    return runner.invoke(app, [str(places / a[1:]) if a.startswith("@") else a for a in arguments])


def test_what_is_found_is_what_hybridize_uses(places, tmp_path):
    path = tmp_path / "search.json"
    options = ["--full", "1", "--window", "16", "--slots", "8", "--context", "1000", *SMALL]
    result = run(places, "search", "@tiny", str(path), *options)
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in ("found", "uniform", "first", "last", "none", "all"))
    assert "nha hybridize MODEL OUTPUT" in result.stdout
    found = json.loads(path.read_text())
    assert sorted(found["windows"]) == [-1, 16, 16] and len(found["full_layers"]) == 1
    assert (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"
    made = tmp_path / "made"
    arguments = ["hybridize", "@tiny", str(made), "--windows", str(path), "--slots", "8", "--no-measure", "--json"]
    converted = run(places, *arguments)
    assert converted.exit_code == 0, converted.output
    assert json.loads(converted.stdout)["window_sizes"] == found["windows"]


def test_what_a_hybrids_search_finds_is_for_another_distillation_of_its_original(places, tmp_path):
    result = run(places, "search", "@hybrid", str(tmp_path / "search.json"), "--full", "1", "--context", "1000", *SMALL)
    assert result.exit_code == 0, result.output
    assert "nha distill ORIGINAL OUTPUT" in result.stdout and "hybridize" not in result.stdout


def test_a_search_is_resumed_with_a_larger_budget_and_refuses_other_settings(places, tmp_path):
    path = tmp_path / "search.json"
    first = run(places, "search", "@hybrid", str(path), "--full", "1", *SMALL, "--json")
    assert first.exit_code == 0, first.output
    before = json.loads(path.read_text())
    second = run(places, "search", "@hybrid", str(path), "--full", "2", *SMALL, "--json")
    assert second.exit_code == 0, second.output
    after = json.loads(second.stdout)
    assert len(after["full_layers"]) == 2 and before["evaluated"].items() <= after["evaluated"].items()
    other = run(places, "search", "@hybrid", str(path), "--full", "2", *SMALL, "--recall-weight", "0.9")
    assert other.exit_code == 2
    assert "expected a search with recall_weight 0.9" in other.stderr.replace("\n", " ")
    assert json.loads(path.read_text()) == after


def test_a_budget_in_bytes(places, tmp_path):
    path = tmp_path / "search.json"
    whole = 2 * 2 * 8 * 4 * 5000  # keys and values, 2 heads of 8, float32
    result = run(places, "search", "@hybrid", str(path), "--bytes", str(int(2.5 * whole)), "--context", "5000", *SMALL)
    assert result.exit_code == 0, result.output
    assert len(json.loads(path.read_text())["full_layers"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["@tiny", "{new}", "--full", "4"], "expected --full from 0 to 3, got 4"),
        (["@tiny", "{new}", "--full", "1", "--bytes", "10"], "expected --full or --bytes, got both"),
        (["@tiny", "{new}", "--bytes", "10", *SMALL], "expected at least"),
        (
            ["@tiny", "{new}", "--full", "1", "--recall-weight", "2"],
            "expected --recall-weight of at least 0",
        ),
        (
            ["@tiny", "{new}", "--full", "1", "--wide", "8"],
            "expected --wide to be -1 or above the other layers' 64, got 8",
        ),
        (["@tiny", "{new}", "--full", "1", "--window", "-1"], "expected --window of at least 0"),
        (["@tiny", "{new}", "--full", "1", "--slots", "0"], "expected --slots of at least 1"),
        (["@tiny", "{new}", "--full", "1", "--seq-len", "99"], "expected --seq-len of at least 256"),
        (["@tiny", "{new}", "--full", "1", "--text", "/nowhere"], "expected a text file, there is none at"),
        (["@tiny", "{new}", "--full", "1", "--seq-len", "900000"], "expected text for 8 blocks of 900000 tokens"),
        (["@tiny", "{dir}", "--full", "1"], "expected a file name that ends in .json"),
        (["@tiny", "{new}/a/b.json", "--full", "1"], "expected a directory for the result"),
        (["@tiny", "{other}", "--full", "1", *SMALL], "expected a file of format 'nha-search-v2'"),
        (["/nowhere/at/all", "{new}", "--full", "1"], "expected a model directory or a Hub id"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(places, arguments, message, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    where = {"{new}": "new.json", "{dir}": "", "{new}/a/b.json": "new/a/b.json", "{other}": "other.json"}
    result = run(places, "search", *(str(tmp_path / where[a]) if a in where else a for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"] and other.read_text() == "{}"


@pytest.mark.parametrize("options", [[], ["--heads", "2"]], ids=" ".join)
@pytest.mark.parametrize("text", [b"{broken", b"\xff", b"[1]", b'{"format": "other"}'], ids=str)
def test_an_output_of_another_kind_is_refused_before_the_model_is_loaded(places, options, text, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded a model"))
    output = tmp_path / "search.json"
    output.write_bytes(text)
    result = runner.invoke(app, ["search", str(places / "tiny"), str(output), *options])
    assert result.exit_code == 2 and str(output) in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert output.read_bytes() == text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--windows", "/nowhere.json"], "there is no file at"),
        (["--windows", "x.json", "--window", "32"], "expected --windows or --window and --full-layers, got both"),
        (["--windows", "x.json", "--full-layers", "1"], "expected --windows or --window and --full-layers, got both"),
    ],
)
def test_hybridize_refuses_windows_that_cannot_be(places, options, message, tmp_path):
    result = run(places, "hybridize", "@tiny", str(tmp_path / "made"), *options)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "made").exists()


def test_the_command_has_help_with_an_example():
    result = runner.invoke(app, ["search", "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout


def test_heads_that_are_found_are_converted_and_another_plan_takes_their_weights(places, tmp_path):
    path, text = tmp_path / "plan.json", tmp_path / "letters.txt"
    names = ("Anna", "Berlin", "Cyrus", "Delphi", "Edward", "Florence", "Greta", "Havana")
    lines = [
        f"The {i} traveller whom old letter {i} praises often was {n}." for i, n in zip("abcdefgh", names, strict=True)
    ]
    text.write_text(" ".join(lines))
    options = ["--heads", "1", "--head-steps", "1", "--window", "8", "--text", str(text)]
    first = run(places, "search", "@tiny", str(path), *options, "--wide", "18", "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(path.read_text())
    assert sorted(w for row in found["windows"] for w in ([row] * 2 if isinstance(row, int) else row)) == [6] * 5 + [18]
    second = run(places, "search", "@tiny", str(path), *options)
    assert second.exit_code == 0 and "full attention" in second.stdout, second.output
    full = json.loads(path.read_text())
    assert full["weights"] == found["weights"] and full["wide_window"] == -1
    made = tmp_path / "made"
    arguments = ["hybridize", "@tiny", str(made), "--windows", str(path), "--slots", "8", "--no-measure", "--json"]
    converted = run(places, *arguments)
    assert converted.exit_code == 0, converted.output
    assert json.loads(converted.stdout)["window_sizes"] == full["windows"]
    for wrong, words in ((["@hybrid"], "not converted yet"), (["@tiny", "--seed", "1"], "seed 1")):
        refused = run(places, "search", wrong[0], str(path), *options, *wrong[1:])
        assert refused.exit_code == 2 and words in " ".join(refused.stderr.split())


def test_a_wanted_quality_proposes_the_number_of_full_heads(places, tmp_path, monkeypatch):
    path, text, asked = tmp_path / "plan.json", tmp_path / "letters.txt", []
    text.write_text("The traveller whom old letters praise was Anna.")

    def copied(model, rows, heads, window_size):
        full = int(heads.sum())
        asked.append(full)
        return [row < 2 * full for row in range(len(rows))]

    monkeypatch.setattr(head_counts, "copied", copied)
    monkeypatch.setattr(head_counts, "copy_rows", lambda *_, **__: list(range(8)))
    monkeypatch.setattr(heads, "copy_rows", lambda *_, **__: [CopyRow(torch.arange(1, 30), 1)])
    options = ["--keep", "0.7", "--head-steps", "4", "--window", "8", "--text", str(text)]
    first = run(places, "search", "@tiny", str(path), *options)
    assert first.exit_code == 0 and "3: 75%" in first.stdout, first.output
    found = json.loads(path.read_text())
    assert found["heads"] == 3 and [2, 0.5] in found["kept"] and found["wide_window"] == -1
    assert sum(w == -1 for row in found["windows"] for w in ([row] * 2 if isinstance(row, int) else row)) == 3
    asked.clear()
    again = run(places, "search", "@tiny", str(path), *options)
    assert again.exit_code == 0 and not asked  # what is known decides
    refused = run(places, "search", "@tiny", str(tmp_path / "new.json"), "--keep", "0.7", "--heads", "3")
    assert refused.exit_code == 2 and "got both: 0.7 and 3" in " ".join(refused.stderr.split())


def test_windows_of_single_heads_are_named_on_the_command_line(places, tmp_path):
    common = ["--window", "16", "--slots", "8", "--no-measure", "--json", "--windows"]
    made = run(places, "hybridize", "@tiny", str(tmp_path / "made"), *common, "0.1=32, 2=-1")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["window_sizes"] == [[16, 32], 16, -1]
    refused = run(places, "hybridize", "@tiny", str(tmp_path / "other"), *common, "0.2=32")
    assert refused.exit_code == 2 and "heads below 2 in layer 0, got 2" in " ".join(refused.stderr.split())
