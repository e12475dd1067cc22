"""What the commands share: one-line errors, exit codes, progress bars, JSON, outputs that appear whole or never."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

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
)

from nha.errors import BadInput, one_line
from nha.report.results import to_json

OK, FAILED_CHECK, BAD_INPUT = 0, 1, 2

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_settings = {"traceback": False}


def show_tracebacks(on: bool) -> None:
    """Let errors through with their traceback instead of one line (the `--traceback` option)."""
    _settings["traceback"] = on


def fail(message: object, code: int = BAD_INPUT) -> NoReturn:
    """Print one line to stderr and leave with `code`."""
    err.print(f"[bold red]error:[/] {escape(one_line(message))}", soft_wrap=True)
    raise typer.Exit(code)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that stand for bad input into one line and exit code 2."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        if _settings["traceback"]:
            function(*args, **kwargs)
            return
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except (BadInput, ValueError, TypeError, OSError, NotImplementedError, ImportError) as error:
            fail(error)
        except Exception as error:
            # The errors of safetensors and huggingface_hub derive from Exception alone; theirs are about input.
            if type(error).__module__.split(".")[0] in ("safetensors", "huggingface_hub", "safetensors_rust"):
                fail(error)
            raise

    return run


def print_json(value: Any) -> None:
    """Write one JSON document to stdout, numbers as they are, NaN and infinities as null."""
    sys.stdout.write(to_json(value))
    sys.stdout.flush()


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
    """Raise unless every index names a layer."""
    for index in indices:
        if not 0 <= index < layers:
            raise BadInput(f"expected --full-layers between 0 and {layers - 1}, got {index}")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise for an option below its smallest meaningful value."""
    if value < least:
        raise BadInput(f"expected {name} of at least {least}, got {value}")


def check_new_directory(path: Path, *, replaceable: Callable[[Path], bool] | None = None) -> None:
    """Raise unless `path` is absent, an empty directory, or a directory that `replaceable` accepts."""
    if not path.exists():
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise BadInput(f"expected to be able to write in {parent}, which is not a writable directory")
        return
    if not path.is_dir():
        raise BadInput(f"expected {path} to be a new directory, it is a file")
    if any(path.iterdir()) and not (replaceable and replaceable(path)):
        raise BadInput(f"expected {path} to be new or empty, it already holds files")


def progress_bar() -> Progress:
    """A progress display on stderr, so that stdout stays free for the result."""
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24, complete_style="cyan", finished_style="green"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
    )


@contextmanager
def steps(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar moved by calling the value with (done, total)."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


def read_text(path: Path) -> str:
    """A text file's contents. Raises BadInput for one that is absent, empty or not UTF-8."""
    if not path.is_file():
        raise BadInput(f"expected a text file, there is none at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"expected UTF-8 text, {path} is something else") from None
    if not text.strip():
        raise BadInput(f"expected some text, {path} is empty")
    return text


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
