"""Tensors in safetensors files, streamed between the disk and the memory of any device; checksums are made on the way.

Neither side holds a second copy: a CPU's tensors are read and written where they are, and those of a GPU pass through
two page-locked buffers a file, one of which is copied while the other is filled. Several files are read at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

DIGEST = "sha256"  # the metadata's name for the checksum of everything else in a file
METADATA = "__metadata__"
PIECE = 1 << 20  # bytes that are read, added to the checksum and copied at once
READERS = 16  # files that are read at once
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
MAX_ELEMENTS = 2**60  # also of a tensor of which one dimension is 0, with 1 in its place
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, and where its bytes start in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, device: torch.device | str) -> Tensor:
        """Memory for the tensor, of the kind that any thread may fill."""
        with torch.inference_mode(False):
            return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class TensorFile:
    """A file that is open for reading, its metadata and its tensors by name. Leaving its context closes it."""

    path: Path
    file: FileIO
    metadata: dict[str, str]
    entries: dict[str, Entry]

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def empty(self, device: torch.device | str) -> dict[str, Tensor]:
        """Memory for all tensors."""
        return {name: entry.empty(device) for name, entry in self.entries.items()}


def open_tensors(path: str | Path) -> TensorFile:
    """Open a safetensors file and check that its header fits its size.

    Raises:
        ValueError: the file is cut short or no safetensors file; the message names it.
        OSError: there is no such file, it is a directory, or it cannot be read.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"expected a file of tensors at {path}, got a directory")
    file = FileIO(path)
    try:
        metadata, entries = _read_header(file, os.fstat(file.fileno()).st_size)
    except BaseException as error:
        file.close()
        if isinstance(error, ValueError | KeyError | TypeError | AttributeError | RecursionError):
            raise ValueError(f"expected a whole safetensors file at {path}, got: {error or repr(error)}") from None
        raise
    return TensorFile(Path(path), file, metadata, entries)


