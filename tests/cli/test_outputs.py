"""A command whose output cannot be written says so before it reads a model, a text or a table."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nha.cli import app
from nha.io import check_writable
from nha.models import loading

NOWHERE = Path("/proc")  # a file system in which nobody, root included, makes an entry


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
    def read(*args, **kwargs):
        raise AssertionError("expected no work before the output is checked")

    for name in ("load", "load_weights", "load_tokenizer"):
        monkeypatch.setattr(loading, name, read)
    places = {"MODEL": "smollm2", "TEXT": __file__}
    result = CliRunner().invoke(app, [places.get(a, a).format(NOWHERE / "new") for a in arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(NOWHERE) in result.stderr


@pytest.mark.parametrize("below", ["", "new", "new/below"])
def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path, below):
    check_writable(tmp_path / below)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        check_writable(tmp_path / "file" / "new")
