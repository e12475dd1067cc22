"""`nha distill`: a teacher and some text in, a trained hybrid out; a run that was stopped is resumed."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from nha.cli import common
from nha.cli.common import BadInput, command, err, out, print_json
from nha.cli.corpus import Text, report_corpus
from nha.cli.evaluate_options import with_groups
from nha.cli.hybridize import WINDOWS_HELP, check_convertible, searched_windows
from nha.cli.options import given_options, make_settings, option_errors, with_settings
from nha.convert.head_ranks import HeadRanks, searched_heads, spread_heads
from nha.distill.recipes import RECIPES, recipe_settings, takes_heads
from nha.distill.settings import CONTROL, TEACHER, DistillSettings
from nha.distill.stopping import Stop, handle_signals
from nha.distill.timeline import BEGUN, Timeline
from nha.io import atomic_directory, check_writable
from nha.models import loading

if TYPE_CHECKING:
    from nha.data.corpus import Corpus
    from nha.distill.estimate import Estimate
    from nha.distill.run import Distilled

UNFINISHED = 3
RANKING_SECONDS = 3600.0  # that other processes wait for the one that ranks the heads, at most
H100_BYTES = 80e9
LARGE_MEMORY = 40 << 30  # from here on an estimate names what recomputing activations takes
ALSO, ONLY = "also", "only"
DTYPES = ("auto", "float32", "bfloat16")

RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="Measured settings, which other options override. "
        + "; ".join(f"{name}: {one.meaning}" for name, one in RECIPES.items())
        + ".",
        show_default="none",
    ),
]
ControlOption = Annotated[
    str | None,
    typer.Option(
        help="The fair control, the original trained on the same batches with full attention. 'also' trains it "
        "first, in OUTPUT/control, 'only' trains it alone; a directory is that of one trained before. The hybrid's "
        "numbers are then shown relative to it.",
        show_default="none",
    ),
]


@dataclass(frozen=True)
class TextOptions:
    """Options for the text to train on."""

    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to train on: a file, a folder, or datasets:NAME. May be given several times."),
    ] = None
    corpus: Annotated[
        Path | None,
        typer.Option(help="Where the tokens of the text are kept, to be read again.", show_default="OUTPUT.corpus"),
    ] = None
    field: Annotated[str, typer.Option(help="The field with the text in .jsonl, .parquet and datasets.")] = "text"
    held_out: Annotated[float, typer.Option(help="Fraction of the documents that are never trained on.")] = 0.02
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Read the text and stop.")] = False

    def check(self, needed: bool) -> None:
        """Raise BadInput for options that cannot be, and where text is needed and none is named."""
        if needed and self.text is None and self.corpus is None:
            raise BadInput("expected --text to train on, or --corpus of an earlier run, got neither")
        common.check_range("--held-out", self.held_out, at_least=0, below=1)


DEFAULT_TEXT = TextOptions()


@dataclass(frozen=True)
class DryRunOptions:
    """Options for an estimate in place of a run."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, memory, steps and time of the run, and stop.")
    ] = False
    gpu: Annotated[
        str | None,
        typer.Option(help="GPUs that --dry-run estimates for, such as H100 or H100:8.", show_default="the one here"),
    ] = None


DEFAULT_RUN = DryRunOptions()


