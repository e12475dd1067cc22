"""`nha chat` where stdin is no terminal: one line a turn, and errors do not end the conversation."""

from __future__ import annotations

import os
import signal

import pytest
from typer.testing import CliRunner

from nha.cli import app
from nha.cli.chat import interruptible
from nha.models import loading

runner = CliRunner()


def chat(model, *lines: str, arguments: tuple[str, ...] = ()):
    result = runner.invoke(
        app, ["chat", str(model), "--max-new-tokens", "8", *arguments], input="\n".join(lines) + "\n"
    )
    assert result.exit_code == 0, result.output
    return result


def test_every_line_is_a_turn_with_its_memory_and_speed(tiny_hybrid):
    result = chat(tiny_hybrid, "Hello there, how are you?", "", "And what then?")
    stats = [line for line in result.stderr.splitlines() if "tokens/s" in line]
    assert len(stats) == 2
    memories = {line.rsplit(" is ", 1)[1] for line in stats}
    assert len(memories) == 1  # constant
    assert "no chat template" in result.stderr


def test_a_conversation_is_saved_reset_and_loaded(tiny_hybrid, tmp_path):
    path = tmp_path / "talk [bold]"
    result = chat(tiny_hybrid, "Hello", f"/save {path}", "more", "/reset", f"/load {path}", "more")
    assert f"saved in {path} and {path}.json" in result.stderr.replace("\n", "")
    assert "1 turns from" in result.stderr
    answers = result.stdout.splitlines()
    resumed = chat(tiny_hybrid, "more", arguments=("--load", str(path)))
    assert resumed.stdout.strip() and result.stdout.endswith(resumed.stdout), answers


@pytest.mark.parametrize("text", [None, b"{broken", b"\xff", b'{"format": "other"}'], ids=str)
def test_a_conversation_that_cannot_be_read_is_refused_before_the_model_is_loaded(text, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded a model"))
    if text is not None:
        (tmp_path / "talk.json").write_bytes(text)
    result = runner.invoke(app, ["chat", "smollm2", "--load", str(tmp_path / "talk")], input="Hello\n")
    assert result.exit_code == 2 and str(tmp_path / "talk.json") in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "line, named", [("/save", "/save PATH"), ("/load /nowhere", "/nowhere.json"), ("/nope", "/nope")]
)
def test_what_cannot_be_done_is_one_line_and_the_conversation_goes_on(tiny_hybrid, line, named):
    result = chat(tiny_hybrid, line, "Hello")
    errors = [text for text in result.stderr.splitlines() if text.startswith("error:")]
    assert len(errors) == 1 and named in errors[0]
    assert "tokens/s" in result.stderr


def test_a_line_that_is_no_utf8_is_named_and_the_conversation_goes_on(tiny_hybrid):
    result = runner.invoke(app, ["chat", str(tiny_hybrid), "--max-new-tokens", "4"], input=b"a\xff\nHello\n")
    assert result.exit_code == 0 and "expected text in UTF-8, got 'a\\udcff'" in result.stderr.replace("\n", " ")
    assert result.stderr.count("tokens/s") == 1
    alone = runner.invoke(app, ["generate", str(tiny_hybrid), "-", "--max-new-tokens", "4"], input=b"a\xff")
    assert alone.exit_code == 2 and "expected text in UTF-8, got 'a\\udcff'" in alone.stderr.replace("\n", " ")


def test_help_lists_the_commands(tiny_hybrid):
    result = chat(tiny_hybrid, "/help")
    for name in ("/save", "/load", "/reset"):
        assert name in result.stderr


def test_the_first_interrupt_ends_the_answer_and_the_second_the_program():
    before = signal.getsignal(signal.SIGINT)  # processes in the background of a shell ignore it
    with interruptible() as seen:
        os.kill(os.getpid(), signal.SIGINT)
        assert seen
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "option, value, named",
    [
        ("--temperature", "nan", "nan"),
        ("--temperature", "-1", "-1"),
        ("--temperature", "inf", "inf"),
        ("--top-p", "nan", "nan"),
        ("--top-p", "0", "above 0"),
        ("--max-new-tokens", "0", "at least 1"),
    ],
)
@pytest.mark.parametrize("command", [["chat"], ["generate"]])
def test_settings_outside_their_bounds_are_refused(command, option, value, named, tiny_hybrid):
    prompt = ["Hello"] if command == ["generate"] else []
    result = runner.invoke(app, [*command, str(tiny_hybrid), *prompt, option, value])
    assert result.exit_code == 2
    assert result.stderr.startswith("error:") and result.stderr.count("\n") == 1
    assert option in result.stderr and named in result.stderr
