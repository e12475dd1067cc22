"""The commands on a tiny model: what they do, and that bad input is one line before anything is written."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from nha.cli import app

runner = CliRunner()


def test_a_converted_model_writes_text_in_constant_memory(tiny_hybrid):
    sizes = []
    for count in (20, 60):
        arguments = ["generate", str(tiny_hybrid), "Hello there, ", "--max-new-tokens", str(count), "--json"]
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["new_tokens"] <= count
        sizes.append(found["cache_bytes"])
    assert sizes[0] == sizes[1]


def test_perplexity_with_its_ablations(tiny_hybrid):
    arguments = ["eval", "perplexity", str(tiny_hybrid), "--length", "64", "--count", "2", "--ablations"]
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["results"]
    assert set(found) == {"model", "slots off", "window off", "longer window", "full attention"}
    assert found["model"]["interval"][0] <= found["model"]["perplexity"] <= found["model"]["interval"][1]
    assert found["model"]["slot_mass"]["mean"] > 0 == found["slots off"]["slot_mass"]["mean"]
    # inside the window all forms that have one are the same model
    assert found["model"]["by_position"][0] != found["window off"]["by_position"][0]
    table = runner.invoke(app, arguments)
    assert table.exit_code == 0
    assert "slots off" in table.stdout


def test_windows_of_minus_one_are_full_attention(tiny_hybrid):
    arguments = ["eval", "perplexity", str(tiny_hybrid), "--length", "64", "--count", "1", "--json"]
    changed = json.loads(runner.invoke(app, [*arguments, "--window", "-1"]).stdout)["results"]["model"]
    original = json.loads(runner.invoke(app, [*arguments, "--ablations"]).stdout)["results"]["full attention"]
    assert changed["perplexity"] == original["perplexity"]


def check_step_numbers(stderr: str) -> None:
    """Every step of a quickstart is told as it begins, each with the next number."""
    began = re.findall(r"^ *(\d+)/(\d+) .* left$", stderr, re.MULTILINE)
    assert [int(number) for number, _ in began] == list(range(1, int(began[0][1]) + 1)), began


def test_quickstart_measures_the_distilled_hybrid_of_the_embedded_model_where_it_ships(tiny, tmp_path, monkeypatch):
    import transformers

    from nha.models import loading, smollm2
    from nha.models.delta import low_rank_changes, save_delta
    from nha.report import quickstart
    from tests.models.test_delta import changed

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model = changed(base, [25, [25, 256], 25], num_slots=64)
    path = tmp_path / "delta.safetensors"
    save_delta(path, model, low_rank_changes(base, model, 2), {"quality": '{"ppl_2k": 1.08}'})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    monkeypatch.setattr(smollm2, "DELTA", path)
    monkeypatch.setattr(quickstart, "DELTA", path)
    monkeypatch.setattr(quickstart, "CONTEXTS", (512, 1024))
    monkeypatch.setattr(smollm2, "gguf_path", lambda: path)
    monkeypatch.setattr(smollm2, "load_smollm2", lambda *_: (base, tokenizer))
    arguments = ["quickstart", "--output", str(tmp_path / "report"), "--quick", "--json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["source"] == loading.EMBEDDED and found["window_sizes"] == [25, 25, 25]
    assert found["notes"] == ["1 KV heads have longer windows than the others of their layer: 256 tokens."]
    names = {variant["name"] for variant in found["variants"]}
    assert names == {"teacher", "untrained", "hybrid", "slots_off", "longer_window", "window_off"}
    asked = [(one["tokens"], one["facts"]) for one in found["distilled"]["recall"]]
    assert asked == [(256, 1), (1024, 1), (2048, 1)] and found["distilled"]["bytes"] == path.stat().st_size
    assert found["tuning"] is None and len(found["samples"]) == 3
    check_step_numbers(result.stderr)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Relative to the original trained on the same tokens" in page and "A number 2,048 tokens back" in page
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "report" / "hybrid")
    ids = torch.randint(97, (1, 40))
    assert (saved(ids).logits - model(ids).logits).abs().max() < 0.3  # the file's numbers are bfloat16


def test_quickstart_writes_a_report_and_a_hybrid(tiny, tmp_path):
    output = tmp_path / "report"
    arguments = [
        "quickstart",
        "--model",
        str(tiny),
        "--output",
        str(output),
        "--window",
        "16",
        "--slots",
        "8",
        "--full-layers",
        "1",
        "--quick",
    ]
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["healthy"]
    check_step_numbers(result.stderr)
    names = {variant["name"] for variant in found["variants"]}
    assert names == {"teacher", "untuned", "all_hybrid", "hybrid", "slots_off", "longer_window", "window_off"}
    assert found["window_sizes"] == [16, -1, 16]
    assert {path.name for path in output.iterdir()} >= {"index.html", "results.json", "hybrid", "perplexity.png"}
    assert "| original |" in (output / "hybrid" / "README.md").read_text()
    again = runner.invoke(app, ["generate", str(output / "hybrid"), "Hello", "--max-new-tokens", "4"])
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["hybridize", "{tiny}", "{new}", "--window", "-2"],
            "expected --window of at least -1",
        ),
        (["hybridize", "{tiny}", "{new}", "--window", "8,8"], "expected 3 window sizes, one per layer, got 2"),
        (
            ["hybridize", "{tiny}", "{new}", "--window", "a"],
            "expected integers separated by commas, got 'a' for --window",
        ),
        (["hybridize", "{tiny}", "{new}", "--slots", "0"], "expected --slots of at least 1"),
        (["hybridize", "{tiny}", "{new}", "--full-layers", "3"], "expected --full-layers between 0 and 2, got 3"),
        (
            ["hybridize", "{tiny}", "{new}", "--init", "none"],
            "expected --init to be one of kmeans, soft, spread, keys, paper, got 'none'",
        ),
        (["hybridize", "{tiny}", "{new}", "--dtype", "int8"], "expected --dtype to be one of auto"),
        (["hybridize", "{tiny}", "{new}", "--calibration", "/nowhere"], "expected a text file, there is none at"),
        (["hybridize", "{tiny}", "{new}", "--calibration", "{tiny}"], "expected a text file, a directory is at"),
        (["hybridize", "{tiny}", "{new}", "--calibration", "{short}"], "expected calibration text of more than 64"),
        (["hybridize", "{tiny}", "{new}", "--calibration", "{latin}"], "expected UTF-8 text in line 2 of"),
        (["generate", "{hybrid}", "hello", "--document", "{latin}"], "expected UTF-8 text in line 2 of"),
        (["hybridize", "{tiny}", "{tiny}"], "to be new or empty, it already holds files"),
        (["hybridize", "{hybrid}", "{new}"], "is a hybrid already"),
        (["hybridize", "/nowhere/at/all", "{new}"], "expected a model directory or a Hub id"),
        (["generate", "{tiny}", "hello", "--window", "8"], "expected a hybrid for --window"),
        (["generate", "{hybrid}", " "], "expected a prompt, got nothing"),
        (["generate", "{hybrid}", "hello", "--top-p", "2"], "expected --top-p above 0 and at most 1, got 2"),
        (["eval", "perplexity", "{tiny}", "--ablations"], "expected a hybrid for --ablations"),
        (["eval", "perplexity", "{tiny}", "--length", "1"], "expected --length of at least 2, got 1"),
        (["quickstart", "--model", "{tiny}", "--window", "-1"], "expected --window to convert at least one layer"),
        (["quickstart", "--model", "{tiny}", "--output", "{new}", "--window", "512"], "got 512"),
        (["quickstart", "--model", "{tiny}", "--output", "{new}", "--slots", "4097"], "got 4097"),
        (["quickstart", "--model", "{tiny}", "--output", "{new}", "--seed", "-1"], "got -1"),
        (["quickstart", "--model", "{tiny}", "--output", "{tiny}"], "to be new or empty"),
        (["generate", "{hybrid}", "a\udcff"], "\\udcff"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, tiny, tiny_hybrid, tmp_path):
    (tmp_path / "short.txt").write_text("Hello.")
    (tmp_path / "latin.txt").write_bytes(b"Hello.\nA caf\xe9.\n")
    places = {"{tiny}": str(tiny), "{hybrid}": str(tiny_hybrid), "{new}": str(tmp_path / "new")}
    places |= {f"{{{name}}}": str(tmp_path / f"{name}.txt") for name in ("short", "latin")}
    result = runner.invoke(app, [places.get(argument, argument) for argument in arguments])
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert result.stderr.strip().startswith("error:")
    assert not (tmp_path / "new").exists()


def test_truncated_weights_are_refused(tiny, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    result = runner.invoke(app, ["generate", str(broken), "hello"])
    assert result.exit_code == 2
    assert "truncated or foreign" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("command", ["quickstart", "hybridize", "generate", "doctor", "eval perplexity"])
def test_every_command_has_help_with_an_example(command):
    result = runner.invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout


def test_an_error_after_measuring_keeps_the_numbers_and_is_a_failed_check(tiny, tmp_path, monkeypatch):
    from nha.report import plots, quickstart

    def broken(*args, **kwargs):
        raise RuntimeError("disk [full]")

    monkeypatch.setattr(quickstart, "costs", broken)
    monkeypatch.setattr(plots, "png", broken)
    output = tmp_path / "report [1]"
    arguments = ["quickstart", "--model", str(tiny), "--output", str(output), "--window", "16", "--slots", "8"]
    result = runner.invoke(app, [*arguments, "--quick", "--no-tune", "--no-save"])
    assert result.exit_code == 1, result.output
    assert "disk [full]" in result.stderr and str(output) in result.stdout.replace("\n", "")
    found = json.loads((output / "results.json").read_text())
    names = [variant["name"] for variant in found["variants"]]
    assert names == ["teacher", "hybrid", "slots_off", "longer_window", "window_off"]
    assert {check["name"] for check in found["checks"] if not check["passed"]} == {
        "measuring memory and time",
        "drawing memories.png",
        "drawing perplexity.png",
    }
    assert (output / "index.html").is_file()


def test_an_interrupted_quickstart_leaves_nothing(tiny, tmp_path, monkeypatch):
    from nha.report import quickstart

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "write_samples", interrupted)
    arguments = ["quickstart", "--model", str(tiny), "--output", str(tmp_path / "report"), "--window", "16"]
    result = runner.invoke(app, [*arguments, "--slots", "8", "--quick", "--no-tune", "--no-save"])
    assert result.exit_code == 130
    assert not list(tmp_path.iterdir())