@command
@with_groups
@with_settings(DistillSettings)
def distill(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The teacher: a model directory, a Hub id, or 'smollm2'.")],
    output: Annotated[
        Path, typer.Argument(help="The directory of the run: settings, checkpoints, log, and the hybrid in hybrid/.")
    ],
    settings: DistillSettings,
    text: TextOptions = DEFAULT_TEXT,
    windows: Annotated[
        str | None,
        typer.Option(help=WINDOWS_HELP, show_default=False),
    ] = None,
    recipe: RecipeOption = None,
    estimated: DryRunOptions = DEFAULT_RUN,
    control: ControlOption = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype to compute in: auto, float32 or bfloat16.", show_default="bfloat16 on a GPU, float32 on a CPU"
        ),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")] = False,
) -> None:
    """Turn a pretrained model into a hybrid and train it to match what it was.

    Run the same command again to resume a run that was stopped, in whatever way. Exit code 3: stopped by --budget;
    130 and 143: by SIGINT and SIGTERM, with a checkpoint.
    """
    stop = Stop(settings.budget)
    try:
        with handle_signals(stop):
            text.check(needed=not estimated.dry_run)
            common.check_choice("--dtype", dtype, DTYPES)
            if control not in (None, ALSO, ONLY) and not Path(control).is_dir():
                raise BadInput(
                    f"expected --control to be {ALSO}, {ONLY} or the directory of a control, got {control!r}"
                )
            source = loading.find_to_convert(model)
            given = {name: getattr(settings, name) for name in given_options(context, DistillSettings)}
            if windows is not None:
                found = searched_windows(windows, source, settings.window_size, settings.full_layers)
                given |= {"window_size": tuple(found), "full_layers": ()}
            unknown = False
            if recipe is not None:
                ranks, unknown = ranks_of(source)
                unknown = unknown and takes_heads(given)
                with option_errors(DistillSettings):
                    settings = recipe_settings(recipe, layers_of(source), source.base, given, context_of(source), ranks)
            else:
                settings = make_settings(DistillSettings, dataclasses.asdict(settings) | given)
            size = settings.window_size
            plan = check_convertible(source, size if isinstance(size, int) else list(size), list(settings.full_layers))
            if control != ONLY:
                from nha.models.config import check_windows_end

                with option_errors(DistillSettings):
                    check_windows_end(plan, settings.seq_len)
            check_run_directories(output, control, text.prepare_only)
            note_context(source, settings)
            own = Text(text.text, text.corpus, output, text.field, text.held_out)
            tokenizer = partial(loading.load_tokenizer, source)
            if estimated.dry_run:
                check_text(own, tokenizer, source, settings, control)
                if unknown:
                    err.print("note: heads are ranked when the run begins; here they are spread evenly", soft_wrap=True)
                report_estimate(source, settings, estimated.gpu, as_json)
                return
            check_writable(output)
            timeline = Timeline()
            timeline.mark("options checked")
            if text.prepare_only:
                report_corpus(own.read(tokenizer)[1], as_json)
                return
            opened, loaded = load_beside(source, dtype, timeline, lambda: own.read(tokenizer)[1])
            if unknown and recipe is not None:
                place = output.with_name(output.name + ".heads.json")
                settings = with_ranked_heads(recipe, settings, source, loaded, opened, place)
                timeline.mark("heads ranked")
            run(Job(source, opened, output, settings, dtype, control, as_json, timeline), loaded, stop)
    except KeyboardInterrupt:
        reason = stop.reason or "SIGINT"
        err.print(f"{reason}: stopped before the first step; run the same command again to start", soft_wrap=True)
        raise typer.Exit(exit_code(reason)) from None


def check_run_directories(output: Path, control: str | None, prepare_only: bool) -> None:
    """Raise ValueError for the directory of a run, or of its control, that holds other files, before text is read."""
    from nha.distill.checkpoint import check_place

    if prepare_only or common.rank() != 0:  # under torchrun the first process may be writing there already
        return
    if control != ONLY:
        check_place(output)
    if control in (ALSO, ONLY):
        check_place(output / CONTROL)


def check_text(
    text: Text,
    load_tokenizer: Callable[[], Any],
    source: loading.Source,
    settings: DistillSettings,
    control: str | None,
) -> None:
    """Raise what a run raises for its text, before any is read, and for a corpus that is there already."""
    corpus = text.check(load_tokenizer)
    if corpus is None:
        return
    from nha.distill.estimate import empty_model
    from nha.distill.run import check_run

    model, tokenizer = empty_model(loading.read_config(source)), load_tokenizer()
    for is_control in {ALSO: (True, False), ONLY: (True,)}.get(control or "", (False,)):
        check_run(model, tokenizer, corpus, settings, is_control)


def exit_code(reason: str) -> int:
    """The exit code of a run that was stopped.

    >>> exit_code("budget"), exit_code("SIGINT"), exit_code("SIGTERM")
    (3, 130, 143)
    """
    return UNFINISHED if reason == "budget" else 128 + signal.Signals[reason]


def load_beside(
    source: loading.Source, dtype: str, timeline: Timeline, read: Callable[[], Corpus]
) -> tuple[Corpus, tuple[Any, Any]]:
    """The corpus that `read` gives, and the original and its tokenizer, which another thread loads meanwhile.

    An error of `read` is raised once the model is loaded.
    """
    import_module("nha.distill.run")  # before there are two threads that would import its parts at the same time
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load_original, source, dtype)
        corpus = read()
        timeline.mark("text read")
        with common.status(f"loading {source.label}"):
            found = loaded.result()
    timeline.mark("model loaded")
    return corpus, found


