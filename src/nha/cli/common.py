"""Shared by all commands: errors in one line, exit codes, progress, JSON, and the checks of options."""

from __future__ import annotations

import functools
import inspect
import io
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Protocol, Self

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nha.errors import BadInput, line_of, one_line
from nha.io import check_writable

OK, FAILED_CHECK, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
DTYPES = ("auto", "float32", "bfloat16", "float16")
SILENT_SECONDS = 10.0  # between two lines of one task where there is no terminal

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_settings = {"traceback": False}

# Their message says what is wrong with the input; any other type is named in front of its message.
_INPUT_ERRORS = (BadInput, ValueError, TypeError, OSError, NotImplementedError, ImportError)
_INPUT_ERROR_PACKAGES = ("safetensors", "safetensors_rust", "huggingface_hub")


def show_tracebacks(on: bool) -> None:
    """Let errors through with their traceback instead of one line (the `--traceback` option)."""
    _settings["traceback"] = on


def fail(message: object, code: int = BAD_INPUT) -> NoReturn:
    """Print one line to stderr and leave with `code`."""
    err.print(f"[bold red]error:[/] {escape(printable(one_line(message)))}", soft_wrap=True)
    raise typer.Exit(code)


def printable(text: str) -> str:
    """Text without what a terminal cannot show: lone surrogates and control characters become escapes.

    >>> printable("a\\ud800b\\x1b[0m")
    'a\\\\ud800b\\\\x1b[0m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def error_line(error: BaseException) -> str:
    """An exception as one line: its message, after its type where the type is not one that speaks of input.

    >>> error_line(ValueError("expected 3\\n got 4")), error_line(KeyError("layers"))
    ('expected 3 got 4', "unexpected KeyError: 'layers' (nha --traceback shows where)")
    """
    message = one_line(error)
    known = isinstance(error, _INPUT_ERRORS) or type(error).__module__.split(".")[0] in _INPUT_ERROR_PACKAGES
    if known and message:
        return message
    return f"unexpected {type(error).__name__}{': ' if message else ''}{message} (nha --traceback shows where)"


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn every error of a command into one line on stderr and exit code 2; `--traceback` lets them through."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        if _settings["traceback"]:
            function(*args, **kwargs)
            return
        try:
            function(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            fail(error_line(error))

    run.__doc__ = unwrapped(inspect.getdoc(function) or "")  # the help: a terminal wraps its lines itself
    return run


def unwrapped(text: str) -> str:
    """Text whose paragraphs are a line each.

    >>> unwrapped("Train a\\nmodel.\\n\\nRun it\\nagain.")
    'Train a model.\\n\\nRun it again.'
    """
    return "\n\n".join(one_line(paragraph) for paragraph in text.split("\n\n"))


def print_json(value: Any) -> None:
    """Write one JSON document to stdout, numbers as they are, NaN and infinities as null."""
    from nha.report.results import to_json

    sys.stdout.write(to_json(value))
    sys.stdout.flush()


def parse_gpus(text: str | None) -> tuple[str | None, int]:
    """A GPU's name and how many there are. Raises BadInput for no number.

    >>> parse_gpus("H100:8"), parse_gpus("A100"), parse_gpus(None)
    (('H100', 8), ('A100', 1), (None, 1))
    """
    if text is None:
        return None, 1
    name, _, count = text.partition(":")
    if count and not (count.isascii() and count.isdigit() and int(count)):
        raise BadInput(f"expected --gpu as NAME or NAME:COUNT, got {text!r}")
    return name, int(count or 1)


def parse_ints(text: str, what: str) -> list[int]:
    """Integers separated by commas.

    >>> parse_ints("64, 128,-1", "--window")
    [64, 128, -1]
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadInput(f"expected {what} to be integers separated by commas, got {text!r}") from None


def parse_windows(text: str) -> int | list[int]:
    """One window for all layers, or a list with one per layer; -1 is full attention.

    >>> parse_windows("64"), parse_windows("64,-1")
    (64, [64, -1])
    """
    windows = parse_ints(text, "--window")
    if not windows:
        raise BadInput(f"expected --window to be an integer or a list of them, got {text!r}")
    wrong = [w for w in windows if w < -1]
    if wrong:
        raise BadInput(f"expected windows of -1 (full attention), 0 or more, got {wrong[0]}")
    return windows if "," in text else windows[0]


