"""Look into a hybrid while it runs: what its layers see, what its slots get, what it is without a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from nha.models.config import FULL
from nha.models.windows import hybrid_layers, temporary_windows
from nha.ops.heads import Window

ABLATIONS = (None, "slots_off", "window_off")


@dataclass
class Observation:
    """Inputs of an attention layer in one forward pass: hidden [B, T, hidden], keys and values [B, T, H, D].

    `query` [B, T, HQ, D] and `key` have their positions; `scale` and `softcap` are those of the scores.
    """

    hidden: Tensor
    slot_key: Tensor
    key: Tensor
    value: Tensor
    query: Tensor
    scale: float
    softcap: float | None


@contextmanager
def ablate(model: PreTrainedModel, ablation: str | None) -> Iterator[None]:
    """Within the context, read hybrid layers without their slots ("slots_off") or their window ("window_off").

    Slots off keeps window and sink. Window off reads slots that hold every token and the sink (a window of 0).
    Raises ValueError for another name.
    """
    if ablation not in ABLATIONS:
        raise ValueError(f"expected an ablation in {ABLATIONS}, got {ablation!r}")
    modules = hybrid_layers(model)
    before = [module.ablation for module in modules]
    try:
        for module in modules:
            module.ablation = ablation
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            module.ablation = old


@contextmanager
def observe(
    model: PreTrainedModel, callback: Callable[[int, Observation], None], windows: int | Sequence[Window] = FULL
) -> Iterator[None]:
    """Within the context, call `callback(layer, observation)` in every forward pass, as soon as a layer has its keys.

    Windows are -1 meanwhile (the model before its conversion), unless others are asked for.
    """
    modules = hybrid_layers(model)
    with temporary_windows(model, windows):
        try:
            for index, module in enumerate(modules):
                module.observer = partial(callback, index)
            yield
        finally:
            for module in modules:
                module.observer = None


@contextmanager
def observe_mass(model: PreTrainedModel, callback: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the context, call `callback(layer, slots, sink)` in every forward pass, for every layer that reads slots.

    `slots` and `sink` [B, T, HQ] are the attention mass of either. Without the context nothing of this is computed.
    A layer does not report a sequence that fits into its window: the mass is 0.
    """
    modules = hybrid_layers(model)
    try:
        for index, module in enumerate(modules):
            module.mass_observer = partial(callback, index)
        yield
    finally:
        for module in modules:
            module.mass_observer = None
