"""The directory of a run: its lock, its identity, and checkpoints that are whole, durable and verified when read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nha.distill.settings import CONTROL, TEACHER
from nha.io import sync_directory, sync_tree, write_atomically

RUN, LOG, LOCK, WEIGHTS, MANIFEST = "run.json", "log.jsonl", ".lock", "trained.safetensors", "manifest.json"
RUN_FORMAT = "nha-run-v3"  # v2: the end of an answer was no part of it
REQUIRED = (WEIGHTS, "scheduler.pt", "trainer_state.json")  # the optimizer is a file or, sharded, a folder
PREFIX, PARTIAL = "checkpoint-", ".partial"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run's directory; the system releases it when the process ends, in whatever way.

    Raises ValueError, with the process id that is in the lock file, if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    file = os.fdopen(os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = file.read().strip() or "unknown"
                raise ValueError(f"expected no other process to train in {run}, got process {holder}") from None
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                raise
        _open_locks.append(file)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        if file in _open_locks:
            _open_locks.remove(file)
        file.close()


_open_locks: list[Any] = []


def _leave_locks_to_the_parent() -> None:
    """A forked data loader that outlives its parent must not keep the lock."""
    while _open_locks:
        _open_locks.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def check_directory(run: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError unless a run of this identity can begin or be resumed in this directory; writes nothing."""
    check_place(run)
    file = run / RUN
    if file.is_file():
        begun, wanted = _read_run(file), _as_json(wanted)
        differing = sorted(k for k in wanted.keys() | begun.keys() if wanted.get(k) != begun.get(k))
        if differing:
            pairs = "; ".join(f"{k} {_given(begun.get(k))}, got {wanted.get(k)!r}" for k in differing)
            raise ValueError(f"expected to resume the run in {run} with {pairs}: name a new directory for another run")


def check_place(run: Path) -> None:
    """Raise ValueError unless a directory is absent, empty or holds a run, of whatever identity; writes nothing."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"expected {run} to be a directory, got a file")
    if run.is_dir() and not (run / RUN).is_file():
        others = sorted(
            path.name for path in run.iterdir() if path.name not in (CONTROL, TEACHER) and not _is_leftover(path)
        )
        if others:
            raise ValueError(f"expected {run} to be new, empty or a run to resume, got other files such as {others[0]}")


def wait_for_begin(run: Path, seconds: float = 600.0) -> None:
    """Wait until the first of several processes has begun the run: before, nothing else may be in its directory.

    Raises TimeoutError; all processes must see the same directory.
    """
    wait_for_file(run / RUN, seconds)


def wait_for_file(path: Path, seconds: float) -> None:
    """Wait for a file that the first of several processes writes. Raises TimeoutError."""
    until = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > until:
            raise TimeoutError(f"expected {path} of the first process within {seconds:.0f} s, got none")
        time.sleep(0.05)


def begin(run: Path, wanted: Mapping[str, Any]) -> None:
    """Write the identity of a new run, or compare it with that of the run to resume; the lock is held.

    Raises ValueError if `run.json` is damaged, of another format, or differs; nothing is written then.
    """
    check_directory(run, wanted)
    for path in run.iterdir():
        if path.name != LOCK and _is_leftover(path):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    if not (run / RUN).is_file():
        write_atomically(run / RUN, json.dumps(_as_json(wanted), indent=1) + "\n")
        sync_directory(run.absolute().parent)


def _as_json(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with its format, as it is read back from a file."""
    return json.loads(json.dumps({"format": RUN_FORMAT} | dict(wanted)))


def _given(value: Any) -> str:
    """A setting of a run for a message; None stands for one that was left out.

    >>> _given(0.001), _given(None)
    ('= 0.001', 'not set')
    """
    return "not set" if value is None else f"= {value!r}"


