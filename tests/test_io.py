"""Files and directories are replaced by whole new ones or not at all."""

import pytest

from nha.io import atomic_directory, atomic_write, write_atomically


def write_half(output, inside=""):
    with output as work:
        (work / inside).write_text("half of")
        raise OSError("full")


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "notes.txt"
    write_atomically(path, "old, é")
    with pytest.raises(OSError, match="full"):
        write_half(atomic_write(path))
    assert path.read_text(encoding="utf-8") == "old, é"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_directory(tmp_path):
    path = tmp_path / "made"
    for text in ("old", "new"):
        with atomic_directory(path) as work:
            (work / text).write_text(text)
        assert [file.name for file in path.iterdir()] == [text]
    with pytest.raises(OSError, match="full"):
        write_half(atomic_directory(path), "half")
    assert [file.name for file in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]
