"""`nha search`: which layers should keep full attention."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nha.cli import common
from nha.cli.common import BadInput, command, err, human_bytes, out, print_json
from nha.io import write_atomically
from nha.models import loading

if TYPE_CHECKING:
    from nha.convert.search import SearchResult


@command
def search(
    model: Annotated[str, typer.Argument(help="A model directory, a Hub id, or 'smollm2'; a hybrid or not yet one.")],
    output: Annotated[Path, typer.Argument(help="The JSON file for the result; an unfinished one is gone on with.")],
    full: Annotated[
        int | None, typer.Option(help="How many layers keep full attention.", show_default="4, or what --bytes allows")
    ] = None,
    most_bytes: Annotated[
        int | None, typer.Option("--bytes", help="Bytes that the cache may take at --context.", show_default=False)
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens for which the cache is counted.")] = 16384,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens in the windows of all other layers.", show_default="64, or a hybrid's most common"),
    ] = None,
    wide: Annotated[int, typer.Option(help="The window of the chosen layers; -1 is full attention.")] = -1,
    slots: Annotated[int, typer.Option(help="Slots per key-value head, for a model that is no hybrid yet.")] = 64,
    weight: Annotated[float, typer.Option(help="Weight of the recall loss; the text loss has the rest.")] = 0.5,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text file to search with; may be given several times.", show_default="built-in text"),
    ] = None,
    text_rows: Annotated[int, typer.Option(help="Rows of plain text.")] = 8,
    recall_rows: Annotated[int, typer.Option(help="Rows of recall text.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens in each row.")] = 2048,
    exchange: Annotated[bool, typer.Option(help="Exchange layers after the greedy search.")] = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the recall text.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Find the layers that should keep full attention, by the loss on recall and language text; trains nothing."""
    check_options(full, most_bytes, context, window, wide, slots, weight, dtype)
    common.check_at_least("--text-rows", text_rows, 1)
    common.check_at_least("--recall-rows", recall_rows, 1)
    common.check_at_least("--length", length, 256)
    picture = check_paths(output)
    texts = None if text is None else [common.read_text(path) for path in text]
    source = loading.find(model)
    hybrid = source.config is not None and loading.is_hybrid(source.config)
    count = full if full is not None or most_bytes is not None else 4
    check_count(source, count)

    from nha.convert.search import (
        Evaluator,
        count_for_bytes,
        load_search,
        save_search,
        search_data,
    )
    from nha.convert.search import search as find
    from nha.models.cache_file import fingerprint

    with err.status(f"loading {source.label}"):
        loaded, tokenizer = loading.load(source, dtype=dtype)
    digest = fingerprint(loaded)
    data = search_data(tokenizer, texts, text_rows=text_rows, recall_rows=recall_rows, length=length, seed=seed)
    base = base_window(loaded, window)
    settings = {
        "model": source.label,
        "weights": digest,
        "window": base,
        "wide": wide,
        "weight": weight,
        "slots": loaded.config.num_slots if hybrid else slots,
        "data": data.fingerprint,
        "dtype": str(loaded.dtype),
    }
    known = load_search(output, settings) if output.exists() else None
    if not hybrid:
        from nha.convert.hybridize import hybridize

        with common.steps(f"converting {source.label}, in memory") as advance:
            loaded = hybridize(
                loaded, num_slots=slots, window_size=base, calibration=texts, tokenizer=tokenizer, progress=advance
            )
    evaluate = Evaluator(loaded, data, base_windows(loaded, base), wide=wide, weight=weight)
    if count is None:
        count = count_for_bytes(loaded, evaluate.windows, wide, most_bytes or 0, context)
    with common.steps(f"searching {count} of {loading.layers_of(loaded.config)} layers") as advance:
        result = find(
            evaluate,
            count,
            context=context,
            settings=settings,
            known=known,
            exchange=exchange,
            save=lambda found: save_search(found, output),
            progress=advance,
        )
    if picture is not None:
        draw(result, picture)
    if as_json:
        print_json(result.to_dict())
        return
    report(result, evaluate, output, picture)


