"""`nha bench`: time the operator, whole models and the CPU, and draw what was measured."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from nha.cli import common
from nha.cli.common import FAILED_CHECK, check_at_least, command
from nha.errors import BadInput
from nha.io import check_writable
from nha.models import loading

RESULTS = Path("benchmarks/results")
bench_app = typer.Typer(help="Time this library on this machine.", no_args_is_help=True, rich_markup_mode="rich")

Output = Annotated[Path, typer.Option(help="Directory of the tables.")]
Budget = Annotated[float, typer.Option("--budget-s", help="Start no new row after so many seconds.")]
Only = Annotated[str | None, typer.Option(help="Only rows whose line in --list matches this regular expression.")]
List = Annotated[bool, typer.Option("--list", help="Print the rows and stop.")]
Tiny = Annotated[bool, typer.Option(help="Tiny shapes, which need no GPU; their times mean nothing.")]


def log(line: str) -> None:
    common.out.print(line, markup=False, soft_wrap=True)


def leave(failed: int) -> None:
    if failed:
        raise typer.Exit(FAILED_CHECK)


@bench_app.command("op", epilog='Example: [cyan]nha bench op --only "^triton fwd .*W64"[/]')
@command
def op(
    output: Output = RESULTS, budget: Budget = 500, only: Only = None, list_: List = False, tiny: Tiny = False
) -> None:
    """Time the operator beside cuDNN, FlashAttention, FlexAttention and what else is installed: ops.csv.

    Run the same command again to resume: rows that are there are not measured again until all are.
    """
    time_operator("ops.csv", output, budget, only, list_, tiny)


@bench_app.command("decode", epilog='Example: [cyan]nha bench decode --only "B64 "[/]')
@command
def decode(
    output: Output = RESULTS, budget: Budget = 500, only: Only = None, list_: List = False, tiny: Tiny = False
) -> None:
    """Time one token of the operator after 32,768 others, with and without a CUDA graph: ops-decode.csv.

    Run the same command again to resume, as with `nha bench op`.
    """
    time_operator("ops-decode.csv", output, budget, only, list_, tiny, kind="decode")


def time_operator(
    name: str, output: Path, budget: float, only: str | None, list_: bool, tiny: bool, kind: str | None = None
) -> None:
    """Measure the operator's rows, or those of one kind, into the table of this name."""
    from nha.bench import op as bench
    from nha.bench.timing import select

    check_at_least("--budget-s", budget, 0)
    rows = select([row for row in bench.rows(tiny) if kind in (None, row.kind)], only)
    if list_:
        log("\n".join(map(str, rows)))
        return
    check_writable(output)
    warnings.simplefilter("ignore")
    leave(bench.run(rows, output, budget, tiny, log, name))


@bench_app.command("model", epilog="Example: [cyan]nha bench model smollm2-135m --output results --budget-s 240[/]")
@command
def model(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="llama-3-8b, qwen2.5-7b, qwen3-8b or smollm2-135m with random weights; or a directory or Hub id.",
        ),
    ] = "llama-3-8b",
    output: Output = RESULTS / "models",
    full: Annotated[int, typer.Option("--full", help="Full layers of the first hybrid; the second has none.")] = 4,
    budget: Budget = 500,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Measure the I-th of N parts, each on a GPU of its own.")
    ] = None,
    draw: Annotated[bool, typer.Option("--draw", help="Measure nothing: put parts together and draw them.")] = False,
    only: Only = None,
    list_: List = False,
    tiny: Tiny = False,
) -> None:
    """Time a model and its hybrids: prompts, tokens and throughput, as MODEL.csv, .png and .html.

    Run the same command again to resume: rows that are there are not measured again.
    """
    from nha.bench import model as bench
    from nha.bench import model_page
    from nha.bench.timing import select

    check_at_least("--budget-s", budget, 0)
    check_at_least("--full", full, 0)
    part = shard and parse_shard(shard)
    if not draw:
        rows = select(bench.cells(tiny, full), only)
        if list_:
            log("\n".join(map(str, rows)))
            return
        check_writable(output)
        warnings.simplefilter("ignore")
        failed = bench.run(name, rows, output, budget, shard=part or None, tiny=tiny, log=log)
        if part:
            leave(failed)
            return
    else:
        failed = 0
    rows = bench.collect(name, output)
    if not rows and draw:
        raise BadInput(f"expected a table of {name} in {output}, found none")
    if not rows:  # no time was left for any, which the last line says
        return
    bench.write_rows(bench.table_path(output, name), rows)
    for line in model_page.summary(rows):
        log(line)
    for path in model_page.write(rows, bench.label(name), output / bench.label(name)):
        log(str(path))
    leave(failed)


