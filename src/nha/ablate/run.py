"""Running a table: row by row, resumable, shared by any number of processes."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import multiprocessing
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from nha.ablate.language import WINDOW, Sources, train_language
from nha.ablate.recall import Learner, RecallPlan, mean_valid, measure_learner, train_learners
from nha.ablate.record import ROWS, Data, read_row, row_file
from nha.ablate.specs import state_bytes, used_parameters
from nha.ablate.steps import Steps
from nha.ablate.table import Row, Table
from nha.distill.checkpoint import locked
from nha.errors import OutOfTime, one_line
from nha.evaluate.public.run import NEEDLE, PERPLEXITY
from nha.io import write_atomically
from nha.train.trainer import TrainingDiverged

RUNS, LOCKS, FAILURES = "runs", "locks", "failures"
ROWS_OF_A_PROCESS = 3  # at least, since a process takes seconds to start
MEASURE_SECONDS = 2.0  # of a recall model, at most what it took an H200
Log = Callable[[str], None]


@dataclass(frozen=True)
class Shard:
    """Process `index` (from 1) of `count` that share the rows of a table; each uses one of the machine's GPUs.

    >>> Shard.parse("2/4")
    Shard(index=2, count=4)
    """

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from I/N. Raises ValueError unless 1 <= I <= N."""
        first, _, last = text.partition("/")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(f"expected a shard I/N with 1 <= I <= N, got {text!r}")
        return cls(int(first), int(last))

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", (self.index - 1) % torch.cuda.device_count())

    def order(self, rows: list[Row]) -> list[Row]:
        """The rows, own ones first: whoever is done helps with what nobody has begun."""
        own, others = rows[self.index - 1 :: self.count], []
        for step in range(1, self.count):
            others += rows[(self.index - 1 + step) % self.count :: self.count]
        return own + others


@dataclass
class Progress:
    """The rows of a table by what became of them in this process."""

    made: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @classmethod
    def merged(cls, found: Sequence[Progress]) -> Progress:
        """That of several processes as one: a row that one of them has made was made by no other process.

        >>> Progress.merged([Progress(made=["a"]), Progress(present=["a"], elsewhere=["b"], late=["c"])])
        Progress(made=['a'], present=[], elsewhere=['b'], late=['c'], failed=[])
        """
        names = {
            entry.name: dict.fromkeys(n for own in found for n in getattr(own, entry.name)) for entry in fields(cls)
        }
        settled = {*names["made"], *names["late"], *(name.partition(" (")[0] for name in names["failed"])}
        for rest in ("present", "elsewhere"):
            names[rest] = dict.fromkeys(name for name in names[rest] if name not in settled)
        return cls(**{name: list(found) for name, found in names.items()})


def failure_file(out: Path, name: str) -> Path:
    """Where it is written why a row failed: one line, which other processes read, and the traceback."""
    return out / FAILURES / f"{name}.txt"


def write_failure(out: Path, name: str, why: str, details: str = "") -> None:
    """Write durably why a row has failed, in one line, with its traceback."""
    failure_file(out, name).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(failure_file(out, name), f"{why}\n\n{details}".rstrip() + "\n")


def failure_since(out: Path, name: str, since: float) -> str | None:
    """Why a row failed in this or another process, None if it has not since a time in seconds since 1970."""
    path = failure_file(out, name)
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0] if path.stat().st_mtime >= since else None
    except FileNotFoundError:  # never failed, or another process has just made the row
        return None


@contextmanager
def claimed(out: Path, name: str) -> Iterator[bool]:
    """Whether this process may make a row; no other one may meanwhile. Ends with the process, in whatever way."""
    manager = locked(out / LOCKS / name)
    try:
        manager.__enter__()
    except ValueError:
        yield False
        return
    try:
        yield True
    finally:
        manager.__exit__(None, None, None)


