"""Settings of a conversion and of a search for the layers that keep full attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nha.settings import (
    DTYPES,
    INITS,
    MAX_WINDOW,
    SLOT_WRITES,
    check_settings,
    count,
    fraction,
    parse_ints,
    parse_window,
    setting,
    weight,
)

SEARCHED_LAYERS = {"HuggingFaceTB/SmolLM2-135M-Instruct": (8, 18, 20, 23)}  # see docs/searching.md
FULL_FRACTION = 4 / 30  # of layers that keep full attention; searches and recipes were tuned at 4 of 30
WIDE_FRACTION = 15 / 90  # of KV heads with a wide window: some 15 of 90 copy from distant tokens
MAX_SEED = (1 << 32) - 1


@dataclass(frozen=True)
class HybridizeSettings:
    """Settings of a conversion, as `nha.hybridize` takes them. Raises ValueError for a value outside its bounds.

    >>> HybridizeSettings(num_slots=0)
    Traceback (most recent call last):
    ValueError: expected num_slots of at least 1 and at most 65536, got 0
    """

    window_size: int | tuple[int | tuple[int, ...], ...] = setting(
        64,
        "Tokens of every window, or a list with one entry per layer; -1: full attention.",
        at_least=-1,
        at_most=MAX_WINDOW,
        option="window",
        parse=parse_window,
    )
    num_slots: int = count(64, "Slots per KV head.", at_most=1 << 16, option="slots")
    full_layers: tuple[int, ...] | None = setting(
        None,
        "Layers that keep full attention, such as 8,18,20,23; '' for none.",
        at_least=0,
        at_most=1 << 16,
        parse=parse_ints,
        shown="8,18,20,23 for smollm2, none for other models",
    )
    init: str = setting("kmeans", "Start of the gates; spread and soft are for training.", choices=INITS)
    num_sinks: int = count(
        1, "Constant keys that stand in for a text's first tokens.", at_least=0, at_most=1 << 10, option="sinks"
    )
    slot_distance: int = count(128, "Distance, in tokens, at which queries see the slots.", at_least=0)
    slot_write: str = setting(
        "soft",
        "How slots are written: every token by gates, or kept tokens in a slot each, by a score that is learned from "
        "the original's attention.",
        choices=SLOT_WRITES,
    )
    dtype: str = setting("auto", "Dtype of the weights; auto: that of the model.", choices=DTYPES)
    seed: int = setting(0, "Seed of the k-means.", at_least=0, at_most=MAX_SEED)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search. Raises ValueError for a value outside its bounds.

    >>> SearchSettings(recall_weight=2)
    Traceback (most recent call last):
    ValueError: expected recall_weight of at least 0 and at most 1, got 2
    """

    num_full: int | None = setting(
        None,
        "How many layers keep full attention.",
        at_least=0,
        at_most=1 << 16,
        option="full",
        shown="2 in 15 of the layers, or what --bytes allows",
    )
    heads: int | None = setting(
        None,
        "Search KV heads instead of layers: how many get the window of --wide. With full attention (-1) the others "
        "have --window; else all windows together take the bytes of --window in every head.",
        at_least=0,
        at_most=1 << 20,
        shown="layers",
    )
    keep: float | None = setting(
        None,
        "Search KV heads, and propose how many need full attention: the fewest with which the model, untrained, still "
        "copies this fraction of what it copies from real text.",
        above=0,
        at_most=1,
        shown="as many as --heads",
    )
    head_steps: int = count(56, "Steps in which the mixing weights of heads are learned.")
    max_bytes: int | None = setting(
        None, "Bytes that the cache may take at --context.", at_least=1, at_most=1 << 50, option="bytes", shown="none"
    )
    context: int = count(16384, "Tokens for which the cache is counted.", at_most=1 << 40)
    window_size: int | None = setting(
        None,
        "Tokens in the windows of all other layers.",
        at_least=0,
        at_most=MAX_WINDOW,
        option="window",
        shown="64, or a hybrid's most common",
    )
    wide_window: int = setting(
        -1, "The window of the chosen layers; -1 is full attention.", at_least=-1, at_most=MAX_WINDOW, option="wide"
    )
    num_slots: int = count(64, "Slots per KV head, for a model that is no hybrid yet.", at_most=1 << 16, option="slots")
    recall_weight: float = fraction(0.5, "Weight of the recall loss; the text loss has the rest.")
    text_sequences: int = count(8, "Sequences of plain text.", at_most=1 << 16)
    recall_sequences: int = count(16, "Sequences of recall text.", at_most=1 << 16)
    seq_len: int = count(2048, "Tokens of a sequence.", at_least=256)
    exchange: bool = setting(True, "Exchange layers after the greedy search.")
    dtype: str = setting("auto", "Dtype of the weights; auto: that of the model.", choices=DTYPES)
    seed: int = setting(0, "Seed of the recall text.", at_least=0, at_most=MAX_SEED)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.num_full is not None and self.max_bytes is not None:
            raise ValueError(f"expected num_full or max_bytes, got both: {self.num_full} and {self.max_bytes}")
        if self.heads is not None and (self.num_full is not None or self.max_bytes is not None):
            raise ValueError(f"expected heads or num_full and max_bytes, got both, with heads of {self.heads}")
        if self.keep is not None:
            given = {"heads": self.heads, "num_full": self.num_full, "max_bytes": self.max_bytes}
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"expected keep or {name}, got both: {self.keep:g} and {value}")
            if self.wide_window != -1:
                raise ValueError(f"expected wide_window of -1 with keep, got {self.wide_window}")
        others = 64 if self.window_size is None else self.window_size
        if self.wide_window != -1 and self.wide_window <= others:
            raise ValueError(
                f"expected wide_window to be -1 or above the other layers' {others}, got {self.wide_window}"
            )


