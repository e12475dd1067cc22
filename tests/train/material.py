"""Material that tests of training share: a copying task, a corpus that bytes are read from, and short settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nha.data.corpus import Corpus
from nha.data.prepare import prepare
from nha.train.settings import TrainSettings
from tests.convert.test_hybridize import byte_tokenizer
from tests.data.test_corpus import texts

LENGTH = 32


class Copying:
    """Sixteen random tokens and the same again; the second half counts."""

    identity, vocab_size, seq_len = "copying 16", 60, LENGTH

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        half = np.random.default_rng([3, index]).integers(2, 60, LENGTH // 2 + 1)
        ids = np.concatenate([half, half])[: LENGTH + 1]
        targets = ids[1:].copy()
        targets[: LENGTH // 2] = -100
        return ids[:-1], targets


def material(path: Path) -> tuple[Corpus, Any]:
    """A corpus in `path` and the tokenizer that read it."""
    (path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts()))
    tokenizer = byte_tokenizer(path)
    options: dict[str, Any] = dict(min_tokens=8, held_out_fraction=0.2)
    return prepare([str(path / "texts.jsonl")], path / "corpus", tokenizer, **options), tokenizer


def settings(**changes: Any) -> TrainSettings:
    """Six steps of four sequences in two forward passes."""
    short: dict[str, Any] = dict(
        preset="tiny",
        window_size=8,
        num_slots=6,
        tokens=6 * 4 * LENGTH,
        batch_size=4,
        seq_len=LENGTH,
        micro_batch_size=2,
        lr=3e-3,
        save_every=2,
        log_every=1,
    )
    return TrainSettings(**(short | changes))
