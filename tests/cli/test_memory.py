"""`nha generate --memory` and `nha chat --memory`: a second question about a document reads the question alone."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from nha.cli import app

runner = CliRunner()
DOCUMENT = "The harbour master wrote down every ship that came in before the storm of that year. " * 12


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(DOCUMENT)
    return path


def ask(model, *arguments) -> dict:
    result = runner.invoke(app, ["generate", str(model), "--json", "--max-new-tokens", "4", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_second_question_reads_the_question_alone(tiny_hybrid, document, tmp_path):
    about = ("--document", document, "--memory", tmp_path / "memory")
    first = ask(tiny_hybrid, "Who wrote?", *about)
    second = ask(tiny_hybrid, "And when was that?", *about)
    same = ask(tiny_hybrid, "Who wrote?", *about)
    assert first["prompt_tokens_found"] == 0
    assert first["prompt_tokens"] - 50 < second["prompt_tokens_found"] <= same["prompt_tokens_found"]
    assert same["text"] == first["text"] == ask(tiny_hybrid, "Who wrote?", "--document", document)["text"]


def test_a_chat_begins_with_what_was_read_before(tiny_hybrid, tmp_path):
    message = DOCUMENT * 8
    lines = []
    for _ in range(2):
        arguments = ["chat", str(tiny_hybrid), "--max-new-tokens", "4", "--memory", str(tmp_path / "memory")]
        result = runner.invoke(app, arguments, input=f"{message}\nAnd then?\n")
        assert result.exit_code == 0, result.output
        lines.append((result.stdout, [line for line in result.stderr.splitlines() if "tokens read" in line]))
    assert lines[0][0] == lines[1][0]
    assert [("found in memory" in line) for line in lines[0][1] + lines[1][1]] == [False, False, True, False]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--document", "/nowhere.txt"], "/nowhere.txt"),
        (["--memory-gib", "0"], "--memory-gib"),
        (["--memory", "/proc/none"], "/proc/none"),
        (["--state-dtype", "int4"], "--state-dtype"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_hybrid, arguments, named):
    result = runner.invoke(app, ["generate", str(tiny_hybrid), "Hello", *arguments])
    assert result.exit_code in (1, 2)
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_states_in_fewer_bytes(tiny_hybrid, tiny):
    plain = ask(tiny_hybrid, DOCUMENT)["cache_bytes"]
    assert ask(tiny_hybrid, DOCUMENT, "--state-dtype", "int8")["cache_bytes"] < plain / 2
    result = runner.invoke(app, ["generate", str(tiny), "Hello", "--state-dtype", "int8"])
    assert result.exit_code == 2
    assert "hybrid for --state-dtype" in result.stderr
