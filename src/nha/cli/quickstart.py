"""`nha quickstart`: convert a model, measure what that keeps, costs and saves, and write a report about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from nha.cli import common
from nha.cli.common import FAILED_CHECK, BadInput, command, err, out, print_json
from nha.cli.hybridize import check_convertible, check_settings
from nha.io import atomic_directory
from nha.models import loading
from nha.report.results import FORMAT, VARIANTS, Results
from nha.report.words import megabytes, number, verdict


@command
def quickstart(
    model: Annotated[
        str, typer.Option(help="A model directory, a Hub id, or 'smollm2', which needs no network.")
    ] = loading.EMBEDDED,
    output: Annotated[Path, typer.Option(help="Where the report and the hybrid go.")] = Path("report"),
    window: Annotated[str, typer.Option(help="Tokens each window holds, or a list with one entry per layer.")] = "64",
    slots: Annotated[int, typer.Option(help="Slots per key-value head.")] = 64,
    full_layers: Annotated[
        str, typer.Option(help="Layers that keep full attention, such as 3,11,18,26.", show_default=False)
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Measure less, in about a third of the time.")] = False,
    tune: Annotated[bool, typer.Option(help="Train the gates for a short while after converting.")] = True,
    save: Annotated[bool, typer.Option(help="Keep the hybrid in OUTPUT/hybrid.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document to stdout.")] = False,
) -> None:
    """Convert a model, see what it keeps, costs and saves: a page with plots in under five minutes."""
    windows = common.parse_windows(window)
    layers = common.parse_ints(full_layers, "--full-layers")
    check_settings(slots, sinks=1, slot_distance=128, dtype="auto")
    if max([windows] if isinstance(windows, int) else windows) < 0:
        raise BadInput(f"expected --window to convert at least one layer, got {window}")
    common.check_new_directory(output, replaceable=is_report)
    source = loading.find(model)
    check_convertible(source, windows, layers)

    from nha.cli.pipeline import Settings, run

    settings = Settings(windows, slots, layers, seed, quick=quick, tune=tune)
    from nha.report import write_report

    with atomic_directory(output) as work, common.progress_bar() as bar:
        saved = work / "hybrid" if save else None
        results = run(source, settings, bar, saved)
        results.saved_to = str(output / "hybrid") if save else None
        task = bar.add_task("writing the report", total=1)
        write_report(results, work)
        bar.update(task, completed=1)
    if as_json:
        print_json(results.to_dict())
    else:
        show(results, output)
    if not results.healthy:
        for check in results.checks:
            if not check.passed:
                err.print(f"[bold red]check failed:[/] {check.name}: {check.detail}", soft_wrap=True)
        raise typer.Exit(FAILED_CHECK)


def is_report(path: Path) -> bool:
    """Whether a directory holds an earlier report, which a new one may replace."""
    try:
        data = json.loads((path / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def show(results: Results, output: Path) -> None:
    """The results as a table, the verdict, and where the page is."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", title=None)
    table.add_column("how the model runs")
    table.add_column("perplexity", justify="right")
    table.add_column("against the original", justify="right")
    teacher = results.perplexity("teacher")
    for name, (label, _) in VARIANTS.items():
        form = results.form(name)
        if form is not None:
            style = "bold cyan" if name == "hybrid" else ""
            table.add_row(label, number(form.perplexity), f"{form.perplexity / teacher:.2f}x", style=style)
    out.print()
    out.print(table)
    out.print()
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for title in ("context", "memory, original", "hybrid", "time per token, original", "hybrid"):
        table.add_column(title, justify="right")
    for cost in results.costs:
        times = ("" if ms is None else f"{ms:.0f} ms" for ms in (cost.teacher_ms, cost.hybrid_ms))
        table.add_row(f"{cost.context:,}", megabytes(cost.teacher_bytes), megabytes(cost.hybrid_bytes), *times)
    out.print(table)
    out.print()
    out.print(Text.from_markup(verdict(results).text.replace("<b>", "[bold]").replace("</b>", "[/]")))
    out.print()
    out.print(f"Report: [bold]{output / 'index.html'}[/]", soft_wrap=True)
    if results.saved_to:
        out.print(f'Try it: [cyan]nha generate {results.saved_to} "Why is the sky blue?"[/]', soft_wrap=True)