def load_original(source: loading.Source, dtype: str) -> tuple[Any, Any]:
    """The original in the dtype to compute in, on the fastest device, and its tokenizer."""
    import torch

    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return loading.load(source, dtype=dtype)


def layers_of(source: loading.Source) -> int:
    """The number of a model's layers."""
    from nha.models.smollm2 import LAYERS

    return LAYERS if source.config is None else loading.layers_of(source.config)


def context_of(source: loading.Source) -> int | None:
    """The tokens that a model was made for, as its configuration has them, None for the embedded model."""
    from nha.models.config import context_length

    return None if source.config is None else context_length(source.config)


def ranks_of(source: loading.Source) -> tuple[HeadRanks, bool]:
    """The ranks of a model's KV heads, and whether they only stand in for those that a search has yet to find."""
    from nha.convert.search import candidate_layers
    from nha.models.smollm2 import KV_HEADS, LAYERS

    counts = [KV_HEADS] * LAYERS
    if source.config is not None:
        config: Any = source.config.get_text_config()
        own = set(candidate_layers(config))
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        counts = [heads if layer in own else 0 for layer in range(config.num_hidden_layers)]
    known = searched_heads(source.base, counts)
    return known or spread_heads(counts), known is None


def with_ranked_heads(
    recipe: str, settings: DistillSettings, source: loading.Source, loaded: tuple[Any, Any], corpus: Corpus, path: Path
) -> DistillSettings:
    """The settings with a recipe's windows for the heads that copy, which `path` keeps; one process finds them."""
    from nha.distill.checkpoint import wait_for_file
    from nha.distill.heads import find_heads
    from nha.ops.heads import window_of

    if common.rank() != 0:
        wait_for_file(path, RANKING_SECONDS)
    with common.steps(f"learning which heads of {source.label} copy") as advance:
        plan = find_heads(recipe, *loaded, corpus, path, progress=advance)
    return dataclasses.replace(settings, window_size=tuple(map(window_of, plan.windows)))


def note_context(source: loading.Source, settings: DistillSettings) -> None:
    """Say on stderr where sequences are longer than what the model was made for."""
    context = context_of(source)
    longest = max(settings.seq_len, settings.long_seq_len if settings.long_tokens else 0)
    if context is not None and longest > context:
        note = f"note: sequences of {longest:,} tokens are longer than the {context:,} that the model was made for"
        note += "; as the teacher it reads them in pieces of these"
        err.print(note, soft_wrap=True)


def report_estimate(source: loading.Source, settings: DistillSettings, gpu: str | None, as_json: bool) -> None:
    """Print what a run on GPUs such as "H100:8", or on what is here, will cost, from the model's configuration."""
    from nha.distill.estimate import PEAKS, estimate

    device, world = common.parse_gpus(gpu) if gpu is not None else (None, common.world_size())
    if device is not None and not any(name in device for name in PEAKS):
        raise BadInput(f"expected --gpu to be one of {', '.join(PEAKS)}, got {device!r}")
    config = loading.read_config(source)
    found = estimate(config, settings, world=world, device=device)
    elsewhere = None if found.device != "CPU" else estimate(config, settings, device="H100")
    recomputing = dataclasses.replace(settings, gradient_checkpointing=True)
    if as_json:
        result = {"model": source.name, **dataclasses.asdict(found), "settings": dataclasses.asdict(settings)}
        print_json(result | ({"on_h100": dataclasses.asdict(elsewhere)} if elsewhere else {}))
        return
    table = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
    memory = f"about {found.memory_bytes / 2**30:.1f} GiB on each device"
    if found.memory_bytes > LARGE_MEMORY and not settings.gradient_checkpointing:
        less = estimate(config, recomputing, world=world, device=device)
        memory += f", with --gradient-checkpointing {less.memory_bytes / 2**30:.1f} GiB"
    time = f"about {common.duration(found.seconds)} on {found.device}, at {found.assumed}"
    for name, text in (
        (
            "model",
            f"{source.label}, {found.parameters / 1e6:,.0f} M parameters, {found.trainable / 1e6:,.1f} M trained",
        ),
        ("run", f"{found.tokens:,} tokens in {found.steps:,} steps, {found.flops_per_token / 1e9:,.2f} GFLOP a token"),
        *([("teacher", f"trained on the first {found.teacher_tokens:,} of them")] if found.teacher_tokens else []),
        ("memory", memory),
        ("time", time + ", besides about a minute to compile and align"),
        *([("on one H100", one_gpu(elsewhere, estimate(config, recomputing, device="H100")))] if elsewhere else []),
    ):
        table.add_row(f"[dim]{name}[/]", escape(text))
    out.print(table)


