"""The process that `nha.distill.compiler` starts: it trains a few random layers of a run's kinds for one step.

Reads a configuration, a dtype, settings and stages from stdin, and prints each stage when its kernels are compiled.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
import threading
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nha.data.packing import pack
from nha.data.stream import Mixture
from nha.distill.compiler import FAILED, ORIGINAL
from nha.distill.run import as_student, make_mixture
from nha.distill.settings import DistillSettings
from nha.distill.timeline import start_compiler
from nha.distill.trainer import short_windows
from nha.errors import one_line
from nha.models.adapter import to_hybrid
from nha.models.config import FULL, plan_windows
from nha.ops.heads import Window, window_of

MEMORY_FRACTION = 0.15  # of a GPU


def sample_layers(windows: Sequence[Window], kinds: Sequence[Any]) -> list[int]:
    """One layer of every kind that has graphs of its own: of a window, and of a kind in the family's configuration.

    Where windows differ, attention is outside the graphs: then two of the windows stand for all.

    >>> sample_layers([64, 64, -1, 64], [None] * 4), sample_layers([64, (64, 9), (9, 64), -1], [None] * 4)
    ([0, 2], [0, 1, 3])
    """
    several = list(dict.fromkeys(window for window in windows if window != FULL))[:2]
    keys: list[Any] = list(zip(windows, kinds, strict=True))
    if len(several) == 2:
        keys = [(window == FULL, window == several[1], kind) for window, kind in keys]
    return [keys.index(key) for key in dict.fromkeys(keys)]


def few_layers(config: Any, chosen: Sequence[int]) -> Any:
    """The configuration of a model of the chosen layers: a list of an entry a layer keeps theirs."""
    new, layers = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(new).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(new, name, [value[index] for index in chosen])
    new.num_hidden_layers = len(chosen)
    return new


def sample_batches(mixture: Mixture, device: torch.device) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Batches of the sizes that the first step has, of tokens 0, and the length of their sequences."""
    size, length = mixture.shape(0)
    recall = mixture.num_recall(0)
    groups = [size - recall, recall] if mixture.separate_recall else [size]
    micro = mixture.micro_batch_size or size
    for count in dict.fromkeys(min(micro, group - at) for group in groups for at in range(0, group, micro)):
        arrays = pack([(np.zeros(length, np.int64), [0], np.ones(length, bool))] * count)
        batch = {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}
        yield batch | {name: batch["follows"] / batch["follows"].sum() for name in ("kl_weight", "ce_weight")}, length


def compile_stage(config: Any, dtype: str, settings: DistillSettings, stage: str, device: torch.device) -> None:
    """Compile the graphs and kernels of a stage."""
    text, control = config.get_text_config(), stage == ORIGINAL
    given = settings.window_size
    planned = plan_windows(text, given if isinstance(given, int) else list(given), settings.full_layers)
    windows = [FULL if control else window_of(window) for window in planned]
    chosen = sample_layers(windows, getattr(text, "layer_types", None) or [None] * len(windows))
    torch.manual_seed(settings.seed)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(few_layers(text, chosen), dtype=getattr(torch, dtype))
    to_hybrid(
        model,
        [windows[index] for index in chosen],
        num_slots=settings.num_slots,
        num_sinks=settings.num_sinks,
        slot_distance=settings.slot_distance,
        slot_write=settings.slot_write,
    )
    student = as_student(model, settings, control).train()
    distinct = list(dict.fromkeys(windows))
    rows = [list(islice(cycle(distinct), at, at + len(chosen))) for at in range(0, len(distinct), len(chosen))]
    short = [short_windows(row) for row in rows] if settings.window_dropout else []
    student.compile_kernels(settings.seq_len, *rows, *short)
    student.compile_layers()
    for batch, length in sample_batches(make_mixture(settings, control=control), device):
        loss, _ = student(**batch, max_seq_len=length)
        loss.backward()
    torch._dynamo.reset()


def limit_memory(device: torch.device) -> None:
    """Leave the memory of a GPU to the run: what needs more than a small part of it fails here."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_FRACTION, device)


def end_with(pipe: BinaryIO) -> None:
    """End this process when the other end of a pipe is closed."""
    pipe.read()
    os._exit(1)


def main() -> None:
    """Compile what stdin asks for."""
    printed, sys.stdout = sys.stdout, sys.stderr
    start_compiler()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.zeros(1, device=device)
    limit_memory(device)
    try:
        config, dtype, settings, stages = pickle.load(sys.stdin.buffer)
    except EOFError:
        return
    threading.Thread(target=end_with, args=(sys.stdin.buffer,), daemon=True).start()
    for stage in stages:
        try:
            compile_stage(config, dtype, settings, stage, device)
        except Exception as error:  # whatever it is, the run compiles by itself
            print(f"{FAILED}{type(error).__name__}: {one_line(error)}", file=printed, flush=True)
            return
        print(stage, file=printed, flush=True)


if __name__ == "__main__":
    main()
