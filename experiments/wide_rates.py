"""Distil shapes of 0.4B and 1B for a few hundred steps at the recipes' learning rates: the loss falls without a spike.

    PYTHONPATH=src python -m experiments.wide_rates --data DATA --output OUT --budget-s 190

The rates of the recipes were tuned at a width of 576 and shrink in proportion for wider models; "x1" is that rate, and
"unscaled" the rate of width 576. Weights start at random, so the original is first trained with full attention by the
same loop, as with `--teacher-tokens`, on a part of the steps; then the hybrid is distilled from it. A spike is a loss
above the mean of the 50 entries before by more than six of their standard deviations. OUT/rates/*.json holds the loss
of every step of each case, written every 50 steps; a case that was cut is made again. OUT/rates.md and rates.png show
them. Exit status: 0, 1 for a failure, 3 where time was up.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments.distill import versions
from experiments.second_model import find_corpus, load_tokenizer
from nha.data.corpus import Corpus
from nha.distill.recipes import recipe_settings
from nha.distill.run import distill
from nha.distill.settings import GATE_LR, LR, DistillSettings
from nha.distill.stopping import Stop
from nha.distill.trainer import Reports
from nha.io import write_atomically

# Hidden size, feed-forward size, layers, query heads, KV heads.
SHAPES = {"tiny": (64, 128, 2, 4, 2), "0.4B": (960, 2560, 32, 15, 5), "1B": (2048, 8192, 16, 32, 8)}
RATES = ("x1", "unscaled")
CASES = ("0.4B-x1", "1B-x1", "1B-unscaled", "0.4B-unscaled")
BEFORE, DEVIATIONS = 50, 6.0
RESERVE_S = 8.0
WRITE_EVERY = 50


def find_spikes(losses: Sequence[float], before: int = BEFORE, deviations: float = DEVIATIONS) -> list[int]:
    """Where a loss exceeds the mean of the `before` losses before it by more than some of their standard deviations.

    The first `before` losses are not judged: they fall too fast for a mean.

    >>> calm = [5.0, 5.1] * 40
    >>> find_spikes(calm), find_spikes([*calm, 5.2, 9.0])
    ([], [81])
    """
    values, found = np.asarray(losses, float), []
    for index in range(before, len(values)):
        window = values[index - before : index]
        if not np.isfinite(values[index]) or values[index] > window.mean() + deviations * window.std():
            found.append(index)
    return found


def shape_config(name: str, vocab_size: int) -> LlamaConfig:
    """A Llama of a shape."""
    hidden, inner, layers, heads, kv_heads = SHAPES[name]
    return LlamaConfig(
        vocab_size=-(-vocab_size // 64) * 64,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def settings_of(case: str, options: argparse.Namespace) -> DistillSettings:
    """The settings of a case: the recipe's but for the number of steps, all sequences of one length."""
    shape, _, rate = case.rpartition("-")
    step = options.batch_size * options.seq_len
    given: dict[str, Any] = {
        "tokens": float((options.teacher_steps + options.steps) * step),
        "teacher_tokens": float(options.teacher_steps * step),
        "long_tokens": 0.0,
        "recall_fraction": 0.25,
        "long_range_fraction": 0.5,
        "answer_weight": DistillSettings.answer_weight,
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "align_sequences": 8,
        "align_steps": 5,
        "trainable": "layers" if options.teacher_steps else "attention",
        "compile": "nothing",
        "log_every": 1,
        "save_every": 10**9,
    }
    if rate == "unscaled":
        given |= {"lr": LR, "gate_lr": GATE_LR}
    return recipe_settings("constant", SHAPES[shape][2], given=given)


