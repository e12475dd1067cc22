"""`nha eval tasks`: lm-evaluation-harness on a model, offline or with the standard tasks from the Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nha.cli import common
from nha.cli import evaluate_options as options
from nha.cli import evaluate_tables as tables
from nha.cli.common import BadInput, command, err, out, print_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nha.evaluate.measure import Progress

DEFAULTS = options.ModelOptions()


@command
@options.with_groups
def tasks(
    model: Annotated[str, options.MODEL],
    names: Annotated[
        str,
        typer.Option(
            "--tasks",
            help="'offline' (this package's own), 'standard' (ARC, HellaSwag, LAMBADA, PIQA, WinoGrande, FDA, SWDE, "
            "SQuAD, RULER; needs the Hub), or names that lm-eval knows, separated by commas.",
        ),
    ] = "offline",
    limit: Annotated[
        int | None, typer.Option(help="Maximum number of documents of each task.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Documents in one forward pass.")] = 8,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Tokens of the longest document.", show_default="the configuration's")
    ] = None,
    models: options.ModelOptions = DEFAULTS,
    output: Annotated[Path | None, options.OUTPUT] = None,
    as_json: Annotated[bool, options.AS_JSON] = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model."""
    common.check_at_least("--batch-size", batch_size, 1)
    for name, value in (("--limit", limit), ("--max-seq-len", max_seq_len)):
        if value is not None:
            common.check_at_least(name, value, 1)
    options.check_output(output)
    from nha.evaluate.tasks import check_harness, known_tasks, run_tasks, task_names

    wanted = task_names(names)
    check_harness()
    plan = options.checked_plan(model, models)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with common.status("looking up tasks"):
        manager = known_tasks(wanted)
    loaded, tokenizer = options.load(plan)
    limits = {"limit": limit, "batch_size": batch_size, "max_seq_len": max_seq_len}

    def measure(model: PreTrainedModel, progress: Progress) -> dict[str, Any]:
        progress("tasks", 0, len(wanted))
        try:
            found = run_tasks(model, tokenizer, wanted, **limits, seed=models.seed, manager=manager)
        except (ConnectionError, TimeoutError) as error:
            raise BadInput(f"expected the Hub to be reachable for {names}, it is not: {error}") from None
        progress("tasks", len(wanted), len(wanted))
        return {"tasks": found}

    from nha.evaluate.compare import measure_each

    partial = options.partial_results(
        output, {"command": "tasks", **plan.identity, **limits, "tasks": wanted, "seed": models.seed}
    )
    with options.named_progress() as progress:
        rows = measure_each(plan, loaded, tokenizer, measure, progress, partial)
    results = {"model": plan.source.name, "seed": models.seed, "limit": limit, "results": rows}
    if output is not None:
        tables.save(output, "tasks.json", results, "exact")
        partial.remove()
    if as_json:
        print_json(results)
        return
    out.print(tables.harness_table(rows))
    err.print(f"[dim]95 % bootstrap intervals over documents, seed {models.seed}[/]")
