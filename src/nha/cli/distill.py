"""`nha distill`: a teacher and some text in, a trained hybrid out; a run that was stopped goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nha.cli import common
from nha.cli.common import BadInput, command, err, out, print_json
from nha.cli.hybridize import check_convertible, searched_windows
from nha.io import atomic_directory
from nha.models import loading

if TYPE_CHECKING:
    from nha.data.corpus import Corpus
    from nha.distill.run import DistillSettings

UNFINISHED = 3


@command
def distill(
    model: Annotated[str, typer.Argument(help="The teacher: a model directory, a Hub id, or 'smollm2'.")],
    output: Annotated[
        Path, typer.Argument(help="The directory of the run: settings, checkpoint, log, and the hybrid in hybrid/.")
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to train on: a file, a folder, or datasets:NAME. May be given several times."),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Where the tokens of the text are kept, or were by an earlier run.", show_default="OUTPUT.corpus"
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Where texts are in .jsonl, .parquet and datasets.")] = "text",
    held_out: Annotated[float, typer.Option(help="Share of documents that are never trained on.")] = 0.02,
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Read the text and stop.")] = False,
    window: Annotated[
        str, typer.Option(help="Tokens each window holds, or a list with one entry per layer; -1: full attention.")
    ] = "64",
    windows: Annotated[
        Path | None,
        typer.Option(help="A result of nha search, instead of --window and --full-layers.", show_default=False),
    ] = None,
    slots: Annotated[int, typer.Option(help="Slots per key-value head.")] = 64,
    full_layers: Annotated[
        str, typer.Option(help="Layers that keep full attention, such as 3,11,18,26.", show_default=False)
    ] = "",
    init: Annotated[str, typer.Option(help="How gates start: spread, soft, kmeans or paper.")] = "spread",
    sinks: Annotated[int, typer.Option(help="Constant keys that stand in for a text's first tokens.")] = 1,
    slot_distance: Annotated[int, typer.Option(help="How many tokens back a query sees the slots.")] = 128,
    tokens: Annotated[float, typer.Option(help="Tokens to train on, such as 20e6.")] = 20e6,
    rows: Annotated[int, typer.Option(help="Rows of a step, on each GPU.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 2048,
    micro_batch_size: Annotated[int, typer.Option(help="Rows that go through the model at a time; 0: all.")] = 0,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations, for less memory.")] = False,
    long_tokens: Annotated[
        float, typer.Option(help="How many of the tokens to read in longer rows, at the end.")
    ] = 0.0,
    long_length: Annotated[int, typer.Option(help="Tokens of such a row.")] = 8192,
    align_steps: Annotated[int, typer.Option(help="Steps of aligning each layer first; 0: none.")] = 40,
    trained: Annotated[str, typer.Option(help="What is trained: attention, layers, lora or slots.")] = "attention",
    rank: Annotated[int, typer.Option(help="Rank of the adapters of lora.")] = 16,
    rate: Annotated[
        float | None,
        typer.Option(help="Learning rate of weights.", show_default="2e-3, less for models wider than 576"),
    ] = None,
    gate_lr: Annotated[
        float | None, typer.Option(help="Learning rate of gates.", show_default="8e-3, less for wider models")
    ] = None,
    divergence: Annotated[float, typer.Option(help="Weight of the divergence from the teacher.")] = 1.0,
    cross_entropy: Annotated[float, typer.Option(help="Weight of the cross-entropy of text.")] = 0.5,
    recall: Annotated[float, typer.Option(help="Share of rows that are recall text.")] = 0.125,
    answers: Annotated[float, typer.Option(help="Weight of the cross-entropy of its answers.")] = 0.5,
    facts: Annotated[int, typer.Option(help="Most facts in a row of recall text.")] = 16,
    far: Annotated[float, typer.Option(help="Share of that text that asks from far, up to the whole row.")] = 0.0,
    grow: Annotated[float, typer.Option(help="Share of the steps after which rows hold the most facts.")] = 0.0,
    gradients: Annotated[
        str, typer.Option(help="Gradients of text and recall text: clip or normalise each, or together.")
    ] = "normalise",
    window_dropout: Annotated[float, typer.Option(help="Share of steps with a quarter of the windows.")] = 0.0,
    dtype: Annotated[
        str, typer.Option(help="auto, float32 or bfloat16.", show_default="bfloat16 on a GPU, float32 on a CPU")
    ] = "auto",
    compiled: Annotated[
        str | None,
        typer.Option(
            "--compile",
            help="What is compiled: layers, or nothing (a minute less before the first step).",
            show_default="layers on one GPU, else nothing",
        ),
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    log_every: Annotated[int, typer.Option(help="Steps between entries of the log.")] = 10,
    budget: Annotated[
        float | None, typer.Option(help="Stop after this many seconds, with a checkpoint.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Turn a pretrained model into a hybrid and train it to be like what it was.

    The same command goes on with a run that was stopped, in whatever way. Exit code 3: stopped by --budget.
    """
    if text is None and corpus is None:
        raise BadInput("expected --text to train on, or --corpus of an earlier run, got neither")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"expected --dtype to be auto, float32 or bfloat16, got {dtype!r}")
    layers = common.parse_ints(full_layers, "--full-layers")
    given = common.parse_windows(window) if windows is None else searched_windows(windows, window, layers)
    source = loading.find(model)
    check_convertible(source, given, layers)

    from nha.data.recall import RecallSettings
    from nha.distill.run import DistillSettings

    settings = DistillSettings(
        window_size=tuple(given) if isinstance(given, list) else given,
        num_slots=slots,
        full_layers=tuple(layers),
        init=init,
        num_sinks=sinks,
        slot_distance=slot_distance,
        tokens=tokens,
        long_tokens=long_tokens,
        rows=rows,
        length=length,
        long_length=long_length,
        align_steps=align_steps,
        rate=rate,
        gate_lr=gate_lr,
        trained=trained,
        rank=rank,
        divergence=divergence,
        cross_entropy=cross_entropy,
        recall_share=recall,
        recall=RecallSettings(facts=(1, facts), long_range_fraction=far),
        grow=grow,
        answers=answers,
        gradients=gradients,
        window_dropout=window_dropout,
        micro_batch_size=micro_batch_size,
        checkpointing=checkpointing,
        save_every=save_every,
        log_every=log_every,
        seed=seed,
    )
    settings.check()
    cache = corpus or output.with_name(output.name + ".corpus")
    opened = read_text(source, text, cache, field, held_out)
    if prepare_only:
        report_corpus(opened, as_json)
        return
    run(source, opened, output, settings, dtype, compiled, budget, as_json)


