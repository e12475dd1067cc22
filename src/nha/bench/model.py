"""Time a model with full attention and as a hybrid, in one run: prompts, tokens, and as many sequences as fit.

A row is one cell: a variant of the model (see `nha.bench.shapes`), a task, how it is done, and a length T in tokens.

prefill     reading a prompt of T tokens into a cache, in "one call" or by "generate" until its first token; ms, and the
            peak of memory with the weights
decode      one more token of one sequence after T: "eager" is a call with a cache that grows, "graph" a CUDA graph of a
            call with a static cache, "compiled" a CUDA graph of the compiled call, "generate" plain `generate()`
throughput  one more token of as many sequences of T tokens as fit into the memory; B is their number
throughput-80gb  the same in the memory of an 80 GB GPU, of which 78 GiB can be had
throughput-80gb-int8  and with keys and values of full attention in 8 bits

Hybrids have random gates: times do not depend on them. `status` is "ok", "out of memory" or what failed.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nha.bench import model_measure
from nha.bench.shapes import ORIGINALS, SLOTS, WINDOW, Variants, load_original
from nha.bench.timing import is_out_of_memory, read_table, require_gpu, stamp, synchronize
from nha.errors import BadInput, one_line
from nha.io import atomic_write

ABOUT = ("gpu", "torch", "transformers", "triton", "nha", "date")
COLUMNS: tuple[str, ...] = ("model", "variant", "task", "how", "B", "T", "ms", "tokens_s", "peak_gib", "status", *ABOUT)
FULL_LAYERS = 4
LIMITED, LIMITED_INT8, LIMIT_GIB = "throughput-80gb", "throughput-80gb-int8", 78
OK, OUT_OF_MEMORY = "ok", "out of memory"
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One measurement of a variant of the model."""

    variant: str
    task: str
    how: str
    length: int

    def __str__(self) -> str:
        return f"{self.variant} {self.task} {self.how} T{self.length}"

    @property
    def fields(self) -> Row:
        return {"variant": self.variant, "task": self.task, "how": self.how, "T": self.length}

    @property
    def cost(self) -> float:
        """Seconds that it takes, roughly, with 8B parameters on an H100."""
        if self.task == "prefill":
            quadratic = 8 if self.variant in ORIGINALS else 0 if self.variant == "hybrid-0" else 1
            call = self.length / 30e3 + (self.length / 131072) ** 2 * quadratic
            return 2 + max(2 * call, min(4 * call, 3))
        compiles = 40 if self.how == "compiled" else 0
        grows = 0 if self.variant == "hybrid-0" else self.length / 131072
        return compiles + (6 if self.task.startswith("throughput") else 4) + grows


