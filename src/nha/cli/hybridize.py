"""`nha hybridize`: a pretrained model in, a hybrid directory out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nha.cli import common
from nha.cli.common import BadInput, command, err, out, print_json
from nha.io import atomic_directory
from nha.models import loading


@command
def hybridize(
    model: Annotated[str, typer.Argument(help="A model directory, a Hub id, or 'smollm2' for the embedded model.")],
    output: Annotated[Path, typer.Argument(help="The new directory for the hybrid.")],
    window: Annotated[
        str,
        typer.Option(help="Tokens each window holds, or a list with one entry per layer; -1: full attention."),
    ] = "64",
    slots: Annotated[int, typer.Option(help="Slots per key-value head.")] = 64,
    full_layers: Annotated[
        str, typer.Option(help="Layers that keep full attention, such as 3,11,18,26.", show_default=False)
    ] = "",
    windows: Annotated[
        Path | None,
        typer.Option(
            "--windows", help="A result of nha search, instead of --window and --full-layers.", show_default=False
        ),
    ] = None,
    init: Annotated[
        str, typer.Option(help="How gates start: kmeans, soft (for training) or paper (the authors).")
    ] = "kmeans",
    sinks: Annotated[int, typer.Option(help="Constant keys that stand in for a text's first tokens.")] = 1,
    slot_distance: Annotated[int, typer.Option(help="How many tokens back a query sees the slots.")] = 128,
    calibration: Annotated[
        Path | None, typer.Option(help="A text file to calibrate on.", show_default="built-in text")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the k-means.")] = 0,
    measure: Annotated[bool, typer.Option(help="Measure original and hybrid for the model card.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Turn a pretrained model into a hybrid and save it, weights and all."""
    layers = common.parse_ints(full_layers, "--full-layers")
    sizes = searched_windows(windows, window, layers) if windows else common.parse_windows(window)
    check_settings(slots, sinks, slot_distance, dtype)
    if init not in ("kmeans", "soft", "paper"):
        raise BadInput(f"expected --init to be kmeans, soft or paper, got {init!r}")
    common.check_new_directory(output)
    texts = None if calibration is None else [common.read_text(calibration)]
    source = loading.find(model)
    check_convertible(source, sizes, layers)

    from nha.convert.hybridize import hybridize as convert

    started = time.perf_counter()
    with err.status(f"loading {source.label}"):
        loaded, tokenizer = loading.load(source, dtype=dtype)
    forms: dict[str, Any] = {}
    ids = measuring_text(tokenizer) if measure else None
    if ids is not None:
        measure_form(forms, "original", loaded, ids)
    with common.steps(f"converting {source.label}") as advance:
        hybrid = convert(
            loaded,
            num_slots=slots,
            window_size=sizes,
            full_layers=layers,
            init=init,
            calibration=texts,
            tokenizer=tokenizer,
            slot_distance=slot_distance,
            num_sinks=sinks,
            seed=seed,
            progress=advance,
        )
    if ids is not None:
        from nha.models.observe import ablate

        measure_form(forms, "hybrid", hybrid, ids)
        with ablate(hybrid, "slots_off"):
            measure_form(forms, "hybrid, slots off", hybrid, ids)
    with err.status(f"writing {output}"):
        save(hybrid, tokenizer, output, source.base, forms, seed)
    found: dict[str, Any] = {
        "model": source.name,
        "output": str(output),
        "window_sizes": list(hybrid.config.window_sizes),
        "num_slots": slots,
        "num_sinks": sinks,
        "init": init,
        "perplexity": {name: form.value for name, form in forms.items()},
        "seconds": round(time.perf_counter() - started, 2),
    }
    if as_json:
        print_json(found)
        return
    converted = sum(w >= 0 for w in found["window_sizes"])
    out.print(f"[green]✓[/] {converted} of {len(found['window_sizes'])} layers converted, saved in [bold]{output}[/]")
    for name, form in forms.items():
        out.print(f"  perplexity {form.value:7.2f}  {name}")
    out.print(f'  try it:  [cyan]nha generate {output} "Why is the sky blue?"[/]')


def searched_windows(path: Path, window: str, layers: list[int]) -> list[int]:
    """The windows that `nha search` found. Raises BadInput where others are asked for as well."""
    from nha.convert.search import windows_from_search

    if window != "64" or layers:
        raise BadInput("expected --windows or --window and --full-layers, got both")
    return windows_from_search(path)


def check_settings(slots: int, sinks: int, slot_distance: int, dtype: str) -> None:
    """Raise BadInput for options outside what they can be."""
    common.check_at_least("--slots", slots, 1)
    common.check_at_least("--sinks", sinks, 0)
    common.check_at_least("--slot-distance", slot_distance, 0)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadInput(f"expected --dtype to be auto, float32, bfloat16 or float16, got {dtype!r}")


def check_convertible(source: loading.Source, windows: int | list[int], full_layers: list[int]) -> None:
    """Raise BadInput, before any weight is read, for a family or layer numbers that cannot be converted."""
    if source.config is None:
        from nha.data.smollm2 import LAYERS

        loading.check_window_count(windows, LAYERS)
        common.check_layers(full_layers, LAYERS)
        return
    if loading.is_hybrid(source.config):
        raise BadInput(f"expected a model to convert, {source.name} is a hybrid already")
    from nha.models.config import plan_windows
    from nha.models.families import check_family

    check_family(source.config)
    common.check_layers(full_layers, loading.layers_of(source.config))
    plan_windows(source.config, windows, full_layers)


def measuring_text(tokenizer: Any) -> Any:
    """Four stretches of 512 tokens [4, 512] of the built-in documents."""
    from nha.data.text import blocks, evaluation_documents

    return blocks(tokenizer, evaluation_documents(), 4, 512)


def measure_form(forms: dict[str, Any], name: str, model: Any, ids: Any) -> None:
    """Add the perplexity of a model on ids [N, T] to `forms`, with a progress bar."""
    from nha.evaluate.perplexity import perplexity

    with common.steps(f"measuring: {name}") as advance:
        forms[name] = perplexity(model, ids, progress=advance)


def save(model: Any, tokenizer: Any, output: Path, base: str, forms: dict[str, Any], seed: int) -> None:
    """Write the hybrid and its model card into a directory that appears only when it is whole."""
    from nha.convert.card import CardFacts, save_hybrid

    text = "4 texts of 512 tokens of the Python language reference"
    facts = CardFacts(base, {name: form.value for name, form in forms.items()}, text, seed)
    with atomic_directory(output) as work:
        save_hybrid(model, tokenizer, work, facts)