def _read_run(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        begun = json.loads(text)
    except (ValueError, RecursionError):
        begun = None
    if not isinstance(begun, dict):
        got = "an empty file" if not text.strip("\0 \n") else "something else"
        raise ValueError(f"expected the settings of a run in {file}, got {got}")
    if begun.get("format") != RUN_FORMAT:
        got = begun.get("format", "one of an earlier version, without a format")
        raise ValueError(f"expected a run of format {RUN_FORMAT!r} in {file}, got {got}: name a new directory")
    return begun


def _is_leftover(path: Path) -> bool:
    """Whether a crash or the lock left this file: it has a hidden name."""
    return path.name == LOCK or (path.name.startswith(".") and path.name.endswith((".tmp", ".old", PARTIAL)))


def partial_path(run: Path, name: str) -> Path:
    """The folder in which a checkpoint is written before it is whole; all ranks know it."""
    return run / f".{name}{PARTIAL}"


def publish(work: Path, place: Path) -> None:
    """Make a written checkpoint durable and give it its name; older ones go after that.

    The order is what counts: data and manifest reach the disk, then the name, and only then is anything removed.
    """
    sums = {str(path.relative_to(work)): list(_size_and_checksum(path)) for path in _files(work)}
    (work / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    sync_tree(work)
    run = place.parent
    if place.exists():  # a damaged one of the same step
        shutil.rmtree(place)
    os.replace(work, place)
    sync_directory(run)
    for old in run.glob(PREFIX + "*"):
        if old.name != place.name:
            shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _size_and_checksum(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def check_whole(checkpoint: Path) -> None:
    """Raise ValueError, naming the file, unless a checkpoint holds all that its manifest lists, byte for byte."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        listed = {str(name): (int(size), int(checksum)) for name, (size, checksum) in sums.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"expected {MANIFEST} in {checkpoint}, it is missing or damaged") from None
    optimizer = any(name.startswith("optimizer") for name in listed)
    missing = [name for name in REQUIRED if name not in listed] + ([] if optimizer else ["optimizer.pt"])
    for name in missing + sorted(listed):
        path = checkpoint / name
        if name in missing or not path.is_file():
            raise ValueError(f"expected {name} in {checkpoint}, it is missing")
        if path.stat().st_size != listed[name][0]:
            raise ValueError(f"expected {listed[name][0]} bytes in {path}, got {path.stat().st_size}")
        if _size_and_checksum(path) != listed[name]:
            raise ValueError(f"expected the contents of {path} as they were written, got others: it is damaged")


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name; -1 for another name."""
    number = checkpoint.name.removeprefix(PREFIX)
    return int(number) if number.isascii() and number.isdigit() else -1


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None if there is no checkpoint at all.

    Warns of newer ones that are damaged. Raises ValueError, with what is wrong with the newest, if all are damaged:
    starting over without a word would lose the run.
    """
    found = sorted((path for path in run.glob(PREFIX + "*") if step_of(path) >= 0), key=step_of, reverse=True)
    first: ValueError | None = None
    for path in found:
        try:
            check_whole(path)
        except ValueError as error:
            first = first or error
            continue
        if first is not None:
            warnings.warn(f"{first}; resuming from the one before, {path.name}", stacklevel=2)
        return path
    if first is not None:
        raise first
    return None


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Copy the trained parameters of a checkpoint into a `Distillation`, sharded or not.

    Raises ValueError, before any is copied, if the file is damaged or names and shapes are not those of the model.
    """
    file = checkpoint / WEIGHTS
    try:
        found = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"expected a whole safetensors file at {file}, got: {error}") from None
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        example = f"{missing[0]} missing" if missing else f"{unknown[0]} unknown"
        raise ValueError(f"expected {len(wanted)} trained tensors in {file}, got {len(found)}: {example}")
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            shapes = f"{list(parameter.shape)} in {file}, got {list(found[name].shape)}"
            raise ValueError(f"expected {name} of shape {shapes}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(_sharded_like(found[name].to(parameter.device), parameter))


def load_into_plain(model: nn.Module, checkpoint: Path) -> None:
    """Copy the trained parameters of a checkpoint of a control into the model that it was made of, in its dtype.

    Raises ValueError, before any is copied, if the file is damaged or names and shapes are not those of the model.
    """
    file = checkpoint / WEIGHTS
    try:
        found = {name.removeprefix("model."): value for name, value in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"expected a whole safetensors file at {file}, got: {error}") from None
    own = dict(model.named_parameters())
    for name, value in found.items():
        if name not in own or own[name].shape != value.shape:
            got = list(own[name].shape) if name in own else "none"
            raise ValueError(f"expected {name} of shape {list(value.shape)} in the model, got {got}")
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)


def _sharded_like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def read_log(run: Path, until: int | None = None) -> list[dict[str, float]]:
    """The entries of a run's log, up to a step; a line that a crash cut short is left out."""
    file = run / LOG
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry and (until is None or entry["step"] <= until):
            entries.append(entry)
    return entries
