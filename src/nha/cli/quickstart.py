"""`nha quickstart`: convert a model, measure it, and write a report."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nha.cli import common
from nha.cli.common import FAILED_CHECK, BadInput, command, duration, err, escape, out, print_json
from nha.cli.hybridize import check_convertible
from nha.cli.options import make_settings
from nha.convert.settings import HybridizeSettings
from nha.io import atomic_directory
from nha.models import loading
from nha.report.requirements import EMBEDDED, REPORT, check_installed
from nha.report.results import VARIANTS, Results
from nha.report.sentences import change, megabytes, number, verdict

if TYPE_CHECKING:
    from nha.report.quickstart import Settings

DEFAULT_WINDOW = 64  # as the option has it


@command
def quickstart(
    model: Annotated[
        str, typer.Option(help="A model directory, a Hub id, or 'smollm2', which needs no network.")
    ] = loading.EMBEDDED,
    output: Annotated[Path, typer.Option(help="A new directory for the report and the hybrid.")] = Path("report"),
    window: Annotated[str, typer.Option(help="Tokens each window holds, or a list with one entry per layer.")] = str(
        DEFAULT_WINDOW
    ),
    slots: Annotated[int, typer.Option(help="Slots per key-value head.")] = 64,
    full_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that keep full attention, such as 8,18,20,23; '' for none.",
            show_default="8,18,20,23 for smollm2, none for other models",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Measure less, in about half the time.")] = False,
    tune: Annotated[bool, typer.Option(help="Train the gates for a short while after converting.")] = True,
    save: Annotated[bool, typer.Option(help="Keep the hybrid in OUTPUT/hybrid.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON document to stdout.")] = False,
) -> None:
    """Convert a model and measure memory, speed and quality: a page with pictures in under five minutes.

    The embedded model's distilled hybrid is measured where its file is installed and sizes are the default.
    """
    check_installed(REPORT + (EMBEDDED if model == loading.EMBEDDED else ()))
    windows = common.parse_windows(window)
    given = None if full_layers is None else common.parse_ints(full_layers, "--full-layers")
    common.check_seed(seed)
    make_settings(HybridizeSettings, {"num_slots": slots})
    if max([windows] if isinstance(windows, int) else windows) < 0:
        raise BadInput(f"expected --window to convert at least one layer, got {window}")
    common.check_new_directory(output, replaceable=is_report)
    source = loading.find_to_convert(model)
    check_convertible(source, windows, given or [])

    from nha.report.page import write_report, write_results
    from nha.report.quickstart import Settings, default_full_layers, kept, planned_steps, run

    if given is None:
        given = default_full_layers(source) if isinstance(windows, int) else []
    settings = Settings(windows, slots, given, seed, quick=quick, tune=tune)
    if model == loading.EMBEDDED and full_layers is None and tune:
        settings = distilled_settings(settings)
    settings.check()
    with atomic_directory(output) as work, common.progress_bar() as bar:
        steps = Steps(planned_steps(settings), bar)
        results = run(source, settings, steps.report, work / "hybrid" if save else None)
        results.saved_to = str(output / "hybrid") if save else None
        write_results(results, work)
        steps.report("drawing and writing the report", 0, 1)
        with kept(results.checks, "writing the report"):
            write_report(results, work)
        write_results(results, work)
        steps.report("drawing and writing the report", 1, 1)
    if as_json:
        print_json(results.to_dict())
    else:
        show(results, output)
    if not results.healthy:
        for check in results.checks:
            if not check.passed:
                err.print(f"[bold red]check failed:[/] {escape(f'{check.name}: {check.detail}')}", soft_wrap=True)
        raise typer.Exit(FAILED_CHECK)


def distilled_settings(settings: Settings) -> Settings:
    """The settings that measure the embedded model's distilled hybrid, if there is one and sizes are the default."""
    from nha.models.smollm2 import has_hybrid, hybrid_configuration

    if not has_hybrid():
        return settings
    config = hybrid_configuration()
    if settings.windows != DEFAULT_WINDOW or settings.slots != config.num_slots:
        return settings
    return dataclasses.replace(settings, windows=list(config.window_sizes), full_layers=[], distilled=True)


class Steps:
    """Shows the steps of a run with the time left, from the seconds that each is planned to take."""

    def __init__(self, planned: dict[str, float], bar: common.ProgressDisplay) -> None:
        self.planned, self.bar = planned, bar
        self.tasks: dict[str, Any] = {}
        self.started = time.perf_counter()

    def left(self, name: str) -> float:
        """Seconds left when this step begins, at the speed of the steps before it."""
        names = list(self.planned)
        done = sum(self.planned[other] for other in names[: names.index(name)])
        speed = (time.perf_counter() - self.started) / done if done else 1.0
        return speed * (sum(self.planned.values()) - done)

    def report(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of a step are done (a `total` of 0: not known yet)."""
        if name not in self.tasks:
            number = list(self.planned).index(name) + 1
            text = f"{number:2}/{len(self.planned)} {name}"
            self.tasks[name] = self.bar.add_task(f"{text}, about {duration(self.left(name))} left", total=None)
            self.bar.update(self.tasks[name], description=text)
        if total:
            self.bar.update(self.tasks[name], completed=done, total=total)


def is_report(path: Path) -> bool:
    """Whether a directory holds an earlier report, which a new one may replace."""
    try:
        data = json.loads((path / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and str(data.get("format")).startswith("nha-quickstart-")


def show(results: Results, output: Path) -> None:
    """Print the results as tables, the verdict, and where the page is."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", title=None)
    table.add_column("variant")
    for title in ("perplexity", "relative to the original", "memory"):
        table.add_column(title, justify="right")
    teacher = results.perplexity("teacher")
    for name in results.table:
        variant = results.variant(name)
        if variant is not None:
            memory = "" if variant.bytes is None else megabytes(variant.bytes)
            cells = number(variant.perplexity), change(variant.perplexity / teacher), memory
            table.add_row(VARIANTS[name][0], *cells, style="bold cyan" if name == "hybrid" else "")
    out.print()
    out.print(table)
    out.print()
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for title in ("context", "memory, original", "hybrid", "time per token, original", "hybrid"):
        table.add_column(title, justify="right")
    for cost in results.costs:
        times = ("" if ms is None else f"{ms:,.0f} ms" for ms in (cost.teacher_ms, cost.hybrid_ms))
        table.add_row(f"{cost.context:,}", megabytes(cost.teacher_bytes), megabytes(cost.hybrid_bytes), *times)
    out.print(table)
    out.print()
    judged = verdict(results)
    out.print(f"[bold]{escape(judged.opening)}[/] {escape(judged.text)}")
    out.print()
    out.print(f"Report: [bold]{escape(str(output / 'index.html'))}[/]", soft_wrap=True)
    if results.saved_to:
        out.print(f"Try it: [cyan]nha chat {escape(shlex.quote(results.saved_to))}[/]", soft_wrap=True)
