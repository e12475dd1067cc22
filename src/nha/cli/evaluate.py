"""`nha eval`: measure a model."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nha.cli import common, loading
from nha.cli.common import BadInput, command, err, out, print_json


@command
def perplexity(
    model: Annotated[str, typer.Argument(help="A model directory, a Hub id, or 'smollm2' for the embedded model.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text file; may be given several times.", show_default="the Python language reference"),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in each stretch of text.")] = 1024,
    count: Annotated[int, typer.Option(help="Stretches to read.")] = 4,
    window: Annotated[
        str | None,
        typer.Option(help="Change a hybrid's windows for this run; -1 is the original.", show_default="as saved"),
    ] = None,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Measure a hybrid with its slots off, its window off, and the original.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Perplexity, by position in the text."""
    common.check_at_least("--length", length, 2)
    common.check_at_least("--count", count, 1)
    windows = None if window is None else common.parse_windows(window)
    texts = None if text is None else [common.read_text(path) for path in text]
    source = loading.find(model)
    hybrid = source.config is not None and loading.is_hybrid(source.config)
    if windows is not None:
        loading.check_windows_changeable(source, windows)
    if ablations and not hybrid:
        raise BadInput(f"expected a hybrid for --ablations, {source.name} is not one: convert it with nha hybridize")
    with err.status(f"loading {source.label}"):
        loaded, tokenizer = loading.load(source)

    from nha.cli.measure import as_teacher
    from nha.data.text import blocks, evaluation_documents
    from nha.evaluate import perplexity as measured
    from nha.evaluate.measure import bucket_edges
    from nha.models.adapter import ablate, set_windows

    ids = blocks(tokenizer, evaluation_documents() if texts is None else texts, count, length)
    if windows is not None:
        set_windows(loaded, windows)
    edges = bucket_edges(length)
    rows: dict[str, Any] = {}
    contexts: dict[str, Any] = {"model": None}
    if ablations:
        contexts |= {"slots off": ablate(loaded, "slots_off"), "window off": ablate(loaded, "window_off")}
        contexts |= {"original": as_teacher(loaded)}
    with common.progress_bar() as bar:
        for name, context in contexts.items():
            task = bar.add_task(f"reading: {name}", total=ids.numel())
            started = time.perf_counter()
            with context or ablate(loaded, None):
                found = measured.perplexity(loaded, ids, progress=lambda n, _, t=task: bar.update(t, completed=n))
            rows[name] = {
                "perplexity": found.value,
                "loss": found.loss,
                "standard_error": found.error,
                "by_position": found.by_position(edges),
                "seconds": round(time.perf_counter() - started, 3),
            }
    if as_json:
        shape = {"texts": len(ids), "length": length, "bucket_edges": edges}
        print_json({"model": source.name, **shape, "results": rows})
        return
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("")
    for title in ("perplexity", "loss, nats", *(f"{a}-{b}" for a, b in itertools.pairwise(edges))):
        table.add_column(title, justify="right")
    for name, row in rows.items():
        loss = f"{row['loss']:.3f} ± {row['standard_error']:.3f}" if len(ids) > 1 else f"{row['loss']:.3f}"
        table.add_row(name, f"{row['perplexity']:.2f}", loss, *(f"{value:.1f}" for value in row["by_position"]))
    out.print(table)
    err.print(f"[dim]{len(ids)} texts of {length:,} tokens; columns with numbers: perplexity by token position[/]")
