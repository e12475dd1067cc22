"""Compare `nha eval public` with lm-evaluation-harness's own tasks and scorer, item by item, on the same file.

    PYTHONPATH=src python -m experiments.harness --data DATA --limit 100 --output results/quality/harness.json

The harness reads PIQA and ARC-easy with its own prompts, tokenizes, scores and counts: `acc` is compared with the
choice of `nha`, in float32 and, where there is one, on a GPU. Needs lm-eval. Without --limit: all items.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from nha.data.sources import json_rows
from nha.evaluate.public.run import PublicSettings, measure_public, read_public, spaced
from nha.evaluate.public.sets import find_set
from nha.io import write_atomically
from nha.models import loading

TASKS = ("piqa", "arc_easy")


def harness_task(name: str, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """A task as the harness has it in its YAML file, with these rows as its documents."""
    path = folder / f"{name}.jsonl"
    plain = [row | {"query": row["query"].strip().removeprefix("Question:").strip()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in plain), encoding="utf-8")
    return {
        "task": f"{name}_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{query}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def harness_scores(
    model: Any, tokenizer: Any, tasks: list[dict[str, Any]], batch_size: int
) -> dict[str, dict[str, list[int]]]:
    """{task: {metric: 0 or 1 for every document}} by the harness."""
    from lm_eval import evaluator
    from lm_eval.models import huggingface

    wrapped = vars(huggingface)["HFLM"](pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found: Any = vars(evaluator)["simple_evaluate"](model=wrapped, tasks=tasks, bootstrap_iters=0, log_samples=True)
    scores = {}
    for task, samples in found["samples"].items():
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        scores[task.removesuffix("_local")] = {m: [int(s[m]) for s in ordered] for m in ("acc", "acc_norm")}
    return scores


def main(arguments: list[str] | None = None) -> int:
    """Score with both and write where they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limit", type=int, help="items of each set, evenly spaced")
    parser.add_argument("--batch-size", type=int, default=8, help="of the harness")
    parser.add_argument("--output", type=Path, default=Path("results/quality/harness.json"))
    options = parser.parse_args(arguments)
    model, tokenizer = loading.load(loading.find(options.model), dtype="float32")
    data = read_public(options.data, PublicSettings(parts=TASKS, limit=options.limit))
    own = measure_public(model.eval(), tokenizer, data)["sets"]
    with tempfile.TemporaryDirectory() as folder:
        tasks = []
        for name in TASKS:
            rows = [row for _, row in json_rows(find_set(options.data, name))]
            tasks.append(harness_task(name, spaced(rows, options.limit), Path(folder)))
        theirs = harness_scores(model, tokenizer, tasks, options.batch_size)
    result: dict[str, Any] = {"model": options.model, "lm_eval": importlib.metadata.version("lm_eval")}
    result |= {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "sets": {}}
    for name in TASKS:
        ours, acc = [int(c) for c in own[name]["correct"]], theirs[name]["acc"]
        differing = [i for i, (a, b) in enumerate(zip(ours, acc, strict=True)) if a != b]
        row = {"items": len(ours), "nha": sum(ours), "harness": sum(acc), "differing_items": differing}
        result["sets"][name] = row | {"harness_acc_norm": sum(theirs[name]["acc_norm"])}
        print(name, result["sets"][name], flush=True)
    write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
