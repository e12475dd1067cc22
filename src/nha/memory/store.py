"""Caches on disk by the text they hold: what a model has read once, no process reads again.

A text is read in segments that end at block boundaries and at marks of the caller. Some of the caches in between are
stored as entries, named by a hash of the model and of all segments so far: those at marks, every few blocks, and the
last one. An entry is one file with the layers of constant size, and one file with what the layers that grow (full
attention) got since the entry that it builds on. What is stored grows with the length of a text, not with its square.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import PreTrainedModel

from nha import __version__
from nha.io import write_tensors
from nha.models.cache_file import cache_contents, cache_from, fingerprint
from nha.models.conversation import cache_keyword
from nha.models.windows import decoder
from nha.tensor_file import TensorFile, fill_all, open_tensors

FORMAT = "nha-memory-v1"
SUFFIX, GROWTH_SUFFIX = ".state.safetensors", ".growth.safetensors"
GROWING = (".keys", ".values", ".keys_scale", ".values_scale")  # ends of names of tensors [B, H, T, ...]
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
    """The end of a segment: how many tokens lie before it, the name of an entry there, and whether it is a mark."""

    stop: int
    name: str
    is_mark: bool


class Snapshot(NamedTuple):
    """Copies of what an entry holds, which later segments do not change, and a function that waits for them."""

    tensors: dict[str, Tensor]
    growth: dict[str, Tensor]
    metadata: dict[str, str]
    wait: Callable[[], None]


class Entry(NamedTuple):
    """A cache that was loaded, and the boundaries of the entries that it was put together from, its own the last."""

    cache: Cache
    chain: list[Boundary]


@dataclass(frozen=True)
class MemoryStore:
    """Caches of texts in a directory, bounded in bytes; any number of processes may use it at once.

    Going on from a found cache gives the same bits as reading the text anew through a store of the same `block_size`
    with the same marks, on the same device and versions: the segments are the same.

    Attributes:
        path: the directory; it is made, readable by its owner alone.
        max_bytes: size of all entries together; those used least recently are removed.
        block_size: tokens from one boundary to the next. Smaller blocks are shared by more texts and read slower.
        blocks_per_entry: blocks from one entry to the next, the last of a text aside.

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
    block_size: int = 1024
    blocks_per_entry: int = 8

    def __post_init__(self) -> None:
        for name in ("max_bytes", "block_size", "blocks_per_entry"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        try:
            Path(self.path).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(f"expected a directory for memories at {self.path}, got: {error.strerror}") from None

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._entries())

    def load(self, model: PreTrainedModel, ids: Tensor, marks: Sequence[int] = ()) -> Memory | None:
        """The cache of the longest stored prefix of a text `ids` [1, T] that leaves at least one token to read.

        None where nothing is stored. An entry that is damaged or of another model is removed, with one line in the log.
        """
        entry = self._load(model, self._boundaries(model, ids, marks))
        return None if entry is None else Memory(entry.cache, entry.chain[-1].stop, entry.chain[-1].stop)

    def read(self, model: PreTrainedModel, ids: Tensor, marks: Sequence[int] = ()) -> Memory:
        """A cache that has read a text `ids` [1, T] up to the last boundary before its end, ready for `generate`.

        What is stored is loaded, the rest is read segment by segment and stored. `marks` are further boundaries, for
        instance the end of a document before a question. Where the disk is full, reading goes on without storing, with
        one line in the log. Raises ValueError for more than one row.
        """
        boundaries = self._boundaries(model, ids, marks)
        cache, chain = self._load(model, boundaries) or Entry(DynamicCache(config=model.config), [])
        found = done = chain[-1].stop if chain else 0
        ids, stored = ids.to(model.device), None
        with ThreadPoolExecutor(1) as writer:  # which stores an entry while the next segments are read
            for place in boundaries:
                if place.stop <= found:
                    continue
                with torch.no_grad():
                    options: dict[str, Any] = {cache_keyword(model): cache, "use_cache": True, "logits_to_keep": 1}
                    model(ids[:, done : place.stop], **options)
                done = place.stop
                entry = self.block_size * self.blocks_per_entry
                wanted = place is boundaries[-1] or place.is_mark or done % entry == 0
                if wanted and (stored is None or stored.result()):
                    chain = [*chain, place]
                    stored = writer.submit(self._save, snapshot(cache, model, chain), chain)
            if stored is not None:
                stored.result()
        return Memory(cache, done, found)

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
        state_dtype = getattr(decoder(model).config, "state_dtype", "float32")
        about += [] if state_dtype == "float32" else [state_dtype]
        kv_cache_dtype = getattr(decoder(model).config, "kv_cache_dtype", "auto")
        about += [] if kv_cache_dtype == "auto" else [f"keys and values {kv_cache_dtype}"]
        digest = hashlib.sha256(json.dumps(about).encode())
        found = []
        for start, stop in pairwise([0, *stops]):
            digest.update(f"{stop}:".encode() + numbers[start:stop].tobytes())
            found.append(Boundary(stop, f"{stop:08d}-{digest.hexdigest()[:40]}", stop in marks))
        return found

    def _state_file(self, place: Boundary) -> Path:
        return Path(self.path) / (place.name + SUFFIX)

    def _growth_files(self, chain: list[Boundary]) -> list[Path]:
        """The files of what growing layers got from each entry of a chain to the next."""
        starts = [0, *(place.stop for place in chain)]
        return [
            Path(self.path) / f"{place.name}.{start}{GROWTH_SUFFIX}"
            for start, place in zip(starts, chain, strict=False)
        ]

    def _save(self, entry: Snapshot, chain: list[Boundary]) -> bool:
        """Store the cache at the end of a chain; False, and nothing is left behind, where that cannot be done."""
        entry.wait()
        path = self._state_file(chain[-1])
        try:
            if entry.growth:
                write_tensors(self._growth_files(chain)[-1], entry.growth, {"kind": FORMAT})
            write_tensors(path, entry.tensors, entry.metadata)
            self._touch(chain)
            self._shrink(self.max_bytes)
        except OSError as error:
            logger.warning("reading goes on without storing in %s: %s", self.path, one_line(error))
            return False
        return path.exists()  # else all entries of this text are more than may be stored

    def _load(self, model: PreTrainedModel, boundaries: list[Boundary]) -> Entry | None:
        """The entry at the last of these boundaries where one is stored whole."""
        for index in range(len(boundaries), 0, -1):
            entry = self._load_entry(model, boundaries[:index])
            if entry is not None:
                self._touch(entry.chain)
                return entry
        return None

    def _load_entry(self, model: PreTrainedModel, boundaries: list[Boundary]) -> Entry | None:
        """The entry at the last boundary; None where it is not stored whole, and a file that is damaged is removed."""
        path = self._state_file(boundaries[-1])
        with ExitStack() as files:
            state = self._open(path, files) if path.exists() else None
            if state is None:
                return None
            try:
                grows, chain = described_chain(state, boundaries)
                opened = [self._open(path, files) for path in (self._growth_files(chain) if grows else [])]
                growth = [part for part in opened if part is not None]
                if len(growth) < len(opened):
                    return None
                tensors = self._fill(state, growth, grows, model.device)
                if tensors is None:
                    return None
                cache = cache_from(tensors, state.metadata, path, model)
                if cache.get_seq_length() != chain[-1].stop:
                    raise ValueError(f"expected a cache of {chain[-1].stop} tokens, got {cache.get_seq_length()}")
                return Entry(cache, chain)
            except (ValueError, LookupError, TypeError) as error:
                drop(path, error)
                return None

    def _open(self, path: Path, files: ExitStack) -> TensorFile | None:
        """A file that is open until `files` ends; None where there is none or it cannot be read."""
        try:
            opened = files.enter_context(open_tensors(path))
            if opened.metadata.get("kind") != FORMAT:
                raise ValueError(f"expected a file of format {FORMAT!r}, got {opened.metadata.get('kind')!r}")
            return opened
        except (OSError, ValueError) as error:
            leave_out(path, error)
        return None

    def _fill(
        self, state: TensorFile, growth: list[TensorFile], grows: list[str], device: torch.device
    ) -> dict[str, Tensor] | None:
        """The tensors of an entry, each read into its place in memory; None where a file is damaged."""
        tensors, parts = state.empty(device), [{} for _ in growth]
        for name in grows:
            entries = [part.entries[name] for part in growth]
            sizes = [entry.shape[2] for entry in entries]
            shape = (*entries[0].shape[:2], sum(sizes), *entries[0].shape[3:])
            tensors[name] = replace(entries[0], shape=shape).empty(device)
            for part, x in zip(parts, tensors[name].split(sizes, 2), strict=True):
                part[name] = x
        files = [state, *growth]
        errors = fill_all(list(zip(files, [tensors, *parts], strict=True)), device)
        for opened, error in zip(files, errors, strict=True):
            if error is not None:
                leave_out(opened.path, error)
        return None if any(errors) else tensors

    def _touch(self, chain: list[Boundary]) -> None:
        """Note that these entries were used; the shorter ones, which others build on, a little later."""
        now = time.time_ns()
        for place, growth in zip(chain, self._growth_files(chain), strict=True):
            for path in (self._state_file(place), growth):
                with suppress(OSError):
                    os.utime(path, ns=(now, now - place.stop))

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


