"""A short training of gates and sinks, layer by layer: each layer's output should be what full attention gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.models.config import FULL, LayerWindow, smallest_window
from nha.models.windows import hybrid_layers, set_windows
from nha.ops.backends import compile_kernels

GATE_LR, SINK_LR = 1e-2, 1e-3
Tensors = tuple[Tensor, ...]


def align(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    steps: int = 20,
    batch_size: int = 1,
    gate_lr: float = GATE_LR,
    sink_lr: float = SINK_LR,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, float]]:
    """Train every hybrid layer's gate and sink towards the output of the layer with full attention, on its inputs.

    One forward pass over texts ids [N, T] of the model before its conversion; each layer is trained for `steps`
    steps of Adam on `batch_size` sequences as soon as the pass reaches it, so memory is that of one layer. No other
    weight moves. Gates move at `gate_lr`, sinks at `sink_lr`. `progress` is called with (layers done, layers in all).

    Returns, per layer, the error before and after over all texts: squared, relative to that of an output of zero
    (0 for layers that are not hybrid). Raises ValueError if no window is shorter than the sequences.
    """
    modules = hybrid_layers(model)
    windows: list[LayerWindow] = list(model.config.window_sizes)  # type: ignore[arg-type]
    shortest = smallest_window(windows)
    if shortest == FULL or ids.shape[1] <= shortest:
        raise ValueError(
            f"expected texts longer than the smallest window, got {ids.shape[1]} tokens, windows {windows}"
        )
    generator = torch.Generator().manual_seed(seed)
    errors: list[tuple[float, float]] = []

    def train(module: Any, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, Any]) -> None:
        index = len(errors)
        if module.training_now:
            return
        if windows[index] == FULL:
            errors.append((0.0, 0.0))
            return
        if all(window == FULL for window in windows[:index]):  # the first hybrid layer
            compile_layers(kwargs, output[0])
        module.training_now = True
        set_windows(model, [window if place == index else FULL for place, window in enumerate(windows)])
        try:
            with torch.enable_grad():
                task = Task(module, kwargs, output[0])
                errors.append(_train_layer(task, steps, batch_size, (gate_lr, sink_lr), generator))
        finally:
            module.training_now = False
            set_windows(model, FULL)
        if progress is not None:
            progress(index + 1, len(modules))

    def compile_layers(kwargs: dict[str, Any], target: Tensor) -> None:
        """Compile the kernels of all layers side by side: one after another they take a minute where windows differ."""
        chosen = torch.arange(min(batch_size, len(target)), device=target.device)

        def launch() -> None:
            for module, window in zip(modules, windows, strict=True):
                if window != FULL:
                    Task(module, kwargs, target).gradients(chosen)

        for module in modules:
            module.training_now = True
        set_windows(model, windows)
        try:
            with torch.enable_grad():
                compile_kernels(launch, target.device)
        finally:
            set_windows(model, FULL)
            for module in modules:
                module.training_now = False

    was_training = model.training
    model.eval()
    set_windows(model, FULL)
    try:
        with _frozen_but_slots(model), _hooks(modules, train), torch.no_grad():
            model.get_decoder()(ids.to(model.device), use_cache=False)
    finally:
        set_windows(model, windows)
        model.train(was_training)
    return errors


class Task:
    """The error of one layer's output on chosen sequences, and its gradients.

    Args:
        module: the hybrid attention module, whose window is the layer's own.
        kwargs: the inputs of the layer, of all sequences.
        target: its output with full attention [N, T, hidden].
    """

    def __init__(self, module: Any, kwargs: dict[str, Any], target: Tensor):
        self.module, self.target = module, target
        self.hidden: Tensor = kwargs["hidden_states"].detach()
        self.tables = kwargs["position_embeddings"]
        own = ("hidden_states", "position_embeddings", "past_key_values", "cache")
        self.rest = {name: x for name, x in kwargs.items() if name not in own}
        slots = module.nha
        self.sinks = [slots.sink_key, slots.sink_value] if slots.sink_key.shape[1] else []
        self.parameters = [*slots.g_proj.parameters(), *self.sinks]

    def error(self, chosen: Tensor) -> Tensor:
        """The error [] of some sequences: squared, relative to that of an output of zero."""

        def choose(x: Tensor) -> Tensor:
            return x.index_select(0, chosen)

        cut = None if self.tables is None else tuple(choose(t) if t.shape[0] > 1 else t for t in self.tables)
        out = self.module(hidden_states=choose(self.hidden), position_embeddings=cut, **self.rest)[0]
        wanted = choose(self.target).float()
        return (out.float() - wanted).square().sum() / wanted.square().sum()

    def gradients(self, chosen: Tensor) -> Tensors:
        """The gradients of `parameters`."""
        return torch.autograd.grad(self.error(chosen), self.parameters, materialize_grads=True)

    @torch.no_grad()
    def measure(self, batch_size: int) -> float:
        """The mean error of all sequences."""
        parts = torch.arange(len(self.hidden), device=self.hidden.device).split(batch_size)
        return float(sum(self.error(part) * len(part) for part in parts) / len(self.hidden))


def _train_layer(
    task: Task, steps: int, batch_size: int, lrs: tuple[float, float], generator: torch.Generator
) -> tuple[float, float]:
    """Train one layer's slots; the errors before and after."""
    before = task.measure(batch_size)
    groups = [{"params": task.parameters[: -len(task.sinks) or None], "lr": lrs[0]}]
    if task.sinks:
        groups.append({"params": task.sinks, "lr": lrs[1]})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    saved = [p.detach().clone() for p in task.parameters]
    chosen = torch.arange(min(batch_size, len(task.hidden)), device=task.hidden.device)
    for _ in range(steps):
        chosen.copy_(torch.randperm(len(task.hidden), generator=generator)[:batch_size])
        for parameter, grad in zip(task.parameters, task.gradients(chosen), strict=True):
            parameter.grad = grad
        optimizer.step()
        schedule.step()
    after = task.measure(batch_size)
    if not after < before:  # a layer that training did not help stays as it was
        with torch.no_grad():
            for parameter, value in zip(task.parameters, saved, strict=True):
                parameter.copy_(value)
        after = before
    return before, after


@contextmanager
def _frozen_but_slots(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, only the slots' parameters ask for gradients."""
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(".nha." in name)
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(asked[name])
            p.grad = None


@contextmanager
def _hooks(modules: list[Any], function: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(function, with_kwargs=True) for module in modules]
    try:
        for module in modules:
            module.training_now = False
        yield
    finally:
        for handle, module in zip(handles, modules, strict=True):
            handle.remove()
            del module.training_now
