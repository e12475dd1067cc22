"""`nha train`: text in, a model trained from scratch out; a run that was stopped is resumed."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from nha.cli import common
from nha.cli.common import BadInput, command, duration, err, human_bytes, out, print_json
from nha.cli.corpus import Text, report_corpus
from nha.cli.distill import exit_code
from nha.cli.options import option_errors, with_settings
from nha.distill.stopping import Stop, handle_signals
from nha.io import atomic_directory, check_writable
from nha.models import loading
from nha.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nha.data.corpus import Corpus
    from nha.train.estimate import Estimate
    from nha.train.run import TrainResult


@command
@with_settings(TrainSettings, file=True)
def train(
    output: Annotated[
        Path, typer.Argument(help="The directory of the run: settings, checkpoints, log, and the model in model/.")
    ],
    settings: TrainSettings,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to train on: a file, a folder, or datasets:NAME. May be given several times."),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(help="Where the tokens of the text are kept, to be read again.", show_default="OUTPUT.corpus"),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="The tokenizer: a directory, a Hub id, or 'smollm2'.")
    ] = loading.EMBEDDED,
    field: Annotated[str, typer.Option(help="The field with the text in .jsonl, .parquet and datasets.")] = "text",
    held_out: Annotated[float, typer.Option(help="Fraction of the documents that are never trained on.")] = 0.02,
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Read the text and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate memory and time, and stop; needs no text.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="GPUs that --dry-run estimates for, such as H100 or H100:8.", show_default="the one here"),
    ] = None,
    mfu: Annotated[float, typer.Option(help="Fraction of the GPU's peak that --dry-run assumes.")] = 0.35,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Train a model from scratch.

    Run the same command again to resume a run that was stopped, in whatever way. Exit code 3: stopped by --budget;
    130 and 143: by SIGINT and SIGTERM, with a checkpoint.
    """
    own, load = Text(text, corpus, output, field, held_out), partial(load_tokenizer, tokenizer)
    common.check_range("--held-out", held_out, at_least=0, below=1)
    if not prepare_only and common.rank() == 0:  # under torchrun the first may be writing already
        from nha.distill.checkpoint import check_place

        check_place(output)
    if dry_run:
        common.check_range("--mfu", mfu, above=0, at_most=1)
        found = own.check(load)
        with option_errors(TrainSettings):
            report_estimate(settings, len(load()), found, (*common.parse_gpus(gpu), mfu), as_json)
        return
    stop = Stop(settings.budget)
    try:
        with handle_signals(stop):
            if text is None and corpus is None:
                raise BadInput("expected --text to train on, or --corpus of an earlier run, got neither")
            check_settings(settings)
            check_writable(output)
            loaded, opened = own.read(load)
            if prepare_only:
                report_corpus(opened, as_json)
                return
            run(loaded, opened, output, settings, stop, as_json)
    except KeyboardInterrupt:
        reason = stop.reason or "SIGINT"
        err.print(f"{reason}: stopped before the first step; run the same command again to start", soft_wrap=True)
        raise typer.Exit(exit_code(reason)) from None


