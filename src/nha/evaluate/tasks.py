"""Tasks of lm-evaluation-harness: the offline ones of this package, and the harness's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache as memoize
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.data.packages import check_package
from nha.evaluate.bootstrap import interval
from nha.models.config import context_length

FOLDER = Path(__file__).parent / "harness"
OFFLINE = ("nha_cloze", "nha_choice", "nha_recall")
STANDARD = (
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "lambada_openai",
    "piqa",
    "winogrande",
    "fda",
    "swde",
    "squad_completion",
    "ruler",
)
GENERATED = (
    "ruler",
    "niah_",
)  # tasks that generate documents of several lengths, with the model's tokenizer by its name
MIXED = {"perplexity"}  # metrics that are no mean over documents


def task_names(wanted: str) -> list[str]:
    """Names of tasks: "offline" and "standard" stand for `OFFLINE` and `STANDARD`; else names separated by commas.

    >>> task_names("offline,piqa")
    ['nha_cloze', 'nha_choice', 'nha_recall', 'piqa']
    """
    groups = {"offline": OFFLINE, "standard": STANDARD}
    parts = [part.strip() for part in wanted.split(",") if part.strip()]
    names = list(dict.fromkeys(name for part in parts for name in groups.get(part, (part,))))
    if not names:
        raise ValueError(f"expected names of tasks separated by commas, got {wanted!r}")
    return names


def check_harness() -> None:
    """Raise ImportError with the line that installs lm-evaluation-harness, if it is absent."""
    check_package("lm_eval", "eval", "to run tasks")


@memoize
def _index(offline: bool, metadata: str) -> Any:
    """The harness's index, which takes seconds to read, for metadata in JSON."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(FOLDER), include_defaults=not offline, metadata=json.loads(metadata))


def known_tasks(names: Sequence[str], metadata: dict[str, Any] | None = None) -> Any:
    """The harness's index of tasks that has these names; its own tasks are indexed only on request.

    `metadata` is for tasks that generate their documents. Raises ValueError for an unknown task.
    """
    check_harness()
    manager = _index(set(names) <= set(OFFLINE), json.dumps(metadata))
    known = {*manager.all_tasks}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"expected tasks that lm-eval knows, or offline or standard, got {', '.join(unknown)}")
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_seq_len: int | None = None,
    seed: int = 0,
    manager: Any = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks through the harness's own `HFLM`: {task: {metric: {value, interval, documents}}}.

    Args:
        model, tokenizer: any causal language model of transformers, so hybrids too.
        names: of tasks, as `task_names` gives them.
        limit: maximum number of documents of each task.
        batch_size: documents in one forward pass.
        max_seq_len: tokens of the longest document (default: the configuration's).
        seed: of the bootstrap, and of few-shot examples.
        manager: the result of `known_tasks` for these names.

    Intervals are 95 % bootstrap intervals over documents, None for a metric that is no mean of them. Raises
    ImportError without lm-eval, ValueError for an unknown task; a data set that the Hub lacks raises as datasets does.
    """
    length = max_seq_len or context_length(model.config) or 4096
    if any(name.startswith(GENERATED) for name in names):
        lengths = [n for n in (4096, 8192, 16384, 32768) if n <= length] or [length]
        manager = known_tasks(names, {"pretrained": tokenizer.name_or_path, "max_seq_lengths": lengths})
    elif manager is None:
        manager = known_tasks(names)
    from lm_eval import evaluator
    from lm_eval.models import huggingface

    run, wrap = vars(evaluator)["simple_evaluate"], vars(huggingface)["HFLM"]
    harness = wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_seq_len)
    found: Any = run(
        model=harness,
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    results: dict[str, dict[str, Any]] = {}
    for task, row in found["results"].items():
        samples = found["samples"].get(task, [])
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            scores = [s[metric] for s in samples if metric in s and s.get("filter", kind) == kind]
            means = metric not in MIXED and scores and all(isinstance(s, (bool, int, float)) for s in scores)
            results.setdefault(task, {})[metric] = {
                "value": float(value),
                "interval": list(interval(scores, seed=seed)) if means else None,
                "documents": len(scores) or len(samples),
            }
    return results
