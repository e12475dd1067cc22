"""Time the operator and the decoding step of two revisions in one run, and print the ratios.

    python3 experiments/compare_revisions.py OLD NEW [--budget-s 95] [--rounds 3] [--limit 1.03] [--only PATTERN]

OLD and NEW are two checkouts, or their `src` folders, for instance `git worktree add ../old REVISION` and `.`. Each
gets a process with that folder alone on its path. The processes are timed in turn, row by row, as OLD NEW NEW OLD ...,
with the same code, which knows only names that are public in both: `nha_attention`, `RingState` and `nha_decode`.

A row's time is the median by CUDA events with a cold L2 cache. It is called slower only if its ratio is above the limit
and every round of NEW took longer than every round of OLD. Exit status: 1 if a row is slower or failed. Needs torch.
Without a GPU tiny shapes of the PyTorch implementation are timed by the wall clock: that tries the script, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypedDict

FLUSH = 256 << 20  # bytes that push everything else out of the L2 cache
LIMIT = 1.03


@dataclass(frozen=True)
class Row:
    """One measurement: bf16, head dim D, M slots; in rows of decoding W tokens and more were seen."""

    kind: str  # fwd, fwd+bwd, decode (called), decode-graph (replayed as a CUDA graph)
    batch: int
    length: int
    query_heads: int
    heads: int
    dim: int
    slots: int
    window: int

    def __str__(self) -> str:
        heads = f"HQ{self.query_heads} H{self.heads} D{self.dim} M{self.slots}"
        return f"{self.kind} B{self.batch} T{self.length} {heads} W{self.window}"


def rows(tiny: bool) -> list[Row]:
    """Every row, the most important first."""
    if tiny:
        return [Row(kind, 1, 40, 4, 2, 16, 4, w) for w in (8, 0) for kind in ("fwd", "fwd+bwd")]
    llama, smollm = (32, 8, 128, 64), (9, 3, 64, 64)
    both = ("fwd", "fwd+bwd")
    found = [Row(kind, b, t, *llama, 64) for b, t in ((16, 2048), (32, 1024), (1, 32768)) for kind in both]
    found += [Row("decode-graph", 64, 1, *llama, 64)]
    found += [Row(kind, 16, 2048, *llama, w) for w in (0, 512) for kind in both]
    found += [Row(kind, 16, 2048, *smollm, 64) for kind in both]
    found += [Row(kind, b, 1, *llama, 64) for kind, b in (("decode", 64), ("decode-graph", 1))]
    return [*found, Row("decode-graph", 64, 1, *smollm, 64), Row("fwd", 1, 2048, *llama, 64)]


# ---------------------------------------------------------------------------------------------------------------------
# In the process of one revision.


def prepare(row: Row) -> Callable[[], object]:
    """The call that a row times."""
    import torch
    import torch.nn.functional as F

    from nha import nha_attention

    cuda = torch.cuda.is_available()
    device, dtype, impl = ("cuda", torch.bfloat16, "triton") if cuda else ("cpu", torch.float32, "chunked")
    generator = torch.Generator(device).manual_seed(0)

    def draw(length: int, grads: bool) -> tuple[torch.Tensor, ...]:
        def normal(heads: int, dim: int) -> torch.Tensor:
            return torch.randn(row.batch, length, heads, dim, generator=generator, device=device, dtype=dtype)

        q, k, v = normal(row.query_heads, row.dim), normal(row.heads, row.dim), normal(row.heads, row.dim)
        gate = F.logsigmoid(normal(row.heads, row.slots)) / 8
        return tuple(x.requires_grad_(grads) for x in (q, k, v, gate))

    if row.kind == "fwd":
        inputs = draw(row.length, False)
        return lambda: nha_attention(*inputs, window_size=row.window, impl=impl).out
    if row.kind == "fwd+bwd":
        leaves = draw(row.length, True)
        grad = torch.randn_like(leaves[0])
        return lambda: torch.autograd.grad(nha_attention(*leaves, window_size=row.window, impl=impl).out, leaves, grad)
    from nha.ops import RingState, nha_decode

    with torch.no_grad():
        prompt = draw(2 * row.window, False)
        state = nha_attention(*prompt, window_size=row.window, return_state=True, impl=impl).state
    assert state is not None
    ring, token = RingState.of(state), draw(1, False)

    def step() -> torch.Tensor:
        with torch.no_grad():
            return nha_decode(*token, state=ring).out

    return capture(step) if row.kind == "decode-graph" else step


def capture(step: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of one call."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def median_ms(call: Callable[[], object], seconds: float, host_ahead: bool) -> float:
    """Median milliseconds; with `host_ahead` the L2 flush repeats until the call has been queued, so no gap shows."""
    import torch

    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    flushes = min(1 + int(1.5 * host / 50e-6), 400) if host_ahead else 1
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (len(times) < 100 and time.perf_counter() - start < seconds):
        for _ in range(flushes):
            flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def serve(source: str) -> None:
    """Time the rows that come as lines of JSON, and answer each with a line: {"ms": ...} or {"error": ...}."""
    import torch

    import nha

    found = Path(nha.__file__).resolve()
    if not found.is_relative_to(Path(source).resolve()):
        raise SystemExit(f"expected nha from {source}, got {found}")
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            row = Row(**asked["row"])
            ms = median_ms(prepare(row), asked["seconds"], host_ahead=row.kind != "decode")
            answer: Answer = {"ms": ms, "error": ""}
        except Exception as failure:
            answer = {"ms": 0.0, "error": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(json.dumps(answer), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# In the process that compares.


class Answer(TypedDict):
    ms: float
    error: str


class Revision:
    """A process that times rows with the code of one folder."""

    def __init__(self, folder: Path) -> None:
        folder = folder.resolve()
        source = next((p for p in (folder / "src", folder) if (p / "nha" / "__init__.py").exists()), None)
        if source is None:
            raise SystemExit(f"expected a folder with nha/ or src/nha/ in it, got {folder}")
        self.source = source
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(self.source)}
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--serve", str(self.source)]
        return subprocess.Popen(
            command,
            cwd=tempfile.gettempdir(),
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def time(self, row: Row, seconds: float) -> Answer:
        """The answer of the process, or an error if it has ended."""
        try:
            _pipe(self.process.stdin).write(_request(row, seconds))
            _pipe(self.process.stdin).flush()
            line = _pipe(self.process.stdout).readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"ms": 0.0, "error": f"its process ended with {self.process.wait()}"}

    def compile(self, wanted: list[Row]) -> list[subprocess.Popen[str]]:
        """Processes that run the rows once, so that the kernels lie compiled in Triton's cache on disk."""
        alike: dict[tuple, list[Row]] = {}
        for row in wanted:
            alike.setdefault((row.kind.removesuffix("-graph"), row.query_heads, row.window), []).append(row)
        helpers = []
        for same in alike.values():
            helper = self._start()
            _pipe(helper.stdin).write("".join(_request(row, 0.0) for row in same))
            _pipe(helper.stdin).close()
            helpers.append(helper)
        return helpers

    def close(self) -> None:
        self.process.communicate(timeout=60)


