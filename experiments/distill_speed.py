"""Time `nha distill` as a user starts it: from the command to its first step, its compiling, and its tokens a second.

    python -m experiments.distill_speed --model MODEL --text TEXT --out DIR --budget-s 110

Two commands run one after the other, each a process of its own: "cold" with text to read and empty caches of compiled
kernels, "warm" with the tokens and caches that it left. Their seconds are those of RUN/timeline.json and their tokens a
second those of RUN/log.jsonl, batches and log included; a CUDA graph is captured before the third step. A row a command
is added to OUT/distill_speed.jsonl, with what it printed beside it. MODEL is a directory, a Hub id, smollm2, or a .gguf
file, which is saved as a directory first. Other options are handed to `nha distill`. Exit status 1 if a command failed
or was not run for lack of time.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nha.bench.timing import stamp
from nha.distill.timeline import BEGUN, NAME

STEP_TOKENS = 16 * 2048
STEPS = {"cold": 120, "warm": 40}
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
SECONDS = {"cold": 60.0, "warm": 35.0}  # that a command takes at least; it is not started with less
SKIPPED = 2  # entries of the log at its beginning that are no steady speed


def save_gguf(path: Path, folder: Path) -> None:
    """A checkpoint in a GGUF file as a directory of a model in bfloat16 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nha.models.smollm2 import forget_gguf

    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    forget_gguf(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def cut_text(source: Path, target: Path, megabytes: float) -> None:
    """The first documents of a file of JSON lines, plain or .xz, that have so many bytes together."""
    left = megabytes * 1e6
    with (lzma.open if source.suffix == ".xz" else open)(source, "rt") as lines, target.open("w") as out:
        for line in lines:
            out.write(str(line))
            left -= len(line)
            if left <= 0:
                return


def summarise(run: Path, wall_s: float) -> dict[str, Any]:
    """The row of a run: seconds from the command to each stage, those between, and the median of its tokens a second.

    Raises OSError where the run did not come as far as its third step.
    """
    stages = json.loads((run / NAME).read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    speeds = [entry["tokens_per_s"] for entry in log if "tokens_per_s" in entry][SKIPPED:]
    return {
        "first_step_s": stages["first step"],
        "compile_s": round(stages[BEGUN] - stages["aligned"], 2),
        "tokens_per_s": round(statistics.median(speeds)) if speeds else None,
        "wall_s": round(wall_s, 1),
        "stages": stages,
    }


def run_command(name: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run one of the two commands and return its row; what it prints goes to OUT/NAME.txt."""
    steps, run = options.steps or STEPS[name], work / name
    command = [sys.executable, "-m", "nha", "distill", str(options.model), str(run), "--text", str(work / "text.jsonl")]
    command += ["--corpus", str(work / "corpus"), "--tokens", str(steps * options.step_tokens), "--log-every", "5"]
    environment = os.environ | {variable: str(work / variable) for variable in CACHES}
    start = time.perf_counter()
    with (options.out / f"{name}.txt").open("w") as printed:
        done = subprocess.run(
            [*command, *options.more], stdout=printed, stderr=subprocess.STDOUT, env=environment, timeout=options.left()
        )
    if done.returncode:
        raise RuntimeError(f"expected {name} to finish, got exit status {done.returncode}: see {printed.name}")
    return summarise(run, time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    """Run both commands and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=12, help="of the text that are read")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=110)
    parser.add_argument("--steps", type=int, help="of each command")
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS)
    options, options.more = parser.parse_known_args(arguments)
    deadline = time.monotonic() + options.budget_s
    options.left = lambda: max(1.0, deadline - time.monotonic())
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="distill-speed-") as folder:
        work = Path(folder)
        cut_text(options.text, work / "text.jsonl", options.megabytes)
        if str(options.model).endswith(".gguf"):
            save_gguf(Path(options.model), work / "base")
            options.model = work / "base"
        about = stamp("torch", "transformers", "triton", "nha")
        for name in STEPS:
            if options.left() < SECONDS[name] and options.steps is None:
                print(f"{name} not run: {options.left():.0f} s are left, it takes {SECONDS[name]:.0f}")
                return 1
            try:
                row = {"run": name, **run_command(name, options, work), **about}
            except (RuntimeError, OSError, KeyError, subprocess.TimeoutExpired) as error:
                print(error)
                return 1
            with (options.out / "distill_speed.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{name}: first step after {row['first_step_s']:.1f} s, compiled in {row['compile_s']:.1f} s, ", end=""
            )
            print(f"{row['tokens_per_s']:,} tokens/s; {row['stages']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