def cells(tiny: bool = False, full: int = FULL_LAYERS) -> list[Cell]:
    """Every cell, the most important first; `full` is the number of full layers of the first hybrid (tiny: 1)."""
    full = min(full, 1) if tiny else full
    hybrids = (f"hybrid-{full}", "hybrid-0") if full else ("hybrid-0",)
    some, none = hybrids[0], "hybrid-0"
    everyone = (*ORIGINALS, *hybrids)
    lengths, seen, far = ([2**n for n in range(8, 18)], (2048, 32768, 131072), 2**20)
    if tiny:
        lengths, seen, far = [20, 30], (10, 20, 30), 40
    near, middle, long = seen

    def each(names: Iterable[str], task: str, hows: Iterable[str], at: Iterable[int]) -> list[Cell]:
        return [Cell(name, task, how, n) for n in at for name in names for how in hows]

    first = [n for n in lengths if n in (lengths[0], *seen)] or lengths
    found = each(("original", *hybrids), "prefill", ["one call"], first)
    found += each(everyone, "decode", ["graph"], seen)
    found += each((*ORIGINALS[1:], *hybrids), "throughput", ["graph"], [middle])
    found += each(["original"], "throughput", ["eager"], [middle])
    found += each((*ORIGINALS[1:], some), "decode", ["compiled"], [middle])
    found += each(["original", *hybrids], "decode", ["generate"], [near])
    found += each((*ORIGINALS[1:], *hybrids), LIMITED, ["graph"], [middle]) + each([none], LIMITED, ["graph"], [far])
    found += each((*ORIGINALS[1:], some), LIMITED_INT8, ["graph"], [middle])
    found += each(["original", *hybrids], "prefill", ["generate"], first) + each([none], "prefill", ["generate"], [far])
    found += each([none], "decode", ["graph"], [far]) + each([none], "throughput", ["graph"], [far])
    found += each(["original", *hybrids], "prefill", ["one call"], lengths)
    found += each(["original", *hybrids], "prefill", ["generate"], lengths)
    found += each((*ORIGINALS[1:], some, none), "decode", ["compiled"], (long, near))
    found += each((*ORIGINALS[1:], *hybrids), "throughput", ["compiled"], [middle])
    found += each(["original", *hybrids], "decode", ["eager"], (near, middle))
    found += each(everyone, "decode", ["graph"], (lengths[0], lengths[len(lengths) // 2]))
    found += each(["original"], "decode", ["compiled"], [middle]) + each([none], "decode", ["compiled"], [far])
    found += each(["original", *hybrids], "decode", ["generate"], [lengths[0], middle])
    found += each((*ORIGINALS[1:], *hybrids), "throughput", ["graph"], [long])
    return list(dict.fromkeys(found))


def shard_of(wanted: list[Cell], shard: tuple[int, int]) -> list[Cell]:
    """The cells of shard (i, n), 1 <= i <= n: all shards together take equally long.

    >>> [len(shard_of(cells(), (i, 4))) for i in (1, 2)] != [0, 0]
    True
    """
    index, count = shard
    loads, own = [0.0] * count, set()
    for cell in sorted(wanted, key=lambda cell: -cell.cost):
        lightest = loads.index(min(loads))
        loads[lightest] += cell.cost
        if lightest == index - 1:
            own.add(cell)
    return [cell for cell in wanted if cell in own]


def measure(variants: Variants, cell: Cell) -> Row:
    """The columns of a cell. Raises torch.OutOfMemoryError where the memory is too small even for one sequence."""
    model = variants.get(cell.variant)
    with torch.no_grad():
        if cell.task == "prefill":
            found = model_measure.prefill(model, cell.how, cell.length)
        elif cell.task == "decode":
            found = model_measure.decode(model, cell.how, cell.length, variants.window)
        else:
            limit = None if cell.task == "throughput" else LIMIT_GIB
            numbers = "int8" if cell.task == LIMITED_INT8 else "auto"
            with model_measure.memory_limit(limit), model_measure.kv_cache_dtype(model, numbers):
                found = model_measure.throughput(model, cell.how, cell.length, variants.window, variants.slots, limit)
    return found | {"ms": round(found["ms"], 3), "tokens_s": round(found["tokens_s"], 1)}


def attempt(variants: Variants, cell: Cell) -> Row:
    """The columns of a cell with a status; what fails is a row without numbers."""
    try:
        return measure(variants, cell) | {"status": OK}
    except Exception as error:
        if is_out_of_memory(error):
            return {"status": OUT_OF_MEMORY}
        return {"status": f"{type(error).__name__}: {one_line(error)}"[:200]}


class Rows:
    """The table of one run, one row a line on the disk as soon as it is measured; a later run adds what is missing.

    Raises BadInput for a table of another GPU or of another model, whose directory may have the same name.
    """

    def __init__(self, path: Path, model: str, about: Row):
        self.path, self.about = path, about | {"model": model}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read_table(path) if path.exists() else []
        for column in ("gpu", "model"):
            own = str(self.about[column])
            others = sorted({str(row[column]) for row in self.rows} - {own})
            if others:
                raise BadInput(
                    f"expected rows of {own} in {path}, got rows of {', '.join(others)}: name a new --output"
                )
        self.rows = [row for row in self.rows if row["status"] in (OK, OUT_OF_MEMORY)]
        write_rows(path, self.rows)

    def has(self, cell: Cell) -> bool:
        return any(row | cell.fields == row for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row | self.about)
        write_rows(self.path, self.rows)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replace a table by these rows."""
    with atomic_write(path) as work, work.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def label(name: str) -> str:
    """The name of a model's files.

    >>> label("HuggingFaceTB/SmolLM2-135M")
    'SmolLM2-135M'
    """
    return Path(name).name or "model"


def table_path(out: Path, name: str, shard: tuple[int, int] | None = None) -> Path:
    """The table of a model in a directory, or that of one shard."""
    part = f".part-{shard[0]}-of-{shard[1]}" if shard else ""
    return out / f"{label(name)}{part}.csv"


def run(
    name: str,
    wanted: list[Cell],
    out: Path,
    budget_s: float,
    *,
    shard: tuple[int, int] | None = None,
    tiny: bool = False,
    log: Callable[[str], None] = print,
) -> int:
    """Measure the cells that the table in `out` lacks and start none that would end after `budget_s`.

    Returns the number of cells that failed; memory that is too small is no failure. Raises ValueError without a GPU,
    unless `tiny`, and BadInput for a table of another GPU or model, and for a model that cannot be loaded.
    """
    require_gpu(tiny)
    deadline = time.monotonic() + budget_s
    wanted = wanted if shard is None else shard_of(wanted, shard)
    table = Rows(table_path(out, name, shard), name, stamp("torch", "transformers", "triton", "nha"))
    missing, failed, unrun = [cell for cell in wanted if not table.has(cell)], 0, 0
    variants: Variants | None = None
    for cell in missing:
        if time.monotonic() + (0 if tiny else cell.cost) > deadline:
            unrun += 1
            continue
        if variants is None:
            start = time.perf_counter()
            variants = Variants(load_original(name, tiny), *((8, 6) if tiny else (WINDOW, SLOTS)))
            synchronize()
            log(f"model made in {time.perf_counter() - start:.0f} s")
        start = time.perf_counter()
        found = attempt(variants, cell)
        failed += found["status"] not in (OK, OUT_OF_MEMORY)
        table.add({"variant": cell.variant, "task": cell.task, "how": cell.how, "T": cell.length} | found)
        log(f"{line(found)}  {cell} (in {time.perf_counter() - start:.0f} s)")
        if cell.how == "compiled":
            torch._dynamo.reset()
        model_measure.clear()
    later = ": run the command again for them" if unrun else ""
    log(f"{len(table.rows)} rows in {table.path}, {failed} failed, {unrun} not started for lack of time" + later)
    return failed


def line(row: Row) -> str:
    """A measurement as text."""
    if row["status"] != OK:
        return row["status"]
    return f"{row['ms']:>10.2f} ms {row['tokens_s']:>10.0f} tokens/s {row['peak_gib'] or 0:>6.1f} GiB  B{row['B']}"


def collect(name: str, out: Path) -> list[Row]:
    """All rows of a model in a directory, parts of shards included, each cell once: the newest counts.

    Raises BadInput for rows of different GPUs or models, whose ratios would mean nothing.
    """
    paths = [*sorted(out.glob(f"{label(name)}.part-*.csv")), table_path(out, name)]
    found: dict[tuple, Row] = {}
    for path in paths:
        for row in read_table(path) if path.exists() else []:
            key = (row["variant"], row["task"], row["how"], row["T"])
            old = found.get(key)
            if old is None or (row["status"] == OK, row["date"]) >= (old["status"] == OK, old["date"]):
                found[key] = row
    for column, what in (("gpu", "GPU"), ("model", "model")):
        several = sorted({str(row[column]) for row in found.values()})
        if len(several) > 1:
            raise BadInput(f"expected rows of one {what} in {out}, got rows of {', '.join(several)}")
    return sorted(found.values(), key=lambda row: (row["task"], row["variant"], row["how"], row["T"]))
