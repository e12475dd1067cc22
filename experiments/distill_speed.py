"""Time `nha distill` as a user starts it: from the command to its first step, its compiling, and its tokens a second.

    python -m experiments.distill_speed --model MODEL --text TEXT --output DIR --budget-s 110

Two commands run one after the other, each a process of its own: "cold" with text to read and empty caches of compiled
kernels, "warm" with the tokens and caches that it left. Their seconds are those of RUN/timeline.json and their tokens a
second those of RUN/log.jsonl, batches and log included; a CUDA graph is captured before the third step. A command is
stopped once it has logged its steps, so that saving takes no time. A row a command is added to OUT/distill_speed.jsonl,
also for one that was stopped or failed earlier, with its stages until then and the status it ended with; what it
printed lies beside it. MODEL is a directory, a Hub id, smollm2, or a .gguf file, which is saved as a directory first.
Other options are handed to `nha distill`. Exit status 1 if a command did not make its steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nha.bench.timing import stamp
from nha.distill.timeline import BEGUN, NAME, process_start
from nha.io import append_line

STEP_TOKENS = 16 * 2048
STEPS = {"cold": 25, "warm": 100}
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
MIN_SECONDS = 15.0  # a command is not started with less
SKIPPED = 2  # entries of the log at its beginning that are no steady speed
POLL_SECONDS = 0.2


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


def read_log(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log, none where it has none yet."""
    log = run / "log.jsonl"
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def summarise(run: Path) -> dict[str, Any]:
    """The row of a run: seconds from the command to each stage, those between, and the median of its tokens a second.

    None for what the run did not reach.
    """
    stages = json.loads((run / NAME).read_text()) if (run / NAME).exists() else {}
    log = read_log(run)
    speeds = [entry["tokens_per_s"] for entry in log if "tokens_per_s" in entry][SKIPPED:]
    return {
        "first_step_s": stages.get("first step"),
        "align_s": round(stages["aligned"] - stages["converted"], 2) if "aligned" in stages else None,
        "compile_s": round(stages[BEGUN] - stages["aligned"], 2) if BEGUN in stages else None,
        "tokens_per_s": round(statistics.median(speeds)) if speeds else None,
        "steps": int(log[-1]["step"]) if log else 0,
        "stages": stages,
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a command and the processes that compile for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_command(name: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The row of one of the two commands, run until it has logged its steps; what it prints goes to OUT/NAME.txt."""
    steps, run = options.steps or STEPS[name], work / name
    command = [sys.executable, "-m", "nha", "distill", str(options.model), str(run), "--text", str(work / "text.jsonl")]
    command += ["--corpus", str(work / "corpus"), "--tokens", str(steps * options.step_tokens), "--log-every", "5"]
    environment = os.environ | {variable: str(work / variable) for variable in CACHES}
    with (options.output / f"{name}.txt").open("w") as printed:
        process = subprocess.Popen(
            [*command, *options.more],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None and options.left() > 0 and not done(run, steps):
                time.sleep(POLL_SECONDS)
            status = process.poll()
        finally:
            stop(process)
    return summarise(run) | {"wanted_steps": steps, "status": status}


def done(run: Path, steps: int) -> bool:
    """Whether a run has logged so many steps."""
    log = read_log(run)
    return bool(log) and log[-1]["step"] >= steps


def main(arguments: list[str] | None = None) -> int:
    """Run both commands and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=12, help="of the text that are read")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=110)
    parser.add_argument("--work", type=Path, help="where text, runs and caches are kept; default: a temporary folder")
    parser.add_argument("--steps", type=int, help="of each command")
    parser.add_argument("--commands", nargs="+", default=list(STEPS), choices=list(STEPS), help="which to run")
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS)
    options, options.more = parser.parse_known_args(arguments)
    start = time.time()
    if arguments is None:  # a process of its own: its imports count, and what it started ends with it
        start = process_start()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.left = lambda: start + options.budget_s - time.time()
    options.output.mkdir(parents=True, exist_ok=True)
    made = []
    temporary = tempfile.TemporaryDirectory(prefix="distill-speed-")
    with temporary if options.work is None else nullcontext(options.work) as folder:
        work = Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "text.jsonl").exists():
            cut_text(options.text, work / "text.jsonl", options.megabytes)
        if str(options.model).endswith(".gguf"):
            if not (work / "base").exists():
                save_gguf(Path(options.model), work / "base")
            options.model = work / "base"
        about = stamp("torch", "transformers", "triton", "nha")
        for name in options.commands:
            if options.left() < MIN_SECONDS:
                print(f"{name} not run: {options.left():.0f} s are left")
                return 1
            row = {"run": name, **run_command(name, options, work), **about}
            append_line(options.output / "distill_speed.jsonl", json.dumps(row))
            print(describe(row, options.output / f"{name}.txt"), flush=True)
            made.append(row["steps"] >= row["wanted_steps"])
    return 0 if all(made) else 1


def describe(row: dict[str, Any], printed: Path) -> str:
    """A row as a line.

    >>> describe({"run": "cold", "steps": 0, "wanted_steps": 25, "status": -11, "stages": {}}, Path("cold.txt"))
    'cold: 0 of 25 steps, ended with status -11, see cold.txt; {}'
    >>> row = {"run": "warm", "steps": 2, "wanted_steps": 2, "first_step_s": 40.0, "align_s": 9.0, "compile_s": None}
    >>> describe(row | {"tokens_per_s": None, "stages": {}}, Path("warm.txt"))
    'warm: first step after 40.0 s, aligned in 9.0 s, too few steps for a speed; {}'
    """
    if row["steps"] < row["wanted_steps"]:
        ended = "" if row["status"] is None else f", ended with status {row['status']}"
        return f"{row['run']}: {row['steps']} of {row['wanted_steps']} steps{ended}, see {printed}; {row['stages']}"
    parts = (("first step after", "first_step_s"), ("aligned in", "align_s"), ("compiled in", "compile_s"))
    times = ", ".join(f"{word} {row[name]:.1f} s" for word, name in parts if row[name] is not None)
    speed = f"{row['tokens_per_s']:,} tokens/s" if row["tokens_per_s"] else "too few steps for a speed"
    return f"{row['run']}: {times}, {speed}; {row['stages']}"


if __name__ == "__main__":
    sys.exit(main())