def check_options(
    full: int | None,
    most_bytes: int | None,
    context: int,
    window: int | None,
    wide: int,
    slots: int,
    weight: float,
    dtype: str,
) -> None:
    """Raise BadInput for options that cannot be, or cannot be together."""
    if full is not None and most_bytes is not None:
        raise BadInput(f"expected --full or --bytes, got both: {full} and {most_bytes}")
    common.check_at_least("--context", context, 1)
    common.check_at_least("--slots", slots, 1)
    if window is not None:
        common.check_at_least("--window", window, 0)
    if wide != -1 and wide <= (64 if window is None else window):
        raise BadInput(f"expected --wide to be -1 or above the window of the other layers, got {wide}")
    if not 0 <= weight <= 1:
        raise BadInput(f"expected --weight from 0 to 1, got {weight}")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadInput(f"expected --dtype to be auto, float32, bfloat16 or float16, got {dtype!r}")


def check_paths(output: Path) -> Path | None:
    """The picture's path beside the result's, None without matplotlib. Raises BadInput for a path that cannot be."""
    from importlib.util import find_spec

    if output.is_dir() or output.suffix != ".json":
        raise BadInput(f"expected a file name that ends in .json for the result, got {output}")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise BadInput(f"expected a directory for the result, there is none at {parent}")
    return output.with_suffix(".png") if find_spec("matplotlib") else None


def check_count(source: loading.Source, count: int | None) -> None:
    """Raise BadInput, before any weight is read, for more layers than the model has."""
    from nha.data.smollm2 import LAYERS
    from nha.models.families import check_family

    layers = LAYERS if source.config is None else loading.layers_of(source.config)
    if count is not None and not 0 <= count <= layers:
        raise BadInput(f"expected --full from 0 to {layers}, got {count}")
    if source.config is not None and not loading.is_hybrid(source.config):
        check_family(source.config)


def base_window(model: Any, window: int | None) -> int:
    """The window of layers that are not wide: as asked for, the most common one of a hybrid, or 64."""
    if window is not None:
        return window
    windows = [w for w in getattr(model.config, "window_sizes", []) if w >= 0]
    return Counter(windows).most_common(1)[0][0] if windows else 64


def base_windows(model: Any, base: int) -> list[int]:
    """The windows of all layers of a hybrid while none is wide."""
    from nha.convert.search import candidate_layers

    own = candidate_layers(model.config)
    return [base if i in own else -1 for i in range(loading.layers_of(model.config))]


def draw(result: SearchResult, picture: Path) -> None:
    """Write the picture, whole or not at all."""
    from nha.report.curves import front_png

    write_atomically(picture, front_png(result.to_dict()))


def report(result: SearchResult, evaluate: Any, output: Path, picture: Path | None) -> None:
    """Print the placements and the front."""
    from nha.convert.search import cache_bytes

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for title in (f"cache, {result.context:,} tokens", "loss, nats", "recall", "text"):
        table.add_column(title, justify="right")
    table.add_column("wide layers")
    rows = {"found": result.full_layers} | result.placements
    for name, layers in rows.items():
        losses, size = (
            result.losses(layers),
            cache_bytes(evaluate.model, evaluate.windows_of(tuple(layers)), result.context),
        )
        shown = ",".join(map(str, layers)) if len(layers) <= 12 else f"{len(layers)} layers"
        table.add_row(
            name,
            human_bytes(size),
            *(f"{losses[key]:.3f}" for key in ("loss", "recall", "text")),
            shown,
            style="bold" if name == "found" else None,
        )
    out.print(table)
    out.print("\n[dim]the best found at every size of the cache[/]")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("layers", "cache", "loss, nats"):
        table.add_column(title, justify="right")
    table.add_column("which")
    for row in result.front:
        layers = row["full_layers"]
        shown = ",".join(map(str, layers)) if len(layers) <= 12 else "all"
        table.add_row(str(len(layers)), human_bytes(row["bytes"]), f"{row['loss']:.3f}", shown)
    out.print(table)
    where = f"{output}, {picture}" if picture else str(output)
    err.print(f"[dim]{len(result.evaluated)} sets measured in {result.seconds:.0f} s; saved in {where}[/]")
    out.print(f"  use it:  [cyan]nha hybridize MODEL OUTPUT --windows {output}[/]")
