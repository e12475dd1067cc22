"""transformers' Trainer for training from scratch: windows by step, throughput in the log, a stop where it diverges."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nha.data.stream import ResumeSampler
from nha.distill.resumable import ResumableTrainer
from nha.models.windows import temporary_window
from nha.train.loss import LanguageModel
from nha.train.optimizers import make_optimizer
from nha.train.rows import MicroBatches, draw_windows
from nha.train.settings import TrainSettings

RECENT = 10  # entries of the log that a spike is judged by
Measures = dict[str, float]
Evaluate = Callable[[PreTrainedModel], Measures]


class TrainingDiverged(ValueError):
    """The loss is not finite, or has risen by more than `max_spike`; the last whole checkpoint is kept."""


def peak_bytes() -> int:
    """The most memory that was in use: of the GPU, or of this process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PretrainTrainer(ResumableTrainer):
    """Trains a `LanguageModel` on `MicroBatches`.

    Args:
        model: the model and its loss.
        batches: item i is micro-batch i, so a run resumes exactly where it stopped.
        args: as transformers takes them; its accumulation steps are the micro-batches of a step.
        settings: learning rates, optimizer and random windows.
        callbacks: called by the Trainer.
        start: the step of the checkpoint to resume from, or 0.
        losses: entries of the log before `start`.
        operations: of a token, for the utilisation.
        peak: operations per second of all devices together; None if unknown.
    """

    def __init__(
        self,
        model: LanguageModel,
        batches: MicroBatches,
        args: TrainingArguments,
        settings: TrainSettings,
        *,
        callbacks: list[TrainerCallback],
        start: int = 0,
        losses: list[float] | None = None,
        operations: float = 0.0,
        peak: float | None = None,
    ):
        self.batches, self.settings, self.start = batches, settings, start
        self.recent = list(losses or [])[-RECENT:]
        self.operations, self.peak = operations, peak
        self.last_log: tuple[float, int] | None = None  # when, and at which step
        self.throughput: list[float] = []
        super().__init__(model=model, args=args, train_dataset=batches, callbacks=callbacks)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides it by the accumulation steps

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches from `start` on, prefetched by other processes where there is a GPU to keep busy."""
        cuda = self.args.device.type == "cuda"
        options: dict[str, Any] = {"num_workers": 2, "prefetch_factor": 8, "pin_memory": True} if cuda else {}
        sampler = ResumeSampler(len(self.batches), self.start * self.batches.per_step)
        return DataLoader(self.batches, batch_size=None, sampler=sampler, **options)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's step of one micro-batch, once with each window that this step draws."""
        step, settings = self.state.global_step, self.settings
        if self.last_log is None:
            self.last_log = (time.perf_counter(), step)
        if not settings.random_windows:
            return super().training_step(model, inputs, num_items_in_batch)
        losses = []
        for window in draw_windows(settings.random_windows, settings.seed, step, settings.windows_per_step):
            with temporary_window(self.model.causal, window):
                losses.append(super().training_step(model, inputs, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """The loss [] of a micro-batch, divided by the windows that it is read with, which are summed."""
        return model(**inputs) / self.settings.windows_per_step

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the settings name."""
        if self.optimizer is None:
            fused = self.args.device.type == "cuda"
            self.optimizer = make_optimizer(self.model if model is None else model, self.settings, fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """`TrainSettings.lr_factor` for all groups."""
        if self.lr_scheduler is None:

            def factor(step: int) -> float:
                return self.settings.lr_factor(step, num_training_steps)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the Trainer's log by loss, norm and throughput since the last entry, and the time that is left.

        Raises TrainingDiverged for a loss that is not finite or has risen by more than `max_spike`.
        """
        if "loss" not in logs:
            return
        now, step = time.perf_counter(), self.state.global_step
        before, first = self.last_log or (now, step)
        step_tokens = self.settings.batch_size * self.batches.seq_len
        speed = (step - first) * step_tokens / max(1e-9, now - before)
        left = (self.batches.steps - step) * step_tokens / max(1e-9, speed)
        entry = {
            "loss": logs["loss"],
            "grad_norm": float(logs["grad_norm"]),
            "lr": logs["learning_rate"],
            "tokens": step * step_tokens,
            "tokens_per_s": speed,
            "seconds_left": left,
            "peak_memory_bytes": peak_bytes(),
        }
        if self.peak is not None:
            entry["mfu"] = speed * self.operations / self.peak
        self.throughput.append(speed)
        self.last_log = (now, step)
        self._check(entry["loss"], entry["grad_norm"], step)
        super().log(entry)

    def _check(self, loss: float, norm: float, step: int) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged(f"expected a finite loss and gradient, got {loss} and {norm} at step {step}")
        lowest = min(self.recent, default=math.inf)
        if loss > lowest + self.settings.max_spike:
            most = f"{lowest + self.settings.max_spike:.3f}, {self.settings.max_spike:g} above the lowest lately"
            raise TrainingDiverged(f"expected a loss of at most {most}, got {loss:.3f} at step {step}")
        self.recent = [*self.recent, loss][-RECENT:]

    def record(self, measures: Measures, seconds: float) -> None:
        """Add an entry of measures to the log; the `seconds` that they took do not count as training."""
        super().log(dict(measures))
        if self.last_log is not None:
            self.last_log = (self.last_log[0] + seconds, self.last_log[1])


class MeasureCallback(TrainerCallback):
    """Calls `measure` every few steps except the last, and lets an entry of the log precede every checkpoint."""

    def __init__(self, every: int, measure: Callable[[], None]):
        self.every, self.measure = every, measure

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log before a checkpoint, since the loss is checked there: weights that are not finite are never saved."""
        if control.should_save:
            control.should_log = True
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            due = control.should_log
            self.measure()  # adds an entry to the log, after which the Trainer thinks that it has logged this step
            control.should_log = due
