"""Distil hybrids in many ways at equal tokens and measure each: what makes slots matter, beside its baselines.

    PYTHONPATH=src python3 experiments/distill.py --model MODEL --corpus CORPUS --arms hybrid,sink --out DIR

    --model        a model directory, a Hub id, or smollm2
    --corpus       from `nha distill --prepare-only`; its held-out documents are measured on
    --arms         names of ARMS, or "all"; --list shows them
    --seeds        0,1,2 for instance (default: 0)
    --set K=V      change a setting of every arm, such as rows=32 or rate=1e-3 (see DistillSettings); may be repeated
    --search       JSON of `nha search`: where the arms with full layers keep them (default: layers 3, 11, 18, 26)
    --out          summary.json (one row an arm, seed and number of tokens) and logs.jsonl (what they logged)
    --tokens       of every arm (default: 20e6)
    --work         where runs keep checkpoints (default: a temporary directory); the same command goes on from there
    --budget-s N   stop after so long; arms that did not run are named
    --no-eval      train only, for speed; --quick measures less
    --profile      time steps of the first arm one by one and show where the time goes, instead of all this
    --compile      layers (default on a GPU) or nothing

A row is written as soon as it is known. Exit status: 0 if every arm ran, 3 if time was up, 1 if an arm failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
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

from nha.convert.hybridize import hybridize
from nha.convert.search import windows_from_search
from nha.data.corpus import Corpus, open_corpus
from nha.data.recall import RecallSettings
from nha.data.stream import Stream
from nha.distill.run import (
    COMPILED,
    Distilled,
    DistillSettings,
    compile_student,
    distill,
    stage_one_ids,
    trainer_of,
)
from nha.distill.student import Distillation
from nha.evaluate.measure import Suite, measure_model, measure_texts, standard_suite
from nha.evaluate.variants import use_variant
from nha.io import write_atomically
from nha.models import loading
from nha.models.config import plan_windows
from nha.report.results import to_json

FULL_LAYERS = (3, 11, 18, 26)
# What differs from DistillSettings(); "full" stands for the layers that keep full attention.
TOLD = ("loss", "divergence", "cross_entropy", "answer_loss", "answers_right", "norm_text", "norm_recall")
TEACHER = "teacher"
TUNED = {"window_size": -1, "divergence": 0.0, "cross_entropy": 1.0}
SINK = {"slots_off": True, "align_steps": 0}
SLOW = {"rate": 5e-4, "gate_lr": 2e-3}
SOFT = {"init": "soft"}
FAR = {"recall": RecallSettings(long_range_fraction=0.5)}
FIRST = SOFT | SLOW | {"gradients": "clip", "cross_entropy": 0.0}  # the first recipe
PAPER = {
    "init": "paper",
    "align_steps": 0,
    "divergence": 0.0,
    "cross_entropy": 1.0,
    "gradients": "together",
    "rate": 2e-4,
    "gate_lr": 5e-4,
}
ARMS: dict[str, dict[str, Any]] = {
    TEACHER: {},
    "teacher_tuned": TUNED,
    "hybrid": {},
    "hybrid4": {"full": True},
    "sink": SINK,
    "sink4": SINK | {"full": True},
    "sink128": SINK | {"window_size": 128},  # W + M: as many keys and values as the hybrid
    "sink128_4": SINK | {"window_size": 128, "full": True},
    "text": {"recall_share": 0.0},
    "sink128_text": SINK | {"window_size": 128, "recall_share": 0.0},
    "paper": PAPER,
    "paper4": PAPER | {"full": True},
    # one setting at a time
    "recall6": {"recall_share": 0.0625},
    "recall25": {"recall_share": 0.25},
    "recall50": {"recall_share": 0.5},
    "answers0.1": {"answers": 0.1},
    "answers0.25": {"answers": 0.25},
    "answers2": {"answers": 2.0},
    "together": {"gradients": "together"},
    "clip": {"gradients": "clip"},
    "clip5e-4": FIRST,
    "clip5e-4_4": FIRST | {"full": True},
    "sink128_clip5e-4": SINK | FIRST | {"window_size": 128},
    "text5e-4": SLOW | {"cross_entropy": 0.0, "recall_share": 0.0},
    "rate5e-4": SLOW,
    "rate1e-3": {"rate": 1e-3, "gate_lr": 4e-3},
    "rate4e-3": {"rate": 4e-3, "gate_lr": 16e-3},
    "gates2e-3": {"gate_lr": 2e-3},
    "gates3e-2": {"gate_lr": 3e-2},
    "divergence": {"cross_entropy": 0.0},
    "cross_entropy": {"divergence": 0.0, "cross_entropy": 1.0},
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
    "grow": {"grow": 0.5},
    "far": FAR,
    "few_facts": {"recall": RecallSettings(facts=(1, 4))},
    "lora": {"trained": "lora"},
    "slots_alone": {"trained": "slots"},
    "all_weights": {"trained": "layers"},
    "long": {"long_share": 0.5},
    "long_far": FAR | {"long_share": 0.5, "recall_share": 0.25},
    "long_recall": FAR | {"long_share": 5 / 7, "recall_share": 0.5},
}


def settings_of(arm: str, seed: int, tokens: float, full: tuple[int, ...], given: dict[str, Any]) -> DistillSettings:
    """The settings of an arm; what is given by hand goes before what the arm says."""
    changes = dict(ARMS[arm])
    changes |= {"full_layers": full} if changes.pop("full", False) else {}
    changes |= {"long_tokens": tokens * changes.pop("long_share")} if "long_share" in changes else {}
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
    """What every arm is measured on: held-out documents, and recall text made with them."""
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
    form = "slots_off" if settings.slots_off else "hybrid"
    with use_variant(model, form):
        found = measure_model(model, suite, generate=generate)
    if form == "hybrid" and any(window >= 0 for window in model.config.window_sizes):
        teacher_forced = Suite(suite.texts, [one for one in suite.recall if one.task in ("one_fact", "four_facts")])
        with use_variant(model, "slots_off"):
            found["slots_off"] = measure_model(model, teacher_forced, generate=False)
        with use_variant(model, "window_off"):
            found["window_off"] = measure_texts(model, suite.texts)
    return found


def speed(run: Distilled) -> float:
    """Median tokens/s of the second half of what was logged."""
    logged = [entry["tokens_per_s"] for entry in run.log]
    return statistics.median(logged[len(logged) // 2 :]) if logged else 0.0


def row_of(arm: str, seed: int, settings: DistillSettings | None, run: Distilled | None, model: Any) -> dict[str, Any]:
    """What a row says besides measurements."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    config = model.config
    row: dict[str, Any] = {
        "arm": arm,
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
        plain = dataclasses.asdict(DistillSettings())
        row["settings"] = {k: v for k, v in dataclasses.asdict(settings).items() if v != plain[k]}
        row["last"], row["aligned"] = run.log[-1] if run.log else {}, run.aligned
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    return row


def profile(arm: str, corpus: Corpus, options: argparse.Namespace, steps: int = 5) -> None:
    """Print the time of a few steps, and of their kernels."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    settings = settings_of(arm, 0, 1e9, full_layers(options.search), options.given)
    model, tokenizer = loading.load(loading.find(options.model), dtype=options.dtype)
    stream = Stream(corpus, tokenizer, settings.mixture())
    windows = plan_windows(model.config, settings.window_size, settings.full_layers)
    ids = stage_one_ids(corpus, settings, windows)
    hybridize(model, settings.num_slots, windows, init=settings.init, calibration=ids)  # type: ignore[arg-type]
    student = Distillation(model, trained=settings.trained, taught=settings.divergence > 0)
    compile_student(student, options.compile)
    with tempfile.TemporaryDirectory() as run:
        trainer = trainer_of(student.train(), stream, Path(run), settings, 0, None, None)
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
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=70))
        for name in ("cuda", "cpu") if cuda else ("cpu",):
            total = (
                sum(
                    getattr(event, f"self_{'device' if name == 'cuda' else 'cpu'}_time_total")
                    for event in found.key_averages()
                )
                / 1e6
                / steps
            )
            print(f"{name}: {total:.3f} s a step")
    seconds = [step(batch) for batch in batches]
    tokens = settings.rows * settings.length
    print(f"{tokens / statistics.median(seconds):,.0f} tokens/s without logs and data")
    if cuda:
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")


def same_run(row: dict[str, Any], arm: str, seed: int, tokens: float) -> bool:
    """Whether a row is of this arm and seed and of as many tokens, up to 5 %."""
    return (row["arm"], row["seed"]) == (arm, seed) and abs(row["tokens"] - tokens) <= 0.05 * tokens


class Sweep:
    """The rows so far, and the time left."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, Path(options.out)
        self.ends = time.monotonic() + options.budget_s
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "summary.json"
        self.rows: list[dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else []

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def say(self, *words: Any) -> None:
        print(f"[{self.options.budget_s - self.left:6.1f}]", *words, flush=True)

    def has(self, arm: str, seed: int) -> bool:
        """Whether a row of this arm, seed and (about) as many tokens has been measured."""
        wanted = 0 if arm == TEACHER else self.options.tokens
        return any(same_run(row, arm, seed, wanted) and "recall" in row for row in self.rows)

    def keep(self, row: dict[str, Any], log: list[dict[str, float]]) -> None:
        """Write a row and its log."""
        about = {name: row[name] for name in ("arm", "seed", "tokens")}
        self.rows = [r for r in self.rows if not same_run(r, **about)] + [row]
        write_atomically(self.file, to_json(self.rows))
        if log:
            with (self.out / "logs.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(about | {"log": log}) + "\n")
        parts = [f"{key} {row[key]:.3f}" for key in ("ppl_2k", "ppl_8k", "repeats_2k") if key in row]
        for task, found in row.get("recall", {}).items():
            parts.append(f"{task} " + " ".join(f"{d}:{s['digits']:.2f}/{s['exact']:.2f}" for d, s in found.items()))
        self.say(row["arm"], row["seed"], f"{row['tokens_per_s'] or 0:,.0f} tokens/s", "; ".join(parts))

    def run(self, arm: str, seed: int, corpus: Corpus, suite: Suite | None) -> bool:
        """Train and measure one arm; False if time was up before it was done."""
        options = self.options
        model, tokenizer = loading.load(loading.find(options.model), dtype=options.dtype)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if arm == TEACHER:
            row = row_of(arm, seed, None, None, model)
            self.keep(row | (measure(model, suite, None, not options.no_generate) if suite else {}), [])
            return True
        settings = settings_of(arm, seed, options.tokens, full_layers(options.search), options.given)
        work = Path(options.work) / f"{arm}-{seed}"

        def report(entry: dict[str, float]) -> None:
            every = settings.log_every * options.say_every
            if entry["step"] % every == 0 or entry["step"] <= settings.log_every:
                told = " ".join(f"{name} {value:.3f}" for name, value in entry.items() if name in TOLD)
                self.say(f"  {arm} step {entry['step']:.0f} {entry['tokens_per_s']:,.0f} tokens/s {told}")

        reserve = 0.0 if suite is None else options.eval_s
        found = distill(
            model,
            tokenizer,
            corpus,
            work,
            settings,
            compiled=options.compile,
            report=report,
            budget=self.left - reserve,
        )
        if not found.finished:
            return False
        row = row_of(arm, seed, settings, found, found.model)
        self.keep(row | (measure(found.model, suite, settings, not options.no_generate) if suite else {}), found.log)
        return True


def main(arguments: list[str] | None = None) -> int:
    """Run the arms asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus")
    parser.add_argument("--arms", default="teacher,hybrid,sink,sink128")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--set", action="append", default=[], dest="pairs")
    parser.add_argument("--search")
    parser.add_argument("--out", default="results/hybridize")
    parser.add_argument("--work", default=os.path.join(tempfile.gettempdir(), "nha-hybridize"))
    parser.add_argument("--budget-s", type=float, default=1e9)
    parser.add_argument("--eval-s", type=float, default=60.0, help="seconds to leave for measuring an arm")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--compile", choices=COMPILED)
    parser.add_argument("--lengths", type=lambda s: [int(x) for x in s.split(",")], default=[2048, 8192])
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tasks", type=lambda s: s.split(","), default=["one_fact", "four_facts", "multi_key_needle"])
    parser.add_argument("--say-every", type=int, default=5, help="entries of the log for each that is printed")
    for flag in ("no-eval", "no-generate", "quick", "list", "profile"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:16} {changes}" for name, changes in ARMS.items()))
        return 0
    arms = list(ARMS) if options.arms == "all" else options.arms.split(",")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or options.corpus is None:
        parser.error(f"expected arms out of {', '.join(ARMS)}, got {unknown}" if unknown else "expected --corpus")
    options.given = parse_settings(options.pairs)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for arm in arms:
        settings_of(arm, 0, options.tokens, full_layers(options.search), options.given).check()
    campaign = Sweep(options)
    tokenizer = loading.load_tokenizer(loading.find(options.model))
    corpus = open_corpus(options.corpus, tokenizer)
    if options.profile:
        profile(arms[0], corpus, options)
        return 0
    suite = None if options.no_eval else suite_of(corpus, tokenizer, options)
    failed, late = [], []
    for seed in seeds:
        for arm in arms:
            name = f"{arm}-{seed}"
            if campaign.has(arm, seed):
                campaign.say(name, "is there already")
                continue
            if campaign.left <= (0 if suite is None else options.eval_s):
                late.append(name)
                continue
            campaign.say(name, "starts")
            try:
                if not campaign.run(arm, seed, corpus, suite):
                    late.append(name)
            except Exception as error:
                traceback.print_exc()
                failed.append(f"{name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
            gc.collect()  # a Trainer refers to itself
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if failed:
        campaign.say("failed:", "; ".join(failed))
    if late:
        campaign.say("no time for:", ", ".join(late))
    return 1 if failed else 3 if late else 0


if __name__ == "__main__":
    sys.exit(main())