@dataclass(frozen=True)
class HeadSearchSettings:
    """Settings of a search for the KV heads that need a wide window. Raises ValueError for a value out of bounds.

    >>> HeadSearchSettings(penalty=-1)
    Traceback (most recent call last):
    ValueError: expected penalty of at least 0 and at most 1000000, got -1
    """

    heads: int | None = setting(
        None, "KV heads that get the wide window.", at_least=0, at_most=1 << 20, shown="a sixth of all"
    )
    wide_window: int = setting(256, "Their window; -1 is full attention.", at_least=-1, at_most=MAX_WINDOW)
    window_size: int = count(
        64, "Tokens a head whose bytes all windows together may take; beside full heads, the window of the others."
    )
    train_window: int = count(64, "The narrow window that full attention is mixed with.", at_least=1)
    penalty: float = weight(0.02, "Weight of the sum of all mixing weights.")
    lr: float = setting(0.07, "Learning rate of the mixing weights.", above=0, at_most=1)
    steps: int = count(56, "Steps of Adam.")
    batch_size: int = count(2, "Clozes of a step.", at_most=1 << 10)
    max_distance: int = count(256, "Tokens from an answer back to its source, at most.", at_least=16)
    seed: int = setting(0, "Seed of the clozes.", at_least=0, at_most=MAX_SEED)

    def __post_init__(self) -> None:
        check_settings(self)

    def identity(self) -> dict[str, Any]:
        """The settings that the mixing weights depend on: all but what is made of them."""
        made = ("heads", "wide_window", "window_size")
        return {name: value for name, value in vars(self).items() if name not in made}


def fraction_of(total: int, fraction: float) -> int:
    """A fraction of the layers or heads of a model, at least one unless the fraction is 0.

    >>> fraction_of(30, FULL_FRACTION), fraction_of(32, FULL_FRACTION), fraction_of(4, FULL_FRACTION)
    (4, 4, 1)
    >>> fraction_of(90, WIDE_FRACTION), fraction_of(256, WIDE_FRACTION)
    (15, 43)
    """
    return min(total, max(1, round(fraction * total))) if fraction else 0


def searched_layers(base: str) -> tuple[int, ...]:
    """The layers that a search found best for a model; none for one that was not searched.

    >>> searched_layers("HuggingFaceTB/SmolLM2-135M-Instruct"), searched_layers("some/other")
    ((8, 18, 20, 23), ())
    """
    return SEARCHED_LAYERS.get(base, ())
