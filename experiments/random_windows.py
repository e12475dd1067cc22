"""Train one model with random windows and one for each window, and measure the first at all of them.

    python experiments/random_windows.py --corpus run.corpus --preset 20m --tokens 50e6 --out results/random_windows

Every model trains on the same tokens. Writes knob.csv, knob.json (perplexity of the first model relative to each of the
others at its window) and knob.png. A model that was measured already is not trained again, and one whose training was
stopped resumes from its checkpoint in `--work`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from experiments.knob import label, write
from nha.data.corpus import open_corpus
from nha.settings import parse_ints
from nha.train.knob import turn_knob
from nha.train.run import train
from nha.train.settings import TrainSettings

WINDOWS = (64, 16, 256, -1, 0)  # the most important first
RANDOM = "random"


def settings_of(name: str, window: int | None, options: argparse.Namespace, left: float) -> TrainSettings:
    """The settings of the model for one window; of the model for all of them, None."""
    drawn: dict[str, Any] = {"window_size": window}
    if window is None:
        hybrid = [each for each in options.windows if each >= 0]
        drawn = {"window_size": hybrid[0] if hybrid else -1, "random_windows": options.windows}
    return TrainSettings(
        preset=options.preset,
        tokens=options.tokens,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        seq_len=options.seq_len,
        lr=options.lr,
        seed=options.seed,
        budget=left,
        **drawn,
    )


def main(arguments: list[str] | None = None) -> int:
    """Train and measure the models that are not there yet. Returns 0, or 3 where time was short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "results/random_windows")))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nha-random-windows")
    parser.add_argument("--windows", type=parse_ints, default=WINDOWS)
    parser.add_argument("--preset", default="20m")
    parser.add_argument("--tokens", type=float, default=50e6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=0)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-s", type=float, default=540.0)
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.budget_s
    corpus = open_corpus(options.corpus)
    ids = torch.from_numpy(corpus.held_out_sequences(options.texts, options.seq_len))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "knob.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    models: dict[str, int | None] = {RANDOM: None} | {label(window): window for window in options.windows}
    for name, window in models.items():
        if name in {row["model"] for row in rows}:
            continue
        settings = settings_of(name, window, options, max(0.0, ends - time.monotonic()))
        found = train(corpus, options.work / f"{name}-{options.seed}", settings)
        if not found.finished:
            print(f"{name}: stopped after {found.steps} of {settings.steps()} steps", flush=True)
            return 3
        measured = options.windows if window is None else (window,)
        own = [
            {"model": name, "tokens": found.summary["tokens"], **row} for row in turn_knob(found.model, ids, measured)
        ]
        rows += own
        with file.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in own)
        print(json.dumps(own), flush=True)
    write(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