def snapshot(cache: Cache, model: PreTrainedModel, chain: list[Boundary]) -> Snapshot:
    """The contents of an entry at the end of a chain: layers that grow give what they got since the entry before."""
    stop, start = chain[-1].stop, chain[-2].stop if len(chain) > 1 else 0
    tensors, metadata = cache_contents(cache, model)
    grows = [n for n, x in tensors.items() if n.endswith(GROWING) and x.shape[2] == stop]
    growth = {name: tensors.pop(name)[:, :, start:].clone() for name in grows}
    metadata |= {"kind": FORMAT, "grows": json.dumps(grows), "chain": json.dumps([place.stop for place in chain])}
    copies = {name: x.clone() for name, x in tensors.items()}
    return Snapshot(copies, growth, metadata, wait_for(model.device))


def wait_for(device: torch.device) -> Callable[[], None]:
    """A function, for any thread, that waits until a device has done what this thread has asked for so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def described_chain(state: TensorFile, boundaries: list[Boundary]) -> tuple[list[str], list[Boundary]]:
    """The tensors of an entry that grow, by name, and the boundaries of the entries that it builds on, its own last.

    Raises ValueError for a file of another text.
    """
    grows, stops = json.loads(state.metadata["grows"]), json.loads(state.metadata["chain"])
    chain = [place for place in boundaries if place.stop in stops]
    if [place.stop for place in chain] != stops or stops[-1] != boundaries[-1].stop:
        raise ValueError(f"expected entries at some of {[place.stop for place in boundaries]}, got {stops}")
    return grows, chain


def leave_out(path: Path, error: OSError | ValueError) -> None:
    """Remove a file that is damaged, and say so of one that cannot be read; another process may have removed it."""
    if isinstance(error, ValueError):
        drop(path, error)
    elif not isinstance(error, FileNotFoundError):
        logger.warning("%s cannot be read and is left out: %s", path.name, one_line(error))


def drop(path: Path, error: Exception) -> None:
    """Remove a file that cannot be used."""
    logger.warning("dropped %s, to be read again: %s", path.name, one_line(error))
    with suppress(OSError):
        path.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """An error's first line."""
    return (str(error) or repr(error)).splitlines()[0]
