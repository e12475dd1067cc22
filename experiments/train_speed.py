"""Time training of the paper's 340M model beside the same model with full attention.

    python experiments/train_speed.py --output results/from_scratch

Both train in the same loop, on random tokens, with compiled layers. `full-cudnn` and `full-flash` name the kernel of
full attention. `learn` is no timing: the first hundred steps on real text (the Python reference, as bytes). Rows go to
OUT/train_speed.csv and .jsonl at once; a case that is there already is not run again. On several GPUs:
`torchrun --nproc-per-node 2 experiments/train_speed.py`. There a case that fails is the last, since one process may
wait for another: name the rest by --only. --report prints the rows of OUT as the table of docs/training.md.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nha.bench.timing import stamp
from nha.data.text import calibration_text
from nha.distill.trainer import Reports
from nha.io import append_line, atomic_write
from nha.models.nha import NHAForCausalLM
from nha.train.estimate import estimate
from nha.train.presets import model_config
from nha.train.run import TrainResult, train
from nha.train.settings import TrainSettings

VOCABULARY = 32000
STEP_TOKENS = 1 << 15  # on each GPU
BACKENDS = {"full-cudnn": SDPBackend.CUDNN_ATTENTION, "full-flash": SDPBackend.FLASH_ATTENTION}
FULL_LAYERS = (5, 11, 17, 23)
NAMES = {"nha": "NHA", "full-cudnn": "full attention, cuDNN", "full-flash": "full attention, FlashAttention"}
NAMES |= {"nha-4-full": "NHA, 4 of 24 layers full", "nha-muon": "NHA, Muon"}


@dataclass(frozen=True)
class Case:
    """One model at one length."""

    name: str
    seq_len: int

    def __str__(self) -> str:
        return f"{self.name}-{self.seq_len}"


class RandomTokens:
    """Sequences of random tokens."""

    vocab_size = VOCABULARY

    def __init__(self, seq_len: int):
        self.seq_len, self.identity = seq_len, f"random {seq_len}"

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.random.default_rng([5, index]).integers(0, self.vocab_size, self.seq_len + 1)
        return ids[:-1], ids[1:]


class TextBytes:
    """Sequences of bytes from places of the Python reference that the index draws."""

    vocab_size = VOCABULARY

    def __init__(self, seq_len: int):
        self.seq_len, self.identity = seq_len, f"bytes {seq_len}"
        self.bytes = np.frombuffer(calibration_text().encode(), np.uint8).astype(np.int64)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = int(np.random.default_rng([7, index]).integers(len(self.bytes) - self.seq_len))
        ids = self.bytes[start : start + self.seq_len + 1]
        return ids[:-1], ids[1:]


def cases(tiny: bool) -> list[Case]:
    """The most important first."""
    near, middle, far = (2048, 8192, 32768) if not tiny else (32, 64, 96)
    pairs = [(near, "nha"), (near, "full-cudnn"), (near, "learn"), (middle, "nha"), (middle, "full-cudnn")]
    pairs += [(far, "nha"), (far, "full-cudnn"), (near, "full-flash"), (near, "nha-4-full"), (near, "nha-muon")]
    return [Case(name, length) for length, name in [*pairs, (far, "nha-4-full")]]


def settings_of(case: Case, options: argparse.Namespace, world: int) -> TrainSettings:
    """The settings of a case: the same tokens in a step at every length."""
    size = max(1, options.step_tokens // case.seq_len)
    steps = 100 if case.name == "learn" else options.steps
    changes: dict[str, Any] = {"window_size": 16} if options.tiny else {}
    if case.name == "nha-4-full":
        changes["full_layers"] = (1,) if options.tiny else FULL_LAYERS
    if case.name in BACKENDS:
        changes["window_size"] = -1
    if case.name == "nha-muon":
        changes["optimizer"] = "muon"
    return TrainSettings(
        preset=options.preset,
        qk_norm=False,  # as in the paper
        tokens=steps * size * world * case.seq_len,
        batch_size=size * world,
        seq_len=case.seq_len,
        parallel=options.parallel,
        compile=options.compile,
        lr=1e-3 if case.name == "learn" else 1e-4,
        warmup_fraction=0.1,
        save_every=0,
        log_every=5,
        **changes,
    )


def made_on_device(settings: TrainSettings) -> NHAForCausalLM:
    """A model whose weights are drawn where it trains: on a CPU 1.4 billion take longer than the timed steps."""
    place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    with torch.device(place):
        return NHAForCausalLM(model_config(settings, VOCABULARY))


def run_case(case: Case, options: argparse.Namespace, world: int) -> dict[str, Any]:
    """A row of the table."""
    settings = settings_of(case, options, world)
    data: Any = RandomTokens(case.seq_len)
    if case.name == "learn":
        data = TextBytes(case.seq_len)
    backend = BACKENDS.get(case.name)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    kernel = sdpa_kernel(backend) if backend is not None and torch.cuda.is_available() else nullcontext()
    with tempfile.TemporaryDirectory() as folder, kernel:
        shared = Path(tempfile.gettempdir()) / f"nha-train-speed-{os.getppid()}-{case}"  # torchrun's process id
        begun = time.monotonic()

        def log(entry: dict[str, Any]) -> None:
            print(f"{case}: {time.monotonic() - begun:.0f} s, step {entry.get('step')}", flush=True)

        run = Path(folder) / "run" if world == 1 else shared
        make = None if case.name == "learn" else lambda: made_on_device(settings)
        found = train(data, run, settings, make_model=make, reports=Reports(log=log))
    return describe(case, settings, found, world)


def describe(case: Case, settings: TrainSettings, found: TrainResult, world: int) -> dict[str, Any]:
    """A row of the table. Raises InterruptedError for a run that a signal stopped."""
    if not found.finished:
        raise InterruptedError(f"expected {case} to finish, stopped by {found.stopped_by} after {found.steps} steps")
    with torch.device("meta"):
        model = NHAForCausalLM(model_config(settings, VOCABULARY))
    expected = estimate(model, settings, world=world)
    losses = [entry["loss"] for entry in found.log if "loss" in entry]
    return {
        "case": case.name,
        "preset": settings.preset,
        "seq_len": case.seq_len,
        "micro_batch": settings.micro_batch(world)[0],
        "gpus": world,
        "parallel": settings.parallel,
        "tokens_per_s": round(found.summary["tokens_per_s"]),
        "mfu": found.summary.get("mfu"),
        "peak_gib": round(found.summary["peak_memory_bytes"] / 2**30, 2),
        "estimated_gib": round(expected.total_bytes / 2**30, 2),
        "steps": found.steps,
        "first_loss": round(losses[0], 3),
        "last_loss": round(losses[-1], 3),
        "seconds": round(found.summary["seconds"], 1),
        **stamp("torch", "transformers", "triton", "nha"),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that are there already."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def add_row(out: Path, row: dict[str, Any]) -> None:
    """Append a row to the JSON lines, and write all of them as CSV."""
    append_line(out / "train_speed.jsonl", json.dumps(row))
    with atomic_write(out / "train_speed.csv") as work, work.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(read_rows(out / "train_speed.jsonl"))


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """The settings that tell the case of a row from all others."""
    return row["preset"], row["case"], row["seq_len"], row["gpus"], row["parallel"]


def table(rows: list[dict[str, Any]]) -> str:
    """The timed rows in Markdown, by GPUs and length.

    Beside each is its speed over full attention through cuDNN and, where there are rows of several GPUs, over one.
    """

    def setting(row: dict[str, Any]) -> tuple[int, bool, int, str]:
        return row["gpus"], row["preset"] != "340m", row["seq_len"], row["parallel"]

    timed = sorted((row for row in rows if row["case"] != "learn"), key=setting)
    speeds = {identity(row): row["tokens_per_s"] for row in timed}

    def over(row: dict[str, Any], **changes: Any) -> str:
        other = speeds.get(identity(row | changes))
        return f"{row['tokens_per_s'] / other:.2f}" if other else ""

    found = []
    for row in timed:
        several = row["gpus"] > 1
        cells = {
            "GPUs": f"{row['gpus']}, {row['parallel'].upper()}" if several else "1",
            "context": f"{row['seq_len']:,}",
            "model": NAMES[row["case"]] + ("" if row["preset"] == "340m" else f", {row['preset']}"),
            "tokens/s": f"{row['tokens_per_s']:,}",
            "over full attention": over(row, case="full-cudnn"),
            "over one GPU": over(row, gpus=1, parallel="ddp") if several else "",
            "of the peak": f"{100 * row['mfu']:.0f} %" if row["mfu"] else "",
            "memory of each": f"{row['peak_gib']:.1f} GiB",
        }
        found.append(cells)
    names = [name for name in found[0] if any(cells[name] for cells in found)]
    lines = [names, *([cells[name] for name in names] for cells in found)]
    shown = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([shown[0], "|---" * len(names) + "|", *shown[1:]]) + "\n"


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "results/from_scratch")))
    parser.add_argument("--preset", default="340m")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS, help="tokens of a step on each GPU")
    parser.add_argument("--budget-s", type=float, default=540.0)
    parser.add_argument("--case-s", type=float, default=60.0, help="seconds that must be left for a case to start")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds after which a case ends the process")
    parser.add_argument("--only", default="", help="names of cases, separated by commas")
    parser.add_argument("--parallel", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--compile", default="auto", choices=["auto", "layers", "nothing"])
    parser.add_argument("--tiny", action="store_true", help="short sequences of the preset tiny, for a CPU")
    parser.add_argument("--report", action="store_true", help="print the rows as a table, and stop")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.preset, options.step_tokens = "tiny", 192
    options.ends = time.monotonic() + options.budget_s
    return options


def is_late(options: argparse.Namespace) -> bool:
    """Whether too little time is left for a case: where several processes run, to any of them."""
    left = torch.tensor(options.ends - time.monotonic())
    if torch.distributed.is_initialized():
        left = left.to("cuda" if torch.cuda.is_available() else "cpu")
        torch.distributed.all_reduce(left, torch.distributed.ReduceOp.MIN)
    return left.item() < options.case_s


def main(arguments: list[str] | None = None) -> int:
    """Run the cases that are not there yet. Returns 0, 1 for a failure or 3 where time was short."""
    options = parse_options(arguments)
    if options.report:
        print(table(read_rows(options.output / "train_speed.jsonl")))
        return 0
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    options.output.mkdir(parents=True, exist_ok=True)
    there = {identity(row) for row in read_rows(options.output / "train_speed.jsonl")}
    status = 0
    for case in cases(options.tiny):
        named = not options.only or case.name in options.only.split(",") or str(case) in options.only.split(",")
        if not named or (options.preset, case.name, case.seq_len, world, options.parallel) in there:
            continue
        if is_late(options):
            print(f"{case}: no time left", flush=True)
            status = status or 3
            continue
        faulthandler.dump_traceback_later(options.limit_s, exit=True)  # also where a process waits for another in C
        try:
            row = run_case(case, options, world)
            if rank == 0:
                add_row(options.output, row)
                print(json.dumps(row), flush=True)
        except Exception:
            traceback.print_exc()
            status = 1
            if world > 1:
                break
        finally:
            faulthandler.cancel_dump_traceback_later()
        torch._dynamo.reset()
        gc.collect()  # a Trainer refers to itself
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return status


if __name__ == "__main__":
    sys.exit(main())
