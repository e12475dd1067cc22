"""Measure what distilling models of 1B, 3B and 8B parameters costs, with random weights; one GPU or several.

    PYTHONPATH=src python -m experiments.cost --output OUT                                  # one GPU
    PYTHONPATH=src torchrun --nproc-per-node 2 -m experiments.cost --output OUT             # two GPUs, sharded

A few steps of `nha distill`'s own loop for every shape, teacher included (`--compile nothing` starts sooner and shows
what steps cost that are not compiled). Each shape is a row of OUT/cost.json as soon
as it is known, stamped with GPU, versions and date; OUT/cost.md is the table, with hours for a number of tokens. Rows
of the same shape and number of GPUs are not made again. --budget-s: shapes that would begin later are left out, and a
shape that has begun ends after the step in which time is up (the third at the earliest).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
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

from nha.distill.recipes import recipe_settings
from nha.distill.settings import COMPILED, DistillSettings
from nha.io import write_atomically

# Llama 3.2 1B and 3B and Llama 3 8B: hidden size, feed-forward size, layers, query heads, KV heads, tied embeddings;
# sequences of a step and in one pass, and whether activations are recomputed.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(size=(64, 128, 2, 4, 2, True), vocab=512, batch=(2, 0, False)),
    "1B": dict(size=(2048, 8192, 16, 32, 8, True), vocab=128256, batch=(8, 0, False)),
    "3B": dict(size=(3072, 8192, 28, 24, 8, True), vocab=128256, batch=(8, 0, True)),
    "8B": dict(size=(4096, 14336, 32, 32, 8, False), vocab=128256, batch=(4, 0, True)),
}
RECIPE, BASE_TOKENS = "quality", 12e6
MIN_STEPS = 3  # of a shape, even where time is up


def shape_config(name: str) -> Any:
    """The configuration of a shape."""
    from transformers import LlamaConfig

    hidden, inner, layers, heads, kv_heads, tied = SHAPES[name]["size"]
    return LlamaConfig(
        vocab_size=SHAPES[name]["vocab"],
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        max_position_embeddings=131072,
    )


def make_corpus(work: Path) -> tuple[Any, Any]:
    """Built-in text in tokens of a small tokenizer that is trained on it: a step's time does not depend on the text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from nha.data.corpus import open_corpus
    from nha.data.prepare import prepare
    from nha.data.text import calibration_text, evaluation_documents

    texts = [calibration_text(), *evaluation_documents()]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=500, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)
    work.mkdir(parents=True, exist_ok=True)
    if (work / "corpus").is_dir():
        return open_corpus(work / "corpus", tokenizer), tokenizer
    (work / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return prepare([str(work / "text.jsonl")], work / "corpus", tokenizer, held_out_fraction=0.0), tokenizer


def settings_of(name: str, options: argparse.Namespace, world: int) -> DistillSettings:
    """Settings of a few steps of a shape, with the recipe's full layers."""
    batch, micro, recompute = SHAPES[name]["batch"]
    seq_len = options.seq_len
    given = {
        "tokens": float(options.steps * batch * seq_len * world),
        "batch_size": batch,
        "micro_batch_size": micro,
        "gradient_checkpointing": recompute or world > 1,
        "seq_len": seq_len,
        "long_tokens": 0.0,
        "teacher_tokens": 0.0,
        "align_steps": 0,
        "align_sequences": 4,
        "compile": options.compile,
        "log_every": 1,
        "save_every": 10**9,
    }
    return recipe_settings(RECIPE, SHAPES[name]["size"][2], given=given)


def prepare_run(
    model: Any, tokenizer: Any, corpus: Any, settings: DistillSettings, run: Path, until: float
) -> tuple[Any, Any, Any]:
    """Student, stream and trainer of a run that ends once the clock (`time.monotonic`) shows `until`."""
    from nha.data.stream import Stream
    from nha.distill.run import compiles, make_mixture, make_student, make_trainer
    from nha.distill.stopping import Stop
    from nha.models.config import plan_windows

    rank, world = place()
    windows = plan_windows(model.config, settings.window_size, settings.full_layers)  # type: ignore[arg-type]
    stream = Stream(corpus, tokenizer, make_mixture(settings, world), rank, world)
    student, _ = make_student(model, corpus, settings, windows)
    if compiles(student, settings.compile):
        student.compile_layers()
    stop = Stop(max(0.0, until - time.monotonic()))
    return student.train(), stream, make_trainer(student, stream, run, settings, stop=stop)


def time_steps(
    model: Any, tokenizer: Any, corpus: Any, settings: DistillSettings, run: Path, until: float
) -> list[float]:
    """Tokens per second of each step on one device, without what is written and aligned before and after.

    Steps that would begin after `until` are left out, except for the first three.
    """
    import torch

    student, stream, trainer = prepare_run(model, tokenizer, corpus, settings, run, until)
    optimizer: Any = trainer.create_optimizer()
    speeds: list[float] = []
    for step in range(len(stream)):
        if step >= MIN_STEPS and time.monotonic() > until:
            break
        batch, begun = stream[step], time.perf_counter()
        trainer.training_step(student, batch)
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        speeds.append(settings.batch_size * settings.seq_len / (time.perf_counter() - begun))
    return speeds


def sharded_speeds(
    model: Any, tokenizer: Any, corpus: Any, settings: DistillSettings, run: Path, until: float
) -> list[float]:
    """Tokens per second of each step on all devices of a `torchrun`; no checkpoint is written.

    A step that ends after `until` is the last one.
    """
    from transformers import TrainerCallback

    class SaveNothing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = False

    trainer = prepare_run(model, tokenizer, corpus, settings, run, until)[2]
    trainer.add_callback(SaveNothing())
    trainer.train()
    return [entry["tokens_per_s"] for entry in trainer.state.log_history if "tokens_per_s" in entry]


def place() -> tuple[int, int]:
    """This process among those of a `torchrun`, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def measure(
    name: str, corpus: Any, tokenizer: Any, options: argparse.Namespace, world: int, until: float
) -> dict[str, Any]:
    """The row of a shape: tokens per second of the later steps, peak memory, and the estimate beside them."""
    import torch
    from transformers import AutoModelForCausalLM

    from experiments.distill import versions
    from nha.distill.estimate import estimate

    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    settings = settings_of(name, options, world)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape_config(name), dtype=torch.bfloat16 if cuda else torch.float32)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as run:
        speeds = (time_steps if world == 1 else sharded_speeds)(
            model.eval(), tokenizer, corpus, settings, Path(run), until
        )
    about = estimate(shape_config(name), dataclasses.replace(settings, tokens=BASE_TOKENS), world=world)
    speed = statistics.median(speeds[len(speeds) // 2 :])
    return {
        "shape": name,
        "gpus": world if cuda else 0,
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "parameters": about.parameters,
        "trainable": about.trainable,
        "batch_size": settings.batch_size,
        "seq_len": settings.seq_len,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "compile": settings.compile,
        "full_layers": list(settings.full_layers),
        "steps": len(speeds),
        "tokens_per_s": speed,
        "flops_per_s": speed * about.flops_per_token,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "estimated_tokens_per_s": about.tokens / about.seconds,
        "estimated_memory_gib": about.memory_bytes / 2**30,
        "seconds": round(time.monotonic() - begun, 1),
        "versions": versions(),
        "date": str(date.today()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| shape | GPUs | tokens/s | memory of each, GiB | TFLOP/s of each | hours for 12 M tokens | for 100 M |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        each = row["flops_per_s"] / max(1, row["gpus"]) / 1e12
        hours = [f"{tokens / row['tokens_per_s'] / 3600:.2f}" for tokens in (12e6, 100e6)]
        memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}"
        gpus = f"{row['gpus']} {row['gpu'] or 'CPU'}"
        lines.append(
            f"| {row['shape']} | {gpus} | {row['tokens_per_s']:,.0f} | {memory} | {each:.0f} | {' | '.join(hours)} |"
        )
    return "\n".join(lines) + "\n"


def same(row: dict[str, Any], name: str, gpus: int) -> bool:
    """Whether a row is of this shape and number of GPUs."""
    return (row["shape"], row["gpus"]) == (name, gpus)


def main(arguments: list[str] | None = None) -> int:
    """Measure all shapes. Returns 1 if one failed, 3 if the time was up before all had begun."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/cost"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nha-cost")
    parser.add_argument("--shapes", type=lambda s: s.split(","), default=["1B", "3B", "8B"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--compile", default="auto", choices=COMPILED, help="as of nha distill; nothing starts sooner")
    parser.add_argument("--budget-s", type=float, default=1e9)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"expected shapes out of {', '.join(SHAPES)}, got {', '.join(unknown)}")
    import torch

    rank, world = place()
    gpus = world if torch.cuda.is_available() else 0
    file, begun = options.output / "cost.json", time.monotonic()
    rows = json.loads(file.read_text()) if file.is_file() else []
    corpus, tokenizer = make_corpus(options.work / f"text-{rank}")
    status = 0
    for name in options.shapes:
        if any(same(row, name, gpus) for row in rows):
            continue
        if time.monotonic() - begun > options.budget_s:
            status = max(status, 3)
            break
        try:
            row = measure(name, corpus, tokenizer, options, world, begun + options.budget_s)
        except (RuntimeError, ValueError, OSError):
            traceback.print_exc()
            status = 1
        else:
            rows = [*rows, row]
            if rank == 0:
                options.output.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(rows, indent=1) + "\n")
                write_atomically(options.output / "cost.md", table(rows))
                print(json.dumps(row), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return status


if __name__ == "__main__":
    sys.exit(main())
