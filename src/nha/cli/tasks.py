"""`nha eval tasks`: lm-evaluation-harness on a model, offline or with the standard tasks from the Hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nha.cli import common
from nha.cli import evaluate as shared
from nha.cli.common import BadInput, command, err, out, print_json


@command
def tasks(
    model: Annotated[str, shared.MODEL],
    names: Annotated[
        str,
        typer.Option(
            "--tasks",
            help="'offline' (this package's own), 'standard' (ARC, HellaSwag, LAMBADA, PIQA, WinoGrande, FDA, SWDE, "
            "SQuAD, RULER; needs the Hub), or names that lm-eval knows, separated by commas.",
        ),
    ] = "offline",
    limit: Annotated[int | None, typer.Option(help="Documents of each task at most.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts at a time.")] = 8,
    longest: Annotated[
        int | None, typer.Option(help="Tokens of the longest text.", show_default="what the model was made for")
    ] = None,
    window: Annotated[str | None, shared.WINDOW] = None,
    ablations: Annotated[bool, shared.ABLATIONS] = False,
    compare: Annotated[list[str] | None, shared.COMPARE] = None,
    dtype: Annotated[str, shared.DTYPE] = "auto",
    seed: Annotated[int, shared.SEED] = 0,
    output: Annotated[Path | None, shared.OUTPUT] = None,
    as_json: Annotated[bool, shared.AS_JSON] = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model."""
    common.check_at_least("--batch-size", batch_size, 1)
    for name, value in (("--limit", limit), ("--longest", longest)):
        if value is not None:
            common.check_at_least(name, value, 1)
    shared.check_output(output)
    from nha.evaluate.tasks import check_harness, known_tasks, run_tasks, task_names

    wanted = task_names(names)
    check_harness()
    plan = shared.make_plan(model, window, ablations, compare, dtype)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with err.status("looking up tasks"):
        manager = known_tasks(wanted)
    loaded, tokenizer = shared.load_planned(plan)

    def measure(model: Any, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        progress("tasks", 0, len(wanted))
        try:
            found = run_tasks(
                model,
                tokenizer,
                wanted,
                limit=limit,
                batch_size=batch_size,
                longest=longest,
                seed=seed,
                manager=manager,
            )
        except (ConnectionError, TimeoutError) as error:
            raise BadInput(f"expected the Hub to be reachable for {names}, it is not: {error}") from None
        progress("tasks", len(wanted), len(wanted))
        return {"tasks": found}

    rows = shared.measure_each(plan, loaded, tokenizer, measure)
    results = {"model": plan.source.name, "seed": seed, "limit": limit, "results": rows}
    if output is not None:
        shared.save(output, "tasks.json", results, "exact")
    if as_json:
        print_json(results)
        return
    table = shared.new_table(*rows)
    for task, metrics in next(iter(rows.values()))["tasks"].items():
        for metric in metrics:
            cells = []
            for row in rows.values():
                score = row["tasks"][task][metric]
                shown = "" if score["interval"] is None else " " + shared.bracket(score["interval"], 3)
                cells.append(f"{score['value']:.3f}" + shown)
            table.add_row(f"{task}, {metric}", *cells)
    out.print(table)
    err.print(f"[dim]95 % bootstrap intervals over documents, seed {seed}[/]")
