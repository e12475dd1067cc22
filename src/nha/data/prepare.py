"""Text to corpus: documents are tokenized once, and some are held out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nha.data.corpus import FORMAT, Corpus, checksums, documents_digest, open_corpus, read_meta, tokenizer_fingerprint
from nha.data.sources import check_sources, documents, fingerprint
from nha.io import atomic_directory

BATCH_CHARACTERS = 1 << 22
RENAMED = {"held_out": "held_out_fraction", "least": "min_tokens"}  # settings as format v1 has them
Progress = Callable[[int, int], None]


def prepare(
    sources: Sequence[str],
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str = "text",
    held_out_fraction: float = 0.02,
    min_tokens: int = 32,
    progress: Progress | None = None,
) -> Corpus:
    """Tokenize text once and keep the tokens in the directory `path`, which appears only when it is whole.

    Repeated documents and those of fewer than `min_tokens` tokens are left out. A fraction of the documents, chosen by
    their contents, is held out: marked as never to be trained on (at least one, if there are two).

    Args:
        sources: as `nha.data.sources.documents` takes them.
        path: the directory; if it holds a corpus of the same text, settings and tokenizer, that is used. A damaged
            corpus of the same sources is made anew.
        tokenizer: a transformers tokenizer; its BOS token starts every document if it adds one.
        field: where texts are in .jsonl, .parquet and datasets.
        held_out_fraction: from 0 to below 1.
        progress: called with (documents, tokens) so far.

    Raises:
        ValueError: no such source, no text in them, or a directory that holds something else.
        ImportError: a package that the sources need is missing.
    """
    path = Path(path)
    made_from = check_preparation(
        sources, path, tokenizer, field=field, held_out_fraction=held_out_fraction, min_tokens=min_tokens
    )
    if (found := existing_corpus(path, tokenizer)) is not None:
        return found
    with atomic_directory(path) as work:
        _write(work, documents(sources, field), tokenizer, made_from, progress)
    return open_corpus(path, tokenizer)


def existing_corpus(path: Path, tokenizer: PreTrainedTokenizerBase) -> Corpus | None:
    """The corpus in `path`; None where there is none, or a damaged one, which `prepare` makes anew."""
    if (path / "meta.json").is_file():
        with contextlib.suppress(ValueError):
            return open_corpus(path, tokenizer)
    return None


def check_preparation(
    sources: Sequence[str],
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str = "text",
    held_out_fraction: float = 0.02,
    min_tokens: int = 32,
) -> dict[str, Any]:
    """Raise what `prepare` raises before it reads any text. Returns what its corpus is made from, by name."""
    check_sources(sources)
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"expected held_out_fraction from 0 to below 1, got {held_out_fraction}")
    if min_tokens < 1:
        raise ValueError(f"expected min_tokens of at least 1, got {min_tokens}")
    made_from = {
        "sources": list(sources),
        "files": hashlib.sha256(json.dumps(fingerprint(sources, field), sort_keys=True).encode()).hexdigest()[:16],
        "held_out_fraction": held_out_fraction,
        "min_tokens": min_tokens,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        check_replaceable(path, made_from)
    return made_from


def check_replaceable(path: Path, made_from: dict[str, Any]) -> None:
    """Raise ValueError unless `path` holds a corpus of these sources, settings and tokenizer."""
    if not path.is_dir() or not (path / "meta.json").is_file():
        raise ValueError(f"expected a new directory or a corpus at {path}, it holds something else")
    found = {RENAMED.get(name, name): value for name, value in read_meta(path)["made_from"].items()}
    for name, value in made_from.items():
        if found.get(name) != value:
            raise ValueError(
                f"expected a corpus of these sources, settings and tokenizer at {path}, got another one ({name} "
                f"{found.get(name)!r}, not {value!r}): name another directory or delete it"
            )


def _batches(texts: Iterator[str]) -> Iterator[list[tuple[bytes, str]]]:
    """Batches of (digest, text), without repeated texts."""
    seen: set[bytes] = set()
    batch: list[tuple[bytes, str]] = []
    characters = 0
    for text in texts:
        digest = hashlib.sha1(" ".join(text.split()).encode("utf-8")).digest()
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


def _write(
    work: Path,
    texts: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    made_from: dict[str, Any],
    progress: Progress | None,
) -> None:
    """Write the files of a corpus into `work`."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    lengths: list[int] = []
    digests: list[bytes] = []
    total = 0
    with (work / "tokens.bin").open("wb") as file:
        for batch in _batches(texts):
            encoded = tokenizer([text for _, text in batch], verbose=False).input_ids
            for (digest, _), ids in zip(batch, encoded, strict=True):
                if len(ids) < made_from["min_tokens"]:
                    continue
                file.write(np.asarray(ids, dtype).tobytes())
                lengths.append(len(ids))
                digests.append(digest)
                total += len(ids)
            if progress is not None:
                progress(len(lengths), total)
        file.flush()
        os.fsync(file.fileno())
    if not lengths:
        names = ", ".join(made_from["sources"])
        raise ValueError(f"expected text in {names}, got no document of {made_from['min_tokens']} tokens or more")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    held = choose_held_out(digests, made_from["held_out_fraction"])
    np.save(work / "offsets.npy", offsets)
    np.save(work / "held.npy", held)
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "tokens": total,
        "documents": len(lengths),
        "held_out": {"documents": int(held.sum()), "tokens": int(np.diff(offsets)[held].sum())},
        "tokenizer": {
            "fingerprint": made_from["tokenizer"],
            "name": Path(str(getattr(tokenizer, "name_or_path", ""))).name,
            "vocabulary": len(tokenizer),
        },
        "made_from": made_from,
        "digest": documents_digest(offsets, held),
        "checksums": checksums(work / "tokens.bin"),
    }
    (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def choose_held_out(digests: Sequence[bytes], fraction: float) -> np.ndarray:
    """Which documents are held out, bool [documents]: a function of each document's digest, but never all or, of two
    and more, none.

    >>> choose_held_out([bytes(20), b"\\xff" * 20], 0.5).tolist()
    [True, False]
    """
    held = np.array([int.from_bytes(digest[:8], "big") < fraction * 2**64 for digest in digests])
    if fraction > 0 and len(held) > 1 and not held.any():
        held[min(range(len(digests)), key=lambda i: digests[i])] = True
    if held.all():
        held[:] = False
    return held
