"""`nha eval`: measure a model, in every form that it should be compared with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nha.cli import common
from nha.cli.common import BadInput, command, err, out, print_json
from nha.io import atomic_directory
from nha.models import loading

MODEL = typer.Argument(help="A model directory, a Hub id, or 'smollm2' for the embedded model.")
TEXT = typer.Option(help="A text file; may be given several times.", show_default="the Python language reference")
WINDOW = typer.Option(help="Change a hybrid's windows for this run; -1 is full attention.", show_default="as saved")
ABLATIONS = typer.Option(
    "--ablations",
    help="Measure a hybrid also without slots, without window, with a longer window, with full attention.",
)
COMPARE = typer.Option(
    help="Another model to measure, as NAME=MODEL (such as teacher=smollm2); may be given several times.",
    show_default=False,
)
DTYPE = typer.Option(help="auto, float32, bfloat16 or float16.")
SEED = typer.Option(help="Seed of the recall text and of the bootstrap.")
OUTPUT = typer.Option(help="A new directory for the results as JSON, and the picture.", show_default=False)
AS_JSON = typer.Option("--json", help="Print one JSON document to stdout.")
ROWS = typer.Option(help="Rows of each task and distance.")
TASKS = typer.Option(help="Recall tasks, separated by commas.", show_default="all")


@dataclass(frozen=True)
class Plan:
    """The models of a run: the one that was asked for, its windows and forms, those to compare it with, the dtype."""

    source: loading.Source
    windows: int | list[int] | None
    forms: list[str]
    compared: dict[str, loading.Source]
    dtype: str


def make_plan(model: str, window: str | None, ablations: bool, compare: list[str] | None, dtype: str) -> Plan:
    """Check every name before any weight is read. Raises BadInput."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadInput(f"expected --dtype to be auto, float32, bfloat16 or float16, got {dtype!r}")
    windows = None if window is None else common.parse_windows(window)
    source = loading.find(model)
    hybrid = source.config is not None and loading.is_hybrid(source.config)
    if windows is not None:
        loading.check_windows_changeable(source, windows)
    if ablations and not hybrid:
        raise BadInput(f"expected a hybrid for --ablations, {source.name} is not one: convert it with nha hybridize")
    compared: dict[str, loading.Source] = {}
    for entry in compare or []:
        name, equals, where = entry.partition("=")
        if not (name and equals and where) or name in compared or name == "model":
            raise BadInput(f"expected --compare as NAME=MODEL with a name of its own, got {entry!r}")
        compared[name] = loading.find(where)
    from nha.evaluate.variants import VARIANTS

    forms = [form for form in VARIANTS if ablations or form == "hybrid"] if hybrid else ["model"]
    return Plan(source, windows, forms, compared, dtype)


@contextmanager
def form_of(model: Any, form: str) -> Iterator[None]:
    """A hybrid in one of its forms; any other model as it is."""
    from nha.evaluate.variants import use_variant

    if form == "model":
        yield
    else:
        with use_variant(model, form):
            yield


def each_form(plan: Plan, loaded: Any, tokenizer: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, model, form) of everything to measure; models to compare with are loaded one at a time.

    Raises BadInput for one whose tokenizer reads text in another way.
    """
    for form in plan.forms:
        yield "model" if form == "hybrid" else form.replace("_", " "), loaded, form
    for name, source in plan.compared.items():
        with err.status(f"loading {source.label}"):
            other, reader = loading.load(source, dtype=plan.dtype)
        if reader.get_vocab() != tokenizer.get_vocab():
            raise BadInput(f"expected {source.name} to have the tokenizer of {plan.source.name}, it has another")
        yield name, other, "hybrid" if hasattr(other.config, "window_sizes") else "model"


def measure_each(
    plan: Plan, loaded: Any, tokenizer: Any, measure: Callable[[Any, Callable[[str, int, int], None]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What `measure(model, progress)` finds for every form, by name, with the seconds it took."""
    found: dict[str, dict[str, Any]] = {}
    with common.progress_bar() as bar:
        for name, model, form in each_form(plan, loaded, tokenizer):
            tasks: dict[str, Any] = {}

            def progress(what: str, done: int, total: int, name: str = name, tasks: dict[str, Any] = tasks) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(f"{name}: {what}", total=total)
                bar.update(tasks[what], completed=done)

            started = time.perf_counter()
            with form_of(model, form):
                found[name] = measure(model, progress)
            found[name]["seconds"] = round(time.perf_counter() - started, 3)
    return found


