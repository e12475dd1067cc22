"""Durable files: written whole under a temporary name, synced to the disk, then renamed; and states in them.

A reader, or a machine that lost power, finds the old file or the new one, never a part of either.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing PyTorch takes a second, and most users of this module need none
    import torch
    from torch import Tensor

    from nha.ops.state import NHAState

STATE_FORMAT = "nha-state-v2"
OLD_STATE_FORMAT = "nha-state-v1"
OLD_NAMES = {f"tail_{name}": f"window_{name}" for name in ("slot_key", "log_gate")} | {"seen": "num_tokens"}
OLD_ACTIVE = f"slots_{'live'}"  # written apart: nothing else in the code is called so any more
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS}
OPTIONAL_TENSORS = {"window_slot_key", "num_kept"}  # of a state: absent where slots share keys, and are soft


def sync_file(path: str | Path) -> None:
    """Wait until what was written to a file is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: str | Path) -> None:
    """Wait until a directory's entries (new names, renamed and removed ones) are on the disk."""
    if os.name == "nt":  # has no such call: a rename is durable there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: str | Path) -> None:
    """Wait until a directory, all files in it and all directories below it are on the disk."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(folder, name)):
                sync_file(os.path.join(folder, name))
        sync_directory(folder)


def _temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other thread or process uses."""
    return path.with_name(f".{path.name[:64]}.{os.getpid()}.{secrets.token_hex(6)}.tmp")


def replace(work: Path, path: Path) -> None:
    """Durably give a finished file its name, which another file may have had.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     work = Path(folder) / "rows.csv.partial"
    ...     _ = work.write_text("a,b")
    ...     replace(work, Path(folder) / "rows.csv")
    ...     os.listdir(folder)
    ['rows.csv']
    """
    sync_file(work)
    os.replace(work, path)
    sync_directory(path.parent)


@contextmanager
def place_in_errors(path: Path) -> Iterator[None]:
    """Name the file or directory in an error of the file system that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    except Exception as error:  # safetensors has an error of its own
        if "(os error 28)" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without an error, the file there durably replaces `path`.

    Raises FileNotFoundError where the folder of `path` does not exist, and OSError with its name for a full disk.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(f"{folder}/notes.txt") as work:
    ...         _ = work.write_text("all of it")
    ...     os.listdir(folder)
    ['notes.txt']
    """
    path = Path(path)
    if not path.parent.is_dir():  # else the error names a temporary file
        raise FileNotFoundError(f"expected a folder to write {path.name} in, there is none at {path.parent}")
    work = _temporary_name(path)
    try:
        with place_in_errors(path):
            yield work
            replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: str | bytes) -> None:
    """Replace a file durably by a whole new one; text is written as UTF-8."""
    with atomic_write(path) as work:
        work.write_bytes(data.encode() if isinstance(data, str) else data)


def check_writable(folder: str | Path) -> None:
    """Raise OSError, which names the place, unless entries can be made in a directory or where it is to be made.

    Tried by making one: rights do not tell, since root has all of them on a file system that cannot be written to.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     check_writable(f"{folder}/new/below")
    ...     os.listdir(folder)
    []
    """
    place = Path(os.path.realpath(folder))
    while not place.exists():
        place = place.parent
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".nha.", suffix=".tmp", dir=place))
    except OSError as error:
        raise type(error)(f"expected to be able to write in {place}, got: {error.strerror}") from None


