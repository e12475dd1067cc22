"""`nha bench` lists rows, runs them, and refuses bad options in one line."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from nha.bench import cpu_model
from nha.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.parametrize("arguments", [["op"], ["decode"], ["model"], ["cpu", "--everything"]], ids=" ".join)
def test_rows_are_listed(arguments):
    done = run(*arguments, "--list")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) > 8


def test_a_table_is_written_and_drawn_from(tmp_path):
    done = run("cpu", "--tiny", "--repeats", "1", "--output", str(tmp_path))
    assert done.exit_code == 0 and (tmp_path / "cpu.csv").exists()
    done = run("plots", "--results", str(tmp_path), "--output", str(tmp_path))
    assert done.exit_code == 2 and "ops.csv" in done.stderr


def test_a_case_that_fails_is_named_at_the_end_with_exit_code_1_and_the_others_are_kept(tmp_path, monkeypatch):
    once = cpu_model.once

    def fails(model, length):
        if length == 30:
            raise RuntimeError("no room")
        return once(model, length)

    monkeypatch.setattr(cpu_model, "once", fails)
    arguments = ("cpu", "--everything", "--tiny", "--repeats", "1", "--output", str(tmp_path))
    done = run(*arguments)
    last = done.stdout.splitlines()[-1]
    assert done.exit_code == 1 and last == "2 failed: float32 T30 of cpu-model.csv, bfloat16 T30 of cpu-model.csv"
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.csv", "cpu-lengths.csv", "cpu-model.csv.cases"}
    monkeypatch.setattr(cpu_model, "once", once)
    assert run(*arguments).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.csv", "cpu-lengths.csv", "cpu-model.csv"}


@pytest.mark.parametrize("command", ["cpu", "model"])
def test_a_run_without_time_for_a_row_says_that_the_same_command_goes_on(tmp_path, command):
    done = run(command, "--tiny", "--budget-s", "0", "--output", str(tmp_path))
    assert done.exit_code == 0 and not done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("0 ") and "run the command again" in last
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".csv"]


def test_a_model_without_a_row_is_not_drawn_until_one_is_measured(tmp_path):
    arguments = ("model", "--tiny", "--output", str(tmp_path))
    assert run(*arguments, "--budget-s", "0").exit_code == 0
    done = run(*arguments, "--draw")
    assert done.exit_code == 2 and "found none" in done.stderr
    done = run(*arguments, "--only", "^hybrid-0 prefill one call T20$")
    assert done.exit_code == 0 and (tmp_path / "llama-3-8b.html").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments, names",
    [
        (["op", "--only", "nothing like it"], ["nothing like it"]),
        (["op"], ["CUDA"]),
        (["model", "--budget-s", "-1"], ["--budget-s", "-1"]),
        (["model", "--shard", "5/4"], ["--shard", "5/4"]),
        (["model", "--draw"], ["llama-3-8b"]),
        (["cpu", "--only", "nothing like it"], ["nothing like it"]),
        (["cpu", "--repeats", "0"], ["--repeats", "0"]),
    ],
    ids=str,
)
def test_bad_input_is_one_line(arguments, names, tmp_path):
    done = run(*arguments, "--output", str(tmp_path))
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert all(name in done.stderr for name in names)
    assert not list(tmp_path.iterdir())
