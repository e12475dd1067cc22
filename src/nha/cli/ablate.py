"""`nha ablate`: a table of models trained from scratch, row by row, and a page with the outcome."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from nha.cli import common
from nha.cli.common import BadInput, command, err, out, print_json
from nha.cli.evaluate_options import with_groups
from nha.cli.train import load_tokenizer
from nha.io import check_writable
from nha.models import loading

if TYPE_CHECKING:
    from nha.ablate.language import Sources
    from nha.ablate.run import Progress, Shard
    from nha.ablate.table import Table

UNFINISHED = 3
ONE_SHARD = "1/1"


@dataclass(frozen=True)
class Selection:
    """Options for the rows to make."""

    models: Annotated[
        str | None, typer.Option(help="Models to make, separated by commas.", show_default="the table's")
    ] = None
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas.", show_default="the table's")] = None
    lrs: Annotated[
        str | None, typer.Option(help="Learning rates, separated by commas.", show_default="the table's")
    ] = None
    shard: Annotated[
        str, typer.Option(help="I/N: one of N processes that share the rows, on GPU I of the machine.")
    ] = ONE_SHARD
    processes: Annotated[
        int | None,
        typer.Option(
            help="Processes that this command starts to share the rows.",
            show_default="on a CPU one a core for tables of recall, else one",
        ),
    ] = None
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds; a row that does not fit into what is left is not made.", show_default="no limit"),
    ] = None
    reserve: Annotated[float, typer.Option(help="Seconds to leave for measuring a language model.")] = 60.0
    together: Annotated[
        int, typer.Option(help="Rows of recall to train at once: a small model leaves most of a GPU idle.")
    ] = 1
    best_lr: Annotated[
        bool,
        typer.Option("--best-lr", help="After a model's first seed, only the learning rate that was best so far."),
    ] = False
    compile_layers: Annotated[
        bool,
        typer.Option(help="Compile the layers of recall models on a GPU: a later start, and shorter steps."),
    ] = True

    def apply(self, table: Table) -> Table:
        """The table with the rows that are asked for. Raises ValueError or BadInput for what it cannot have."""
        return table.only(
            [name.strip() for name in (self.models or "").split(",") if name.strip()],
            common.parse_ints(self.seeds, "--seeds") if self.seeds else (),
            parse_floats(self.lrs, "--lrs") if self.lrs else (),
        )


@dataclass(frozen=True)
class TextOptions:
    """Options for the text of a language table."""

    corpus: Annotated[
        Path | None, typer.Option(help="Tokens to train language models on, from nha train --prepare-only.")
    ] = None
    tokenizer: Annotated[
        str, typer.Option(help="The tokenizer that made the corpus: a directory, a Hub id, or 'smollm2'.")
    ] = loading.EMBEDDED
    data: Annotated[
        Path | None, typer.Option(help="The directory of the public sets, as for nha eval public.", show_default=False)
    ] = None

    def open(self, table: Table) -> Sources | None:
        """The text of a language table, None for one of another kind. Raises BadInput where an option is missing."""
        if table.language is None:
            return None
        if self.corpus is None or self.data is None:
            raise BadInput(
                f"expected --corpus and --data for the language table {table.name}, got {self.corpus or 'no corpus'} "
                f"and {self.data or 'no data'}"
            )
        from nha.ablate.language import open_sources
        from nha.data.corpus import open_corpus

        with common.status("reading text"):
            loaded = load_tokenizer(self.tokenizer)
            return open_sources(table.language, open_corpus(self.corpus, loaded), loaded, self.data)


ALL_ROWS, NO_TEXT = Selection(), TextOptions()


@command
@with_groups
def ablate(
    table: Annotated[str, typer.Argument(help="A table in YAML, or a built-in one; --list shows those.")] = "",
    output: Annotated[Path, typer.Option(help="The directory of the results.")] = Path("results/from_scratch"),
    rows: Selection = ALL_ROWS,
    text: TextOptions = NO_TEXT,
    summarize: Annotated[
        bool,
        typer.Option("--summarize", help="Make no row: write the page of those in the directory, and of the table."),
    ] = False,
    add: Annotated[
        list[Path] | None,
        typer.Option(help="With --summarize: a directory of results, from another machine, whose rows to add."),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the built-in tables and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Train and measure the models of a table, each from scratch, and say what of the paper's claims was seen.

    Writes summary.json, rows.csv, pictures and README.md. Run the same command again to resume; rows that are there are
    not made again. Exit code 3: rows are missing for lack of time; 1: rows failed.
    """
    since = time.time()
    if show_list:
        show_tables(as_json)
        return
    check_writable(output)
    if summarize:
        write_page(table, output, add or [])
        return
    if add:
        raise BadInput(f"expected --add together with --summarize, got {add[0]} alone")
    if not table:
        raise BadInput("expected a table, or --list to see those that are built in, got neither")
    if rows.budget is not None:
        common.check_at_least("--budget", rows.budget, 0)
    common.check_at_least("--reserve", rows.reserve, 0)
    common.check_at_least("--together", rows.together, 1)
    if rows.processes is not None:
        common.check_at_least("--processes", rows.processes, 1)
        if rows.processes > 1 and rows.shard != ONE_SHARD:
            raise BadInput(f"expected --processes without --shard, got {rows.processes} and {rows.shard}")
    from nha.ablate.record import check_record
    from nha.ablate.run import Shard
    from nha.ablate.summary import remember, write_summary
    from nha.ablate.table import read_table

    own = Shard.parse(rows.shard)
    chosen = rows.apply(read_table(table))
    check_record(output)  # before anything is trained
    sources = text.open(chosen)
    remember(read_table(table), output, name_of(table))

    progress = make_rows(chosen, output, own, rows, sources, since)
    page = write_summary(output)
    if as_json:
        print_json({"page": str(page), **vars(progress)})
    else:
        report(progress, page)
    if progress.failed:
        raise typer.Exit(1)
    if progress.late:
        raise typer.Exit(UNFINISHED)


