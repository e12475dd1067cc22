"""Check the GPU kernels against the definition: `PYTHONPATH=src python3 -m tests.gpu.check` (`make test-gpu`).

    --out DIR        where checks.txt goes (default: report/gpu)
    --budget-s N     be done after so long (default 240); what did not run by then counts as failed
    --seed N         of the random inputs (default: another one each run)
    --only PATTERN   only what has this regular expression in its line, such as "^telling", "fp32 D64" or "decoding"
    --workers N      processes side by side (default: one for each core and each 3 GiB of free GPU memory, at most 16)
    --tiny           the same paths in small, on a CPU under TRITON_INTERPRET=1
    --one-pass       only launch every kernel once, in this process: a program for compute-sanitizer

Every line has a verdict, the largest error as a share of what is allowed, and the problem. A line is written as soon
as it is known. Problems run in processes side by side, so that kernels compile in parallel and a crash harms no other.
Exit status: 1 if anything failed or did not run, else 0. Skipped is what this machine lacks a tool or memory for;
refused are shapes that the kernels name as beyond their limits.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic
import triton  # pyright: ignore[reportMissingImports]

from nha.bench import grid
from tests.gpu import integration as proofs
from tests.gpu import memory
from tests.gpu.cases import Problem, check
from tests.gpu.integration import Setting

PROOFS: dict[str, Callable[[Setting], str]] = {
    "auto": proofs.automatic,
    "refusals": proofs.refusals,
    "operators": proofs.operators,
    "training": proofs.training,
    "packed": proofs.packed,
    "decoding": proofs.decoding,
    "autocast": proofs.autocast,
    "graph": proofs.graph,
    "losses": proofs.losses,
    "distilling": proofs.distilling,
    "full-decoding": proofs.full_decoding,
    "full-segments": proofs.full_segments,
    "slot-views": proofs.slot_views,
    "retuning": proofs.no_retuning,
    "many-rows": memory.many_rows,
    "long-row": memory.long_row,
    "many-keys": memory.many_keys,
    "far-apart": memory.far_apart,
    "memcheck": memory.memcheck,
    "racecheck": memory.racecheck,
}
WORKER_GIB = 3  # memory of one process: its context, its problem
LEAST = 15  # seconds that must be left to begin something
PASSED = ("pass", "skip", "refused")


@dataclass(frozen=True)
class Job:
    """What one process does in one go: problems, or proofs by name."""

    name: str
    parts: tuple[Problem | str, ...]

    def lines(self) -> list[str]:
        """What stands behind the verdict of each part."""
        return [f"{self.name}: {part}" for part in self.parts]


def jobs(tiny: bool) -> list[Job]:
    """Everything, in the order in which it is begun: what tells most, what takes longest, the rest."""
    laws = [Job(task.name, task.problems) for task in grid.tasks(tiny)]
    if tiny:
        return [*laws, *(Job("proof", (name,)) for name in PROOFS)]
    early = [Job("proof", (name,)) for name in ("training", "racecheck", "decoding", "memcheck", "retuning")]
    in_turn = ("many-rows", "long-row", "many-keys", "far-apart", "slot-views")  # for their memory
    large = [Job("proof", in_turn)]
    alone = ("auto", "packed", "operators", "autocast", "graph", "full-decoding", "full-segments", "distilling")
    others = [Job("proof", (name,)) for name in (*alone, "losses", "refusals")]
    return laws[:10] + early + laws[10:24] + large + others + laws[24:]


def run(part: Problem | str, setting: Setting) -> str:
    """The verdict on a problem or a proof."""
    of_laws = isinstance(part, Problem)
    # Memory that no kernel wrote shows as NaN.
    torch.use_deterministic_algorithms(of_laws, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = of_laws  # type: ignore[attr-defined]
    try:
        return check(part, setting.seed, setting.device) if isinstance(part, Problem) else PROOFS[part](setting)
    except Exception as failure:
        return f"ERROR {type(failure).__name__}: {' '.join(str(failure).split())[:400]}"


def timed(part: Problem | str, setting: Setting) -> tuple[str, float]:
    start = time.perf_counter()
    return run(part, setting), time.perf_counter() - start


def prepare() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def serve(connection: Connection, setting: Setting) -> None:
    """A process: receives jobs, sends (verdict, seconds) of every part and then None."""
    os.setsid()  # whatever a part starts ends with this process
    prepare()
    while (job := connection.recv()) is not None:
        for part in job.parts:
            connection.send(timed(part, setting))
            if setting.device == "cuda":
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except Exception:  # a kernel has broken this process's context
                    sys.exit(1)
        connection.send(None)


@dataclass
class Worker:
    """A process, the job it is at and how many of its parts are known."""

    process: Any
    connection: Connection
    job: Job | None = None
    known: int = 0


@dataclass
class Log:
    """Lines so far, on paper and on screen."""

    path: Path
    lines: list[str] = field(default_factory=list)

    def add(self, verdict: str, about: str, seconds: float | None = None) -> None:
        line = f"{verdict} | {about}" + ("" if seconds is None else f" | {seconds:.1f} s")
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line[:500], flush=True)

    def summary(self) -> bool:
        """Print the count of verdicts and what failed; whether all is well."""
        failed = [line for line in self.lines if not line.startswith(PASSED)]
        if failed and len(self.lines) > 1:
            print("\nNot passed:", *(line[:400] for line in failed), sep="\n")
        counts = Counter(line.split()[0].rstrip(":") for line in self.lines)
        words = [line.split() for line in self.lines if line.startswith("pass ") and " rms " in line]
        shares = [float(w[i]) for w in words for i in (1, 4) if w[1][0].isdigit()]
        largest = f"; largest error / bound {max(shares):.2f}" if shares else ""
        print("checks: " + ", ".join(f"{n} {name}" for name, n in counts.items()) + largest, flush=True)
        return bool(self.lines) and not failed


def begin(context: Any, setting: Setting) -> Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, setting), daemon=False)
    process.start()
    theirs.close()
    return Worker(process, ours)


def stop(worker: Worker) -> None:
    """End a process and whatever it has started."""
    try:
        os.killpg(worker.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        worker.process.kill()
    worker.process.join()


def side_by_side(waiting: list[Job], setting: Setting, workers: int, deadline: float, log: Log) -> None:
    """Run jobs in processes until all is done or the time is up."""
    context = multiprocessing.get_context("spawn")
    pool = [begin(context, setting) for _ in range(min(workers, len(waiting)))]

    def hand_out(worker: Worker) -> None:
        late = time.time() > deadline - LEAST
        worker.job, worker.known = (None if late or not waiting else waiting.pop(0)), 0
        worker.connection.send(worker.job)

    def lose(worker: Worker, why: str) -> None:
        if worker.job is not None:
            for about in worker.job.lines()[worker.known :]:
                log.add(f"ERROR {why}", about)

    for worker in pool:
        hand_out(worker)
    while pool and time.time() < deadline:
        ready = wait([worker.connection for worker in pool], timeout=max(deadline - time.time(), 0))
        for worker in [w for w in pool if w.connection in ready]:
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                pool.remove(worker)
                worker.process.join()
                broken = worker.job is not None and worker.known < len(worker.job.parts)
                if broken:
                    lose(worker, f"the process ended with status {worker.process.exitcode}")
                if waiting and time.time() < deadline - LEAST:
                    pool.append(begin(context, setting))
                    hand_out(pool[-1])
                continue
            if message is None:
                hand_out(worker)
            elif worker.job is not None:
                log.add(message[0], worker.job.lines()[worker.known], message[1])
                worker.known += 1
    for worker in pool:
        lose(worker, "still running when the time was up")
        stop(worker)
    for job in waiting:
        for about in job.lines():
            log.add("UNRUN no time left", about)


def chosen(everything: list[Job], only: str | None) -> Iterator[Job]:
    """The jobs, reduced to the parts whose line matches `only`."""
    for job in everything:
        named = zip(job.parts, job.lines(), strict=True)
        parts = tuple(part for part, about in named if only is None or re.search(only, about))
        if parts:
            yield Job(job.name, parts)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("report/gpu"))
    parser.add_argument("--budget-s", type=float, default=240)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("--only", metavar="PATTERN")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one-pass", action="store_true")
    options = parser.parse_args(given)
    started, cuda = time.time(), torch.cuda.is_available()
    if not cuda and not (options.tiny and triton.knobs.runtime.interpret):
        sys.exit("expected a CUDA device, or --tiny with TRITON_INTERPRET=1; found neither")
    setting = Setting("cuda" if cuda else "cpu", options.seed, options.tiny)
    if options.one_pass:
        said = memory.one_pass(setting)
        print(said, flush=True)
        return 0 if said.startswith(PASSED) else 1
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "checks.txt")
    name = torch.cuda.get_device_name() if cuda else "no GPU"
    head = f"seed {options.seed}, {name}, torch {torch.__version__}, triton {triton.__version__}"
    log.path.write_text(head + "\n")
    print(head, flush=True)
    wanted = list(chosen(jobs(options.tiny), options.only))
    if not wanted:
        sys.exit(f"expected --only to name a part of the check, got {options.only!r}")
    workers = options.workers
    if cuda and not options.tiny and not workers:
        room = int(torch.cuda.mem_get_info()[0] / (WORKER_GIB * 2**30))
        workers = max(min(os.cpu_count() or 1, 16, room), 1)
    if workers:
        os.environ |= {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        side_by_side(wanted, setting, workers, started + options.budget_s - 2, log)
    else:
        prepare()
        for job in wanted:
            for part, about in zip(job.parts, job.lines(), strict=True):
                if time.time() > started + options.budget_s:
                    log.add("UNRUN no time left", about)
                else:
                    said, seconds = timed(part, setting)
                    log.add(said, about, seconds)
    good = log.summary()
    print(f"{time.time() - started:.0f} s, lines in {log.path}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