def read_text(source: loading.Source, text: list[str] | None, cache: Path, field: str, held_out: float) -> Corpus:
    """The corpus in `cache`, made from `text` if that is given and it is not there yet."""
    from nha.data.corpus import open_corpus
    from nha.data.prepare import prepare
    from nha.data.sources import check_sources

    if text is not None:
        check_sources(text)
    with err.status("loading the tokenizer"):
        tokenizer = loading.load_tokenizer(source)
    if text is None:
        return open_corpus(cache, tokenizer)
    with common.progress_bar() as bar:
        task = bar.add_task("reading text", total=None)

        def progress(documents: int, tokens: int) -> None:
            bar.update(task, completed=documents, description=f"reading text: {tokens / 1e6:.1f} M tokens")

        found = prepare(text, cache, tokenizer, field=field, held_out_fraction=held_out, progress=progress)
        bar.update(task, total=len(found.held), completed=len(found.held))
    return found


def report_corpus(corpus: Corpus, as_json: bool) -> None:
    """Say what a corpus holds."""
    held = corpus.meta["held_out"]
    found: dict[str, Any] = {
        "corpus": str(corpus.path),
        "tokens": corpus.meta["tokens"],
        "documents": corpus.meta["documents"],
        "held_out": held,
        "bytes": sum(file.stat().st_size for file in corpus.path.iterdir()),
    }
    if as_json:
        print_json(found)
        return
    out.print(
        f"[green]✓[/] {found['tokens']:,} tokens of {found['documents']:,} documents in [bold]{corpus.path}[/] "
        f"({common.human_bytes(found['bytes'])}), {held['tokens']:,} tokens of them held out",
        soft_wrap=True,
    )


def run(
    source: loading.Source,
    corpus: Corpus,
    output: Path,
    settings: DistillSettings,
    dtype: str,
    compiled: str | None,
    budget: float | None,
    as_json: bool,
) -> None:
    """Train, show how it goes, and save the hybrid."""
    import os

    import torch

    from nha.distill.run import distill as train
    from nha.distill.run import saved_hybrid

    main = os.environ.get("RANK", "0") == "0"
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    with err.status(f"loading {source.label}"):
        loaded, tokenizer = loading.load(source, dtype=dtype)
    steps = settings.mixture(int(os.environ.get("WORLD_SIZE", "1"))).steps
    with common.progress_bar() as bar:
        tasks: dict[str, Any] = {}  # shown once there is something to show: what does not fit is one line alone

        def show(name: str, done: int, total: int, text: str) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(text, total=total)
            bar.update(tasks[name], completed=done, total=total, description=text)

        def report(entry: dict[str, float]) -> None:
            show("train", int(entry["step"]), steps, describe(entry))

        found = train(
            loaded,
            tokenizer,
            corpus,
            output,
            settings,
            compiled=compiled,
            report=report,
            budget=budget,
            progress=lambda done, total: show("align", done, total, "aligning layers"),
        )
    if not main:
        return
    last = found.log[-1] if found.log else {}
    result: dict[str, Any] = {
        "model": source.name,
        "output": str(output),
        "finished": found.finished,
        "steps": found.steps,
        "last": last,
        "hybrid": None,
        "settings": dataclasses.asdict(settings),
    }
    if found.finished:
        with err.status("writing the hybrid"), atomic_directory(output / "hybrid") as work:
            saved_hybrid(found, tokenizer, work, source.base, corpus, settings)
        result["hybrid"] = str(output / "hybrid")
    if as_json:
        print_json(result)
    elif found.finished:
        out.print(f"[green]✓[/] {found.steps:,} steps, saved in [bold]{output / 'hybrid'}[/]", soft_wrap=True)
        out.print(f"  {describe(last)}", soft_wrap=True)
        out.print(f'  try it:  [cyan]nha generate {output / "hybrid"} "Why is the sky blue?"[/]', soft_wrap=True)
    else:
        err.print(f"stopped after {found.steps:,} of {steps:,} steps; the same command goes on", soft_wrap=True)
    if not found.finished:
        raise typer.Exit(UNFINISHED)


def describe(entry: dict[str, float]) -> str:
    """An entry of the log in a few words.

    >>> describe({"step": 3, "divergence": 0.1234, "answers_right": 0.5, "tokens_per_s": 96000.0})
    'training: divergence 0.123, answers 50 %, 96,000 tokens/s'
    """
    parts = []
    for name, word in (("divergence", "divergence"), ("cross_entropy", "loss")):
        if entry.get(name):
            parts.append(f"{word} {entry[name]:.3f}")
            break
    if entry.get("answer_loss") or entry.get("answers_right"):
        parts.append(f"answers {100 * entry['answers_right']:.0f} %")
    parts.append(f"{entry.get('tokens_per_s', 0):,.0f} tokens/s")
    return "training: " + ", ".join(parts)
