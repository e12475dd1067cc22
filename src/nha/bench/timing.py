"""Timing on a GPU: medians by the GPU's clock, extra memory, CUDA graphs, the machine's ceilings, and the table."""

from __future__ import annotations

import csv
import re
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

import nha
from nha.io import replace

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
R = TypeVar("R")
FLUSH = 256 << 20  # bytes that push everything else out of the L2 cache


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def median_ms(
    function: Callable[[], object],
    seconds: float = 0.3,
    min_calls: int = 5,
    max_calls: int = 60,
    host_ahead: bool = True,
) -> float:
    """Median milliseconds of a call with a cold L2 cache; without a GPU one call by the wall clock.

    With `host_ahead` the cache is flushed again and again until the call has been queued. Its kernels then follow one
    another without gaps, as they do wherever the host is ahead of the GPU. Measures for about `seconds`, and at least
    `min_calls`; of calls of 0.3 s and more, three.
    """
    start = time.perf_counter()
    if not CUDA:
        function()
        return 1e3 * (time.perf_counter() - start)
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    function()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    flushes = flushes_for(time.perf_counter() - begun) if host_ahead else 1
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < max_calls:
        for _ in range(flushes):
            flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
        slow = times[0] > 300
        if len(times) >= (3 if slow else min_calls) and time.perf_counter() - start > seconds:
            break
    return statistics.median(times)


def flushes_for(host_s: float) -> int:
    """The number of flushes of the cache that take longer than the host, with half as much to spare; 400 at most.

    >>> flushes_for(0.001)  # each takes 50 microseconds or more
    31
    """
    return min(1 + int(1.5 * host_s / 50e-6), 400)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of one call, which keeps the tensors of the call alive; without a GPU the call itself."""
    if not CUDA:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(held: Callable[[], object] = run) -> None:  # the graph itself holds addresses only
        graph.replay()

    return replay


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is one of memory, or came while one of memory was handled (as in the capture of a graph).

    >>> is_out_of_memory(torch.OutOfMemoryError()), is_out_of_memory(ValueError())
    (True, False)
    """
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def first_call(run: Callable[[], object]) -> float:
    """Seconds of a call, compilation included."""
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Peak bytes of a call beyond those allocated before it; None without a GPU."""
    if not CUDA:
        return None
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def stamp(*packages: str) -> dict[str, str]:
    """Machine, versions and date, for every row of a table."""
    from importlib.metadata import PackageNotFoundError, version

    imported = {"torch": torch.__version__, "nha": nha.__version__}  # perhaps not from an installed package

    def found(name: str) -> str:
        try:
            return imported.get(name) or version(name)
        except PackageNotFoundError:
            return "none"

    gpu = torch.cuda.get_device_name() if CUDA else "none"
    versions = {name: found(name) for name in packages}
    return {"gpu": gpu, **versions, "date": date.today().isoformat()}


def ceilings() -> dict[str, float]:
    """Bytes per second of a large copy, read and written, and operations per second of a bfloat16 matrix product."""
    size, side = (4 << 30, 8192) if CUDA else (1 << 20, 64)
    source = torch.empty(size, dtype=torch.int8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy = 2 * size / (median_ms(lambda: target.copy_(source)) / 1e3)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * side**3 / (median_ms(lambda: a @ b) / 1e3)
    if CUDA:
        torch.cuda.empty_cache()
    return {"bytes_per_s": copy, "operations_per_s": product}


def select(rows: Sequence[R], only: str | None) -> list[R]:
    """The rows whose text matches a regular expression; all of them without one.

    Raises ValueError if there are none, or if the expression cannot be read.

    >>> select(["triton fwd", "triton decode", "chunked fwd"], "^triton .*fwd")
    ['triton fwd']
    """
    try:
        found = [row for row in rows if only is None or re.search(only, str(row))]
    except re.error as error:
        raise ValueError(f"expected a regular expression, got {only!r}: {error}") from None
    if not found:
        raise ValueError(f"expected a pattern that names a row, got {only!r}")
    return found


def require_gpu(tiny: bool) -> None:
    """Raises ValueError without a GPU, unless the shapes are tiny."""
    if not CUDA and not tiny:
        raise ValueError("expected a CUDA device, found none: --tiny runs small shapes without one")


class Table:
    """A CSV file that is complete or absent: rows go to PATH.partial at once, which becomes PATH at the end."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.partial, self.columns = path, path.with_name(path.name + ".partial"), list(columns)
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> Table:
        self.file = self.partial.open("w", newline="")
        self.writer = csv.DictWriter(self.file, self.columns)
        self.writer.writeheader()
        return self

    def add(self, row: dict[str, Any]) -> None:
        self.writer.writerow(row)
        self.file.flush()
        self.rows.append(row)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        if self.rows and (kind is None or issubclass(kind, KeyboardInterrupt)):
            replace(self.partial, self.path)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, numbers as numbers, and empty fields as None."""

    def value(text: str) -> Any:
        if text == "":
            return None
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    with path.open(newline="") as file:
        return [{n: value(x) for n, x in row.items()} for row in csv.DictReader(file)]