def _read_header(file: FileIO, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and tensors of a file of `size` bytes. Raises one of several errors where they do not fit together."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError(f"a header of {length} bytes in {size}")
    header = json.loads(_read_all(file, bytearray(length)))
    metadata = header.pop(METADATA, {})
    if any(not isinstance(text, str) for text in metadata.values()):
        raise ValueError("metadata that are no strings")
    entries: dict[str, Entry] = {}
    end = 0
    for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = value["data_offsets"]
        entry = Entry(DTYPES[value["dtype"]], tuple(value["shape"]), 8 + length + start)
        numbers = (start, stop, *entry.shape)
        is_whole = all(type(n) is int and n >= 0 for n in numbers)
        if not is_whole or math.prod(max(n, 1) for n in entry.shape) >= MAX_ELEMENTS:
            raise ValueError(f"{name} of shape {list(entry.shape)} in {start} to {stop}")
        if start != end or stop - start != entry.nbytes:
            raise ValueError(f"{name} of {entry.nbytes} bytes in {start} to {stop}, expected from {end} on")
        entries[name], end = entry, stop
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, of which {8 + length + end} belong to tensors and header")
    return metadata, entries


def _read_all(file: FileIO, target: Any) -> Any:
    """Fill memory from a file, which may give less at a time. Raises ValueError where it ends before."""
    view, done = memoryview(target), 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{done} bytes of {len(view)}, then its end")
        done += count
    return target


def runs(x: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor, in order, as vectors that lie in one piece of its memory.

    >>> [run.tolist() for run in runs(torch.arange(8, dtype=torch.uint8).view(2, 4)[:, 1:3])]
    [[1, 2], [5, 6]]
    """
    if x.is_contiguous():
        yield x.view(-1).view(torch.uint8)
    else:
        for part in x:
            yield from runs(part)


def pieces(x: Tensor) -> Iterator[Tensor]:
    """The runs of a tensor, at most `PIECE` bytes each."""
    for run in runs(x):
        yield from run.split(PIECE)


class Staging:
    """Two buffers between host and device: while the device copies one, the host works with the other."""

    def __init__(self, device: torch.device, follows: Any = None):
        """`follows` is the stream that made the tensors to copy, or used their memory before."""
        self.on_gpu = device.type == "cuda"
        self.buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=self.on_gpu) for _ in range(2)]
        self.turn = 0
        if self.on_gpu:
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(follows or torch.cuda.current_stream(device))
            self.copied = [torch.cuda.Event() for _ in self.buffers]

    def next(self, size: int) -> Tensor:
        """The other buffer, once its last copy has ended."""
        self.turn = 1 - self.turn
        if self.on_gpu:
            self.copied[self.turn].synchronize()
        return self.buffers[self.turn][:size]

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy to or from the buffer that `next` gave last."""
        with torch.cuda.stream(self.stream) if self.on_gpu else nullcontext():
            target.copy_(source, non_blocking=self.on_gpu)
        if self.on_gpu:
            self.copied[self.turn].record(self.stream)

    def wait(self, turn: int) -> None:
        """Until the copy of a buffer has ended."""
        if self.on_gpu:
            self.copied[turn].synchronize()

    def close(self) -> None:
        """Wait until all copies have ended, also after an error: memory of tensors may be given to others then."""
        if self.on_gpu:
            self.stream.synchronize()


def is_addressable(device: torch.device) -> bool:
    """Whether the host reads and writes the memory of a device's tensors."""
    return device.type == "cpu"


def begin_digest(metadata: Mapping[str, str]) -> Any:
    """SHA-256 of a file's metadata without the checksum; names, shapes, dtypes and numbers of tensors are to follow."""
    rest = sorted((name, x) for name, x in metadata.items() if name != DIGEST)
    return hashlib.sha256(json.dumps(rest).encode())


def describe(name: str, dtype: torch.dtype, shape: Iterable[int]) -> bytes:
    """The bytes that a checksum gets for a tensor before its numbers."""
    return json.dumps([name, list(shape), str(dtype)]).encode()


def fill(opened: TensorFile, targets: Mapping[str, Tensor], follows: Any = None) -> None:
    """Read all tensors of a file into these, of the same names, shapes and dtypes, and check the checksum.

    Raises:
        ValueError: the file is damaged; the message names it. The targets hold anything then.
        OSError: it cannot be read.
    """
    for name, entry in opened.entries.items():
        expected, got = ((x.dtype, tuple(x.shape)) for x in (targets[name], entry))
        if expected != got:
            raise ValueError(f"expected {name} of {expected} at {opened.path}, got {got}")
    digest, staging = begin_digest(opened.metadata), None
    try:
        for name, entry in sorted(opened.entries.items()):
            digest.update(describe(name, entry.dtype, entry.shape))
            opened.file.seek(entry.start)
            for piece in pieces(targets[name]):
                if is_addressable(piece.device):
                    digest.update(_read_all(opened.file, piece.numpy()))
                    continue
                staging = staging or Staging(piece.device, follows)
                buffer = staging.next(len(piece))
                digest.update(_read_all(opened.file, buffer.numpy()))
                staging.copy(piece, buffer)
    except ValueError as error:
        raise ValueError(f"expected a whole safetensors file at {opened.path}, got: {error}") from None
    finally:
        if staging is not None:
            staging.close()
    stored, found = opened.metadata.get(DIGEST), digest.hexdigest()
    if stored is not None and found != stored:
        raise ValueError(f"expected contents of checksum {stored} at {opened.path}, got {found}: the file is damaged")


def fill_all(
    jobs: Sequence[tuple[TensorFile, Mapping[str, Tensor]]], device: torch.device
) -> list[ValueError | OSError | None]:
    """`fill` for several files at once, and for each of them the error if there was one."""
    follows = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run(job: tuple[TensorFile, Mapping[str, Tensor]]) -> ValueError | OSError | None:
        try:
            fill(*job, follows)
        except (ValueError, OSError) as error:
            return error
        return None

    if len(jobs) == 1:
        return [run(jobs[0])]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(run, jobs))


def write_file(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors of any device as a safetensors file with a checksum; it may hold anything after an error."""
    own = {name: _in_pieces(x.detach()) for name, x in tensors.items()}
    digest, places, end = begin_digest(metadata), {}, 0
    for name, x in sorted(own.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        places[name] = end, end + x.numel() * x.dtype.itemsize
        end = places[name][1]
    entries = {
        name: {"dtype": NAMES[own[name].dtype], "shape": list(own[name].shape), "data_offsets": place}
        for name, place in places.items()
    }

    def header(checksum: str) -> bytes:
        text = json.dumps({METADATA: {**metadata, DIGEST: checksum}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with open(path, "wb") as file:
        start = file.write(header(digest.hexdigest()))
        before: str | None = None
        for name, piece in _host_pieces((name, piece) for name, x in sorted(own.items()) for piece in pieces(x)):
            if name != before:
                digest.update(describe(name, own[name].dtype, own[name].shape))
                file.seek(start + places[name][0])
                before = name
            digest.update(piece)
            file.write(piece)
        file.seek(0)
        file.write(header(digest.hexdigest()))


def _in_pieces(x: Tensor) -> Tensor:
    """The tensor, or a copy where its memory lies in small pieces."""
    inner = x
    while inner.dim() > 2 and x.numel():
        inner = inner[0]
    return x if inner.is_contiguous() else x.contiguous()


def _host_pieces(given: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, memoryview]]:
    """The bytes of pieces with names, valid until the next ones are asked for; a GPU copies one in advance."""
    staging: Staging | None = None
    waiting: tuple[str, Tensor, int | None] | None = None

    def ready(name: str, buffer: Tensor, turn: int | None) -> tuple[str, memoryview]:
        if staging is not None and turn is not None:
            staging.wait(turn)
        return name, buffer.numpy().data

    try:
        for name, piece in given:
            if is_addressable(piece.device):
                now: tuple[str, Tensor, int | None] = name, piece, None
            else:
                staging = staging or Staging(piece.device)
                buffer = staging.next(len(piece))
                staging.copy(buffer, piece)
                now = name, buffer, staging.turn
            if waiting is not None:
                yield ready(*waiting)
            waiting = now
        if waiting is not None:
            yield ready(*waiting)
    finally:
        if staging is not None:
            staging.close()