def parse_shard(text: str) -> tuple[int, int]:
    """The numbers of "I/N"."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise BadInput(f"expected --shard I/N with I from 1 to N, got {text}")
    return int(index), int(count)


@bench_app.command("cpu", epilog="Example: [cyan]nha bench cpu --everything --budget-s 600[/]")
@command
def cpu(
    output: Output = RESULTS,
    lengths: Annotated[
        bool, typer.Option("--lengths", help="Time 2K to 64K tokens at a window of 64 instead: cpu-lengths.csv.")
    ] = False,
    model: Annotated[
        bool, typer.Option("--model", help="Time a model of SmolLM2-135M's shape instead: cpu-model.csv.")
    ] = False,
    everything: Annotated[bool, typer.Option("--everything", help="Time all three.")] = False,
    repeats: Annotated[int, typer.Option(help="Calls of each row; the median counts.")] = 5,
    budget: Budget = 3600,
    only: Only = None,
    list_: List = False,
    tiny: Tiny = False,
) -> None:
    """Time the PyTorch implementation on the CPU beside full attention: cpu.csv. Run it again to resume.

    Exit code 1: cases failed; those that were measured are kept.
    """
    from nha.bench import cpu as op_bench
    from nha.bench import cpu_model
    from nha.bench.resumable import Outcome
    from nha.bench.timing import read_table, select

    check_at_least("--repeats", repeats, 1)
    check_at_least("--budget-s", budget, 0)
    warnings.simplefilter("ignore")
    ends = time.perf_counter() + budget

    def left() -> float:
        return ends - time.perf_counter()

    def time_op(long: bool, path: Path) -> Outcome:
        return op_bench.run(op_bench.rows(long, tiny), path, repeats, left(), log, only)

    def time_model(path: Path) -> Outcome:
        outcome = cpu_model.run(path, repeats, tiny, left(), log, only)
        if outcome.whole:
            log("\n".join(["Time relative to the original's:", *cpu_model.summary(read_table(path))]))
        return outcome

    tables: dict[str, tuple[list[str], Callable[[Path], Outcome]]] = {}
    if everything or not (lengths or model):
        tables["cpu.csv"] = list(op_bench.groups(op_bench.rows(False, tiny))), partial(time_op, False)
    if everything or model:
        tables["cpu-model.csv"] = list(cpu_model.cases(tiny)), time_model
    if everything or lengths:
        tables["cpu-lengths.csv"] = list(op_bench.groups(op_bench.rows(True, tiny))), partial(time_op, True)
    wanted = set(select([name for names, _ in tables.values() for name in names], only))
    if list_:
        log("\n".join(f"{table}: {name}" for table, (names, _) in tables.items() for name in names if name in wanted))
        return
    check_writable(output)
    failed: list[str] = []
    for table, (names, measure) in tables.items():
        if wanted & set(names):
            failed += [f"{name} of {table}" for name in measure(output / table).failed]
    if failed:
        log(f"{len(failed)} failed: {', '.join(failed)}")
    leave(len(failed))


@bench_app.command("serve", epilog="Example: [cyan]nha bench serve my-hybrid --lengths 4096,32768,131072[/]")
@command
def serve(
    model: Annotated[
        str, typer.Argument(help="Directory of a hybrid, or 'smollm2-hybrid' for that of the embedded model.")
    ],
    output: Output = RESULTS,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "4096,32768,131072",
    sequences: Annotated[int, typer.Option(help="Prompts at a time.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens written after each.")] = 128,
    dtype: Annotated[str, typer.Option(help="Number format of the model, as vLLM names it.")] = "auto",
    eager: Annotated[bool, typer.Option("--eager", help="Without compiled code and CUDA graphs.")] = False,
    memory: Annotated[
        float | None,
        typer.Option(help="Fraction of the device's memory that vLLM may take.", show_default="vLLM's"),
    ] = None,
    budget: Budget = 3600,
) -> None:
    """Time a hybrid in vLLM beside vLLM's own full attention: serve.csv. Needs vLLM."""
    from nha.bench.serve import cases, run
    from nha.serve.embedded import save_embedded, with_directory

    check_at_least("--sequences", sequences, 1)
    check_at_least("--new-tokens", new_tokens, 2)
    if memory is not None:
        common.check_range("--memory", memory, above=0, at_most=1)
    check_writable(output)
    sizes = common.parse_ints(lengths, "--lengths")
    check_at_least("--lengths", min(sizes), 1)
    source = with_directory(loading.find(model))
    if source.directory is None or not loading.is_hybrid(source.config):
        raise BadInput(f"expected the directory of a hybrid, got {model}")
    save_embedded(source)
    options = {"dtype": dtype, "eager": eager, "memory": memory}
    leave(run(cases(str(source.directory), sizes, sequences, new_tokens, **options), output, budget, log))


@bench_app.command("plots", epilog="Example: [cyan]nha bench plots --output pictures[/]")
@command
def plots(
    results: Annotated[Path, typer.Option(help="Directory of the tables.")] = RESULTS,
    output: Annotated[Path, typer.Option(help="Directory of the pictures.")] = Path("docs/images"),
) -> None:
    """Draw the tables as pictures; needs matplotlib and no GPU."""
    from nha.bench.plots import draw

    check_writable(output)
    draw(results, output, log)
