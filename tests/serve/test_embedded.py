"""An embedded model is saved once, whole or not at all, and again when it is another."""

from __future__ import annotations

from pathlib import Path

import pytest

from nha import NHAConfig, NHAForCausalLM
from nha.models.loading import Source
from nha.serve import embedded
from nha.serve.embedded import is_saved, save_embedded, with_directory


class Tokenizer:
    def save_pretrained(self, path: Path) -> None:
        (path / "tokenizer.json").write_text("{}")


@pytest.fixture
def loads(tmp_path, monkeypatch):
    """An embedded model of a few kilobytes; the list grows each time it is loaded."""
    found: list[str] = []

    def load(source: Source) -> tuple[NHAForCausalLM, Tokenizer]:
        found.append(source.name)
        return NHAForCausalLM(NHAConfig.tiny()), Tokenizer()

    for name in ("model.gguf", "delta"):
        (tmp_path / name).write_bytes(b"1")
    monkeypatch.setenv(embedded.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "gguf_path", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "DELTA", tmp_path / "delta")
    monkeypatch.setattr(embedded, "load", load)
    return found


@pytest.fixture
def source(loads):
    return with_directory(Source("smollm2-hybrid", NHAConfig.tiny(), None))


def test_it_is_saved_once(source, loads):
    assert not is_saved(source)
    save_embedded(source)
    save_embedded(source)
    assert loads == ["smollm2-hybrid"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in source.directory.iterdir()}


def test_another_delta_gets_another_directory(source, loads, tmp_path):
    (tmp_path / "delta").write_bytes(b"2")
    again = with_directory(Source("smollm2-hybrid", NHAConfig.tiny(), None))
    assert again.directory != source.directory
    assert again.directory.parent == tmp_path / "cache"


def test_what_could_not_be_written_leaves_nothing(source, loads, monkeypatch):
    def full_disk(self: Tokenizer, path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_embedded(source)
    assert not is_saved(source)
    assert [path.name for path in source.directory.parent.iterdir() if path.is_dir()] == []


def test_other_models_stay_where_they_are(tmp_path):
    source = Source("m", NHAConfig.tiny(), tmp_path)
    assert with_directory(source) is source
    assert is_saved(source)