def one_gpu(found: Estimate, recomputed: Estimate) -> str:
    """Time and memory on an H100, in words; with recomputed activations where it would not have room."""
    words, used = "", found
    if found.memory_bytes > H100_BYTES:
        words, used = f"{found.memory_bytes / 2**30:.1f} GiB do not fit; with --gradient-checkpointing ", recomputed
    return f"{words}about {common.duration(used.seconds)}, {used.memory_bytes / 2**30:.1f} GiB, at {used.assumed}"


@dataclass(frozen=True)
class Job:
    """A command's arguments, checked; `control` is `ALSO`, `ONLY`, a directory or None."""

    source: loading.Source
    corpus: Corpus
    output: Path
    settings: DistillSettings
    dtype: str
    control: str | None
    as_json: bool
    timeline: Timeline


def run(job: Job, original: tuple[Any, Any], stop: Stop) -> None:
    """Train the control and the hybrid from the original and its tokenizer, show the progress, and save both."""
    from nha.distill.results import read_control
    from nha.distill.run import control_identity

    loaded, tokenizer = original
    stop.check()
    identity, control = None, None
    if job.control is not None:
        identity = control_identity(loaded, job.corpus, job.settings, common.world_size())
    if job.control in (ALSO, ONLY):
        control = train_and_save(job, loaded, tokenizer, stop, control_of=identity)
        if job.control == ONLY or control is None:
            return
        free(loaded)
        with common.status(f"loading {job.source.label}"):
            loaded, tokenizer = load_original(job.source, job.dtype)
    elif job.control is not None:
        control = read_control(Path(job.control), identity or {})
    train_and_save(job, loaded, tokenizer, stop, relative_to=control)