def run_table(
    table: Table,
    out: Path,
    *,
    shard: Shard | None = None,
    budget: float = math.inf,
    sources: Sources | None = None,
    reserve: float = 60.0,
    together: int = 1,
    best_lr_only: bool = False,
    compile_layers: bool = True,
    since: float | None = None,
    log: Log = lambda line: None,
) -> Progress:
    """Train and measure the rows that `out` does not have yet; each is written durably as soon as it is known.

    Args:
        table: what to make.
        out: the directory of the results.
        shard: this process among several that share `out`.
        budget: seconds; a row that would take longer than what is left is not made.
        sources: text, for a language table.
        reserve: seconds that measuring a language model takes.
        together: rows of recall that are trained at once.
        best_lr_only: after a model's first seed, make rows alone of the learning rate that was best so far.
        compile_layers: compile the layers of recall models on a GPU.
        since: when the run began of which this process is a part, in seconds since 1970, None for now: what has failed
            in another process since then is not tried again, and has failed here as well.
        log: gets lines about the progress.

    A row that leaves its GPU unusable for this process (an illegal memory access, say) is the last: a line of the log
    says how many are left.

    Raises:
        ValueError: a row in `out` is of other settings; nothing has run.
    """
    shard, since = shard or Shard(), time.time() if since is None else since
    started, device = time.monotonic(), shard.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    progress = Progress()
    for row in table.rows:
        read_row(row_file(out, row.name(table.name)), table.digest(row))
    ordered = shard.order(table.rows)
    rows = [row for row in ordered if not row_file(out, row.name(table.name)).exists()]
    progress.present += [row.name(table.name) for row in ordered if row not in rows]
    while ready := with_best_lr(table, rows, out) if best_lr_only else rows:
        group = ready[: together if table.kind == "recall" else 1]
        rows = [row for row in rows if row not in group]
        with ExitStack() as stack:
            free = [row for row in group if _is_free(table, row, out, since, stack, progress)]
            left = budget - (time.monotonic() - started)
            if left <= 0:
                progress.late += [row.name(table.name) for row in free]
            elif free and table.kind == "recall":
                _make_recall(table, free, out, device, left, progress, log, None if compile_layers else False)
            elif free:
                _make_language(table, free[0], out, device, left, sources, reserve, progress, log)
        try:
            _free_memory(device)
        except RuntimeError as error:
            if not progress.failed:
                raise
            why = one_line(error)[:200]
            log(f"the GPU refuses every call of this process, rows left to another run: {len(rows)} ({why})")
            break
    _look_elsewhere(out, since, progress)
    return progress


def _look_elsewhere(out: Path, since: float, progress: Progress) -> None:
    """Find out what became of the rows that were left to other processes."""
    left, progress.elsewhere = progress.elsewhere, []
    for name in left:
        if row_file(out, name).exists():
            progress.present.append(name)
        elif (why := failure_since(out, name, since)) is not None:
            progress.failed.append(f"{name} ({why})")
        else:
            progress.elsewhere.append(name)


def _free_memory(device: torch.device) -> None:
    """Free the memory of a row that failed. Raises RuntimeError where the row has left the GPU unusable."""
    if device.type == "cuda":
        gc.collect()  # a Trainer refers to itself
        torch.cuda.empty_cache()


