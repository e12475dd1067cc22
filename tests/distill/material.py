"""Material that tests of training share: a tiny teacher that reads bytes, a corpus for it, and short settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nha.data.corpus import Corpus
from nha.data.prepare import prepare
from nha.distill.settings import DistillSettings
from tests.convert.test_hybridize import byte_tokenizer
from tests.data.test_corpus import texts
from tests.models.families import teacher

WINDOW, LENGTH = 16, 320


def tiny(**changes: Any):
    """A tiny random model whose vocabulary holds all bytes."""
    return teacher(vocab_size=300, **changes)


def material(path: Path) -> tuple[Corpus, Any]:
    """A corpus in `path` and the tokenizer that read it."""
    (path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts()))
    tokenizer = byte_tokenizer(path)
    return prepare([str(path / "texts.jsonl")], path / "corpus", tokenizer, min_tokens=8), tokenizer


def settings(**changes: Any) -> DistillSettings:
    """Six steps of two sequences, one of them recall text."""
    short: dict[str, Any] = dict(
        window_size=WINDOW,
        num_slots=6,
        tokens=6 * 2 * LENGTH,
        batch_size=2,
        seq_len=LENGTH,
        recall_fraction=0.5,
        align_steps=2,
        align_sequences=2,
        save_every=2,
        log_every=1,
    )
    return DistillSettings(**(short | changes))
