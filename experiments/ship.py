"""Make the small file that ships a distilled hybrid: gates, sinks and changes of its base model's weights.

    PYTHONPATH=src python -m experiments.ship BASE HYBRID --run RUN --output FILE      # what LoRA trained, exactly
    PYTHONPATH=src python -m experiments.ship BASE HYBRID --output FILE                # all changes, in 2 bits a weight
    PYTHONPATH=src python -m experiments.ship BASE HYBRID --rank 16 --output FILE      # the best changes of rank 16
    PYTHONPATH=src python -m experiments.ship --install FILE --result results/quality  # into the package

HYBRID is the directory of a hybrid that `nha distill BASE RUN` made; --run names the run's directory, if it was made
with --trainable lora.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from nha.distill.checkpoint import WEIGHTS, latest_checkpoint
from nha.io import write_atomically, write_tensors
from nha.models import loading
from nha.models.delta import (
    CACHE_FORMATS,
    check_facts,
    lora_changes,
    low_rank_changes,
    packed_changes,
    portable_config,
    read_delta,
    save_delta,
)
from nha.models.embedded import EMBEDDED_ID, EMBEDDED_LICENSE
from nha.models.smollm2 import DELTA
from nha.tensor_file import DIGEST

LORA_SCALE = 2.0  # lora_alpha over rank, as `nha.distill.student` sets it
LIMIT = 12e6  # bytes
FACTS = {"base": EMBEDDED_ID, "license": EMBEDDED_LICENSE}
README = """# The distilled hybrid of the embedded model

`{name}` makes a hybrid of [{base}](https://huggingface.co/{base}): gates and sinks of its layers,
and changes of the weights of attention. `nha generate smollm2-hybrid "Why is the sky blue?"` loads it.

| | |
|---|---|
| bytes | {size:,} |
| SHA-256 | `{digest}` |
| licence | {license}, that of the model |
| windows | {windows} |
| made by | `{command}` |
"""


def make_delta(
    path: Path, base: Any, hybrid: Any, facts: Mapping[str, str], run: Path | None, rank: int | None
) -> None:
    """Write the file of a hybrid: what LoRA trained in `run`, or the changes from `base` without one.

    These are the best of a rank, or all of them in 2 bits a weight where `rank` is None.
    """
    if run is not None:
        checkpoint = latest_checkpoint(run)
        if checkpoint is None:
            raise SystemExit(f"expected a checkpoint in {run}, got none")
        changes = lora_changes(load_file(checkpoint / WEIGHTS), LORA_SCALE)
    else:
        changes = packed_changes(base, hybrid) if rank is None else low_rank_changes(base, hybrid, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_delta(path, hybrid, changes, {**FACTS, **facts})


def install(file: Path, place: Path = DELTA, quality: Mapping[str, float] | None = None) -> None:
    """Put a file into the package, with its numbers relative to the control, and a README that says what it is.

    Caches then keep numbers as they are computed, however the run was measured: in 8 bits a token takes twice the time
    on a CPU, so that is the user's choice.
    """
    tensors, metadata = read_delta(file)
    metadata.pop(DIGEST, None)
    if file.stat().st_size > LIMIT:
        raise SystemExit(f"expected at most {LIMIT:,.0f} bytes in {file}, got {file.stat().st_size:,}")
    config = portable_config(json.loads(metadata["config"]), metadata)
    metadata["config"] = json.dumps({name: x for name, x in config.items() if name not in CACHE_FORMATS})
    check_facts(metadata)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(place, tensors, metadata | {"quality": json.dumps(quality or {})})
    data = place.read_bytes()
    text = README.format(name=place.name, size=len(data), digest=hashlib.sha256(data).hexdigest(), **metadata)
    if quality:
        text += "\nRelative to the fair control, the original trained on the same batches with full attention:\n\n"
        text += "| | ratio |\n|---|---|\n" + "".join(f"| {name} | {value:.3f} |\n" for name, value in quality.items())
    write_atomically(place.parent / "README.md", text)
    print(f"{place}: {len(data):,} bytes, {len(tensors)} tensors")


def quality_of(folder: Path, recipe: str) -> dict[str, float]:
    """The numbers of a run of `experiments/quality.py` relative to its control, as ratios by name."""
    from experiments.quality_report import find_control, read_runs, shares

    runs = read_runs(folder)
    for run in runs:
        control = find_control(run, runs)
        if run["row"]["arm"] == recipe and control is not None:
            found = shares(run, control)
            return {name: round(value["ratio"], 4) for name, value in found.items() if value["ratio"] is not None}
    raise SystemExit(f"expected the recipe {recipe} and its control in {folder}/runs, got none")


def main(arguments: list[str] | None = None) -> int:
    """Make a file, or install one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?")
    parser.add_argument("hybrid", nargs="?")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--command", default="nha distill", help="the command that made the hybrid, for the file")
    parser.add_argument("--install", type=Path)
    parser.add_argument("--result", type=Path, help="the folder of results that has the file's run and its control")
    parser.add_argument("--recipe", default="ship", help="the run in it")
    options = parser.parse_args(arguments)
    if options.install is not None:
        install(options.install, quality=None if options.result is None else quality_of(options.result, options.recipe))
        return 0
    if options.hybrid is None or options.output is None:
        parser.error("expected BASE, HYBRID and --output")
    base, hybrid = (loading.load(loading.find(name), dtype="float32")[0] for name in (options.base, options.hybrid))
    make_delta(options.output, base, hybrid, {"command": options.command}, options.run, options.rank)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
