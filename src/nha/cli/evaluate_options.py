"""Options and checks that the commands of `nha eval` share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from nha.cli import common
from nha.cli.common import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nha.evaluate.compare import Plan
    from nha.evaluate.partial import PartialResults

MODEL = typer.Argument(
    help="A model directory, a Hub id, or 'smollm2' for the embedded model, 'smollm2-hybrid' for its hybrid."
)
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
SEED = typer.Option(min=0, help="Seed of the recall text and of the bootstrap.")
OUTPUT = typer.Option(help="A new directory for the results as JSON, and the picture.", show_default=False)
AS_JSON = typer.Option("--json", help="Print one JSON document to stdout.")
QUESTIONS = typer.Option(help="Questions of each task and distance.")
TASKS = typer.Option(help="Recall tasks, separated by commas.", show_default="all")


@dataclass(frozen=True)
class ModelOptions:
    """Options of every evaluation: variants of the model, models beside it, dtype and seed."""

    window: Annotated[str | None, WINDOW] = None
    ablations: Annotated[bool, ABLATIONS] = False
    compare: Annotated[list[str] | None, COMPARE] = None
    dtype: Annotated[str, DTYPE] = "auto"
    seed: Annotated[int, SEED] = 0


def with_groups(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of its parameters that are dataclasses, in place of those."""
    given = inspect.signature(function, eval_str=True).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in given if dataclasses.is_dataclass(p.annotation)}
    parameters = [p for p in given if p.name not in groups]
    for group in groups.values():
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in dataclasses.fields(group)
        ]

    @functools.wraps(function)
    def run(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in dataclasses.fields(group)})
        function(**options)

    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in keyword}
    return run


def checked_plan(model: str, models: ModelOptions, auto: str = "auto") -> Plan:
    """The models of a command, checked before any weight is read; `auto` is the dtype for "auto". Raises BadInput."""
    common.check_choice("--dtype", models.dtype, common.DTYPES)
    windows = None if models.window is None else common.parse_windows(models.window)
    from nha.evaluate.compare import make_plan

    dtype = auto if models.dtype == "auto" else models.dtype
    return make_plan(model, windows=windows, ablations=models.ablations, compare=models.compare or [], dtype=dtype)


def load_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The tokenizer of a plan's model alone, with which texts are checked before any weight is read."""
    from nha.models.loading import load_tokenizer

    return load_tokenizer(plan.source)


def load(
    plan: Plan, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a plan and its tokenizer, which may have been read already."""
    from nha.evaluate.compare import load_planned

    with common.status(f"loading {plan.source.label}"):
        return load_planned(plan, tokenizer)


def parse_tasks(tasks: str | None) -> list[str] | None:
    """Recall tasks separated by commas. Raises BadInput for an unknown one."""
    if tasks is None:
        return None
    from nha.data.recall import EVALUATION_TASKS

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    unknown = [name for name in names if name not in EVALUATION_TASKS]
    if unknown or not names:
        raise BadInput(f"expected --tasks out of {', '.join(EVALUATION_TASKS)}, got {tasks!r}")
    return names


def check_metric(metric: str, generate: bool) -> None:
    """Raise BadInput for an unknown metric, and for one that is not measured."""
    from nha.evaluate.recall import METRICS

    if metric not in METRICS or (metric == "generated" and not generate):
        raise BadInput(f"expected --metric out of {', '.join(METRICS[: 2 + generate])}, got {metric!r}")


def check_output(output: Path | None) -> None:
    """Raise for an output directory that is in use, and without the package that draws its picture."""
    if output is not None:
        from nha.data.packages import check_package

        common.check_new_directory(output)
        check_package("matplotlib", "report", "for the picture of --output")


def read_texts(text: list[Path] | None) -> list[str] | None:
    """The contents of text files, None for the built-in text."""
    return None if text is None else [common.read_text(path) for path in text]


def partial_results(output: Path | None, identity: dict[str, Any]) -> PartialResults:
    """Results that an interrupted run of the same command left beside its output directory."""
    from nha.evaluate.partial import open_partial, partial_path

    found = open_partial(None if output is None else partial_path(output), identity)
    if found.parts:
        common.err.print(f"[dim]resuming: {len(found.parts)} parts are measured already[/]")
    return found


@contextmanager
def named_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress of many tasks; the value moves one by (name, done, total)."""
    with common.progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(escape(name), total=total)
            bar.update(tasks[name], completed=done, total=total)

        yield progress