def load_planned(plan: Plan) -> tuple[Any, Any]:
    """The model that was asked for, with the windows that were asked for, and its tokenizer."""
    with err.status(f"loading {plan.source.label}"):
        loaded, tokenizer = loading.load(plan.source, dtype=plan.dtype)
    if plan.windows is not None:
        from nha.models.adapter import set_windows

        set_windows(loaded, plan.windows)
    return loaded, tokenizer


def check_output(output: Path | None) -> None:
    """Raise BadInput for an output directory that is in use, or a picture that cannot be drawn."""
    if output is not None:
        common.check_new_directory(output)
        from importlib.util import find_spec

        if find_spec("matplotlib") is None:
            raise BadInput("expected matplotlib for the picture of --output, got none: pip install 'nha[report]'")


def save(output: Path, name: str, results: dict[str, Any], metric: str) -> None:
    """Write results as JSON, and recall as a picture, into a directory that appears only when it is whole."""
    from nha.report.results import to_json

    with atomic_directory(output) as work:
        (work / name).write_text(to_json(results), encoding="utf-8")
        recall = {form: row["recall"] for form, row in results["results"].items() if row.get("recall")}
        if recall:
            from nha.report.curves import recall_png

            (work / "recall.png").write_bytes(recall_png(recall, metric))
    err.print(f"[dim]saved in {output}[/]")


def read_documents(tokenizer: Any, text: list[str] | None) -> list[list[int]]:
    """Token ids of every text, or of the built-in documents."""
    from nha.data.text import evaluation_documents

    texts = evaluation_documents() if text is None else text
    return [tokenizer(each, verbose=False).input_ids for each in texts]


def bracket(bounds: list[float], digits: int, factor: float = 1.0) -> str:
    """An interval in brackets, its bounds times `factor`."""
    low, high = (factor * bound for bound in bounds)
    return f"[dim]\\[{low:.{digits}f}, {high:.{digits}f}][/]"


