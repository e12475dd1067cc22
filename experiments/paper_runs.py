"""Estimate the paper's runs from the measured utilisation of one or more GPUs, as the table of docs/training.md.

    python experiments/paper_runs.py --speed results/from_scratch/train_speed.jsonl

Settings are those of `examples/settings`; the utilisation is that of the row `nha` of this size, or of 340M, at the
paper's context under DDP, on as many GPUs as `experiments/train_speed.py` was run on. Nothing is assumed to be lost
between more of them, so that the time is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from nha.models.nha import NHAForCausalLM
from nha.settings import read_settings
from nha.train.estimate import Estimate, estimate
from nha.train.presets import model_config
from nha.train.settings import TrainSettings

ROOT = Path(__file__).parent.parent
RUNS = (("340m-15b.yaml", 8), ("1.3b-100b.yaml", 8), ("1.3b-100b.yaml", 32))  # settings and numbers of GPUs
MEASURED = "340m"  # stands for sizes that were not
VOCABULARY = 49152  # SmolLM2's


def measured_speed(path: Path, preset: str = MEASURED, seq_len: int = 2048) -> dict[str, Any]:
    """The last row of NHA of a size, or of 340M, at a length on the most GPUs. Raises ValueError if there is none."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = ("nha", seq_len, "ddp")
    found = [row for row in rows if (row["case"], row["seq_len"], row["parallel"]) == wanted and row["mfu"]]
    of_size = [row for row in found if row["preset"] == preset] or [row for row in found if row["preset"] == MEASURED]
    if not of_size:
        raise ValueError(f"expected a row of nha at {seq_len} tokens under DDP in {path}, got none")
    most = max(row["gpus"] for row in of_size)
    return [row for row in of_size if row["gpus"] == most][-1]


def run_settings(name: str) -> TrainSettings:
    """The settings of a file in `examples/settings`."""
    return TrainSettings(**read_settings(TrainSettings, ROOT / "examples" / "settings" / name))


def estimate_run(settings: TrainSettings, gpus: int, utilisation: float) -> Estimate:
    """The estimate of a run on H100s."""
    with torch.device("meta"):
        model = NHAForCausalLM(model_config(settings, VOCABULARY))
    return estimate(model, settings, world=gpus, device="H100", utilisation=utilisation)


def table(path: Path) -> str:
    """The table in Markdown, from the rows in a file of JSON lines."""
    lines = [
        "| settings | parameters | tokens | GPUs | of the peak, measured with | tokens/s each | memory each | time |",
        "|---" * 8 + "|",
    ]
    for name, gpus in RUNS:
        settings = run_settings(name)
        speed = measured_speed(path, settings.preset)
        found = estimate_run(settings, gpus, speed["mfu"])
        assert found.seconds is not None
        each = found.tokens / found.seconds / gpus
        lines.append(
            f"| `{name}` | {found.parameters / 1e6:,.0f} M | {found.tokens / 1e9:.0f} B | {gpus} | "
            f"{100 * speed['mfu']:.0f} %, {speed['preset']} on {speed['gpus']} | {each:,.0f} | "
            f"about {found.total_bytes / 1e9:.0f} GB | {found.seconds / 3600:.1f} hours |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=Path, default=ROOT / "results" / "from_scratch" / "train_speed.jsonl")
    print(table(parser.parse_args(arguments).speed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