def train_and_save(
    job: Job,
    model: Any,
    tokenizer: Any,
    stop: Stop,
    *,
    control_of: dict[str, Any] | None = None,
    relative_to: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Train a hybrid, or the control of an identity, and report it; its numbers if they were measured.

    They are measured for a control and for a hybrid that has one, `relative_to`. Leaves with an exit code if the run
    is not finished.
    """
    from nha.distill.results import MODEL, measure_run, relative_to_control, save_distilled

    is_control = control_of is not None
    place = job.output / CONTROL if is_control else job.output
    folder = place / (MODEL if is_control else "hybrid")
    found, steps = train(job, model, tokenizer, place, stop, is_control)
    if common.rank() != 0:
        return {}
    measured = relative = None
    if found.finished:
        if is_control or relative_to:
            with common.status("measuring on held-out documents"):
                measured = measure_run(found.model, job.corpus, tokenizer, job.settings)
        if measured and relative_to:
            relative = relative_to_control(measured, relative_to)
        extra = {"control": control_of, "measured": measured}
        with common.status(f"writing {folder}"), atomic_directory(folder) as work:
            found.model.to(base_dtype(job.source, found.model.dtype))  # type: ignore[arg-type]
            save_distilled(
                found, tokenizer, work, job.source.base, job.corpus, job.settings, extra=extra, relative=relative
            )
    result: dict[str, Any] = {
        "model": job.source.name,
        "output": str(job.output),
        "finished": found.finished,
        "stopped_by": None if found.finished else found.stopped_by,
        "steps": found.steps,
        "last": found.log[-1] if found.log else {},
        "teacher": found.teacher_log[-1] if found.teacher_log else {},
        "hybrid": str(folder) if found.finished and not is_control else None,
        "control": str(folder) if found.finished and is_control else None,
        "relative_to_control": relative,
        "settings": dataclasses.asdict(job.settings),
    }
    silent = job.as_json and is_control and job.control == ALSO and found.finished  # one document: the hybrid's
    if not silent:
        report(result, steps, job.as_json)
    return measured


def free(model: Any) -> None:
    """Give the memory of a trained model back; a Trainer refers to itself, so it waits for the garbage collector."""
    import gc

    import torch

    model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def base_dtype(source: loading.Source, default: Any) -> Any:
    """The dtype that the base model is stored in, which the hybrid is saved in."""
    stored = getattr(source.config, "dtype", None)
    if isinstance(stored, str):
        import torch

        stored = getattr(torch, stored, None)
    return default if stored is None else stored


def train(job: Job, model: Any, tokenizer: Any, output: Path, stop: Stop, control: bool) -> tuple[Distilled, int]:
    """Distil, or train a control, with progress on stderr. Returns the outcome and the number of steps in all."""
    from nha.distill.run import distill as train_hybrid
    from nha.distill.run import make_mixture, teacher_steps
    from nha.distill.trainer import Reports

    steps = make_mixture(job.settings, common.world_size()).steps
    first = 0 if control else teacher_steps(job.settings, common.world_size())
    timeline = dataclasses.replace(job.timeline, stages=dict(job.timeline.stages))
    shown: list[str] = []
    with common.progress_bar() as bar:
        tasks: dict[str, Any] = {}  # added when there is progress: what does not fit is refused in one line alone
        texts = {"convert": "converting", "align": "aligning layers"}
        texts["train"] = "training the control" if control else "training"
        texts[TEACHER] = "training the teacher"

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(texts[stage], total=total)
            bar.update(tasks[stage], completed=done, total=total, description=texts[stage])
            if BEGUN in timeline.stages and not shown and not job.as_json:
                shown.append(str(timeline))
                bar.console.print(f"[dim]{escape(shown[0])}[/]", soft_wrap=True)

        def log(entry: dict[str, float]) -> None:
            texts["train"] = ("control, " if control else "") + describe(entry)
            progress("train", int(entry["step"]), steps - first)

        def teacher_log(entry: dict[str, float]) -> None:
            texts[TEACHER] = "teacher, " + describe(entry)
            progress(TEACHER, int(entry["step"]), first)

        reports = Reports(log=log, teacher_log=teacher_log, progress=progress, timeline=timeline)
        options = {"control": control, "reports": reports, "stop": stop}
        return train_hybrid(model, tokenizer, job.corpus, output, job.settings, **options), steps


def report(result: dict[str, Any], steps: int, as_json: bool) -> None:
    """Print the outcome; leaves with a code of its own if the run is not finished."""
    if as_json:
        print_json(result)
    elif result["finished"]:
        saved = escape(result["hybrid"] or result["control"])
        out.print(f"[green]✓[/] {result['steps']:,} steps, saved in [bold]{saved}[/]", soft_wrap=True)
        out.print(f"  {describe(result['last'])}", soft_wrap=True)
        if result["teacher"]:
            first = f"{result['teacher']['tokens']:,.0f} of {result['last']['tokens']:,.0f} tokens"
            out.print(f"  teacher: the original, trained with full attention on the first {first}", soft_wrap=True)
        if result["relative_to_control"]:
            out.print(relative_table(result["relative_to_control"]))
        if result["hybrid"]:
            out.print(f'  try it:  [cyan]nha generate {saved} "Why is the sky blue?"[/]', soft_wrap=True)
    if not result["finished"]:
        reason = result["stopped_by"] or "budget"
        done = f"stopped by {reason} after {result['steps']:,} of {steps:,} steps, with a checkpoint"
        err.print(f"{done}; run the same command again to resume", soft_wrap=True)
        raise typer.Exit(exit_code(reason))


def relative_table(rows: list[dict[str, Any]]) -> Table:
    """The hybrid's numbers on held-out documents beside those of its control."""
    table = Table(box=None, padding=(0, 3, 0, 2), header_style="dim")
    table.add_column("held-out documents")
    for title in ("hybrid", "control", "relative to control"):
        table.add_column(title, justify="right")
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        table.add_row(row["name"], f"{row['value']:.3f}", f"{row['control']:.3f}", ratio)
    return table


def describe(entry: dict[str, float]) -> str:
    """An entry of the log in a few words.

    >>> describe({"step": 3, "kl": 0.1234, "answer_accuracy": 0.5, "tokens_per_s": 96000.0})
    'training: KL 0.123, answers 50 %, 96,000 tokens/s'
    """
    parts = []
    for name, word in (("kl", "KL"), ("cross_entropy", "loss")):
        if entry.get(name):
            parts.append(f"{word} {entry[name]:.3f}")
            break
    if entry.get("answer_loss") or entry.get("answer_accuracy"):
        parts.append(f"answers {100 * entry['answer_accuracy']:.0f} %")
    parts.append(f"{entry.get('tokens_per_s', 0):,.0f} tokens/s")
    return "training: " + ", ".join(parts)
