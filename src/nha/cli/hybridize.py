"""`nha hybridize`: a pretrained model in, a hybrid directory out."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from nha.cli import common
from nha.cli.common import BadInput, command, err, out, print_json
from nha.cli.options import with_settings
from nha.convert.settings import HybridizeSettings, searched_layers
from nha.io import atomic_directory
from nha.models import loading

if TYPE_CHECKING:
    from nha.evaluate.perplexity import Perplexity
    from nha.ops.heads import Window


WINDOWS_HELP = (
    "A JSON file of windows, as nha search writes it, instead of --window and --full-layers; or windows of single "
    "layers and KV heads beside these two, such as 15.2=256,8=-1 for head 2 of layer 15 and all of layer 8."
)


@command
@with_settings(HybridizeSettings)
def hybridize(
    model: Annotated[str, typer.Argument(help="A model directory, a Hub id, or 'smollm2' for the embedded model.")],
    output: Annotated[Path, typer.Argument(help="The new directory for the hybrid.")],
    settings: HybridizeSettings,
    windows: Annotated[
        str | None,
        typer.Option(help=WINDOWS_HELP, show_default=False),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A text file to calibrate on.", show_default="built-in text")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure original and hybrid for the model card.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Turn a pretrained model into a hybrid and save it, weights and all."""
    given = settings.window_size
    sizes: int | list[Window] = given if isinstance(given, int) else list(given)
    common.check_new_directory(output)
    texts = None if calibration is None else [common.read_text(calibration)]
    source = loading.find_to_convert(model)
    layers = list(settings.full_layers or ())
    if windows is not None:
        sizes, layers = searched_windows(windows, source, sizes, settings.full_layers), []
    elif settings.full_layers is None and isinstance(sizes, int):
        layers = list(searched_layers(source.base))
    check_convertible(source, sizes, layers)

    started = time.perf_counter()
    with err.status(f"loading {escape(source.label)}"):
        loaded, tokenizer = loading.load(source, dtype=settings.dtype)
    hybrid, measured = convert(source, loaded, tokenizer, settings, sizes, layers, texts, measure)
    with err.status(f"writing {escape(str(output))}"):
        save(hybrid, tokenizer, output, source.base, measured, settings.seed)
    found: dict[str, Any] = {
        "model": source.name,
        "output": str(output),
        "window_sizes": list(hybrid.config.window_sizes),
        "num_slots": hybrid.config.num_slots,
        "num_sinks": hybrid.config.num_sinks,
        "init": settings.init,
        "slot_write": hybrid.config.slot_write,
        "perplexity": {name: variant.value for name, variant in measured.items()},
        "seconds": round(time.perf_counter() - started, 2),
    }
    if as_json:
        print_json(found)
        return
    converted = sum(w != -1 for w in found["window_sizes"])
    shown = escape(str(output))
    out.print(f"[green]✓[/] {converted} of {len(found['window_sizes'])} layers converted, saved in [bold]{shown}[/]")
    for name, variant in measured.items():
        out.print(f"  perplexity {variant.value:7.2f}  {name}")
    out.print(f'  try it:  [cyan]nha generate {shown} "Why is the sky blue?"[/]')


def convert(
    source: loading.Source,
    model: Any,
    tokenizer: Any,
    settings: HybridizeSettings,
    windows: int | list[Window],
    full_layers: list[int],
    texts: list[str] | None,
    measure: bool,
) -> tuple[Any, dict[str, Perplexity]]:
    """The hybrid, and perplexities of original and hybrid by name, if they are to be measured."""
    from nha.convert.hybridize import calibration_ids
    from nha.convert.hybridize import hybridize as convert_model
    from nha.models.observe import ablate

    if texts is not None:  # too little text is refused before anything is measured
        calibration_ids(model, texts, tokenizer, settings.num_slots)
    measured: dict[str, Perplexity] = {}
    ids = measuring_text(tokenizer) if measure else None
    if ids is not None:
        measure_variant(measured, "original", model, ids)
    with common.steps(f"converting {source.label}") as advance:
        hybrid = convert_model(
            model,
            num_slots=settings.num_slots,
            window_size=windows,
            full_layers=full_layers,
            init=settings.init,  # pyright: ignore[reportArgumentType]
            calibration=texts,
            tokenizer=tokenizer,
            slot_distance=settings.slot_distance,
            num_sinks=settings.num_sinks,
            slot_write=settings.slot_write,
            seed=settings.seed,
            progress=advance,
        )
    if ids is not None:
        measure_variant(measured, "hybrid", hybrid, ids)
        with ablate(hybrid, "slots_off"):
            measure_variant(measured, "hybrid, slots off", hybrid, ids)
    return hybrid, measured


