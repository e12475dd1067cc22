"""Files and directories that are replaced only by whole new ones."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; what is there takes the place of `path` when the block ends without an error.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(f"{folder}/notes.txt") as work:
    ...         _ = work.write_text("all of it")
    ...     os.listdir(folder)
    ['notes.txt']
    """
    path = Path(path)
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: str | bytes) -> None:
    """Replace a file by a whole new one; text is written as UTF-8."""
    with atomic_write(path) as work:
        work.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place when the block ends without an error."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    old = work.with_name(work.name + ".old")
    try:
        yield work
        # mkdtemp makes it private; a finished output has the usual rights.
        mask = os.umask(0)
        os.umask(mask)
        work.chmod(0o777 & ~mask)
        if path.exists():
            os.replace(path, old)
        os.replace(work, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
