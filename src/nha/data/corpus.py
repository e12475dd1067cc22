"""A corpus: text tokenized once by one tokenizer, kept on disk as a flat file of tokens."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

FORMAT = "nha-corpus-v2"
READABLE = ("nha-corpus-v1", FORMAT)  # v1 has other names for two settings, and the same files
DTYPES = ("uint16", "uint32")
BLOCK = 1 << 24  # bytes of tokens that share one checksum
MAX_CHECKED = 64  # blocks checked when a corpus is opened, spread evenly over a larger one
PROBE = "Hello, world! 0123456789  \n\tdef f(x): return x**2\n\nÀ la carte: 3.14 — “naïve” 你好 Привет 🙂"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of a tokenizer's vocabulary and of its tokens for a text in several scripts.

    Tokenizers that give the same tokens have the same one, wherever they were loaded from.
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
    def train_indices(self) -> np.ndarray:
        """Indices of the documents to train on."""
        return np.flatnonzero(~self.held)

    @cached_property
    def train_ends(self) -> np.ndarray:
        """Cumulative tokens of the documents to train on, [documents to train on] int64."""
        return self.lengths[self.train_indices].cumsum()

    @cached_property
    def held_out_indices(self) -> np.ndarray:
        """Indices of the held-out documents, longest first."""
        held = np.flatnonzero(self.held)
        return held[np.argsort(-self.lengths[held], kind="stable")]

    @property
    def identity(self) -> str:
        """A digest of the tokenizer, all tokens, where documents begin and which are held out."""
        covered = [self.meta[name] for name in ("dtype", "tokens", "checksums", "digest")]
        return f"{self.meta['tokenizer']['fingerprint']}-{_sha256(json.dumps(covered).encode())}"

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def sample(self, count: int, seq_len: int, seed: int = 0, min_seq_len: int = 2) -> np.ndarray:
        """`count` spans [count, seq_len] int64, each of one training document, from its start while there are enough.

        If no document is that long, `seq_len` is halved, down to `min_seq_len`. Raises ValueError if none is left.
        """
        while seq_len >= min_seq_len:
            long_enough = self.train_indices[self.lengths[self.train_indices] >= seq_len]
            if len(long_enough):
                generator = np.random.default_rng([seed, 7])
                repeats = range(-(-count // len(long_enough)))
                order = np.concatenate([generator.permutation(long_enough) for _ in repeats])[:count]
                spans = []
                for number, index in enumerate(order):
                    spare = int(self.lengths[index]) - seq_len
                    start = 0 if number < len(long_enough) else int(generator.integers(spare + 1))
                    spans.append(self.document(index)[start : start + seq_len])
                return np.stack(spans).astype(np.int64)
            seq_len //= 2
        found = int(self.lengths[self.train_indices].max(initial=0))
        raise ValueError(f"expected documents of at least {min_seq_len} tokens, the longest of {self.path} has {found}")

    def held_out_sequences(self, count: int, seq_len: int) -> np.ndarray:
        """The first `seq_len` tokens of up to `count` held-out documents that have as many, [<= count, seq_len] int64.

        Raises ValueError if there is none.
        """
        found = [index for index in self.held_out_indices if self.lengths[index] >= seq_len][:count]
        if not found:
            longest = int(self.lengths[self.held_out_indices].max(initial=0))
            raise ValueError(
                f"expected a held-out document of {seq_len} tokens in {self.path}, the longest has {longest}"
            )
        return np.stack([self.document(index)[:seq_len] for index in found]).astype(np.int64)

    def filler(self, generator: np.random.Generator) -> Callable[[int], np.ndarray]:
        """A function that gives n tokens [n] int64 of training documents, from places that the generator draws."""

        def draw(count: int) -> np.ndarray:
            parts, missing = [np.zeros(0, np.int64)], count
            while missing > 0:
                place = int(generator.integers(self.train_ends[-1]))
                index = int(np.searchsorted(self.train_ends, place, side="right"))
                document = self.document(self.train_indices[index])
                start = place - int(self.train_ends[index] - len(document))
                start = max(0, min(start, len(document) - missing))
                parts.append(document[start : start + missing].astype(np.int64))
                missing -= len(parts[-1])
            return np.concatenate(parts)

        return draw

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return open_corpus, (self.path,)


def checksums(path: Path) -> list[int]:
    """A checksum of every `BLOCK` bytes of a file."""
    with path.open("rb") as file:
        return [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK), b"")]


def documents_digest(offsets: np.ndarray, held: np.ndarray) -> str:
    """A digest of where documents begin and which are held out."""
    return _sha256(offsets.tobytes() + held.tobytes())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_meta(path: Path) -> dict[str, Any]:
    """The description of a corpus. Raises ValueError if `path` does not hold one, or one of another format."""
    file = path / "meta.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"expected a corpus in {path}, it has no meta.json that can be read") from None
    if not isinstance(meta, dict) or meta.get("format") not in READABLE:
        got = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise ValueError(f"expected a corpus of format {FORMAT!r} in {path}, got {got!r}")
    kinds = {
        "tokens": int,
        "documents": int,
        "held_out": dict,
        "tokenizer": dict,
        "made_from": dict,
        "digest": str,
        "checksums": list,
    }
    for name, kind in kinds.items():
        if not isinstance(meta.get(name), kind):
            raise ValueError(f"expected {name!r} as {kind.__name__} in {file}, got {type(meta.get(name)).__name__}")
    for name, kind in (("fingerprint", str), ("name", str), ("vocabulary", int)):
        if not isinstance(meta["tokenizer"].get(name), kind):
            raise ValueError(f"expected the tokenizer's {name!r} as {kind.__name__} in {file}")
    if meta.get("dtype") not in DTYPES:
        raise ValueError(f"expected a dtype out of {DTYPES} in {file}, got {meta.get('dtype')!r}")
    return meta


def open_corpus(path: Path | str, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """A corpus that `nha.data.prepare.prepare` wrote, its tokens mapped from disk; its sources are not needed.

    Raises ValueError, in one line, for a directory that is no corpus, a damaged one (sizes and checksums), and one
    of another tokenizer than the one given.
    """
    path = Path(path)
    meta = read_meta(path)
    if tokenizer is not None:
        expected, got = tokenizer_fingerprint(tokenizer), meta["tokenizer"]["fingerprint"]
        if expected != got:
            name = f"{getattr(tokenizer, 'name_or_path', '')!r} ({expected})"
            read = f"{meta['tokenizer']['name']!r} ({got})"
            raise ValueError(f"expected the corpus in {path} to be of the model's tokenizer {name}, got {read}")
    tokens = _open_tokens(path / "tokens.bin", meta)
    try:
        offsets, held = (np.load(path / f"{name}.npy") for name in ("offsets", "held"))
    except (OSError, ValueError, EOFError):
        raise ValueError(
            f"expected offsets.npy and held.npy in {path}: the corpus is damaged, prepare it again"
        ) from None
    if documents_digest(offsets, held) != meta["digest"] or offsets.shape != (len(held) + 1,) or held.dtype != bool:
        raise ValueError(f"expected the documents that were written in {path}, got others: prepare the corpus again")
    return Corpus(path, tokens, offsets, held, meta)


def _open_tokens(file: Path, meta: dict[str, Any]) -> np.ndarray:
    """The tokens of a corpus, mapped from disk. Raises ValueError for a wrong size or checksum."""
    dtype = np.dtype(meta["dtype"])
    size, expected = file.stat().st_size if file.is_file() else 0, meta["tokens"] * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"expected {expected} bytes of tokens in {file}, got {size}: the corpus is damaged, prepare it again"
        )
    known = meta["checksums"]
    if len(known) != -(-size // BLOCK):
        raise ValueError(
            f"expected {-(-size // BLOCK)} checksums of {file}, got {len(known)}: prepare the corpus again"
        )
    checked = min(len(known), MAX_CHECKED)
    with file.open("rb") as data:
        for block in (i * len(known) // checked for i in range(checked)):
            data.seek(block * BLOCK)
            if zlib.crc32(data.read(BLOCK)) != known[block]:
                raise ValueError(f"expected whole tokens in {file}, block {block} is damaged: prepare the corpus again")
    return np.memmap(file, dtype, "r")
