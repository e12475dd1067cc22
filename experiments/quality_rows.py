"""The rows of `experiments/quality.py`: a run's file, which is there from the first part of its evaluation on."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from experiments.quality_runs import RECIPES, Recipe, Run, budget_of

Made = dict[str, Any]  # a file of runs/: row, settings, log, eval


def source_of(run: Run) -> Run:
    """The run that trains what this one measures: itself, unless its recipe names another."""
    if not (run.recipe and run.recipe.source):
        return run
    return Run(RECIPES[run.recipe.source], run.budget, run.settings, run.recipe.source)


def read_run(folder: Path, run: Run) -> Made | None:
    """A run's file in a folder; None where it has none."""
    path = folder / f"{run.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def missing_parts(made: Made) -> set[str]:
    """The parts of its evaluation that a run's file lacks."""
    return set(made["row"].get("missing", ()))


def has_row(folder: Path, run: Run, work: Path) -> bool:
    """Whether a run was made before. One that lacks parts was, unless what it measures is still in `work`.

    That is its checkpoint; of the small file, for which nothing is trained, the answers so far.
    """
    found = read_run(folder, run)
    if found is None or not missing_parts(found):
        return found is not None
    if run.recipe and run.recipe.shipped == "file":
        return not (work / "partial" / f"{run.name}.jsonl").is_file()
    return not (work / "runs" / source_of(run).name).is_dir()


def write_run(folder: Path, run: Run, made: Made, before: Made | None) -> dict[str, Any]:
    """Write a run's file durably and return its row; `before` is that of an earlier call, which lacks parts.

    The earlier one stays while it has a part that is not measured anew yet. Training is as it was then, since this
    time a checkpoint was read, and seconds of the evaluation add up.
    """
    from nha.io import write_atomically

    if before is not None:
        if not missing_parts(made) <= missing_parts(before):
            return before["row"]
        row, old = made["row"], before["row"]
        row = row | {name: old[name] for name in ("train_seconds", "memory_gib") if name in old}
        row["eval_seconds"] = round(row["eval_seconds"] + old["eval_seconds"], 1)
        seconds = made["eval"]["seconds"] | before["eval"]["seconds"]
        made = made | {"row": row, "eval": made["eval"] | {"seconds": seconds}}
        made |= {"timelines": before["timelines"]} if "timelines" in before else {}
    write_atomically(folder / f"{run.name}.json", json.dumps(made) + "\n")
    return made["row"]


def command_of(run: Run) -> str:
    """The command that makes a run; a control comes with the recipe that it is for."""
    tokens = f"{run.beside}={run.settings.tokens:g}"
    return f"python -m experiments.quality --data DATA --runs {run.beside} --tokens {tokens} --seeds {run.seed}"


def cache_bytes(model: Any, tokens: int) -> int:
    """Bytes of the cache after so many tokens of one sequence, in the model's dtype."""
    import torch

    from nha.models.cache import cache_nbytes
    from nha.ops.heads import all_windows
    from nha.report.costs import filled_cache

    widest = max(all_windows(getattr(model.config, "window_sizes", None) or ()), default=0)
    read = min(tokens, max(512, 2 * widest))  # until no window takes more memory
    ids = torch.arange(read, device=model.device)[None] % model.config.vocab_size
    return int(cache_nbytes(filled_cache(model, ids, tokens)))


def cache_formats(recipe: Recipe) -> dict[str, str]:
    """How a recipe's caches keep numbers, where it is not the default."""
    found = {"state_dtype": recipe.state_dtype, "kv_cache_dtype": recipe.kv_cache_dtype}
    return {name: dtype for name, dtype in found.items() if dtype not in ("float32", "auto")}


def row_of(run: Run, config: Any, held: int, measured: dict[str, Any], log: list[dict[str, float]]) -> dict[str, Any]:
    """The row of a run, whose model has this configuration and a cache of `held` bytes after 16,384 tokens."""
    import statistics

    import torch

    from experiments.distill import versions
    from experiments.quality_runs import batches_digest
    from nha.evaluate.public.run import summary

    numbers = summary(measured)
    speeds = [entry["tokens_per_s"] for entry in log]
    return {
        "arm": run.recipe.name if run.recipe else "control",
        "budget": budget_of(held) if run.recipe else run.budget,
        "seed": run.seed,
        "tokens": int(log[-1]["tokens"]) if log else 0,
        "teacher_tokens": run.settings.teacher_tokens if run.recipe else 0,
        "bytes_16k": held,
        **(cache_formats(run.recipe) if run.recipe else {}),
        "windows": list(config.window_sizes),
        "slots": config.num_slots if run.recipe else 0,
        **{name: numbers.get(name) for name in ("ppl_2k", "ppl_8k", "sets", "average", "squad")},
        **{name: numbers.get(name) for name in ("cloze_near", "cloze_far", "needle")},
        "control": batches_digest(run.settings),
        "command": command_of(run),
        "tokens_per_s": statistics.median(speeds[len(speeds) // 2 :]) if speeds else None,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "versions": versions(),
        "date": str(date.today()),
    }