def searched_windows(
    given: str, source: loading.Source, window_size: int | Sequence[Window], full_layers: Collection[int] | None
) -> list[Window]:
    """The windows of all layers that --windows names: those of a file, or changes to the windows of other options.

    Raises BadInput where a file and other options name windows.
    """
    from nha.convert.heads import is_head_text, windows_from_plan, windows_from_text

    if not is_head_text(given):
        if window_size != HybridizeSettings().window_size or full_layers:
            raise BadInput("expected --windows or --window and --full-layers, got both")
        return list(windows_from_plan(given))
    if source.config is None:
        from nha.models.smollm2 import KV_HEADS, LAYERS

        windows = [window_size] * LAYERS if isinstance(window_size, int) else list(window_size)
        loading.check_window_count(windows, LAYERS)
        common.check_layers(list(full_layers or ()), LAYERS)
        return list(windows_from_text(given, with_full(windows, full_layers), KV_HEADS))
    from nha.models.config import plan_windows

    text = source.config.get_text_config()
    windows = plan_windows(text, window_size, list(full_layers or ()))
    return list(windows_from_text(given, windows, text.num_key_value_heads))


def with_full(windows: Sequence[Window], full_layers: Collection[int] | None) -> list[Window]:
    """The windows with full attention in some layers."""
    full = {layer % len(windows) for layer in full_layers or ()}
    return [-1 if layer in full else window for layer, window in enumerate(windows)]


def check_convertible(
    source: loading.Source, windows: int | Sequence[Window], full_layers: list[int]
) -> Sequence[Window]:
    """The window of every layer.

    Raises BadInput, before any weight is read, for a family that cannot be converted, and for layer numbers and windows
    that the model cannot have.
    """
    if source.config is None:
        from nha.models.smollm2 import LAYERS

        loading.check_window_count(windows, LAYERS)
        common.check_layers(full_layers, LAYERS)
        return with_full([windows] * LAYERS if isinstance(windows, int) else windows, full_layers)
    if loading.is_hybrid(source.config):
        raise BadInput(f"expected a model to convert, {source.name} is a hybrid already")
    from nha.models.config import plan_windows
    from nha.models.families import check_family

    text = source.config.get_text_config()
    check_family(text)
    common.check_layers(full_layers, loading.layers_of(source.config))
    return plan_windows(text, windows, full_layers)


def measuring_text(tokenizer: Any) -> Any:
    """Four texts of 512 tokens, ids [4, 512], of the built-in documents."""
    from nha.data.text import blocks, evaluation_documents

    return blocks(tokenizer, evaluation_documents(), 4, 512)


def measure_variant(measured: dict[str, Perplexity], name: str, model: Any, ids: Any) -> None:
    """Add the perplexity of a model on ids [N, T] to `measured`, with a progress bar."""
    from nha.evaluate.perplexity import perplexity

    with common.steps(f"measuring: {name}") as advance:
        measured[name] = perplexity(model, ids, progress=advance)


def save(model: Any, tokenizer: Any, output: Path, base: str, measured: Mapping[str, Perplexity], seed: int) -> None:
    """Write the hybrid and its model card into a directory that appears only when it is whole."""
    from nha.convert.card import CardFacts, save_hybrid

    text = "4 texts of 512 tokens of the Python language reference"
    facts = CardFacts(base, {name: variant.value for name, variant in measured.items()}, text, seed)
    with atomic_directory(output) as work:
        save_hybrid(model, tokenizer, work, facts)
