"""`nha bench`: time the operator, a whole model, its decoding and the CPU, and draw what was measured."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from nha.cli import common
from nha.cli.common import FAILED_CHECK, check_at_least, command

RESULTS = Path("benchmarks/results")
bench_app = typer.Typer(help="Time this library on this machine.", no_args_is_help=True, rich_markup_mode="rich")

Out = Annotated[Path, typer.Option(help="Directory of the tables.")]
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
def op(out: Out = RESULTS, budget: Budget = 500, only: Only = None, list_: List = False, tiny: Tiny = False) -> None:
    """Time the operator beside cuDNN, FlashAttention, FlexAttention and what else is installed: ops.csv."""
    from nha.bench import op as bench
    from nha.bench.timing import select

    check_at_least("--budget-s", budget, 0)
    rows = select(bench.rows(tiny), only)
    if list_:
        log("\n".join(map(str, rows)))
        return
    warnings.simplefilter("ignore")
    leave(bench.run(rows, out, budget, tiny, log))


@bench_app.command("model", epilog="Example: [cyan]nha bench model --budget-s 240[/]")
@command
def model(out: Out = RESULTS, budget: Budget = 500, only: Only = None, list_: List = False, tiny: Tiny = False) -> None:
    """Time prompts of a model of Llama-3-8B's shape, as a hybrid and with full attention: model.csv."""
    from nha.bench.model import prompt_rows

    _time_model(prompt_rows(tiny), out / "model.csv", budget, only, list_, tiny)


@bench_app.command("decode", epilog='Example: [cyan]nha bench decode --only "^hybrid decode graph"[/]')
@command
def decode(
    out: Out = RESULTS, budget: Budget = 500, only: Only = None, list_: List = False, tiny: Tiny = False
) -> None:
    """Time decoding with a model of Llama-3-8B's shape, one sequence and as many as fit: decode.csv."""
    from nha.bench.model import decode_rows

    _time_model(decode_rows(tiny), out / "decode.csv", budget, only, list_, tiny)


def _time_model(rows: list, path: Path, budget: float, only: str | None, list_: bool, tiny: bool) -> None:
    from nha.bench.model import run
    from nha.bench.timing import select

    check_at_least("--budget-s", budget, 0)
    rows = select(rows, only)
    if list_:
        log("\n".join(map(str, rows)))
        return
    warnings.simplefilter("ignore")
    leave(run(rows, path, budget, tiny, log))


@bench_app.command("cpu", epilog="Example: [cyan]nha bench cpu --lengths[/]")
@command
def cpu(
    out: Out = RESULTS,
    lengths: Annotated[
        bool, typer.Option("--lengths", help="Time 2K to 64K tokens at a window of 64 instead: cpu-lengths.csv.")
    ] = False,
    model: Annotated[
        bool, typer.Option("--model", help="Time a model of SmolLM2-135M's shape instead: cpu-model.csv.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Calls of each row; the median counts.")] = 5,
    tiny: Tiny = False,
) -> None:
    """Time the PyTorch implementation on the CPU beside full attention: cpu.csv."""
    from nha.bench import cpu_model
    from nha.bench.cpu import rows, run

    check_at_least("--repeats", repeats, 1)
    if model:
        warnings.simplefilter("ignore")
        cpu_model.run(out / "cpu-model.csv", repeats, tiny, log)
        return
    run(rows(lengths, tiny), out / ("cpu-lengths.csv" if lengths else "cpu.csv"), repeats, log)


@bench_app.command("plots", epilog="Example: [cyan]nha bench plots --out pictures[/]")
@command
def plots(
    results: Annotated[Path, typer.Option(help="Directory of the tables.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Directory of the pictures.")] = Path("docs/images"),
) -> None:
    """Draw the tables as pictures; needs matplotlib and no GPU."""
    from nha.bench.plots import draw

    draw(results, out, log)