def processes_for(table: Table, out: Path) -> int:
    """How many processes should share the rows that `out` does not have: on a CPU at most one a core, else one."""
    if torch.cuda.is_available() or table.kind != "recall":
        return 1
    missing = sum(not row_file(out, row.name(table.name)).exists() for row in table.rows)
    return max(1, min(torch.get_num_threads(), missing // ROWS_OF_A_PROCESS))


def run_in_processes(table: Table, out: Path, count: int, **options: Any) -> Progress:
    """`run_table` in `count` processes that share the rows and the threads of this one.

    Args:
        table, out: as `run_table` takes them.
        count: processes.
        options: further arguments of `run_table`, which are sent to the processes.
    """
    threads = max(1, torch.get_num_threads() // count)
    spawned = multiprocessing.get_context("spawn")  # a GPU and threads do not survive a fork
    with ProcessPoolExecutor(count, spawned, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        shards = [Shard(index, count) for index in range(1, count + 1)]
        running = [pool.submit(run_table, table, out, shard=shard, **options) for shard in shards]
        return Progress.merged([each.result() for each in running])


def best_lr(rows: Sequence[Data]) -> float:
    """The learning rate that was best on validation data, by the mean over seeds.

    Learning rates that have fewer seeds than another are left out.

    >>> best_lr([{"lr": 0.1, "valid": 0.5}, {"lr": 0.1, "valid": 0.7}, {"lr": 0.2, "valid": 0.9}])
    0.1
    """
    valid: dict[float, list[float]] = {}
    for row in rows:
        valid.setdefault(row["lr"], []).append(row["valid"])
    most = max(map(len, valid.values()))
    means = {lr: sum(values) / most for lr, values in valid.items() if len(values) == most}
    return max(means, key=means.__getitem__)


def with_best_lr(table: Table, rows: list[Row], out: Path) -> list[Row]:
    """Those of the rows that may be made now if the seeds in `out` choose the learning rate of a model's other seeds.

    All rates of the first seed come first.
    """
    found: dict[str, list[Data]] = {}
    for path in sorted((out / ROWS).glob(f"{table.name}--*.json")):
        made = read_row(path, None)
        assert made is not None
        found.setdefault(made["model"], []).append(made)
    ready = []
    for row in rows:
        made, name = found.get(row.model.name, []), row.model.name
        first = min([each["seed"] for each in made] + [min(table.seeds)])
        if any(other.model.name == name and other.seed == first for other in rows):
            wanted = row.seed == first
        else:
            others = [each for each in made if each["seed"] != row.seed]
            wanted = not others or row.lr == best_lr(others)
        if wanted:
            ready.append(row)
    return ready


def _is_free(table: Table, row: Row, out: Path, since: float, stack: ExitStack, progress: Progress) -> bool:
    """Claim a row until `stack` ends. Returns False where it is there, or another process makes it or has failed to."""
    name = row.name(table.name)
    if not stack.enter_context(claimed(out, name)) or failure_since(out, name, since) is not None:
        progress.elsewhere.append(name)
        return False
    if row_file(out, name).exists():
        progress.present.append(name)
        return False
    return True


@contextmanager
def _says_why(name: str, out: Path, progress: Progress, log: Log) -> Iterator[None]:
    """A row that fails must not take the others along, and no other process should repeat it."""
    try:
        yield
    except OutOfTime as error:
        progress.late.append(name)
        log(f"{name}: {error}")
    except (RuntimeError, MemoryError, ArithmeticError, ImportError, TrainingDiverged) as error:
        why = f"{type(error).__name__}: {one_line(error)[:200]}".removesuffix(": ")
        progress.failed.append(f"{name} ({why})")
        write_failure(out, name, why, "".join(traceback.format_exception(error)))
        log(f"{name}: failed: {why}; traceback in {failure_file(out, name)}")


def _make_recall(
    table: Table,
    rows: list[Row],
    out: Path,
    device: torch.device,
    left: float,
    progress: Progress,
    log: Log,
    compiled: bool | None = None,
) -> None:
    """Train rows of a recall table at once, and measure and write one after the other."""
    learners: dict[str, Learner] = {}
    names = [row.name(table.name) for row in rows]
    for row, name in zip(rows, names, strict=True):
        log(f"{name}: starts")
        with _says_why(name, out, progress, log):
            model: Any = row.model.build(table.recall_shape, row.seed, match=table.matched)
            steps = Steps(model.to(device), compiled=compiled)
            learners[name] = Learner(model, row.lr, steps, row.seed, row.model.random_windows)
    if not learners:
        return
    plan, begun = table.recall, list(learners)
    assert plan is not None

    def report(index: int, step: int, loss: float) -> None:
        log(f"{begun[index]}: step {step:,}, loss {loss:.3f}")

    measuring = MEASURE_SECONDS * len(learners)
    train_learners(list(learners.values()), plan, time_left=left - measuring, progress=report)
    for row, name in zip(rows, names, strict=True):
        if name in learners:
            with _says_why(name, out, progress, log):
                _write(table, row, out, device, recall_row(plan, learners[name], len(learners)), progress)
                _log_scores(name, out, log)


def _log_scores(name: str, out: Path, log: Log) -> None:
    """Log the time and the scores of a row of recall."""
    found = read_row(row_file(out, name), None)
    assert found is not None
    scores = ", ".join(f"{size['task']} {size['size']} {size['accuracy']:.2f}" for size in found["sizes"])
    log(f"{name}: {found['seconds']:.0f} s, {scores}")


def _make_language(
    table: Table,
    row: Row,
    out: Path,
    device: torch.device,
    left: float,
    sources: Sources | None,
    reserve: float,
    progress: Progress,
    log: Log,
) -> None:
    """Make a row of a language table and say what became of it. Raises ValueError without text."""
    if sources is None:
        raise ValueError("expected text for a language table, got none")
    name = row.name(table.name)
    log(f"{name}: starts")
    with _says_why(name, out, progress, log):
        found = language_row(table, row, out, sources, left, reserve, lambda line: log(f"{name}: {line}"))
        _write(table, row, out, device, found, progress)


def _write(table: Table, row: Row, out: Path, device: torch.device, found: dict[str, Any], progress: Progress) -> None:
    """Write a row durably."""
    name = row.name(table.name)
    about = {"table": table.name, "kind": table.kind, "digest": table.digest(row), "model": row.model.name}
    about |= {"settings": dataclasses.asdict(row.model), "lr": row.lr, "seed": row.seed, "device": device_name(device)}
    path = row_file(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(about | found, indent=1, default=list) + "\n")
    failure_file(out, name).unlink(missing_ok=True)
    progress.made.append(name)


def device_name(device: torch.device) -> str:
    """The device's name for results."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def recall_row(plan: RecallPlan, learner: Learner, together: int) -> dict[str, Any]:
    """Measure a model that was trained among `together`. Raises its failure."""
    outcome, model = measure_learner(learner, plan), learner.model
    sizes = [
        {
            "task": score.size.task,
            "size": score.size.label.split(" ", 1)[1],
            "state_bytes": state_bytes(model, score.size.seq_len),
            "accuracy": score.accuracy,
            "interval": list(score.interval),
            "count": score.count,
            "valid_accuracy": score.valid_accuracy,
        }
        for score in outcome.scores
    ]
    return {
        "parameters": used_parameters(model),
        "tokens": outcome.tokens,
        "steps": outcome.steps,
        "seconds": round(outcome.seconds, 1),
        "together": together,
        "loss": outcome.loss,
        "valid": mean_valid(outcome.scores),
        "sizes": sizes,
    }


def language_row(
    table: Table, row: Row, out: Path, sources: Sources, left: float, reserve: float, log: Log = lambda line: None
) -> dict[str, Any]:
    """Train and measure a row of a language table; `log` gets a line about each stage. Raises OutOfTime."""
    plan = table.language
    assert plan is not None
    visible = torch.cuda.device_count()
    if visible > 1:  # Trainer would spread each batch over all of them
        raise ValueError(f"expected one visible GPU for a language table, got {visible}: set CUDA_VISIBLE_DEVICES")
    started, run = time.monotonic(), out / RUNS / row.name(table.name)
    shape = plan.config(sources.corpus.meta["tokenizer"]["vocabulary"])
    outcome = train_language(
        lambda: row.model.build(shape, row.seed, match=table.matched),
        plan,
        sources,
        run,
        lr=row.lr,
        seed=row.seed,
        own=row.model.train,
        windows=row.model.readable(plan.knob),
        has_cache=row.model.has_cache,
        time_left=left,
        reserve=reserve,
        log=log,
    )
    shutil.rmtree(run, ignore_errors=True)  # checkpoints; the results are what a table keeps
    model = row.model.build(shape, row.seed, match=table.matched)
    found = outcome.measures
    sizes = [
        {"task": "perplexity", "size": length, "state_bytes": state_bytes(model, int(length))} | values
        for length, values in found[PERPLEXITY].items()
    ]
    context = plan.settings(row.lr, row.seed).seq_len
    of_context = state_bytes(model, context)
    sizes += [
        {"task": name, "size": str(context), "state_bytes": of_context} | values
        for name, values in found["sets"].items()
    ]
    sizes += [
        {"task": NEEDLE, "size": length, "state_bytes": state_bytes(model, int(length))} | values
        for length, values in found[NEEDLE].items()
    ]
    sizes += [
        {"task": WINDOW, "size": str(entry.pop("window")), "state_bytes": entry.pop("cache_bytes")}
        | {"ppl": entry.pop("perplexity"), **entry}
        for entry in outcome.knob
    ]
    return {
        "parameters": used_parameters(model),
        "tokens": outcome.summary["tokens"],
        "steps": outcome.summary["steps"],
        "seconds": round(time.monotonic() - started, 1),
        "tokens_per_s": outcome.summary.get("tokens_per_s"),
        "loss": outcome.summary.get("eval_loss", outcome.summary.get("loss")),
        "valid": -outcome.summary.get("eval_loss", math.inf),
        "notes": found["notes"],
        "sizes": sizes,
    }