def run_case(case: str, corpus: Corpus, tokenizer: Any, options: argparse.Namespace, stop: Stop) -> bool:
    """Train a case and write its row and losses every `WRITE_EVERY` steps and at the end; False where time was up."""
    shape = case.rpartition("-")[0]
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    settings = settings_of(case, options)
    with torch.device("cuda" if cuda else "cpu"):
        config = shape_config(shape, corpus.meta["tokenizer"]["vocabulary"])
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    logs: dict[str, list[dict[str, float]]] = {"teacher": [], "hybrid": []}
    about = {
        "case": case,
        "parameters": sum(p.numel() for p in model.parameters()),
        "hidden_size": config.hidden_size,
        "learning_rates": settings.learning_rates(config.hidden_size),
        "step_tokens": settings.batch_size * settings.seq_len,
        "trainable": settings.trainable,
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "versions": versions(),
        "date": str(date.today()),
        "command": f"python -m experiments.wide_rates --data DATA --cases {case}",
    }

    def write(finished: bool) -> None:
        losses = {name: [entry["cross_entropy"] for entry in log] for name, log in logs.items()}
        losses |= {"kl": [entry["kl"] for entry in logs["hybrid"]], "total": [x["loss"] for x in logs["hybrid"]]}
        row = about | {"steps": len(logs["hybrid"]), "teacher_steps": len(logs["teacher"]), "finished": finished}
        row |= {"seconds": round(time.monotonic() - begun, 1)}
        row |= {"memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None}
        found = {"row": row | judge(losses), "losses": losses, "settings": dataclasses.asdict(settings)}
        write_atomically(options.output / "rates" / f"{case}.json", json.dumps(found) + "\n")

    def take(name: str) -> Callable[[dict[str, float]], None]:
        def log(entry: dict[str, float]) -> None:
            logs[name].append(entry)
            if len(logs[name]) % WRITE_EVERY == 0:
                print(f"  {case} {name} step {entry['step']:.0f}: loss {entry['loss']:.3f}", flush=True)
                write(finished=False)

        return log

    with tempfile.TemporaryDirectory() as place:
        reports = Reports(log=take("hybrid"), teacher_log=take("teacher"))
        found = distill(model.eval(), tokenizer, corpus, Path(place) / "run", settings, reports=reports, stop=stop)
    about["parameters"] = sum(p.numel() for p in found.model.parameters())  # with gates and sinks
    write(found.finished)
    return found.finished


def is_finished(path: Path) -> bool:
    """Whether a file holds all steps of a case."""
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["row"].get("finished", True)


def judge(losses: dict[str, list[float]]) -> dict[str, Any]:
    """First and last losses, as means of ten, and spikes of each kind of loss."""
    found: dict[str, Any] = {}
    for name, values in losses.items():
        if values:
            ends = [float(np.mean(values[:10])), float(np.mean(values[-10:]))]
            found[name] = {"first": ends[0], "last": ends[1], "spikes": find_spikes(values)}
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| shape and rate | parameters | steps | rates: weights, gates | teacher's loss | hybrid's loss | KL | spikes |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lr, gate_lr, _ = row["learning_rates"]
        ends = [
            f"{row[n]['first']:.2f} to {row[n]['last']:.2f}" if n in row else "" for n in ("teacher", "hybrid", "kl")
        ]
        spikes = sum(len(row[name]["spikes"]) for name in ("teacher", "hybrid", "total") if name in row)
        steps = f"{row['teacher_steps']} + {row['steps']}"
        cells = [
            row["case"],
            f"{row['parameters'] / 1e6:,.0f} M",
            steps,
            f"{lr:.2g}, {gate_lr:.2g}",
            *ends,
            str(spikes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(runs: Sequence[dict[str, Any]]) -> bytes:
    """Cross-entropy of every step: teacher, then hybrid, one panel a case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9, 1.9 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for axes, run in zip(panels, runs, strict=True):
        teacher, hybrid = run["losses"]["teacher"], run["losses"]["hybrid"]
        axes.plot(range(len(teacher)), teacher, color="#5f6871", linestyle="--", linewidth=1, label="teacher")
        axes.plot(range(len(teacher), len(teacher) + len(hybrid)), hybrid, color="#0072b2", linewidth=1, label="hybrid")
        axes.set_title(run["row"]["case"], fontsize=9, loc="left")
        axes.set_ylabel("nats", fontsize=9)
        axes.tick_params(labelsize=9)
        axes.legend(frameon=False, fontsize=9)
    panels[-1].set_xlabel("step", fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def write_report(folder: Path) -> str:
    """Write rates.json, rates.md and rates.png of a folder's runs; returns the table."""
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "rates").glob("*.json")}
    runs = [found[case] for case in (*CASES, *sorted(set(found) - set(CASES))) if case in found]
    if not runs:
        return ""
    text = table([run["row"] for run in runs])
    write_atomically(folder / "rates.json", json.dumps([run["row"] for run in runs], indent=1) + "\n")
    write_atomically(folder / "rates.md", text)
    write_atomically(folder / "rates.png", picture(runs))
    return text


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("results/generality"))
    parser.add_argument("--known", type=Path, default=Path("results/generality"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nha-rates")
    parser.add_argument("--corpus", type=Path, help="a corpus of this tokenizer, if it is there")
    parser.add_argument("--tokenizer", default=os.environ.get("NHA_QUALITY_MODEL", "smollm2"))
    parser.add_argument("--cases", type=lambda s: s.split(","), default=list(CASES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--teacher-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--budget-s", type=float, default=1e9)
    parser.add_argument("--report", type=Path, help="make table and picture of this folder anew, and stop")
    options = parser.parse_args(arguments)
    for case in options.cases:
        shape, _, rate = case.rpartition("-")
        if shape not in SHAPES or rate not in RATES:
            parser.error(f"expected cases SHAPE-RATE of {', '.join(SHAPES)} and {', '.join(RATES)}, got {case}")
    if options.data is None and options.report is None and options.corpus is None:
        parser.error("expected --data or --corpus")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the cases that are not there yet."""
    options, begun = parse_options(arguments), time.monotonic()
    if options.report is not None:
        print(write_report(options.report))
        return 0
    (options.output / "rates").mkdir(parents=True, exist_ok=True)
    tokenizer, status = load_tokenizer(options.tokenizer), 0
    corpus = find_corpus(options.corpus, options.data, options.work, tokenizer)
    stop = Stop(max(1.0, options.budget_s - RESERVE_S - (time.monotonic() - begun)))
    for case in options.cases:
        if any(is_finished(folder / "rates" / f"{case}.json") for folder in (options.output, options.known)):
            continue
        if stop.due():
            status = max(status, 3)
            continue
        try:
            if not run_case(case, corpus, tokenizer, options, stop):
                status = max(status, 3)
        except Exception:
            traceback.print_exc()
            status = 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(write_report(options.output), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