def append_line(path: str | Path, line: str) -> None:
    """Append a line to a file of lines, durably, as UTF-8; it begins anew after a last line that was cut short.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "log.jsonl"
    ...     _ = path.write_text('{"step": 1}\\n{"st')
    ...     append_line(path, '{"step": 2}')
    ...     path.read_text().splitlines()
    ['{"step": 1}', '{"st', '{"step": 2}']
    """
    path, data = Path(path), line.encode() + b"\n"
    is_new = not path.exists()
    with place_in_errors(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            data = data if file.read(1) == b"\n" else b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_directory(path.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory; when the block ends without an error, it durably replaces the directory `path`.

    The old directory is removed only after the new one is on the disk under its name. Where the system can swap two
    names in one step (Linux), `path` is never absent in between. Raises NotADirectoryError if `path` is a file.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for text in ("old", "new"):
    ...         with atomic_directory(f"{folder}/made") as work:
    ...             _ = (work / text).write_text(text)
    ...     os.listdir(folder), os.listdir(f"{folder}/made")
    (['made'], ['new'])
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"expected {path} to be a directory or absent, got a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=path.parent))
    old = work.with_name(work.name + ".old")
    try:
        with place_in_errors(path):
            yield work
            # mkdtemp makes it private; a finished output has the usual rights.
            mask = os.umask(0)
            os.umask(mask)
            work.chmod(0o777 & ~mask)
            sync_tree(work)
            sync_directory(path.parent)
        if path.exists() and not _exchange(work, path):
            os.replace(path, old)
        if not path.exists():
            os.replace(work, path)
        sync_directory(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any device as one safetensors file, durably, with a checksum of everything in it."""
    from nha.tensor_file import write_file

    with atomic_write(path) as work:
        write_file(work, tensors, metadata)


def read_tensors(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file; the tensors own their memory.

    Metadata without "sha256" is that of a file without a checksum: `write_tensors` always adds one.

    Raises:
        ValueError: the file is damaged, cut short or no safetensors file; the message names it.
        OSError: there is no such file, or it cannot be read.

    >>> import torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(f"{folder}/x", {"a": torch.ones(2)}, {"format": "example"})
    ...     tensors, metadata = read_tensors(f"{folder}/x")
    >>> tensors["a"].tolist(), metadata["format"]
    ([1.0, 1.0], 'example')
    """
    import torch

    from nha.tensor_file import fill_all, open_tensors

    with open_tensors(path) as opened:
        tensors = opened.empty(device)
        (error,) = fill_all([(opened, tensors)], torch.device(device))
        if error is not None:
            raise error
        return tensors, opened.metadata


def save_state(state: NHAState, path: str | Path) -> None:
    """Write a state as one safetensors file; an existing file is replaced only by a whole new one.

    >>> import torch
    >>> from nha import NHAState
    >>> state = NHAState.from_slots(torch.ones(1, 2, 8, 4), torch.ones(1, 2, 8, 4), window_size=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(state, f"{folder}/state.safetensors")
    ...     loaded = load_state(f"{folder}/state.safetensors")
    >>> torch.equal(loaded.slot_key, state.slot_key), loaded.window_size
    (True, 3)
    """
    state = state.aligned()
    metadata = {
        "format": STATE_FORMAT,
        "window_size": str(state.window_size),
        "slots_active": str(int(state.slots_active)),
    }
    write_tensors(path, state.tensors(), metadata)


def load_state(path: str | Path, device: torch.device | str = "cpu") -> NHAState:
    """Read a state written by `save_state`; it owns its memory, and going on from it gives the same bits.

    Files of the format "nha-state-v1" are read as well.

    Raises:
        ValueError: the file is damaged, is no state, or holds tensors that do not fit together; the message names the
            file and what is wrong.
        OSError: there is no such file, or it cannot be read.
    """
    from nha.ops.state import NHAState, check_state
    from nha.tensor_file import DIGEST

    tensors, metadata = read_tensors(path)
    kind = metadata.get("format")
    if kind not in (STATE_FORMAT, OLD_STATE_FORMAT):
        raise ValueError(f"expected a state of format {STATE_FORMAT!r} at {path}, got format {kind!r}")
    active = "slots_active"
    wanted = {"format", "window_size", active, DIGEST}
    if kind == OLD_STATE_FORMAT:
        active = OLD_ACTIVE
        wanted = {"format", "window_size", active}
        tensors = {OLD_NAMES.get(name, name): x for name, x in tensors.items()}
    if metadata.keys() != wanted:
        raise ValueError(f"expected metadata {sorted(wanted)} in {path}, got {sorted(metadata)}")
    if metadata[active] not in ("0", "1"):
        raise ValueError(f"expected {active} of 0 or 1 in {path}, got {metadata[active]!r}")
    try:
        window_size = int(metadata["window_size"])
    except ValueError:
        raise ValueError(f"expected an integer window_size in {path}, got {metadata['window_size']!r}") from None
    required = {"slot_key", "slot_value", "key", "value", "window_log_gate", "num_tokens"}
    missing, unknown = sorted(required - tensors.keys()), sorted(tensors.keys() - required - OPTIONAL_TENSORS)
    if missing or unknown:
        raise ValueError(f"expected tensors {sorted(required)} in {path}, got {missing} missing and {unknown} unknown")
    for name in OPTIONAL_TENSORS:
        tensors.setdefault(name, None)  # type: ignore[arg-type]
    state = NHAState(window_size=window_size, slots_active=metadata[active] == "1", **tensors)
    try:
        if kind == OLD_STATE_FORMAT and window_size >= 0 and state.key.shape[1:2] != (window_size,):
            raise ValueError(f"expected key [B, W, H, D] with W = {window_size}, got {list(state.key.shape)}")
        check_state(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} in {path}") from None
    return state.to(device)
