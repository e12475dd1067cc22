"""A command whose output cannot be written says so before it reads a model, a text or a table."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nha.cli import app
from nha.io import check_writable
from nha.models import loading

NOWHERE = Path("/proc")  # a file system in which nobody, root included, makes an entry


def refuse_work(monkeypatch):
    """Let reading a model or its tokenizer fail the test."""

    def read(*args, **kwargs):
        raise AssertionError("expected no work before the output is checked")

    for name in ("load", "load_weights", "load_tokenizer"):
        monkeypatch.setattr(loading, name, read)


@pytest.mark.skipif(not NOWHERE.is_dir(), reason="there is no /proc")
@pytest.mark.parametrize(
    "arguments",
    [
        ["hybridize", "MODEL", "{}"],
        ["export", "MODEL", "{}"],
        ["search", "MODEL", "{}.json"],
        ["distill", "MODEL", "{}", "--text", "TEXT"],
        ["train", "{}", "--text", "TEXT"],
        ["ablate", "recall-cpu", "--output", "{}"],
        ["ablate", "--summarize", "--output", "{}"],
        ["quickstart", "--model", "MODEL", "--output", "{}"],
        ["eval", "perplexity", "MODEL", "--output", "{}"],
        ["bench", "cpu", "--output", "{}"],
        ["bench", "op", "--tiny", "--output", "{}"],
        ["bench", "plots", "--output", "{}"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(arguments, monkeypatch):
    refuse_work(monkeypatch)
    places = {"MODEL": "smollm2", "TEXT": __file__}
    result = CliRunner().invoke(app, [places.get(a, a).format(NOWHERE / "new") for a in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(NOWHERE) in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["hybridize", "MODEL", "{}"],
        ["export", "HYBRID", "{}"],
        ["distill", "MODEL", "{}", "--text", "TEXT"],
        ["distill", "MODEL", "{}", "--text", "TEXT", "--dry-run"],
        ["distill", "MODEL", "{}", "--text", "TEXT", "--control", "also"],
        ["distill", "MODEL", "{above}", "--text", "TEXT", "--control", "only"],
        ["train", "{}", "--text", "TEXT"],
        ["train", "{}", "--dry-run"],
        ["quickstart", "--model", "MODEL", "--output", "{}"],
        ["eval", "perplexity", "MODEL", "--output", "{}"],
        ["eval", "all", "MODEL", "{}"],
    ],
    ids=" ".join,
)
def test_an_output_that_holds_other_files_is_refused_before_any_work(arguments, tmp_path, monkeypatch):
    refuse_work(monkeypatch)
    held = tmp_path / "control"
    held.mkdir()
    (held / "mine.txt").write_text("mine")
    places = {"MODEL": "smollm2", "HYBRID": "smollm2-hybrid", "TEXT": __file__}
    result = CliRunner().invoke(app, [places.get(a, a).format(held, above=tmp_path) for a in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(held) in result.stderr
    assert sorted(tmp_path.rglob("*")) == [held, held / "mine.txt"] and (held / "mine.txt").read_text() == "mine"


def test_text_may_be_prepared_beside_a_directory_of_other_files(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    (tmp_path / "book.txt").write_text("A book of some length. " * 40)
    arguments = ["distill", str(tiny), str(tmp_path / "run"), "--text", str(tmp_path / "book.txt"), "--prepare-only"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and (tmp_path / "run.corpus").is_dir(), result.output


@pytest.mark.parametrize("below", ["", "new", "new/below"])
def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path, below):
    check_writable(tmp_path / below)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        check_writable(tmp_path / "file" / "new")
