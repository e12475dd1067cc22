"""The embedded models as directories, which servers need: saved once, in the user's cache."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from nha.io import atomic_directory
from nha.models.loading import EMBEDDED, Source, load, read_config
from nha.models.smollm2 import DELTA, forget_gguf, gguf_path

VARIABLE = "NHA_CACHE"


def cache_root() -> Path:
    """Where embedded models are saved: NHA_CACHE, else `nha` in the user's cache."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nha"


def fingerprint(name: str) -> str:
    """Twelve digits of an embedded model's files: another version of it gets another directory."""
    gguf = gguf_path()
    made_of = f"{gguf.name} {gguf.stat().st_size}".encode()
    if name != EMBEDDED:
        made_of += DELTA.read_bytes()
    return hashlib.sha256(made_of).hexdigest()[:12]


def with_directory(source: Source) -> Source:
    """A source whose embedded model has the directory that `save_embedded` fills; any other source as it is."""
    if not source.embedded:
        return source
    path = cache_root() / f"{source.name}-{fingerprint(source.name)}"
    return replace(source, config=read_config(source), directory=path)


def is_saved(source: Source) -> bool:
    """Whether the directory of a source is there: an embedded model's is whole or absent."""
    return not source.embedded or (source.directory is not None and source.directory.is_dir())


def save_embedded(source: Source) -> None:
    """Save an embedded model in float32 with its tokenizer, unless its directory is there already.

    Processes that start at the same time wait for one of them. Raises OSError where it cannot be written: the
    directory is whole or absent.
    """
    if is_saved(source):
        return
    assert source.directory is not None
    source.directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{source.directory}.lock"):
        if is_saved(source):
            return
        model, tokenizer = load(source)
        forget_gguf(model)
        with atomic_directory(source.directory) as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