def check_settings(settings: TrainSettings) -> None:
    """Raise BadInput for settings that no text can train with on this machine, before any is read."""
    from nha.train.run import check_fit

    with option_errors(TrainSettings):
        check_fit(settings, vocab_size=64, world=common.world_size())


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by name. Raises BadInput for a directory without one."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        from transformers import AutoTokenizer

        if not any((Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
            raise BadInput(f"expected a tokenizer.json in {name}, there is none")
        return AutoTokenizer.from_pretrained(name)
    return loading.load_tokenizer(loading.find(name))


def report_estimate(
    settings: TrainSettings,
    vocabulary: int,
    corpus: Corpus | None,
    machine: tuple[str | None, int, float],
    as_json: bool,
) -> None:
    """Print parameters, memory and time of a run on a machine: (GPU, how many, fraction of their peak)."""
    import torch

    from nha.models.nha import NHAForCausalLM
    from nha.train.estimate import PEAK_OPERATIONS, device_bytes, estimate, peak_operations
    from nha.train.presets import model_config
    from nha.train.run import check_data

    gpu, gpus, mfu = machine
    if gpu is not None and peak_operations(gpu) is None:
        raise BadInput(f"expected --gpu to be one of {', '.join(PEAK_OPERATIONS)}, got {gpu!r}")
    with torch.device("meta"):
        model = NHAForCausalLM(model_config(settings, vocabulary))
    check_data(corpus, model.config, settings)
    found = estimate(model, settings, world=gpus, device=gpu, utilisation=mfu)
    available = device_bytes() if gpu is None else None
    if as_json:
        print_json(dataclasses.asdict(found) | {"total_bytes": found.total_bytes, "device_bytes": available})
        return
    out.print(estimate_table(found, settings, available, gpus))


def estimate_table(found: Estimate, settings: TrainSettings, available: int | None, gpus: int) -> Table:
    """An estimate as a table."""
    table = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
    room = "" if available is None else f", of {human_bytes(available)} there"
    devices = "one device" if gpus == 1 else f"each of {gpus} devices"
    rows = {
        "parameters": f"{found.parameters / 1e6:,.1f} M",
        "tokens": f"{found.tokens:,.0f} in {found.steps:,} steps of {settings.batch_size} x {settings.seq_len:,}",
        "operations": f"{found.operations_per_token / 1e9:,.2f} G a token, "
        f"{found.operations_per_token * found.tokens:.3g} in all",
        "memory": f"about {human_bytes(found.total_bytes)} on {devices}{room}: "
        f"{human_bytes(found.weights_bytes)} of weights, gradients and optimizer, "
        f"about {human_bytes(found.activation_bytes)} of activations",
        "time": "unknown: no GPU here whose peak is known, name one with --gpu"
        if found.seconds is None
        else f"about {duration(found.seconds)} at {100 * found.utilisation:.0f} % of the peak, which --mfu names",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def run(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    output: Path,
    settings: TrainSettings,
    stop: Stop,
    as_json: bool,
) -> None:
    """Train, show the progress, and save the model."""
    with option_errors(TrainSettings):
        found, steps = train_with_progress(corpus, output, settings, stop)
    if common.rank() != 0:
        return
    result: dict[str, Any] = {
        "output": str(output),
        "finished": found.finished,
        "stopped_by": found.stopped_by,
        "steps": found.steps,
        "summary": found.summary,
        "model": None,
        "settings": dataclasses.asdict(settings),
    }
    if found.finished:
        with common.status("writing the model"), atomic_directory(output / "model") as work:
            found.model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            about = {"settings": dataclasses.asdict(settings), "summary": found.summary}
            (work / "training.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        result["model"] = str(output / "model")
    report(result, steps, as_json)


def train_with_progress(corpus: Corpus, output: Path, settings: TrainSettings, stop: Stop) -> tuple[TrainResult, int]:
    """Train with progress on stderr. Returns the outcome and the number of steps in all."""
    from nha.distill.trainer import Reports
    from nha.train.run import train as train_model

    steps = settings.steps()
    if common.rank() != 0:
        return train_model(corpus, output, settings, stop=stop), steps
    with common.progress_bar() as bar:
        tasks: dict[str, Any] = {}  # added when there is progress: what does not fit is refused in one line alone
        texts = {"train": "training"}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(texts[stage], total=total)
            bar.update(tasks[stage], completed=done, total=total, description=texts[stage])

        def log(entry: dict[str, float]) -> None:
            if "loss" in entry:
                texts["train"] = describe(entry)
                progress("train", int(entry["step"]), steps)

        return train_model(corpus, output, settings, reports=Reports(log=log, progress=progress), stop=stop), steps


def describe(entry: dict[str, float]) -> str:
    """An entry of the log, or a summary, in a few words.

    >>> describe({"loss": 3.21, "tokens_per_s": 96000.0, "mfu": 0.41, "peak_memory_bytes": 5e9})
    'loss 3.210, 96,000 tokens/s, 41 % of the peak, 5.0 GB'
    """
    parts = [f"loss {entry['loss']:.3f}"] if entry.get("loss") is not None else []
    parts += [f"held-out loss {entry['eval_loss']:.3f}"] if "eval_loss" in entry else []
    parts += [f"{entry['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in entry else []
    parts += [f"{100 * entry['mfu']:.0f} % of the peak"] if "mfu" in entry else []
    return ", ".join([*parts, human_bytes(entry["peak_memory_bytes"])])


def report(result: dict[str, Any], steps: int, as_json: bool) -> None:
    """Print the outcome; leaves with a code of its own if the run is not finished."""
    if as_json:
        print_json(result)
    elif result["finished"]:
        model = escape(result["model"])
        out.print(f"[green]✓[/] {result['steps']:,} steps, saved in [bold]{model}[/]", soft_wrap=True)
        out.print(f"  {describe(result['summary'])}", soft_wrap=True)
        out.print(f'  try it:  [cyan]nha generate {model} "The sky is"[/]', soft_wrap=True)
    if not result["finished"]:
        reason = result["stopped_by"] or "budget"
        done = f"stopped by {reason} after {result['steps']:,} of {steps:,} steps, with a checkpoint"
        err.print(f"{done}; run the same command again to resume", soft_wrap=True)
        raise typer.Exit(exit_code(reason))
