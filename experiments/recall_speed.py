"""Time the steps of a recall table on one GPU: eager, captured, captured with compiled layers, and of several models.

    python -m experiments.recall_speed --output results/recall_speed --budget-s 120

A row for each model, way of taking steps and number of models that are trained at once goes to OUT/recall_speed.jsonl
at once: milliseconds of a step of all models for each shape of batch, their mean as the table draws them, and the
seconds that compiling and capturing took.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nha.ablate.steps import WARMUP_STEPS, Batch, Steps, draw_ahead, draw_batch
from nha.ablate.table import Table, read_table
from nha.io import append_line

MODES = {"compiled": (True, True), "captured": (False, True), "eager": (False, False)}
TIMED_STEPS = 20


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_shape(models: list[Steps], draw: Callable[[], Batch], lr: float) -> tuple[float, float, float]:
    """Milliseconds of a step of all models, drawing included, and of drawing alone; seconds before all was prepared."""
    begun = time.perf_counter()
    for _ in range(WARMUP_STEPS + 2):
        batch = draw()
        for steps in models:
            steps(batch, lr)
    wait()
    prepared, begun = time.perf_counter() - begun, time.perf_counter()
    for batch in draw_ahead((draw() for _ in range(TIMED_STEPS)), models[0].model.device):
        for steps in models:
            steps(batch, lr)
    wait()
    step, begun = time.perf_counter() - begun, time.perf_counter()
    for _ in range(TIMED_STEPS):
        draw()
    wait()
    return 1e3 * step / TIMED_STEPS, 1e3 * (time.perf_counter() - begun) / TIMED_STEPS, prepared


def time_model(table: Table, name: str, mode: str, together: int) -> dict[str, Any]:
    """One row, of `together` models that are trained at once."""
    plan = table.recall
    assert plan is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = next(row for row in table.rows if row.model.name == name)
    compiled, captured = MODES[mode]
    models = []
    for _ in range(together):
        model: Any = row.model.build(table.recall_shape, 0, match=table.matched)
        models.append(Steps(model.to(device), compiled=compiled, captured=captured and device.type == "cuda"))
    generator = torch.Generator(device).manual_seed(0)
    found: dict[str, Any] = {"table": table.name, "model": name, "mode": mode, "together": together}
    found |= {"shapes": {}, "prepare_s": 0.0}
    mean = drawing = 0.0
    for size, weight in zip(plan.train, plan.weights, strict=True):
        count = plan.batch_of(size)
        step, draw, prepared = time_shape(models, lambda s=size, n=count: draw_batch(s, n, generator), row.lr)
        found["shapes"][f"{size.label} x {count}"] = round(step, 3)
        mean += weight / sum(plan.weights) * step
        drawing += weight / sum(plan.weights) * draw
        found["prepare_s"] = round(found["prepare_s"] + prepared, 2)
    found["captured"] = models[0].graphs is not None
    return found | {
        "ms": round(mean, 3),
        "draw_ms": round(drawing, 3),
        "row_s": round(mean * plan.steps / 1e3 / together, 2),
    }


def main(arguments: list[str] | None = None) -> int:
    """Time what is not there yet. Returns 0, 1 for a failure or 3 where time was short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "results/recall_speed")))
    parser.add_argument("--table", default="recall")
    parser.add_argument("--models", default="", help="separated by commas; default: all")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--together", default="1", help="models to train at once, several numbers separated by commas")
    parser.add_argument("--budget-s", type=float, default=120.0)
    options = parser.parse_args(arguments)
    ends, table, status = time.monotonic() + options.budget_s, read_table(options.table), 0
    names = [name for name in options.models.split(",") if name] or [model.name for model in table.models]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "recall_speed.jsonl"
    there = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(row["table"], row["model"], row["mode"], row.get("together", 1)) for row in there}
    counts = [int(count) for count in options.together.split(",")]
    for name, mode, together in itertools.product(names, options.modes.split(","), counts):
        if (table.name, name, mode, together) in done:
            continue
        if time.monotonic() > ends:
            print(f"{name}, {mode}, {together}: no time left", flush=True)
            status = status or 3
            continue
        try:
            row = time_model(table, name, mode, together)
            append_line(path, json.dumps(row))
            print(json.dumps(row), flush=True)
        except Exception:
            traceback.print_exc()
            status = 1
        gc.collect()
    return status


if __name__ == "__main__":
    sys.exit(main())
