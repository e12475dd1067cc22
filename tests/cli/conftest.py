"""A tiny model and its hybrid on disk, made once for all tests of the commands."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from nha.cli import app
from tests.convert.test_hybridize import byte_tokenizer
from tests.models.families import teacher

runner = CliRunner()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with a tiny model that reads bytes."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    teacher(vocab_size=300).save_pretrained(path)
    byte_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tiny_hybrid(tiny):
    """The tiny model, converted by the command."""
    path = tiny.parent / "hybrid"
    result = runner.invoke(app, ["hybridize", str(tiny), str(path), "--window", "16", "--slots", "8", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["window_sizes"] == [16, 16, 16]
    assert set(found["perplexity"]) == {"original", "hybrid", "hybrid, slots off"}
    card = (path / "README.md").read_text()
    assert f"| hybrid | {found['perplexity']['hybrid']:.2f} |" in card
    return path
