"""The forms of one hybrid that every table compares: as it is, without slots, without window, a longer window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from nha.models.adapter import ablate, hybrid_layers, temporary_windows

VARIANTS: dict[str, str] = {
    "hybrid": "window and slots",
    "slots_off": "the same without its slots: window and sink only",
    "window_off": "the same without its window: every token goes through the slots",
    "longer_window": "no slots, and a window longer by as many tokens: as many keys and values",
    "full_attention": "all windows at -1: the original, if nothing but gates and sinks was trained",
}


@contextmanager
def use_variant(model: PreTrainedModel, form: str) -> Iterator[None]:
    """Within the context, a hybrid model is one of `VARIANTS`; raises ValueError for another name or model."""
    if form not in VARIANTS:
        raise ValueError(f"expected a form in {list(VARIANTS)}, got {form!r}")
    hybrid_layers(model)
    if form == "full_attention":
        with temporary_windows(model, -1):
            yield
    elif form == "longer_window":
        with longer_window(model):
            yield
    else:
        with ablate(model, None if form == "hybrid" else form):
            yield


@contextmanager
def longer_window(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the hybrid has no slots and windows longer by as many tokens: as many keys and values."""
    slots: int = model.config.num_slots  # type: ignore[assignment]
    windows: list[int] = list(model.config.window_sizes)  # type: ignore[arg-type]
    with temporary_windows(model, [w if w < 0 else w + slots for w in windows]), ablate(model, "slots_off"):
        yield
