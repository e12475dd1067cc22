"""`nha search`: which layers should keep full attention."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from nha.cli import common
from nha.cli.common import BadInput, command, err, human_bytes, out, print_json
from nha.cli.distill import layers_of
from nha.cli.options import with_settings
from nha.cli.search_heads import search_heads
from nha.convert.settings import FULL_FRACTION, SearchSettings, fraction_of
from nha.io import check_writable, write_atomically
from nha.models import loading

if TYPE_CHECKING:
    from nha.convert.search import SearchResult


@command
@with_settings(SearchSettings)
def search(
    model: Annotated[str, typer.Argument(help="A model directory, a Hub id, or 'smollm2'; a hybrid or not yet one.")],
    output: Annotated[Path, typer.Argument(help="The JSON file for the result; an unfinished one is resumed.")],
    settings: SearchSettings,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text file to search with; may be given several times. With --heads also a folder or .jsonl file.",
            show_default="built-in text",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Find the layers or, with --heads or --keep, the KV heads that should keep full attention or get a wide window.

    Layers are compared by the loss on recall and language text. Heads are found by learned weights that mix full and
    narrow attention while the model copies from real text: under a minute on a GPU, minutes on a CPU. No weight of the
    model changes. Run the same command again to resume a search for layers that was stopped, or to make another plan
    of the weights that heads have.
    """
    picture = check_paths(output)
    if settings.heads is not None or settings.keep is not None:
        search_heads(loading.find_to_convert(model), output, settings, text, as_json)
        return
    texts = None if text is None else [common.read_text(path) for path in text]
    source = loading.find_to_convert(model)
    hybrid = source.config is not None and loading.is_hybrid(source.config)
    count = count_full(source, settings)

    from nha.convert.search import Evaluator, count_for_bytes, load_search, save_search, search_data
    from nha.convert.search import search as find
    from nha.models.cache_file import fingerprint

    if output.exists():  # a file of another kind is refused before the model is loaded
        load_search(output)
    with err.status(f"loading {escape(source.label)}"):
        loaded, tokenizer = loading.load(source, dtype=settings.dtype)
    data = search_data(
        tokenizer,
        texts,
        text_sequences=settings.text_sequences,
        recall_sequences=settings.recall_sequences,
        seq_len=settings.seq_len,
        seed=settings.seed,
    )
    base = base_window(loaded, settings.window_size)
    measured_with = {
        "model": source.label,
        "weights": fingerprint(loaded),
        "window_size": base,
        "wide_window": settings.wide_window,
        "recall_weight": settings.recall_weight,
        "num_slots": loaded.config.num_slots if hybrid else settings.num_slots,
        "data": data.fingerprint,
        "dtype": str(loaded.dtype),
    }
    known = load_search(output, measured_with) if output.exists() else None
    if not hybrid:
        loaded = convert_in_memory(source, loaded, tokenizer, settings.num_slots, base, texts)
    evaluate = Evaluator(
        loaded,
        data,
        base_windows(loaded, base),
        wide_window=settings.wide_window,
        recall_weight=settings.recall_weight,
    )
    if count is None:
        count = count_for_bytes(
            loaded, evaluate.windows, settings.wide_window, settings.max_bytes or 0, settings.context
        )
    with common.steps(f"searching {count} of {loading.layers_of(loaded.config)} layers") as advance:
        result = find(
            evaluate,
            count,
            context=settings.context,
            settings=measured_with,
            known=known,
            exchange=settings.exchange,
            save=lambda found: save_search(found, output),
            progress=advance,
        )
    if picture is not None:
        draw(result, picture)
    if as_json:
        print_json(result.to_dict())
        return
    report(result, evaluate, output, picture, hybrid)


def convert_in_memory(
    source: loading.Source, model: Any, tokenizer: Any, num_slots: int, window_size: int, texts: list[str] | None
) -> Any:
    """A hybrid to search with, of a model that is none yet."""
    from nha.convert.hybridize import hybridize

    with common.steps(f"converting {source.label}, in memory") as advance:
        return hybridize(
            model,
            num_slots=num_slots,
            window_size=window_size,
            calibration=texts,
            tokenizer=tokenizer,
            progress=advance,
        )


def check_paths(output: Path) -> Path | None:
    """The picture's path beside the result's, None without matplotlib. Raises for a path that cannot be written."""
    from importlib.util import find_spec

    if output.is_dir() or output.suffix != ".json":
        raise BadInput(f"expected a file name that ends in .json for the result, got {output}")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise BadInput(f"expected a directory for the result, there is none at {parent}")
    check_writable(output.resolve().parent)
    return output.with_suffix(".png") if find_spec("matplotlib") else None


def count_full(source: loading.Source, settings: SearchSettings) -> int | None:
    """How many layers to find, None for as many as --bytes allows.

    Raises BadInput, before any weight is read, for more layers than the model has and for what cannot be converted.
    """
    from nha.models.families import check_family

    layers, count = layers_of(source), settings.num_full
    if count is not None and not 0 <= count <= layers:
        raise BadInput(f"expected --full from 0 to {layers}, got {count}")
    if source.config is not None and not loading.is_hybrid(source.config):
        check_family(source.config.get_text_config())
    return fraction_of(layers, FULL_FRACTION) if count is None and settings.max_bytes is None else count


def base_window(model: Any, window: int | None) -> int:
    """The window of layers without full attention: as asked for, the most common one of a hybrid, or 64."""
    if window is not None:
        return window
    windows = [w for w in getattr(model.config, "window_sizes", []) if w >= 0]
    return Counter(windows).most_common(1)[0][0] if windows else 64


def base_windows(model: Any, base: int) -> list[int]:
    """The windows of all layers of a hybrid while none is chosen."""
    from nha.convert.search import candidate_layers

    own = candidate_layers(model.config)
    return [base if i in own else -1 for i in range(loading.layers_of(model.config))]


def draw(result: SearchResult, picture: Path) -> None:
    """Write the picture, whole or not at all."""
    from nha.report.curves import front_png

    write_atomically(picture, front_png(result.to_dict()))


def report(result: SearchResult, evaluate: Any, output: Path, picture: Path | None, hybrid: bool) -> None:
    """Print the placements, the front and how to use them; a hybrid is not converted again, but its original is."""
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
    err.print(f"[dim]{len(result.evaluated)} sets measured in {result.seconds:.0f} s; saved in {escape(where)}[/]")
    use = "distill ORIGINAL" if hybrid else "hybridize MODEL"
    out.print(f"  use it:  [cyan]nha {use} OUTPUT --windows {escape(str(output))}[/]")
