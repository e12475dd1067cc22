"""transformers' Trainer for distillation: separate gradients for text and recall text."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nha.data.stream import ResumeSampler, Stream
from nha.distill.checkpoint import LOG, read_log
from nha.distill.cuda_graphs import CUDAGraphRunner
from nha.distill.gradients import Gradients, combine_gradients, lr_factor
from nha.distill.resumable import ResumableTrainer
from nha.distill.settings import DistillSettings
from nha.distill.stopping import Stop
from nha.distill.student import SUMS, Distillation
from nha.distill.timeline import Timeline
from nha.io import write_atomically
from nha.ops.heads import Window, map_window

Log = dict[str, float]
Progress = Callable[[str, int, int], None]  # (stage, done, in all); stage: "teacher", "convert", "align" or "train"


@dataclass
class Reports:
    """Functions that a run calls: `log` with every entry of the log, `progress` as a stage begins and after every
    layer and step.

    `teacher_log` is called with every entry of the log of a teacher in training. `timeline` takes down when each stage
    ends.
    """

    log: Callable[[Log], None] | None = None
    teacher_log: Callable[[Log], None] | None = None
    progress: Progress | None = None
    timeline: Timeline = field(default_factory=Timeline)


def short_windows(windows: Sequence[Window]) -> list[Window]:
    """The windows of layers in a step that shortens them: a quarter of each.

    >>> short_windows([64, (256, -1)])
    [16, (64, -1)]
    """
    return [map_window(lambda w: w // 4 if w > 0 else w, own) for own in windows]


class DistillTrainer(ResumableTrainer):
    """Trains a `Distillation` on a `Stream`; item i of the stream is step i, so a run resumes exactly where it stopped.

    Args:
        model: the student and its teacher.
        stream: the batches.
        args: as transformers takes them.
        settings: learning rates, gradients and window dropout.
        callbacks: called by the Trainer.
        cuda_graphs: whether passes of a shape that comes often are captured.
        start: the step of the checkpoint to resume from, or 0.
    """

    model: Any

    def __init__(
        self,
        model: Distillation,
        stream: Stream,
        args: TrainingArguments,
        settings: DistillSettings,
        *,
        callbacks: list[TrainerCallback],
        cuda_graphs: bool = False,
        start: int = 0,
    ):
        self.stream, self.settings, self.start = stream, settings, start
        self.sums: Tensor | None = None
        self.norms: dict[str, Tensor] = {}
        self.last_log: tuple[float, int] | None = None  # when, and at which step
        self.parameters: list[nn.Parameter] = []
        self.cuda_graphs, self.runner = cuda_graphs, None
        super().__init__(model=model, args=args, train_dataset=stream, callbacks=callbacks)

    # A step, without the parts of Trainer that wait for the device.

    def get_train_dataloader(self) -> DataLoader:
        """Steps from `start` on, prefetched by other processes where there is a GPU to keep busy."""
        cuda = self.args.device.type == "cuda"
        options: dict[str, Any] = {"num_workers": 2, "prefetch_factor": 4, "pin_memory": True} if cuda else {}
        sampler = ResumeSampler(len(self.stream), self.start)
        return DataLoader(self.stream, batch_size=None, sampler=sampler, **options)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, None]:
        """The next step, if any is left."""
        return [batch for batch in [next(epoch_iterator, None)] if batch is not None], None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """Nothing: norms are logged by `log`."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Set the gradients of one step, from all its micro-batches. Returns the loss [], detached."""
        step = self.state.global_step
        if self.last_log is None:
            self._begin(model, step)
        windows = self.model.windows
        with self.model.using(short_windows(windows) if self.drops_window(step) else windows):
            parts, losses = self._gradients(model, inputs, self.stream.shape(step)[1])
        loss = torch.zeros((), device=self.args.device)
        for own, sums in losses:
            loss += own
            self.sums = sums if self.sums is None else self.sums + sums
        self.norms = combine_gradients(
            parts,
            self.parameters,
            how=self.settings.gradients,
            max_norm=self.settings.max_grad_norm,
            recall_norm=self.settings.answer_weight,
        )
        return loss

    def _begin(self, model: nn.Module, step: int) -> None:
        self.last_log = (time.perf_counter(), step)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.runner = CUDAGraphRunner(self.model, self.parameters) if self.cuda_graphs else None

    def _gradients(
        self, model: nn.Module, inputs: list[tuple[str, dict[str, Tensor]]], max_seq_len: int
    ) -> tuple[dict[str, Gradients], list[tuple[Tensor, Tensor]]]:
        """Gradients of each part of a step, and the losses and sums of its micro-batches."""
        one_each = len({name for name, _ in inputs}) == len(inputs)
        if self.runner is not None and one_each:
            passes = self.runner(inputs, max_seq_len)
            parts = {name: grads for (name, _), (_, _, grads) in zip(inputs, passes, strict=True)}
            return parts, [(loss, sums) for loss, sums, _ in passes]
        parts, losses = {}, []
        for index, (name, batch) in enumerate(inputs):
            batch = {key: x.to(self.args.device, non_blocking=True) for key, x in batch.items()}
            loss, sums = model(**batch, max_seq_len=max_seq_len)
            self.accelerator.backward(loss)
            losses.append((loss.detach(), sums))
            if index + 1 == len(inputs) or inputs[index + 1][0] != name:
                parts[name] = [p.grad for p in self.parameters]
                for p in self.parameters:
                    p.grad = None
        return parts, losses

    def drops_window(self, step: int) -> bool:
        """Whether windows are short in a step, drawn by seed and step."""
        if not self.settings.window_dropout:
            return False
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        return bool(torch.rand((), generator=generator) < self.settings.window_dropout)

    # Optimizer and learning rates.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with separate learning rates for weights, gates and sinks."""
        if self.optimizer is None:
            rates = self.settings.learning_rates(self.model.config.get_text_config().hidden_size)
            groups = (self.model if model is None else model).parameter_groups(*rates)
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """`lr_factor` for all groups."""
        if self.lr_scheduler is None:

            def factor(step: int) -> float:
                return lr_factor(step, num_training_steps, self.settings.warmup_fraction)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Logs.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the Trainer's log by means per token since the last entry, gradient norms and tokens per second.

        Raises ValueError for a loss that is not finite.
        """
        if "loss" not in logs or self.sums is None:
            return
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        now, step = time.perf_counter(), self.state.global_step
        before, first = self.last_log or (now, step)
        tokens, answers = max(1.0, sums["tokens"]), max(1.0, sums["answers"])
        entry = {
            "loss": logs["loss"],
            "kl": sums["kl"] / tokens,
            "cross_entropy": sums["cross_entropy"] / tokens,
            "answer_loss": sums["answer_loss"] / answers,
            "answer_accuracy": sums["correct_answers"] / answers,
            "lr": logs["learning_rate"],
            "tokens": self._tokens_between(-self.stream.first, step),
            "tokens_per_s": self._tokens_between(first, step) / max(1e-9, now - before),
        } | {f"grad_norm_{name}": float(norm) for name, norm in self.norms.items()}
        self.sums, self.last_log = None, (now, step)
        if not math.isfinite(entry["loss"]):
            raise ValueError(f"expected a finite loss, got {entry['loss']} at step {step}: lower the learning rate")
        super().log(entry)

    def _tokens_between(self, first: int, last: int) -> int:
        return sum(math.prod(self.stream.shape(step)) for step in range(first, last)) * self.args.world_size


class JsonlLogger(TrainerCallback):
    """Appends each entry of the log to `log.jsonl` and hands it to `report`.

    Entries after the step that a run resumes from are dropped.
    """

    def __init__(self, run: Path, start: int, report: Callable[[Log], None] | None):
        self.path, self.report = run / LOG, report
        if os.environ.get("RANK", "0") == "0":
            kept = read_log(run, until=start)
            write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Log | None = None, **_: Any
    ) -> None:
        """Append an entry."""
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step} | {k: v for k, v in logs.items() if k != "epoch"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.report is not None:
            self.report(entry)


class StopCallback(TrainerCallback):
    """Ends training with a checkpoint when `stop` asks for it, and reports the progress of every step."""

    def __init__(self, stop: Stop, progress: Progress | None):
        self.stop, self.progress = stop, progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here on a signal waits for the end of the step, unless one has come already."""
        self.stop.check()
        self.stop.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop if asked to; several processes agree on it when they log, where they wait for the device anyway."""
        due = self.stop.due()
        if args.world_size > 1:
            due = state.global_step % args.logging_steps == 0 and _any_process(due, args.device)
        if due:
            control.should_training_stop = control.should_save = control.should_log = True
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.progress is not None:
            self.progress("train", state.global_step, state.max_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let signals stop at once again: the run is finished, or has written a checkpoint."""
        self.stop.training = False


def _any_process(value: bool, device: torch.device) -> bool:
    flag = torch.tensor(float(value), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