def make_rows(
    table: Table, output: Path, shard: Shard, rows: Selection, sources: Sources | None, since: float
) -> Progress:
    """Make the rows of a table in this process, or in several; `since` is when the command began."""
    from nha.ablate.run import processes_for, run_in_processes, run_table

    options: dict[str, Any] = {
        "budget": math.inf if rows.budget is None else rows.budget,
        "sources": sources,
        "reserve": rows.reserve,
        "together": rows.together,
        "best_lr_only": rows.best_lr,
        "compile_layers": rows.compile_layers,
        "since": since,
        "log": log_line,
    }
    count = rows.processes or (processes_for(table, output) if rows.shard == ONE_SHARD else 1)
    if count > 1:
        return run_in_processes(table, output, count, **options)
    return run_table(table, output, shard=shard, **options)


def log_line(line: str) -> None:
    """Print a line about the progress."""
    err.print(line, markup=False, soft_wrap=True, highlight=False)


def name_of(table: str) -> str:
    """A table as it stands in commands for others: without the directories of this machine.

    >>> name_of("recall"), name_of("/home/me/tables/mine.yaml")
    ('recall', 'mine.yaml')
    """
    return Path(table).name if Path(table).is_absolute() else table


def write_page(table: str, output: Path, sources: list[Path]) -> None:
    """Add the rows of other directories and write the page; a table that is named is on it even without rows."""
    from nha.ablate.summary import add_rows, remember, write_summary
    from nha.ablate.table import read_table

    for source in sources:
        added, kept = add_rows(source, output)
        err.print(f"{added} rows added from {source}, {kept} there already", markup=False, soft_wrap=True)
    if table:
        remember(read_table(table), output, name_of(table))
    out.print(f"[green]✓[/] {escape(str(write_summary(output)))}", soft_wrap=True)


def report(progress: Progress, page: Path) -> None:
    """Print what became of the rows."""
    words = {
        "made": "made",
        "present": "there already",
        "elsewhere": "being made by another process",
        "late": "left out for lack of time",
        "failed": "failed",
    }
    for name, text in words.items():
        rows = getattr(progress, name)
        if rows:
            shown = ": " + "; ".join(rows) if name in ("late", "failed") else ""
            err.print(f"{len(rows)} row{'s' * (len(rows) > 1)} {text}{shown}", markup=False, soft_wrap=True)
    out.print(f"[green]✓[/] {escape(str(page))}", soft_wrap=True)


def show_tables(as_json: bool) -> None:
    """Print the built-in tables."""
    from nha.ablate.table import built_in_tables, read_table

    found = {name: read_table(name) for name in built_in_tables()}
    if as_json:
        print_json(
            {
                name: {"title": t.title, "models": [model.name for model in t.models], "rows": len(t.rows)}
                for name, t in found.items()
            }
        )
        return
    for name, t in found.items():
        out.print(f"[bold]{name}[/]: {escape(t.title)}; {len(t.models)} models, {len(t.rows)} rows", soft_wrap=True)


def parse_floats(text: str, option: str) -> list[float]:
    """Numbers separated by commas. Raises BadInput.

    >>> parse_floats("1e-3, 0.01", "--lrs")
    [0.001, 0.01]
    """
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadInput(f"expected numbers separated by commas for {option}, got {text!r}") from None
