"""Errors of every kind are one line with exit code 2, and progress is readable where there is no terminal."""

from __future__ import annotations

import io
import json
import logging

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from nha.cli import app, common
from nha.report.results import to_json

runner = CliRunner()


def failing(error: BaseException) -> typer.Typer:
    """An application whose only command raises `error`."""
    found = typer.Typer()

    @found.command()
    @common.command
    def run() -> None:
        raise error

    return found


@pytest.mark.parametrize(
    "error, named",
    [
        (ValueError("expected 3\n  got 4"), "expected 3 got 4"),
        (EOFError("Ran out of input"), "EOFError"),
        (KeyError("weight_map"), "weight_map"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError"),
        (MemoryError(), "MemoryError"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "surrogates"),
        (FileNotFoundError(2, "No such file or directory", "a[bold]b"), "a[bold]b"),
        (ValueError("expected text, got \ud800 and \x1b[31m"), "\\ud800"),
        (OSError(), "OSError"),
    ],
)
def test_every_error_is_one_line_with_exit_code_2(error, named):
    result = runner.invoke(failing(error), [])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert named in result.stderr
    assert "Aborted" not in result.output


def test_an_interrupt_is_one_line():
    result = runner.invoke(failing(KeyboardInterrupt()), [])
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["no-such-command"], "no-such-command"),
        (["generate"], "model"),
        (["generate", "x", "y", "--no-such-option"], "--no-such-option"),
        (["quickstart", "--seed", "many"], "--seed"),
        (["eval", "perplexity"], "model"),
    ],
)
def test_usage_errors_are_one_line_too(arguments, named):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert named in result.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1.5])
def test_numbers_outside_their_bounds_are_named(value):
    with pytest.raises(common.BadInput, match=r"--top-p.*above 0.*at most 1.*got"):
        common.check_range("--top-p", value, above=0, at_most=1)


def test_progress_of_a_short_task_without_a_terminal_is_one_line(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(common, "err", Console(file=text, highlight=False))
    with common.steps("reading [draft].txt") as advance:
        for done in range(4):
            advance(done, 3)
    assert text.getvalue() == "reading [draft].txt\n"


def test_progress_without_a_terminal_tells_the_remaining_time(monkeypatch):
    text, clock = io.StringIO(), iter(range(0, 100, 6))
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(clock)))
    display = common.LineProgress(Console(file=text, highlight=False))
    task = display.add_task("training", total=10)
    for done in (1, 2, 3, 10):
        display.update(task, completed=done)
    assert text.getvalue().splitlines() == [
        "training",
        "training: 2 of 10, about 48 s left",
        "training: done in 24 s",
    ]


def test_json_has_neither_nan_nor_lone_surrogates():
    text = to_json({"loss": float("nan"), "text": "a\ud800", "plain": "é"})
    assert json.loads(text.encode()) == {"loss": None, "text": "a\ud800", "plain": "é"}


def test_what_bitsandbytes_would_like_installed_is_not_said_between_our_lines():
    assert runner.invoke(app, ["bench", "op", "--list"]).exit_code == 0
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
