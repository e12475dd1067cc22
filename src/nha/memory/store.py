"""Caches on disk by the text they hold: what a model has read once, no process reads again.

A text is read in segments that end at block boundaries and at marks of the caller. The cache after each segment is an
entry, named by a hash of the model and of all segments so far. An entry is one file with the layers of constant size,
and one file with what its own segment added to the layers that grow (full attention). To load an entry, the files of
the second kind of all entries before it are read too: what is stored grows with the length of the text, not with its
square.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import PreTrainedModel

from nha import __version__
from nha.io import read_tensors, write_tensors
from nha.models.cache_file import cache_contents, cache_from, fingerprint
from nha.models.conversation import cache_keyword

FORMAT = "nha-memory-v1"
SUFFIX, GROWTH_SUFFIX = ".state.safetensors", ".growth.safetensors"
READERS = 8  # files that are read at once
LOCK = ".lock"
LOCK_SECONDS = 10.0  # how long to wait for another process that removes entries
ABANDONED_SECONDS = 3600.0  # a temporary file of this age was left by a process that is gone
logger = logging.getLogger(__name__)


class Memory(NamedTuple):
    """A cache that has read the first `num_tokens` of a text, of which `num_found` came from the store."""

    cache: Cache
    num_tokens: int
    num_found: int


class Boundary(NamedTuple):
    """The end of a segment: how many tokens lie before it, and the name of the entry there."""

    stop: int
    name: str


@dataclass(frozen=True)
class MemoryStore:
    """Caches of texts in a directory, bounded in bytes; any number of processes may use it at once.

    Going on from a found cache gives the same bits as reading the text anew through a store of the same `block_size`
    with the same marks, on the same device and versions: the segments are the same.

    Attributes:
        path: the directory; it is made, readable by its owner alone.
        max_bytes: size of all entries together; those used least recently are removed.
        block_size: tokens from one boundary to the next. A smaller one shares more between texts and stores more.

    >>> import tempfile
    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model, ids = NHAForCausalLM(NHAConfig.tiny()).eval(), torch.arange(100)[None]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = MemoryStore(folder, block_size=32)
    ...     first, second = store.read(model, ids), store.read(model, ids)
    >>> first.num_tokens, first.num_found, second.num_found
    (96, 0, 96)
    >>> answer = model.generate(ids, past_key_values=second.cache, max_new_tokens=3, do_sample=False)
    """

    path: str | Path
    max_bytes: int = 10 * 2**30
    block_size: int = 4096

    def __post_init__(self) -> None:
        for name in ("max_bytes", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        Path(self.path).mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._entries())

    def load(self, model: PreTrainedModel, ids: Tensor, marks: Sequence[int] = ()) -> Memory | None:
        """The cache of the longest stored prefix of a text `ids` [1, T] that leaves at least one token to read.

        None where nothing is stored. An entry that is damaged or of another model is removed, with one line in the log.
        """
        return self._load(model, self._boundaries(model, ids, marks))

    def read(self, model: PreTrainedModel, ids: Tensor, marks: Sequence[int] = ()) -> Memory:
        """A cache that has read a text `ids` [1, T] up to the last boundary before its end, ready for `generate`.

        What is stored is loaded, the rest is read segment by segment and stored. `marks` are further boundaries, for
        instance the end of a document before a question. Where the disk is full, reading goes on without storing, with
        one line in the log. Raises ValueError for more than one row.
        """
        boundaries = self._boundaries(model, ids, marks)
        found = self._load(model, boundaries)
        cache = DynamicCache(config=model.config) if found is None else found.cache
        done = 0 if found is None else found.num_found
        ids, storing = ids.to(model.device), True
        for index, (stop, _) in enumerate(boundaries):
            start = boundaries[index - 1].stop if index else 0
            if stop <= done:
                continue
            with torch.no_grad():
                options: dict[str, Any] = {cache_keyword(model): cache, "use_cache": True, "logits_to_keep": 1}
                model(ids[:, start:stop], **options)
            storing = storing and self._save(model, cache, boundaries[: index + 1])
        return Memory(cache, boundaries[-1].stop if boundaries else 0, done)

    def clear(self) -> None:
        """Remove all entries."""
        self._shrink(0)

    def _boundaries(self, model: PreTrainedModel, ids: Tensor, marks: Sequence[int]) -> list[Boundary]:
        """Where segments of a text end, all before its last token."""
        if ids.dim() != 2 or ids.shape[0] != 1:
            raise ValueError(f"expected ids [1, T], got {list(ids.shape)}")
        length = ids.shape[1]
        stops = sorted({*range(self.block_size, length, self.block_size), *(m for m in marks if 0 < m < length)})
        if not stops:
            return []
        numbers = ids[0].to("cpu", torch.int64).numpy()
        about = [FORMAT, fingerprint(model), model.device.type, torch.__version__, __version__]
        digest = hashlib.sha256(json.dumps(about).encode())
        found = []
        for start, stop in pairwise([0, *stops]):
            digest.update(f"{stop}:".encode() + numbers[start:stop].tobytes())
            found.append(Boundary(stop, f"{stop:08d}-{digest.hexdigest()[:40]}"))
        return found

    def _file(self, name: str, suffix: str = SUFFIX) -> Path:
        return Path(self.path) / (name + suffix)

    def _save(self, model: PreTrainedModel, cache: Cache, boundaries: list[Boundary]) -> bool:
        """Store the cache at the last boundary; False, and nothing is left behind, where that cannot be done."""
        stop, name = boundaries[-1]
        start = boundaries[-2].stop if len(boundaries) > 1 else 0
        tensors, metadata = cache_contents(cache, model)
        grows = [n for n, x in tensors.items() if n.endswith((".keys", ".values")) and x.shape[2] == stop]
        growth = {n: tensors.pop(n)[:, :, start:] for n in grows}
        metadata |= {"kind": FORMAT, "grows": json.dumps(grows)}
        try:
            if growth:
                write_tensors(self._file(name, GROWTH_SUFFIX), growth, {"kind": FORMAT})
            write_tensors(self._file(name), tensors, metadata)
            self._touch(boundaries)
            self._shrink(self.max_bytes)
        except (OSError, SafetensorError) as error:
            logger.warning("reading goes on without storing in %s: %s", self.path, one_line(error))
            return False
        return self._file(name).exists()  # else all entries of this text are more than may be stored

    def _load(self, model: PreTrainedModel, boundaries: list[Boundary]) -> Memory | None:
        """The memory at the last of these boundaries that is stored whole."""
        for index in range(len(boundaries), 0, -1):
            cache = self._load_entry(model, boundaries[:index])
            if cache is not None:
                self._touch(boundaries[:index])
                return Memory(cache, boundaries[index - 1].stop, boundaries[index - 1].stop)
        return None

    def _load_entry(self, model: PreTrainedModel, boundaries: list[Boundary]) -> Cache | None:
        """The cache at the last boundary; None where it is not stored whole, and a file that is damaged is removed."""
        stop, name = boundaries[-1]
        path = self._file(name)
        if not path.exists():
            return None
        state = self._read(path, model)
        if state is None:
            return None
        tensors, metadata = state
        try:
            grows: list[str] = json.loads(metadata["grows"])
            paths = [self._file(before, GROWTH_SUFFIX) for _, before in boundaries] if grows else []
            with ThreadPoolExecutor(READERS) as pool:
                parts = list(pool.map(lambda part: self._read(part, model), paths))
            found = [part[0] for part in parts if part is not None]
            if len(found) < len(paths):
                return None
            tensors |= {key: torch.cat([part[key] for part in found], 2) for key in grows}
            cache = cache_from(tensors, metadata, path, model)
            if cache.get_seq_length() != stop:
                raise ValueError(f"expected a cache of {stop} tokens, got {cache.get_seq_length()}")
            return cache
        except (ValueError, KeyError, TypeError) as error:
            drop(path, error)
            return None

    def _read(self, path: Path, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The contents of one file; None where there is none or it cannot be read. A damaged one is removed."""
        try:
            tensors, metadata = read_tensors(path, model.device)
            if metadata.get("kind") != FORMAT:
                raise ValueError(f"expected a file of format {FORMAT!r}, got {metadata.get('kind')!r}")
            return tensors, metadata
        except FileNotFoundError:  # another process may have just removed it
            return None
        except OSError as error:
            logger.warning("%s cannot be read and is left out: %s", path.name, one_line(error))
        except ValueError as error:
            drop(path, error)
        return None

    def _touch(self, boundaries: list[Boundary]) -> None:
        """Note that these entries were used; the shorter ones, which others build on, a little later."""
        now = time.time_ns()
        for stop, name in boundaries:
            for suffix in (SUFFIX, GROWTH_SUFFIX):
                with suppress(OSError):
                    os.utime(self._file(name, suffix), ns=(now, now - stop))

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """When each file was used last, its bytes, and its path."""
        for path in (*Path(self.path).glob(f"*{SUFFIX}"), *Path(self.path).glob(f"*{GROWTH_SUFFIX}")):
            with suppress(OSError):
                stat = path.stat()
                yield stat.st_mtime_ns, stat.st_size, path

    def _shrink(self, max_bytes: int) -> None:
        """Remove the entries used least recently until the rest fits, and what dead processes left behind."""
        try:
            with FileLock(Path(self.path) / LOCK, timeout=LOCK_SECONDS):
                for path in Path(self.path).glob(".*.tmp"):
                    with suppress(OSError):
                        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                            path.unlink(missing_ok=True)
                entries = sorted(self._entries())
                total = sum(size for _, size, _ in entries)
                for _, size, path in entries:
                    if total <= max_bytes:
                        return
                    path.unlink(missing_ok=True)
                    total -= size
        except Timeout:
            logger.warning("entries in %s are not removed: another process holds its lock", self.path)


def drop(path: Path, error: Exception) -> None:
    """Remove a file that cannot be used."""
    logger.warning("dropped %s, to be read again: %s", path.name, one_line(error))
    with suppress(OSError):
        path.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """An error's first line."""
    return (str(error) or repr(error)).splitlines()[0]
