"""Files and directories are replaced by whole new ones or not at all, and are on the disk before the old ones go."""

import errno
import os
import threading

import pytest
import torch
from safetensors import SafetensorError

from nha import io
from nha.io import atomic_directory, atomic_write, read_tensors, write_atomically, write_tensors


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


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error: No space left (os error 28)")]
)
@pytest.mark.parametrize("write", [atomic_write, atomic_directory])
def test_an_error_of_a_full_disk_names_the_place(tmp_path, write, error):
    with pytest.raises(OSError) as caught, write(tmp_path / "made"):
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "made")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [atomic_write, atomic_directory])
def test_an_error_that_is_not_of_the_disk_stays_as_it_is(tmp_path, write):
    error = ConnectionResetError(errno.ECONNRESET, "reset by peer")
    with pytest.raises(ConnectionResetError) as caught, write(tmp_path / "made"):
        raise error
    assert caught.value is error and caught.value.filename is None


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_error_leaves_the_old_directory(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(io, "_exchange", lambda first, second: False)
    path = tmp_path / "made"
    for text in ("old", "new"):
        with atomic_directory(path) as work:
            (work / text).write_text(text)
        assert [file.name for file in path.iterdir()] == [text]
    with pytest.raises(OSError, match="full"):
        write_half(atomic_directory(path), "half")
    assert [file.name for file in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_named_and_no_temporary_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"write state in, there is none at {tmp_path}/none$"):
        write_atomically(tmp_path / "none" / "state", "x")


def test_a_file_is_not_replaced_by_a_directory(tmp_path):
    path = tmp_path / "made"
    path.write_text("a file")
    with pytest.raises(NotADirectoryError, match="made"), atomic_directory(path):
        pass
    assert path.read_text() == "a file" and list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with atomic_directory(tmp_path / "link") as work:
        (work / "x").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "x").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "there"]


@pytest.fixture
def calls(monkeypatch):
    """Syncs, by path, and renames, by the names of both, in the order in which they happen."""
    seen, sync, replace, exchange = [], os.fsync, os.replace, io._exchange

    def record_sync(descriptor):
        seen.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def record_replace(source, target):
        seen.append(("rename", str(target)))
        replace(source, target)

    def record_exchange(first, second):
        seen.append(("rename", str(second)))
        return exchange(first, second)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    monkeypatch.setattr(io, "_exchange", record_exchange)
    return seen


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to tell what a descriptor is")
def test_a_file_is_on_the_disk_before_it_takes_its_name_and_the_name_after(tmp_path, calls):
    write_atomically(tmp_path / "a", "text")
    (kind, work), *rest = calls
    assert kind == "sync" and work.startswith(f"{tmp_path}/.a.")
    assert rest == [("rename", f"{tmp_path}/a"), ("sync", str(tmp_path))]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to tell what a descriptor is")
@pytest.mark.parametrize("replaces", [True, False])
def test_a_directory_is_on_the_disk_with_all_in_it_before_it_takes_its_name(tmp_path, calls, replaces):
    path = tmp_path / "a"
    if replaces:
        path.mkdir()
    with atomic_directory(path) as work:
        (work / "deep" / "er").mkdir(parents=True)
        for name in ("x", "deep/y", "deep/er/z"):
            (work / name).write_text(name)
    renamed = calls.index(("rename", str(path)))
    synced = [name for kind, name in calls[:renamed] if kind == "sync"]
    for inside in ("/x", "/deep/y", "/deep/er/z", "/deep/er", "/deep", ""):
        assert f"{work}{inside}" in synced
    assert ("sync", str(tmp_path)) in calls[renamed:]


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    path, errors = tmp_path / "f", []

    def write(text):
        try:
            for _ in range(20):
                write_atomically(path, text)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter * 10_000,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and list(tmp_path.iterdir()) == [path]
    assert path.read_text() in [letter * 10_000 for letter in "abcd"]


def test_a_long_name_can_be_written(tmp_path):
    path = tmp_path / ("é" * 120)
    write_atomically(path, "text")
    assert path.read_text() == "text"


def test_tensors_come_back_as_they_were_and_share_nothing(tmp_path):
    path = tmp_path / "x"
    base = torch.randn(2, 3)
    tensors = {
        "a": base,
        "b": base,
        "c": base.T,
        "d": base[0],
        "e": base.bfloat16(),
        "f": torch.tensor(3),
        "g": base[:0],
    }
    write_tensors(path, tensors, {"format": "test"})
    found, metadata = read_tensors(path)
    assert metadata["format"] == "test"
    for name, x in tensors.items():
        assert torch.equal(found[name], x) and found[name].dtype == x.dtype, name
    before = {name: x.clone() for name, x in found.items()}
    path.write_bytes(b"\0" * path.stat().st_size)
    path.write_bytes(b"")
    assert all(torch.equal(found[name], x) for name, x in before.items())


def test_a_directory_or_nothing_is_no_file_of_tensors(tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        read_tensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "absent")