def new_table(*titles: str) -> Table:
    """A plain table with these columns beside that of the names."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


@command
def perplexity(
    model: Annotated[str, MODEL],
    text: Annotated[list[Path] | None, TEXT] = None,
    length: Annotated[int, typer.Option(help="Tokens in each stretch of text.")] = 1024,
    count: Annotated[int, typer.Option(help="Stretches to read.")] = 4,
    window: Annotated[str | None, WINDOW] = None,
    ablations: Annotated[bool, ABLATIONS] = False,
    compare: Annotated[list[str] | None, COMPARE] = None,
    dtype: Annotated[str, DTYPE] = "auto",
    seed: Annotated[int, SEED] = 0,
    output: Annotated[Path | None, OUTPUT] = None,
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """Perplexity, by position in the text, and what share of the softmax goes to the slots."""
    common.check_at_least("--length", length, 2)
    common.check_at_least("--count", count, 1)
    check_output(output)
    texts = None if text is None else [common.read_text(path) for path in text]
    plan = make_plan(model, window, ablations, compare, dtype)
    loaded, tokenizer = load_planned(plan)

    from nha.data.text import blocks, evaluation_documents
    from nha.evaluate import perplexity as measured
    from nha.evaluate.mass import slot_mass
    from nha.evaluate.measure import MASS_TOKENS, bucket_edges

    ids = blocks(tokenizer, evaluation_documents() if texts is None else texts, count, length)
    edges, far = bucket_edges(length), measured.far_repeats(ids.numpy())

    def measure(model: Any, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        found = measured.perplexity(model, ids, progress=lambda done, total: progress("reading", done, total))
        row: dict[str, Any] = {
            "perplexity": found.value,
            "interval": list(found.interval(seed)),
            "loss": found.loss,
            "standard_error": found.error,
            "far_repeats": found.where(far),
            "by_position": found.by_position(edges),
            "by_text": found.by_text,
        }
        if hasattr(model.config, "window_sizes"):
            mass = slot_mass(model, ids[: max(1, MASS_TOKENS // length)])
            row["slot_mass"] = {"mean": mass.mean, **asdict(mass)}
        return row

    rows = measure_each(plan, loaded, tokenizer, measure)
    shape = {"texts": len(ids), "length": length, "bucket_edges": edges, "seed": seed}
    results = {"model": plan.source.name, **shape, "results": rows}
    if output is not None:
        save(output, "perplexity.json", results, "exact")
    if as_json:
        print_json(results)
        return
    for table in perplexity_tables(rows, edges):
        out.print(table)
    err.print(
        f"[dim]{len(ids)} texts of {length:,} tokens, 95 % bootstrap intervals over texts, seed {seed}; far: loss on "
        "pairs of tokens last seen over 192 tokens back; slots: share of the softmax; below: perplexity by position[/]"
    )


def perplexity_tables(rows: dict[str, dict[str, Any]], edges: list[int]) -> Iterator[Table]:
    """What was measured of every form as a whole, and by position."""
    table = new_table("perplexity", "", "loss, nats", "far, nats", "slots")
    for name, row in rows.items():
        far, mass = row["far_repeats"], row.get("slot_mass")
        table.add_row(
            name,
            f"{row['perplexity']:.2f}",
            bracket(row["interval"], 2),
            f"{row['loss']:.3f}",
            f"{far:.3f}" if far == far else "-",
            f"{100 * mass['mean']:.0f} %" if mass and mass["mean"] else "-",
        )
    yield table
    table = new_table(*(f"{a}-{b}" for a, b in itertools.pairwise(edges)))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.1f}" for value in row["by_position"]))
    yield table


def parse_tasks(tasks: str | None) -> list[str] | None:
    """Recall tasks separated by commas. Raises BadInput for one that there is not."""
    if tasks is None:
        return None
    from nha.data.recall import EVALUATION_TASKS

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    unknown = [name for name in names if name not in EVALUATION_TASKS]
    if unknown or not names:
        raise BadInput(f"expected --tasks out of {', '.join(EVALUATION_TASKS)}, got {tasks!r}")
    return names


def check_metric(metric: str, generate: bool) -> None:
    """Raise BadInput for a metric that there is not, or that will not be measured."""
    from nha.evaluate.recall import METRICS

    if metric not in METRICS or (metric == "generated" and not generate):
        raise BadInput(f"expected --metric out of {', '.join(METRICS[: 2 + generate])}, got {metric!r}")


@command
def recall(
    model: Annotated[str, MODEL],
    tasks: Annotated[str | None, TASKS] = None,
    distances: Annotated[
        str | None, typer.Option(help="Tokens from a fact to its answer.", show_default="128, 256, ... up to --length")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in each row.")] = 2048,
    rows: Annotated[int, ROWS] = 32,
    text: Annotated[list[Path] | None, TEXT] = None,
    window: Annotated[str | None, WINDOW] = None,
    ablations: Annotated[bool, ABLATIONS] = False,
    compare: Annotated[list[str] | None, COMPARE] = None,
    generate: Annotated[bool, typer.Option(help="Also let the model write the answers.")] = True,
    metric: Annotated[str, typer.Option(help="What to print: digits, exact or generated.")] = "exact",
    dtype: Annotated[str, DTYPE] = "auto",
    seed: Annotated[int, SEED] = 0,
    output: Annotated[Path | None, OUTPUT] = None,
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """How often a model recalls facts, by task and distance, on names and questions that no training row has."""
    wanted = parse_tasks(tasks)
    apart = None if distances is None else common.parse_ints(distances, "--distances")
    common.check_at_least("--rows", rows, 1)
    check_metric(metric, generate)
    check_output(output)
    texts = None if text is None else [common.read_text(path) for path in text]
    plan = make_plan(model, window, ablations, compare, dtype)
    loaded, tokenizer = load_planned(plan)

    import numpy as np

    from nha.evaluate.measure import by_task, plain_ids
    from nha.evaluate.recall import measure_recall, recall_sets

    filler = np.concatenate(plain_ids(tokenizer, read_documents(tokenizer, texts)))
    sets = recall_sets(tokenizer, filler, tasks=wanted, distances=apart, length=length, rows=rows, seed=seed)

    def measure(model: Any, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        scores = measure_recall(
            model, sets, generate=generate, progress=lambda done, total: progress("recall", done, total)
        )
        return {"recall": by_task(scores, seed)}

    found = measure_each(plan, loaded, tokenizer, measure)
    results = {"model": plan.source.name, "length": length, "rows": rows, "seed": seed, "results": found}
    if output is not None:
        save(output, "recall.json", results, metric)
    if as_json:
        print_json(results)
        return
    for table in recall_tables({name: row["recall"] for name, row in found.items()}, metric):
        out.print(table)
    err.print(recall_note(metric, rows, seed))


def recall_note(metric: str, rows: int, seed: int) -> str:
    """What the numbers in recall tables are."""
    names = {"digits": "tokens of the answer", "exact": "answers wholly", "generated": "answers written"}
    return (
        f"[dim]columns: tokens from fact to answer; numbers: {names[metric]} right in %, with 95 % bootstrap intervals "
        f"over {rows} rows, seed {seed}[/]"
    )


def recall_tables(forms: dict[str, dict[str, Any]], metric: str) -> Iterator[Table]:
    """One table a task: a row for every form, a column for every distance."""
    for task in next(iter(forms.values())):
        distances = list(dict.fromkeys(d for scores in forms.values() for d in scores.get(task, {})))
        table = new_table(*(f"{int(d):,}" for d in distances))
        table.columns[0].header = task.replace("_", " ")
        for name, scores in forms.items():
            cells = []
            for distance in distances:
                score = scores[task][distance]
                cells.append(f"{100 * score[metric]:.0f} " + bracket(score[f"{metric}_interval"], 0, 100))
            table.add_row(name, *cells)
        yield table


@command
def everything(
    model: Annotated[str, MODEL],
    output: Annotated[Path, typer.Argument(help="A new directory for results and picture.")],
    lengths: Annotated[str, typer.Option(help="Tokens in a text, separated by commas.")] = "2048,8192",
    texts: Annotated[int, typer.Option(help="At most so many texts of each length.")] = 64,
    rows: Annotated[int, ROWS] = 32,
    tasks: Annotated[str | None, TASKS] = None,
    text: Annotated[list[Path] | None, TEXT] = None,
    window: Annotated[str | None, WINDOW] = None,
    ablations: Annotated[bool, ABLATIONS] = False,
    compare: Annotated[list[str] | None, COMPARE] = None,
    generate: Annotated[bool, typer.Option(help="Also let the model write the answers.")] = True,
    dtype: Annotated[str, DTYPE] = "auto",
    seed: Annotated[int, SEED] = 0,
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """The standard evaluation: perplexity and recall at several lengths, saved with a picture."""
    wanted = parse_tasks(tasks)
    sizes = common.parse_ints(lengths, "--lengths")
    if not sizes:
        raise BadInput(f"expected --lengths to name at least one length, got {lengths!r}")
    common.check_at_least("--lengths", min(sizes), 256)
    common.check_at_least("--texts", texts, 1)
    common.check_at_least("--rows", rows, 1)
    check_output(output)
    given = None if text is None else [common.read_text(path) for path in text]
    plan = make_plan(model, window, ablations, compare, dtype)
    loaded, tokenizer = load_planned(plan)

    from nha.evaluate.measure import label, measure_form, standard_suite

    documents = read_documents(tokenizer, given)
    suite = standard_suite(tokenizer, documents, lengths=sizes, texts=texts, rows=rows, tasks=wanted, seed=seed)

    def measure(model: Any, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        return measure_form(model, suite, generate=generate, seed=seed, progress=progress)

    found = measure_each(plan, loaded, tokenizer, measure)
    counts = {label(n): len(ids) for n, ids in suite.texts.items()}
    results = {"model": plan.source.name, "texts": counts, "rows": rows, "seed": seed, "results": found}
    save(output, "evaluation.json", results, "exact")
    if as_json:
        print_json(results)
        return
    out.print(summary_table(found, list(counts)))
    for table in recall_tables({name: row["recall"] for name, row in found.items()}, "exact"):
        out.print(table)
    err.print(recall_note("exact", rows, seed))


def summary_table(rows: dict[str, dict[str, Any]], lengths: list[str]) -> Table:
    """Perplexity, far repeats and the slots' share of every form, at every length."""
    titles = [title for n in lengths for title in (f"perplexity {n}", "", f"far {n}, nats")]
    table = new_table(*titles, "slots")
    for name, row in rows.items():
        cells = []
        for n in lengths:
            far = row[f"far_{n}"]
            cells += [
                f"{row[f'ppl_{n}']:.2f}",
                bracket(row[f"ppl_{n}_interval"], 2),
                f"{far:.3f}" if far == far else "-",
            ]
        mass = row.get("slot_mass")
        table.add_row(name, *cells, f"{100 * mass['mean']:.0f} %" if mass and mass["mean"] else "-")
    return table