def check_layers(indices: list[int], layers: int) -> None:
    """Raise BadInput unless every index names a layer."""
    for index in indices:
        if not 0 <= index < layers:
            raise BadInput(f"expected --full-layers between 0 and {layers - 1}, got {index}")


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Raise BadInput for an option below its smallest meaningful value, and for NaN and infinity."""
    check_range(name, value, at_least=minimum)


def check_range(
    name: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise BadInput unless an option is finite and within its bounds.

    >>> check_range("--top-p", 0.9, above=0, at_most=1)
    >>> check_range("--top-p", float("nan"), above=0, at_most=1)
    Traceback (most recent call last):
    nha.errors.BadInput: expected --top-p above 0 and at most 1, got nan
    """
    bounds = {"of at least": at_least, "above": above, "at most": at_most, "below": below}
    wanted = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
    inside = (
        math.isfinite(value)
        and (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )
    if not inside:
        raise BadInput(f"expected {name} {wanted or 'to be finite'}, got {value}")


def check_seed(seed: int) -> None:
    """Raise BadInput for a seed that not every generator takes."""
    if not 0 <= seed < 2**32:
        raise BadInput(f"expected --seed from 0 to {2**32 - 1}, got {seed}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise BadInput for an option that is none of its choices.

    >>> check_choice("--dtype", "int8", ("float32", "bfloat16"))
    Traceback (most recent call last):
    nha.errors.BadInput: expected --dtype to be float32 or bfloat16, got 'int8'
    """
    if value not in choices:
        *most, last = choices
        raise BadInput(f"expected {name} to be {', '.join(most)}{' or ' if most else ''}{last}, got {value!r}")


def check_new_directory(path: Path, *, replaceable: Callable[[Path], bool] | None = None) -> None:
    """Raise BadInput unless `path` is absent, an empty directory, or a directory that `replaceable` accepts.

    Raises OSError where nothing can be written beside it: a new directory is made there under another name.
    """
    if path.exists() and not path.is_dir():
        raise BadInput(f"expected {path} to be a new directory, it is a file")
    if path.exists() and any(path.iterdir()) and not (replaceable and replaceable(path)):
        raise BadInput(f"expected {path} to be new or empty, it already holds files")
    check_writable(path.resolve().parent)


class ProgressDisplay(Protocol):
    """The part of `rich.progress.Progress` that commands use; `LineProgress` has it too."""

    @property
    def console(self) -> Console: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None: ...
    def add_task(self, description: str, *, total: float | None = 100.0) -> Any: ...
    def update(
        self,
        task_id: Any,
        *,
        total: float | None = None,
        completed: float | None = None,
        description: str | None = None,
    ) -> None: ...


class LineProgress:
    """Progress as lines, for output that is no terminal: one when a task begins and, if it is a long one, every ten
    seconds and when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.tasks: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        pass

    def add_task(self, description: str, *, total: float | None = 100.0) -> int:
        """Print that a task begins; the value names it for `update`."""
        now = time.perf_counter()
        self.tasks.append({"text": description, "total": total, "done": 0.0, "begun": now, "said": now, "ended": False})
        self._print(description)
        return len(self.tasks) - 1

    def update(
        self,
        task_id: int,
        *,
        total: float | None = None,
        completed: float | None = None,
        description: str | None = None,
    ) -> None:
        """Move a task on; prints a line only if the last one is old or the task has just ended."""
        task = self.tasks[task_id]
        task["total"] = task["total"] if total is None else total
        task["done"] = task["done"] if completed is None else completed
        task["text"] = task["text"] if description is None else description
        now = time.perf_counter()
        spent, total, done = now - task["begun"], task["total"], task["done"]
        if total is not None and done >= total:
            if not task["ended"]:
                task["ended"] = True
                if spent >= SILENT_SECONDS:
                    self._print(f"{task['text']}: done in {duration(spent)}")
            return
        task["ended"] = False
        if now - task["said"] >= SILENT_SECONDS:
            task["said"] = now
            of = "" if total is None else f" of {total:,.0f}"
            left = f", about {duration(spent / done * (total - done))} left" if total and done else ""
            self._print(f"{task['text']}: {done:,.0f}{of}{left}")

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as a reader says them.

    >>> duration(0.42), duration(42.4), duration(200), duration(7500)
    ('0.4 s', '42 s', '3 min 20 s', '2 h 5 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def progress_bar() -> ProgressDisplay:
    """A progress display on stderr, so that stdout stays free for the result: bars on a terminal, lines elsewhere.

    Descriptions are rich markup: pass paths and names through `escape`.
    """
    if not err.is_terminal:
        return LineProgress(err)
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24, complete_style="cyan", finished_style="green"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
    )


@contextmanager
def steps(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of one task; the value moves it by (done, total). `what` is plain text."""
    with progress_bar() as bar:
        task = bar.add_task(escape(what), total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


@contextmanager
def status(what: str) -> Iterator[None]:
    """A spinner on a terminal, one line elsewhere, while something of unknown length runs. `what` is plain text."""
    if err.is_terminal:
        with err.status(escape(what)):
            yield
    else:
        err.print(escape(what), soft_wrap=True)
        yield


def read_text(path: Path) -> str:
    """A text file's contents. Raises BadInput for one that is absent, empty or not UTF-8."""
    if not path.is_file():
        got = "a directory is" if path.is_dir() else "there is none"
        raise BadInput(f"expected a text file, {got} at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"expected UTF-8 text in line {line_of(error)} of {path}, got {error.reason}") from None
    if not text.strip():
        raise BadInput(f"expected some text, {path} is empty")
    return text


def stdin() -> IO[str]:
    """The standard input in UTF-8; other bytes arrive as lone surrogates, which `check_text` names."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def human_bytes(count: float) -> str:
    """Bytes in the unit a reader expects.

    >>> human_bytes(512), human_bytes(3_400_000), human_bytes(1_510_000_000)
    ('512 B', '3.4 MB', '1.5 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count:.0f} B"


def rank() -> int:
    """The number of this process under torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes under torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
