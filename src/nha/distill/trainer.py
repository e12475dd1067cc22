"""transformers' Trainer for distillation: gradients of text and recall apart, small whole checkpoints, no waiting."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from nha.data.stream import ResumeSampler, Stream
from nha.distill.cuda_graphs import Recorder
from nha.distill.student import SUMS, Distillation, whole
from nha.io import write_atomically

WEIGHTS = "trained.safetensors"
LOG = "log.jsonl"
GRADIENTS = ("clip", "normalise", "together")


def schedule(step: int, steps: int, warmup: float, floor: float = 0.05) -> float:
    """Share of the learning rate at a step: a linear rise over `warmup` of the steps, then a cosine down to `floor`.

    >>> [round(schedule(step, 10, 0.2), 3) for step in (0, 1, 2, 9)]
    [0.5, 0.977, 0.909, 0.073]
    """
    rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
    return rise * ((1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)) + floor)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; what a crash left half written has another name."""
    found = get_last_checkpoint(str(run)) if run.is_dir() else None
    return None if found is None else Path(found)


def shard(tensor: Tensor) -> Tensor:
    """The part of a parameter or gradient that lies on this device."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def combine(
    parts: dict[str, list[Tensor | None]], parameters: list[nn.Parameter], treatment: str, most: float, weight: float
) -> dict[str, Tensor]:
    """Set the gradients of parameters to the sum of those of text and recall, each treated by itself.

    "clip" brings each to a norm of at most `most`; "normalise" clips that of text and gives that of recall `weight`
    times the norm left to text; "together" clips the sum. Returns the norms before, by name, without waiting for a
    device.
    """
    norms = {}
    for name, grads in parts.items():
        given = [g for g in grads if g is not None]
        norms[name] = whole(torch.nn.utils.get_total_norm(given)) if given else torch.zeros(())
    scales = {name: (most / norm.clamp_min(1e-12)).clamp_max(1.0) for name, norm in norms.items()}
    if treatment == "normalise" and len(parts) == 2:
        text, recall = parts
        scales[recall] = weight * scales[text] * norms[text] / norms[recall].clamp_min(1e-12)
    for grads, scale in zip(parts.values(), scales.values(), strict=True):
        torch._foreach_mul_([shard(g) for g in grads if g is not None], scale)  # pyright: ignore[reportPrivateImportUsage]
    for parameter in parameters:
        parameter.grad = None
    for grads in parts.values():
        both = [(p.grad, g) for p, g in zip(parameters, grads, strict=True) if p.grad is not None and g is not None]
        if both:
            sums, more = ([shard(x) for x in column] for column in zip(*both, strict=True))
            torch._foreach_add_(sums, more)  # pyright: ignore[reportPrivateImportUsage]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad if parameter.grad is None else parameter.grad
    return norms


class DistillTrainer(Trainer):
    """Runs a `Distillation` over a `Stream`; item i of the stream is step i, so a run goes on exactly where it stopped.

    `window_dropout` is the share of steps in which hybrid layers have a quarter of their window, so that slots must
    carry more. `recorded` makes CUDA graphs of passes whose shapes come often.
    """

    model: Any

    def __init__(
        self,
        model: Distillation,
        stream: Stream,
        args: TrainingArguments,
        *,
        rates: tuple[float, float, float],
        warmup: float,
        treatment: str,
        clip: float,
        window_dropout: float,
        callbacks: list[TrainerCallback],
        recorded: bool = False,
    ):
        self.stream, self.rates, self.warmup = stream, rates, warmup
        self.treatment, self.clip, self.window_dropout = treatment, clip, window_dropout
        self.start, self.sums, self.norms = 0, None, {}
        self.marked: tuple[float, int] | None = None
        self.parameters: list[nn.Parameter] = []
        self.recorded, self.recorder = recorded, None
        super().__init__(model=model, args=args, train_dataset=stream, callbacks=callbacks)

    # What a step costs besides the model: the parts of Trainer that wait for the device are left out.

    def get_train_dataloader(self) -> DataLoader:
        """Steps from where the run stands, made ahead by another process where there is a GPU to keep busy."""
        cuda = self.args.device.type == "cuda"
        options: dict[str, Any] = {"num_workers": 2, "prefetch_factor": 4, "pin_memory": True} if cuda else {}
        sampler = ResumeSampler(len(self.stream), self.start)
        return DataLoader(self.stream, batch_size=None, sampler=sampler, **options)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, None]:
        """The next step, if any is left."""
        return [batch for batch in [next(epoch_iterator, None)] if batch is not None], None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """Nothing: norms are logged by `training_step`."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one step, from all its micro-batches; the loss, detached."""
        device = self.args.device
        step = self.state.global_step
        if self.marked is None:
            self.marked = (time.perf_counter(), step)
            self.parameters = [p for p in model.parameters() if p.requires_grad]
            self.recorder = Recorder(self.model, self.parameters) if self.recorded else None
            self.model.beside = self.recorded
        parameters, windows = self.parameters, self.model.windows
        parts: dict[str, list[Tensor | None]] = {}
        loss = torch.zeros((), device=device)
        dropped = self.drops_window(step)
        length = self.stream.mixture.shape(step)[1]
        apart = len({name for name, _ in inputs}) == len(inputs)
        with self.model.using([w // 4 if dropped and w > 0 else w for w in windows]):
            if self.recorder is not None and apart:
                passes = self.recorder(inputs, length)
                parts = {name: grads for (name, _), (_, _, grads) in zip(inputs, passes, strict=True)}
                losses = [(own, sums) for own, sums, _ in passes]
            else:
                losses = []
                for at, (name, batch) in enumerate(inputs):
                    batch = {key: x.to(device, non_blocking=True) for key, x in batch.items()}
                    own, sums = model(**batch, longest=length)
                    self.accelerator.backward(own)
                    losses.append((own.detach(), sums))
                    if at + 1 == len(inputs) or inputs[at + 1][0] != name:
                        parts[name] = [p.grad for p in parameters]
                        for p in parameters:
                            p.grad = None
        for own, sums in losses:
            loss += own
            self.sums = sums if self.sums is None else self.sums + sums
        self.norms = combine(parts, parameters, self.treatment, self.clip, self.stream.mixture.answer_weight)
        return loss

    def drops_window(self, step: int) -> bool:
        """Whether windows are short in a step, drawn by seed and step."""
        if not self.window_dropout:
            return False
        generator = torch.Generator().manual_seed(self.stream.mixture.seed * 1_000_003 + step)
        return bool(torch.rand((), generator=generator) < self.window_dropout)

    # Optimizer and schedule.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a rate of its own for weights, gates and sinks."""
        if self.optimizer is None:
            groups = (self.model if model is None else model).groups(*self.rates)
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """`schedule` for all groups."""
        if self.lr_scheduler is None:

            def share(step: int) -> float:
                return schedule(step, num_training_steps, self.warmup)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Logs.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the log of a step by what was learned since the last: means per token, norms, tokens a second."""
        if "loss" not in logs or self.sums is None:
            return
        values = dict(zip(SUMS, self.sums.tolist(), strict=True))
        now, step = time.perf_counter(), self.state.global_step
        began, first = self.marked or (now, step)
        mixture = self.stream.mixture
        read = sum(math.prod(mixture.shape(i)) for i in range(first, step)) * self.args.world_size
        all_read = sum(math.prod(mixture.shape(i)) for i in range(step)) * self.args.world_size
        found = {
            "loss": logs["loss"],
            "divergence": values["divergence"] / max(1.0, values["tokens"]),
            "cross_entropy": values["cross_entropy"] / max(1.0, values["tokens"]),
            "answer_loss": values["answer_loss"] / max(1.0, values["answers"]),
            "answers_right": values["answers_right"] / max(1.0, values["answers"]),
            "rate": logs["learning_rate"],
            "tokens": all_read,
            "tokens_per_s": read / max(1e-9, now - began),
        } | {f"norm_{name}": float(norm) for name, norm in self.norms.items()}
        self.sums, self.marked = None, (now, step)
        if not math.isfinite(found["loss"]):
            raise ValueError(f"expected a finite loss, got {found['loss']} at step {step}: lower the learning rate")
        super().log(found)

    # Checkpoints: what is trained, and all that is needed to go on, whole or not there.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place and move it there when it is whole; older ones go after that."""
        run, name = str(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        work = os.path.join(run, f".{name}.partial")
        main = self.args.should_save
        if main:
            shutil.rmtree(work, ignore_errors=True)
        self.args.output_dir = work
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                shutil.rmtree(os.path.join(run, name), ignore_errors=True)
                os.replace(os.path.join(work, name), os.path.join(run, name))
                for old in Path(run).glob("checkpoint-*"):
                    if old.name != name:
                        shutil.rmtree(old, ignore_errors=True)
        except RuntimeError as error:  # how torch.save reports a full disk
            if not any(words in str(error) for words in ("writing", "unexpected pos")):
                raise
            raise OSError(errno.ENOSPC, f"expected room for a checkpoint in {run}, writing failed") from error
        finally:
            self.args.output_dir = run
            if main:
                shutil.rmtree(work, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, in float32."""
        tensors = {
            name: whole(p.detach()) for name, p in self.model.named_parameters() if p.requires_grad and p.numel()
        }
        if self.args.should_save and output_dir is not None:
            os.makedirs(output_dir, exist_ok=True)
            save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, os.path.join(output_dir, WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read what is trained."""
        load_trained(self.model if model is None else model, Path(resume_from_checkpoint))


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Copy the trained parameters of a checkpoint into a `Distillation`, spread over devices or not."""
    found = load_file(checkpoint / WEIGHTS)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    if found.keys() != wanted.keys():
        raise ValueError(f"expected {len(wanted)} trained tensors in {checkpoint}, got {len(found)} others")
    with torch.no_grad():
        for name, parameter in wanted.items():
            value = found[name].to(parameter.device)
            if hasattr(parameter, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
            parameter.copy_(value)


class JsonlLogger(TrainerCallback):
    """Keeps the log of a run as JSON lines, tells `report` of every entry, and stops in time.

    What a run had logged after the checkpoint it goes on from is dropped. `budget` is in seconds from now on.
    """

    def __init__(self, run: Path, start: int, report: Callable[[dict[str, float]], None] | None, budget: float | None):
        self.path, self.report = run / LOG, report
        self.ends = None if budget is None else time.monotonic() + budget
        if int(os.environ.get("RANK", "0")):
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        write_atomically(self.path, "".join(line + "\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append an entry."""
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step} | {k: v for k, v in logs.items() if k != "epoch"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.report is not None:
            self.report(entry)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Stop, with a checkpoint, when time is up."""
        if self.ends is not None and time.monotonic() > self.ends:
            control.should_training_stop = control.should_save = control.should_log = True
        if state.global_step >= state.max_steps:
            control.should_log = True
        return control
