"""Distil hybrids with several recipes at equal tokens and measure each, beside the baselines.

    PYTHONPATH=src python3 experiments/distill.py --model MODEL --corpus CORPUS --runs hybrid,sink --output DIR

    --model        a model directory, a Hub id, or smollm2
    --corpus       from `nha distill --prepare-only`; its held-out documents are measured on
    --runs         names in RECIPES, or "all"; --list shows them
    --seeds        0,1,2 for instance (default: 0)
    --set K=V      change a setting of every run, such as batch_size=32 or lr=1e-3 (see DistillSettings); repeatable
    --search       JSON of `nha search`: where the runs with full layers keep them (default: layers 3, 11, 18, 26)
    --output       summary.json (one row a run, seed and number of tokens) and logs.jsonl (their logs)
    --tokens       of every run (default: 20e6)
    --work         where runs keep checkpoints (default: a temporary directory); the same command resumes from there
    --budget-s N   stop after so long; runs that were not made are named
    --no-eval      train only, for speed; --quick measures less
    --profile      time steps of the first run one by one and show where the time goes, instead of all this

A row is written as soon as it is known. Exit status: 0 if every run was made, 3 if time was up, 1 if a run failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path
from typing import Any

import torch

from nha.convert.search import windows_from_search
from nha.data.corpus import Corpus, open_corpus
from nha.data.stream import Stream
from nha.distill.run import Distilled, compiles, distill, make_mixture, make_student, make_trainer
from nha.distill.settings import DistillSettings
from nha.distill.trainer import Reports
from nha.evaluate.measure import Suite, measure_model, measure_texts, standard_suite
from nha.evaluate.variants import use_variant
from nha.io import append_line, write_atomically
from nha.models import loading
from nha.models.config import plan_windows
from nha.report.results import to_json

FULL_LAYERS = (3, 11, 18, 26)
# What differs from DistillSettings(); "full" stands for the layers that keep full attention.
LOGGED = ("loss", "kl", "cross_entropy", "answer_loss", "answer_accuracy", "grad_norm_text", "grad_norm_recall")
TEACHER = "teacher"
TUNED = {"window_size": -1, "kl_weight": 0.0, "ce_weight": 1.0}
SINK = {"slots_off": True, "align_steps": 0}
SLOW = {"lr": 5e-4, "gate_lr": 2e-3}
SOFT = {"init": "soft"}
LONG_RANGE = {"long_range_fraction": 0.5}
FIRST = SOFT | SLOW | {"gradients": "clip", "ce_weight": 0.0}  # the first recipe
PAPER = {
    "init": "paper",
    "align_steps": 0,
    "kl_weight": 0.0,
    "ce_weight": 1.0,
    "gradients": "together",
    "lr": 2e-4,
    "gate_lr": 5e-4,
}
RECIPES: dict[str, dict[str, Any]] = {
    TEACHER: {},
    "teacher_tuned": TUNED,
    "hybrid": {},
    "hybrid4": {"full": True},
    "sink": SINK,
    "sink4": SINK | {"full": True},
    "sink128": SINK | {"window_size": 128},  # W + M: as many keys and values as the hybrid
    "sink128_4": SINK | {"window_size": 128, "full": True},
    "text": {"recall_fraction": 0.0},
    "sink128_text": SINK | {"window_size": 128, "recall_fraction": 0.0},
    "paper": PAPER,
    "paper4": PAPER | {"full": True},
    # one setting at a time
    "recall6": {"recall_fraction": 0.0625},
    "recall25": {"recall_fraction": 0.25},
    "recall50": {"recall_fraction": 0.5},
    "answers0.1": {"answer_weight": 0.1},
    "answers0.25": {"answer_weight": 0.25},
    "answers2": {"answer_weight": 2.0},
    "together": {"gradients": "together"},
    "clip": {"gradients": "clip"},
    "clip5e-4": FIRST,
    "clip5e-4_4": FIRST | {"full": True},
    "sink128_clip5e-4": SINK | FIRST | {"window_size": 128},
    "text5e-4": SLOW | {"ce_weight": 0.0, "recall_fraction": 0.0},
    "rate5e-4": SLOW,
    "rate1e-3": {"lr": 1e-3, "gate_lr": 4e-3},
    "rate4e-3": {"lr": 4e-3, "gate_lr": 16e-3},
    "gates2e-3": {"gate_lr": 2e-3},
    "gates3e-2": {"gate_lr": 3e-2},
    "kl": {"ce_weight": 0.0},
    "cross_entropy": {"kl_weight": 0.0, "ce_weight": 1.0},
    "w32m96": {"window_size": 32, "num_slots": 96},
    "w96m32": {"window_size": 96, "num_slots": 32},
    "w64m32": {"num_slots": 32},
    "w64m128": {"num_slots": 128},
    "w128m64": {"window_size": 128},
    "gates_sharp": {"init": "kmeans", "gate_lr": 3e-2},
    "gates_soft": SOFT,
    "gates_keys": {"init": "keys"},
    "no_align": {"align_steps": 0},
    "distance64": {"slot_distance": 64},
    "distance256": {"slot_distance": 256},
    "window_dropout": {"window_dropout": 0.25},
    "fact_warmup": {"fact_warmup": 0.5},
    "long_range": LONG_RANGE,
    "few_facts": {"max_facts": 4},
    "lora": {"trainable": "lora"},
    "slots_alone": {"trainable": "slots"},
    "all_weights": {"trainable": "layers"},
    "long": {"long_fraction": 0.5},
    "long_quarter": LONG_RANGE | {"long_fraction": 0.5, "recall_fraction": 0.25},
    "long_recall": LONG_RANGE | {"long_fraction": 5 / 7, "recall_fraction": 0.5},
}


def settings_of(name: str, seed: int, tokens: float, full: tuple[int, ...], given: dict[str, Any]) -> DistillSettings:
    """The settings of a run; those given by hand override the recipe's."""
    changes = dict(RECIPES[name])
    changes |= {"full_layers": full} if changes.pop("full", False) else {}
    changes |= {"long_tokens": tokens * changes.pop("long_fraction")} if "long_fraction" in changes else {}
    return DistillSettings(**({"tokens": tokens, "seed": seed, "save_every": 10_000} | changes | given))


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Settings out of "name=value"."""
    known = {f.name: f for f in dataclasses.fields(DistillSettings)}
    found: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in known:
            raise SystemExit(f"expected --set with one of {sorted(known)}, got {pair!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def full_layers(search: str | None) -> tuple[int, ...]:
    """Which layers keep full attention."""
    if search is None:
        return FULL_LAYERS
    return tuple(index for index, window in enumerate(windows_from_search(search)) if window == -1)


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on."""
    found: dict[str, str | None] = {"nha": __import__("nha").__version__}
    for name in ("torch", "transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def suite_of(corpus: Corpus, tokenizer: Any, options: argparse.Namespace) -> Suite:
    """Held-out documents and recall text made with them, on which every run is measured."""
    documents = [corpus.document(index) for index in corpus.held_out_indices]
    longest = max(map(len, documents))
    lengths = [length for length in options.lengths if length <= longest]
    return standard_suite(
        tokenizer,
        documents,
        lengths=lengths,
        max_documents=16 if options.quick else options.texts,
        num_questions=8 if options.quick else options.rows,
        tasks=options.tasks,
        seed=0,
    )


def measure(model: Any, suite: Suite, settings: DistillSettings | None, generate: bool) -> dict[str, Any]:
    """The columns of a row: the model as trained, and a hybrid also without slots and without window."""
    if settings is None:
        return measure_model(model, suite, generate=generate)
    variant = "slots_off" if settings.slots_off else "hybrid"
    with use_variant(model, variant):
        found = measure_model(model, suite, generate=generate)
    if variant == "hybrid" and any(window != -1 for window in model.config.window_sizes):
        teacher_forced = Suite(suite.texts, [one for one in suite.recall if one.task in ("one_fact", "four_facts")])
        with use_variant(model, "slots_off"):
            found["slots_off"] = measure_model(model, teacher_forced, generate=False)
        with use_variant(model, "window_off"):
            found["window_off"] = measure_texts(model, suite.texts)
    return found


def speed(run: Distilled) -> float:
    """Median tokens/s of the second half of the log."""
    logged = [entry["tokens_per_s"] for entry in run.log]
    return statistics.median(logged[len(logged) // 2 :]) if logged else 0.0


def row_of(name: str, seed: int, settings: DistillSettings | None, run: Distilled | None, model: Any) -> dict[str, Any]:
    """The columns of a row besides measurements."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    config = model.config
    row: dict[str, Any] = {
        "run": name,
        "seed": seed,
        "tokens": run.log[-1]["tokens"] if run and run.log else 0,
        "windows": list(getattr(config, "window_sizes", [-1] * config.num_hidden_layers)),
        "slots": 0 if settings is None or settings.slots_off else settings.num_slots,
        "tokens_per_s": speed(run) if run else None,
        "gpu": gpu,
        "versions": versions(),
        "date": str(date.today()),
    }
    if settings is not None and run is not None:
        plain = DistillSettings().identity()
        row["settings"] = {k: v for k, v in settings.identity().items() if v != plain[k]}
        row["last"], row["aligned"] = run.log[-1] if run.log else {}, run.aligned
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    return row


def profile(name: str, corpus: Corpus, options: argparse.Namespace, steps: int = 5) -> None:
    """Print the time of a few steps, and of their kernels."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    settings = settings_of(name, 0, 1e9, full_layers(options.search), options.given)
    model, tokenizer = loading.load(loading.find(options.model), dtype=options.dtype)
    stream = Stream(corpus, tokenizer, make_mixture(settings))
    windows = plan_windows(model.config, settings.window_size, settings.full_layers)  # type: ignore[arg-type]
    student, _ = make_student(model, corpus, settings, windows)
    if compiles(student, settings.compile):
        student.compile_layers()
    with tempfile.TemporaryDirectory() as run:
        trainer = make_trainer(student.train(), stream, Path(run), settings)
        optimizer = trainer.create_optimizer()
        batches = [stream[step] for step in range(steps)]

        def step(batch: Any) -> float:
            started = time.perf_counter()
            trainer.training_step(student, batch)
            optimizer.step()
            called = time.perf_counter() - started
            if cuda:
                torch.cuda.synchronize()
            print(f"  called in {called:.3f} s, done in {time.perf_counter() - started:.3f} s", flush=True)
            return time.perf_counter() - started

        for batch in [*batches, *batches]:
            step(batch)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=kinds) as found:
            seconds = [step(batch) for batch in batches]
        events = found.key_averages()
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(events.table(sort_by=order, row_limit=40, max_name_column_width=70))
        for kind in ("device", "cpu") if cuda else ("cpu",):
            total = sum(getattr(event, f"self_{kind}_time_total") for event in events) / 1e6 / steps
            print(f"{kind}: {total:.3f} s a step")
    seconds = [step(batch) for batch in batches]
    tokens = settings.batch_size * settings.seq_len
    print(f"{tokens / statistics.median(seconds):,.0f} tokens/s without logs and data")
    if cuda:
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak")


def same_run(row: dict[str, Any], name: str, seed: int, tokens: float) -> bool:
    """Whether a row is of this run and seed and of as many tokens, up to 5 %."""
    return (row["run"], row["seed"]) == (name, seed) and abs(row["tokens"] - tokens) <= 0.05 * tokens


class Sweep:
    """The rows so far, and the time left."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, Path(options.output)
        self.ends = time.monotonic() + options.budget_s
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "summary.json"
        self.rows: list[dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else []
        if any("run" not in row for row in self.rows):
            raise SystemExit(f"expected rows with a run in {self.file}, got some of an earlier version")

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def print(self, *words: Any) -> None:
        """Print a line with the time since the start."""
        print(f"[{self.options.budget_s - self.left:6.1f}]", *words, flush=True)

    def has(self, name: str, seed: int) -> bool:
        """Whether a row of this run, seed and (about) as many tokens has been measured."""
        wanted = 0 if name == TEACHER else self.options.tokens
        return any(same_run(row, name, seed, wanted) and "recall" in row for row in self.rows)

    def add(self, row: dict[str, Any], log: list[dict[str, float]]) -> None:
        """Write a row and its log."""
        about = {"run": row["run"], "seed": row["seed"], "tokens": row["tokens"]}
        self.rows = [r for r in self.rows if not same_run(r, row["run"], row["seed"], row["tokens"])] + [row]
        write_atomically(self.file, to_json(self.rows))
        if log:
            append_line(self.out / "logs.jsonl", json.dumps(about | {"log": log}))
        parts = [f"{key} {row[key]:.3f}" for key in ("ppl_2k", "ppl_8k", "far_2k") if key in row]
        for task, found in row.get("recall", {}).items():
            parts.append(f"{task} " + " ".join(f"{d}:{s['digits']:.2f}/{s['exact']:.2f}" for d, s in found.items()))
        self.print(row["run"], row["seed"], f"{row['tokens_per_s'] or 0:,.0f} tokens/s", "; ".join(parts))

    def run(self, name: str, seed: int, corpus: Corpus, suite: Suite | None) -> bool:
        """Train and measure one run; False if time was up before it was done."""
        options = self.options
        model, tokenizer = loading.load(loading.find(options.model), dtype=options.dtype)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if name == TEACHER:
            row = row_of(name, seed, None, None, model)
            self.add(row | (measure(model, suite, None, not options.no_generate) if suite else {}), [])
            return True
        settings = settings_of(name, seed, options.tokens, full_layers(options.search), options.given)
        reserve = 0.0 if suite is None else options.eval_s
        budget = max(0.0, self.left - reserve)

        def log(entry: dict[str, float]) -> None:
            every = settings.log_every * options.print_every
            if entry["step"] % every == 0 or entry["step"] <= settings.log_every:
                shown = " ".join(f"{key} {value:.3f}" for key, value in entry.items() if key in LOGGED)
                self.print(f"  {name} step {entry['step']:.0f} {entry['tokens_per_s']:,.0f} tokens/s {shown}")

        found = distill(
            model,
            tokenizer,
            corpus,
            Path(options.work) / f"{name}-{seed}",
            dataclasses.replace(settings, budget=min(budget, 1e9)),
            reports=Reports(log=log),
        )
        if not found.finished:
            return False
        row = row_of(name, seed, settings, found, found.model)
        self.add(row | (measure(found.model, suite, settings, not options.no_generate) if suite else {}), found.log)
        return True

    def run_all(self, names: list[str], seeds: list[int], corpus: Corpus, suite: Suite | None) -> int:
        """Train and measure all runs. Returns the exit status."""
        failed, late = [], []
        for seed, name in itertools.product(seeds, names):
            label = f"{name}-{seed}"
            if self.has(name, seed):
                self.print(label, "is there already")
                continue
            if self.left <= (0 if suite is None else self.options.eval_s):
                late.append(label)
                continue
            self.print(label, "starts")
            try:
                if not self.run(name, seed, corpus, suite):
                    late.append(label)
            except Exception as error:
                traceback.print_exc()
                failed.append(f"{label} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
            gc.collect()  # a Trainer refers to itself
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if failed:
            self.print("failed:", "; ".join(failed))
        if late:
            self.print("no time for:", ", ".join(late))
        return 1 if failed else 3 if late else 0


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with `names`, `given` and `seeds` parsed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus")
    parser.add_argument("--runs", default="teacher,hybrid,sink,sink128")
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0])
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--set", action="append", default=[], dest="pairs")
    parser.add_argument("--search")
    parser.add_argument("--output", default="results/hybridize")
    parser.add_argument("--work", default=os.path.join(tempfile.gettempdir(), "nha-hybridize"))
    parser.add_argument("--budget-s", type=float, default=1e9)
    parser.add_argument("--eval-s", type=float, default=60.0, help="seconds to leave for measuring a run")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--lengths", type=lambda s: [int(x) for x in s.split(",")], default=[2048, 8192])
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="sequences of recall text to measure on")
    parser.add_argument("--tasks", type=lambda s: s.split(","), default=["one_fact", "four_facts", "multi_key_needle"])
    parser.add_argument("--print-every", type=int, default=5, help="entries of the log for each that is printed")
    for flag in ("no-eval", "no-generate", "quick", "list", "profile"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args(arguments)
    options.names = list(RECIPES) if options.runs == "all" else options.runs.split(",")
    unknown = [name for name in options.names if name not in RECIPES]
    if unknown:
        parser.error(f"expected runs out of {', '.join(RECIPES)}, got {', '.join(unknown)}")
    if options.corpus is None and not options.list:
        parser.error("expected --corpus")
    options.given = parse_settings(options.pairs)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Make and measure the runs."""
    options = parse_options(arguments)
    if options.list:
        print("\n".join(f"{name:16} {changes}" for name, changes in RECIPES.items()))
        return 0
    for name in options.names:  # raises before anything runs
        settings_of(name, 0, options.tokens, full_layers(options.search), options.given)
    sweep = Sweep(options)
    tokenizer = loading.load_tokenizer(loading.find(options.model))
    corpus = open_corpus(options.corpus, tokenizer)
    if options.profile:
        profile(options.names[0], corpus, options)
        return 0
    suite = None if options.no_eval else suite_of(corpus, tokenizer, options)
    return sweep.run_all(options.names, options.seeds, corpus, suite)


if __name__ == "__main__":
    sys.exit(main())