def _request(row: Row, seconds: float) -> str:
    return json.dumps({"row": vars(row), "seconds": seconds}) + "\n"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def compare(
    revisions: tuple[Revision, Revision], wanted: list[Row], rounds: int, seconds: float, end: float
) -> list[tuple[Row, list[float], list[float], str]]:
    """(row, times of OLD, times of NEW, error) of every row that there was time for; lines are printed as they come."""
    found = []
    print(f"{'old ms':>10} {'new ms':>10} {'new/old':>8}   rounds of old | of new")
    for row in wanted:
        if time.monotonic() > end:
            print(f"no time left for {row}")
            continue
        times: tuple[list[float], list[float]] = ([], [])
        error = ""
        for turn in range(rounds):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                answer = revisions[which].time(row, seconds)
                times[which].append(answer["ms"])
                error = error or (answer["error"] and f"{('OLD', 'NEW')[which]}: {answer['error']}")
            if error:
                break
        found.append((row, *times, error))
        if error:
            print(f"failed: {row}: {error}", flush=True)
            continue
        old, new = (statistics.median(x) for x in times)
        shown = " | ".join(" ".join(f"{ms:.4f}" for ms in x) for x in times)
        print(f"{old:>10.4f} {new:>10.4f} {new / old:>8.3f}   {shown}   {row}", flush=True)
    return found


def slower(old: list[float], new: list[float], limit: float) -> bool:
    """Whether the ratio of medians is above the limit and no round says otherwise.

    >>> slower([1.0, 1.01], [1.05, 1.06], 1.03), slower([1.0, 1.07], [1.05, 1.09], 1.03)
    (True, False)
    """
    return statistics.median(new) / statistics.median(old) > limit and min(new) > max(old)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--budget-s", type=float, default=95, help="start no new row after so long")
    parser.add_argument("--rounds", type=int, default=3, help="times that each revision is timed in each row")
    parser.add_argument("--seconds", type=float, default=0.25, help="about how long one timing takes")
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest ratio that is not called slower")
    parser.add_argument("--only", default="", help="only rows whose line has this regular expression in it")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU (default without a GPU)")
    options = parser.parse_args()
    end = time.monotonic() + options.budget_s
    import torch

    cuda = torch.cuda.is_available()
    wanted = [row for row in rows(options.tiny or not cuda) if re.search(options.only, str(row))]
    # An own cache: the first timing of a row must not find kernels of other code.
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="compare-triton-")
    revisions = Revision(options.old), Revision(options.new)
    print(f"OLD {revisions[0].source}\nNEW {revisions[1].source}\n{torch.cuda.get_device_name() if cuda else 'CPU'}")
    if cuda:
        for helper in [helper for revision in revisions for helper in revision.compile(wanted)]:
            _pipe(helper.stdout).read()
            helper.wait()
        print(f"compiled in {options.budget_s - (end - time.monotonic()):.0f} s", flush=True)
    found = compare(revisions, wanted, options.rounds, options.seconds, end)
    for revision in revisions:
        revision.close()
    bad = [str(row) for row, old, new, error in found if error or slower(old, new, options.limit)]
    print(f"{len(found)} of {len(wanted)} rows; slower than {options.limit} or failed: {'; '.join(bad) or 'none'}")
    return int(bool(bad))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        sys.exit(main())
