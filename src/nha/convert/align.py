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

GATE_LR, SINK_LR = 1e-2, 1e-3


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
        module.training_now = True
        set_windows(model, [window if place == index else FULL for place, window in enumerate(windows)])
        try:
            with torch.enable_grad():
                errors.append(_train_layer(module, kwargs, output[0], steps, batch_size, (gate_lr, sink_lr), generator))
        finally:
            module.training_now = False
            set_windows(model, FULL)
        if progress is not None:
            progress(index + 1, len(modules))

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


def _train_layer(
    module: Any,
    kwargs: dict[str, Any],
    target: Tensor,
    steps: int,
    batch_size: int,
    lrs: tuple[float, float],
    generator: torch.Generator,
) -> tuple[float, float]:
    """Train one layer's slots on inputs `kwargs`; the errors before and after."""
    hidden = kwargs["hidden_states"].detach()
    tables = kwargs["position_embeddings"]
    own = ("hidden_states", "position_embeddings", "past_key_values", "cache")
    rest = {k: v for k, v in kwargs.items() if k not in own}

    def error(chosen: Tensor) -> Tensor:
        cut = None if tables is None else tuple(t[chosen] if t.shape[0] > 1 else t for t in tables)
        out = module(hidden_states=hidden[chosen], position_embeddings=cut, **rest)[0]
        wanted = target[chosen].float()
        return (out.float() - wanted).square().sum() / wanted.square().sum()

    def measure() -> float:
        with torch.no_grad():
            parts = torch.arange(len(hidden)).split(batch_size)
            return float(sum(error(part) * len(part) for part in parts) / len(hidden))

    before = measure()
    slots = module.nha
    groups = [{"params": list(slots.g_proj.parameters()), "lr": lrs[0]}]
    if slots.sink_key.shape[1]:
        groups.append({"params": [slots.sink_key, slots.sink_value], "lr": lrs[1]})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    saved = [p.detach().clone() for p in slots.parameters()]
    for _ in range(steps):
        optimizer.zero_grad()
        error(torch.randperm(len(hidden), generator=generator)[:batch_size]).backward()
        optimizer.step()
        schedule.step()
    after = measure()
    if not after < before:  # a layer that training did not help stays as it was
        with torch.no_grad():
            for parameter, value in zip(slots.parameters(), saved, strict=True):
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
