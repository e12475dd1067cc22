"""A corpus: text that one tokenizer has read once, kept on disk as a flat file of tokens, and rows to train on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nha.data.sources import check_sources, documents, fingerprint
from nha.io import atomic_directory

FORMAT = "nha-corpus-v1"
BLOCK = 1 << 24  # bytes of tokens that share one checksum
ALWAYS_CHECKED = 64  # blocks; of a larger corpus as many are checked, spread evenly
BATCH_CHARACTERS = 1 << 22
PROBE = "Hello, world! 0123456789  \n\tdef f(x): return x**2\n\nÀ la carte: 3.14 — “naïve” 你好 Привет 🙂"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of a tokenizer's vocabulary and of what it makes of a text in several scripts.

    Tokenizers that read alike have the same one, wherever they were loaded from.
    """
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    found = tokenizer(PROBE, verbose=False).input_ids
    return hashlib.sha256(f"{vocabulary} {found}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens: document i is `tokens[offsets[i] : offsets[i + 1]]`, and is never trained on if `held[i]`.

    `tokens` [N] uint16 or uint32 is mapped from disk, `offsets` [documents + 1] int64, `held` [documents] bool.
    """

    path: Path
    tokens: np.ndarray
    offsets: np.ndarray
    held: np.ndarray
    meta: dict[str, Any]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, [documents] int64."""
        return np.diff(self.offsets)

    @cached_property
    def training(self) -> np.ndarray:
        """Indices of the documents to train on."""
        return np.flatnonzero(~self.held)

    @cached_property
    def training_ends(self) -> np.ndarray:
        """Tokens of the documents to train on up to the end of each, [documents to train on] int64."""
        return self.lengths[self.training].cumsum()

    @cached_property
    def measuring(self) -> np.ndarray:
        """Indices of the documents held out, longest first."""
        held = np.flatnonzero(self.held)
        return held[np.argsort(-self.lengths[held], kind="stable")]

    @property
    def identity(self) -> str:
        """What tells this corpus from any other, for runs that are resumed."""
        return f"{self.meta['tokenizer']['fingerprint']}-{zlib.crc32(json.dumps(self.meta['checksums']).encode()):08x}"

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def texts(self, count: int, length: int, seed: int = 0, least: int = 2) -> np.ndarray:
        """`count` stretches [count, length] int64, each of one training document, from its start if that is not used.

        Where no document is that long, `length` is halved, but not below `least`. Raises ValueError if none is left.
        """
        while length >= least:
            able = self.training[self.lengths[self.training] >= length]
            if len(able):
                generator = np.random.default_rng([seed, 7])
                order = np.concatenate([generator.permutation(able) for _ in range(-(-count // len(able)))])[:count]
                rows = []
                for at, index in enumerate(order):
                    spare = int(self.lengths[index]) - length
                    start = 0 if at < len(able) else int(generator.integers(spare + 1))
                    rows.append(self.document(index)[start : start + length])
                return np.stack(rows).astype(np.int64)
            length //= 2
        longest = int(self.lengths[self.training].max(initial=0))
        raise ValueError(f"expected documents of at least {least} tokens, the longest of {self.path} has {longest}")

    def held_out(self, count: int, length: int) -> np.ndarray:
        """The first `length` tokens of up to `count` held-out documents that have as many, [<= count, length] int64.

        Raises ValueError if there is none.
        """
        able = [index for index in self.measuring if self.lengths[index] >= length][:count]
        if not able:
            longest = int(self.lengths[self.measuring].max(initial=0))
            raise ValueError(
                f"expected a held-out document of {length} tokens in {self.path}, the longest has {longest}"
            )
        return np.stack([self.document(index)[:length] for index in able]).astype(np.int64)

    def filler(self, generator: np.random.Generator) -> Callable[[int], np.ndarray]:
        """A function that gives n tokens [n] int64 of training documents, from places that the generator draws."""

        def stretch(count: int) -> np.ndarray:
            parts, missing = [np.zeros(0, np.int64)], count
            while missing > 0:
                place = int(generator.integers(self.training_ends[-1]))
                index = int(np.searchsorted(self.training_ends, place, side="right"))
                document = self.document(self.training[index])
                start = place - int(self.training_ends[index] - len(document))
                start = max(0, min(start, len(document) - missing))
                parts.append(document[start : start + missing].astype(np.int64))
                missing -= len(parts[-1])
            return np.concatenate(parts)

        return stretch

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return open_corpus, (self.path,)


@dataclass(frozen=True)
class Rows:
    """The stream of rows to train on: all training documents end to end, in an order of its own in every epoch.

    Row i [length] is a function of (corpus, length, seed, i) alone. Every epoch is cut at other places. Where a row
    cuts a document, the rest goes on in the next row as a text of its own.
    """

    corpus: Corpus
    length: int
    seed: int = 0

    @property
    def per_epoch(self) -> int:
        """Rows before every training document has been read once."""
        return max(1, int(self.corpus.training_ends[-1]) // self.length)

    def row(self, index: int) -> tuple[np.ndarray, list[int]]:
        """Tokens [length] int64 of a row and where its texts start (the first at 0)."""
        epoch, place = divmod(index, self.per_epoch)
        order, ends, shift = self._epoch(epoch)
        place = (shift + place * self.length) % int(ends[-1])
        at = int(np.searchsorted(ends, place, side="right"))
        ids, starts, filled = np.empty(self.length, np.int64), [], 0
        skipped = place - (int(ends[at - 1]) if at else 0)
        while filled < self.length:
            part = self.corpus.document(order[at % len(order)])[skipped:][: self.length - filled]
            ids[filled : filled + len(part)] = part
            starts.append(filled)
            filled, skipped, at = filled + len(part), 0, at + 1
        return ids, starts

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Order of the documents, where each ends, and where the first row starts."""
        known = self.__dict__.setdefault("_epochs", {})
        if epoch not in known:
            generator = np.random.default_rng([self.seed, 11, epoch])
            order = self.corpus.training[generator.permutation(len(self.corpus.training))]
            known.clear()
            known[epoch] = (order, self.corpus.lengths[order].cumsum(), int(generator.integers(self.length)))
        return known[epoch]


def checksums(path: Path) -> list[int]:
    """A checksum of every `BLOCK` bytes of a file."""
    with path.open("rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]


def read_meta(path: Path) -> dict[str, Any]:
    """The description of a corpus. Raises ValueError if `path` does not hold one."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"expected a corpus in {path}, it has no meta.json that can be read") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        got = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise ValueError(f"expected a corpus of format {FORMAT!r} in {path}, got {got!r}")
    return meta


def open_corpus(path: Path | str, tokenizer: Any = None) -> Corpus:
    """A corpus that `prepare` wrote, its tokens mapped from disk; sources are not needed any more.

    Raises ValueError, in one line, for a directory that is no corpus, one that is damaged (sizes and checksums), and
    one that another tokenizer than the given one has read.
    """
    path = Path(path)
    meta = read_meta(path)
    if tokenizer is not None:
        wanted, got = tokenizer_fingerprint(tokenizer), meta["tokenizer"]["fingerprint"]
        if wanted != got:
            names = f"{getattr(tokenizer, 'name_or_path', '')!r} ({wanted}), got {meta['tokenizer']['name']!r} ({got})"
            raise ValueError(f"expected the corpus in {path} to have been read by the model's tokenizer {names}")
    file, kind = path / "tokens.bin", np.dtype(meta["dtype"])
    size = file.stat().st_size if file.is_file() else 0
    if size != meta["tokens"] * kind.itemsize:
        wanted = meta["tokens"] * kind.itemsize
        raise ValueError(
            f"expected {wanted} bytes of tokens in {file}, got {size}: the corpus is damaged, prepare it again"
        )
    known = meta["checksums"]
    checked = min(len(known), ALWAYS_CHECKED)
    chosen = [i * len(known) // checked for i in range(checked)]
    with file.open("rb") as data:
        for block in chosen:
            data.seek(block * BLOCK)
            if zlib.crc32(data.read(BLOCK)) != known[block]:
                raise ValueError(f"expected whole tokens in {file}, block {block} is damaged: prepare the corpus again")
    try:
        offsets, held = (np.load(path / f"{name}.npy") for name in ("offsets", "held"))
    except (OSError, ValueError, EOFError):
        raise ValueError(
            f"expected offsets.npy and held.npy in {path}: the corpus is damaged, prepare it again"
        ) from None
    if _digest(offsets, held) != meta["digest"]:
        raise ValueError(f"expected the documents that were written in {path}, got others: prepare the corpus again")
    return Corpus(path, np.memmap(file, kind, "r"), offsets, held, meta)


def _digest(offsets: np.ndarray, held: np.ndarray) -> str:
    return hashlib.sha256(offsets.tobytes() + held.tobytes()).hexdigest()[:16]


def _batches(texts: Iterator[str], seen: set[bytes]) -> Iterator[list[tuple[bytes, str]]]:
    """Texts that have not been seen before, with their digests, some at a time."""
    batch: list[tuple[bytes, str]] = []
    characters = 0
    for text in texts:
        digest = hashlib.sha1(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()
        if not text or digest in seen:
            continue
        seen.add(digest)
        batch.append((digest, text))
        characters += len(text)
        if characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def prepare(
    sources: Sequence[str],
    path: Path | str,
    tokenizer: Any,
    *,
    field: str = "text",
    held_out: float = 0.02,
    least: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Let a tokenizer read texts once and keep the tokens in the directory `path`, which appears only when it is whole.

    Texts that repeat another word for word are left out, and those of fewer than `least` tokens. A share `held_out` of
    the documents, chosen by their contents, is marked as never to be trained on (at least one, where there are two).

    Args:
        sources: as `nha.data.sources.documents` takes them.
        path: the directory; if it holds the same text read by the same tokenizer already, that is used. A damaged
            corpus of the same sources is made anew.
        tokenizer: a transformers tokenizer; its beginning-of-text token starts every document if it adds one.
        field: where texts are in .jsonl, .parquet and datasets.
        progress: called with (documents, tokens) so far.

    Raises:
        ValueError: no such source, nothing to read in them, or a directory that holds something else.
    """
    path = Path(path)
    check_sources(sources)
    if not 0 <= held_out < 1:
        raise ValueError(f"expected a share of held-out documents from 0 to below 1, got {held_out}")
    made_from = {
        "sources": list(sources),
        "files": _hash(fingerprint(sources, field)),
        "held_out": held_out,
        "least": least,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not path.is_dir() or not (path / "meta.json").is_file():
            raise ValueError(f"expected a new directory or a corpus at {path}, it holds something else")
        if read_meta(path)["made_from"] != made_from:
            raise ValueError(
                f"expected a corpus of these sources, settings and tokenizer at {path}, got another one: "
                "name another directory or delete it"
            )
        with contextlib.suppress(ValueError):  # a damaged one is made anew
            return open_corpus(path, tokenizer)
    with atomic_directory(path) as work:
        _write(work, documents(sources, field), tokenizer, made_from, progress)
    return open_corpus(path, tokenizer)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _write(
    work: Path,
    texts: Iterator[str],
    tokenizer: Any,
    made_from: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write tokens, documents and description of a corpus into `work`."""
    kind = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    lengths: list[int] = []
    digests: list[bytes] = []
    seen: set[bytes] = set()
    with (work / "tokens.bin").open("wb") as file:
        for batch in _batches(texts, seen):
            for (digest, _), ids in zip(batch, tokenizer([t for _, t in batch], verbose=False).input_ids, strict=True):
                if len(ids) < made_from["least"]:
                    continue
                file.write(np.asarray(ids, kind).tobytes())
                lengths.append(len(ids))
                digests.append(digest)
            if progress is not None:
                progress(len(lengths), sum(lengths))
        file.flush()
        os.fsync(file.fileno())
    if not lengths:
        raise ValueError(
            f"expected text in {', '.join(made_from['sources'])}, got no text of {made_from['least']} tokens or more"
        )
    share = made_from["held_out"]
    held = np.array([int.from_bytes(digest[:8], "big") < share * 2**64 for digest in digests])
    if share > 0 and len(held) > 1 and not held.any():
        held[min(range(len(digests)), key=lambda i: digests[i])] = True
    if held.all():
        held[:] = False
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(work / "offsets.npy", offsets)
    np.save(work / "held.npy", held)
    meta = {
        "format": FORMAT,
        "dtype": kind.name,
        "tokens": int(offsets[-1]),
        "documents": len(lengths),
        "held_out": {"documents": int(held.sum()), "tokens": int(np.diff(offsets)[held].sum())},
        "tokenizer": {
            "fingerprint": made_from["tokenizer"],
            "name": Path(str(getattr(tokenizer, "name_or_path", ""))).name,
            "vocabulary": len(tokenizer),
        },
        "made_from": made_from,
        "digest": _digest(offsets, held),
        "checksums": checksums(work / "tokens.bin"),
    }
    (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
