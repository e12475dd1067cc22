"""Variants of one hybrid that tables compare: as it is, without slots, without window, with a longer window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from nha.models.observe import ablate
from nha.models.windows import hybrid_layers, temporary_windows
from nha.ops.heads import map_window

VARIANTS: dict[str, str] = {
    "hybrid": "window and slots",
    "slots_off": "without slots: window and sink only",
    "window_off": "without window: every token goes through the slots",
    "longer_window": "without slots, the window longer by as many tokens: as many keys and values",
    "full_attention": "all windows -1: the original, if only gates and sinks were trained",
}


@contextmanager
def use_variant(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the context, a hybrid is one of its `VARIANTS`. Raises ValueError for another name or model."""
    if name not in VARIANTS:
        raise ValueError(f"expected a variant in {list(VARIANTS)}, got {name!r}")
    hybrid_layers(model)
    if name == "full_attention":
        with temporary_windows(model, -1):
            yield
    elif name == "longer_window":
        with longer_window(model):
            yield
    else:
        with ablate(model, None if name == "hybrid" else name):
            yield


@contextmanager
def longer_window(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the hybrid has no slots, and windows longer by as many tokens: as many keys and values."""
    slots: int = model.config.num_slots  # type: ignore[assignment]
    windows = [map_window(lambda w: w if w < 0 else w + slots, own) for own in model.config.window_sizes]  # type: ignore[union-attr]
    with temporary_windows(model, windows), ablate(model, "slots_off"):
        yield
