"""The settings of a distillation in one dataclass: the source of the command line, the docs table and all checks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Imports no PyTorch: the command line needs this file to print its help.
TRAINABLE = ("attention", "layers", "lora", "slots")
GRADIENTS = ("clip", "normalise", "together")
COMPILED = ("auto", "layers", "nothing")
INITS = ("kmeans", "soft", "spread", "keys", "paper")  # those of `hybridize`
LR, GATE_LR, TUNED_WIDTH = 2e-3, 8e-3, 576
MAX_TOKENS, MAX_LENGTH, MAX_WINDOW = 10**15, 1 << 24, (1 << 31) - 1


def _setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help text and its bounds.

    Args:
        default: its value where none is given.
        help: one sentence for the command line and the docs.
        **metadata: `at_least`, `at_most`, `above`: bounds, which may be equal except for `above`. `choices`: the
            strings it can be. `option`: its name on the command line, if not that of the field. `parse`: str to value
            on the command line. `shown`: the default in words. `resumable`: whether a resumed run may change it.
    """
    return field(default=default, metadata={"help": help, **metadata})


def _fraction(default: float, help: str, **metadata: Any) -> Any:
    return _setting(default, help, at_least=0, at_most=1, **metadata)


def _weight(default: float, help: str, **metadata: Any) -> Any:
    return _setting(default, help, at_least=0, at_most=1e6, **metadata)


def _count(default: int, help: str, at_least: int = 1, at_most: int = MAX_LENGTH, **metadata: Any) -> Any:
    return _setting(default, help, at_least=at_least, at_most=at_most, **metadata)


def parse_ints(text: str) -> tuple[int, ...]:
    """Integers separated by commas.

    >>> parse_ints("3, 11,18"), parse_ints("")
    ((3, 11, 18), ())
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"expected integers separated by commas, got {text!r}") from None


def parse_window(text: str) -> int | tuple[int, ...]:
    """One window for all layers, or one for each.

    >>> parse_window("64"), parse_window("64,-1")
    (64, (64, -1))
    """
    windows = parse_ints(text)
    if not windows:
        raise ValueError(f"expected an integer or a list of them, got {text!r}")
    return windows if "," in text else windows[0]


@dataclass(frozen=True)
class DistillSettings:
    """All that a run depends on besides the model and the corpus. A run is resumed with the same settings only.

    Raises ValueError for a value outside the bounds that the field's metadata names, and for NaN and infinity.

    >>> DistillSettings(lr=1e-3).batch_size
    16
    >>> DistillSettings(lr=float("inf"))
    Traceback (most recent call last):
    ValueError: expected lr of at least 0 and at most 1, got inf
    """

    window_size: int | tuple[int, ...] = _setting(
        64,
        "Tokens of every window, or a list with one entry per layer; -1: full attention.",
        at_least=-1,
        at_most=MAX_WINDOW,
        option="window",
        parse=parse_window,
    )
    num_slots: int = _count(64, "Slots per KV head.", at_most=1 << 16, option="slots")
    full_layers: tuple[int, ...] = _setting(
        (),
        "Layers that keep full attention, such as 8,18,20,23.",
        at_least=0,
        at_most=1 << 16,
        parse=parse_ints,
        shown="none",
    )
    init: str = _setting("spread", "Start of the gates.", choices=INITS)
    num_sinks: int = _count(
        1, "Constant keys that stand in for a text's first tokens.", at_least=0, at_most=1 << 10, option="sinks"
    )
    slot_distance: int = _count(128, "Distance, in tokens, at which queries see the slots.", at_least=0)
    tokens: float = _setting(20e6, "Tokens to train on, on all GPUs together.", at_least=1, at_most=MAX_TOKENS)
    batch_size: int = _count(16, "Sequences of a step, on each GPU.", at_most=1 << 16)
    seq_len: int = _count(2048, "Tokens of a sequence.", at_least=2)
    micro_batch_size: int = _count(0, "Sequences in one forward pass; 0: all of a step.", at_least=0, at_most=1 << 16)
    gradient_checkpointing: bool = _setting(False, "Recompute activations in the backward pass, to save memory.")
    long_tokens: float = _setting(
        0.0, "How many of the tokens come in longer sequences, at the end.", at_least=0, at_most=MAX_TOKENS
    )
    long_seq_len: int = _count(8192, "Tokens of these longer sequences.", at_least=2)
    align_steps: int = _count(
        40, "Steps that align each layer by itself before training; 0: none.", at_least=0, at_most=10**6
    )
    align_sequences: int = _count(32, "Sequences that layers are aligned on.", at_most=1 << 16)
    trainable: str = _setting(
        "attention",
        "What is trained besides gates and sinks: the linear layers of attention, of whole layers, LoRA, or nothing.",
        choices=TRAINABLE,
    )
    lora_rank: int = _count(16, "Rank of the LoRA adapters.", at_most=1 << 12)
    lr: float | None = _setting(
        None,
        "Learning rate of weights.",
        at_least=0,
        at_most=1,
        shown=f"{LR:g} up to a hidden size of {TUNED_WIDTH}, less in proportion for wider models",
    )
    gate_lr: float | None = _setting(
        None, "Learning rate of gates.", at_least=0, at_most=1, shown=f"{GATE_LR:g}, scaled in the same way"
    )
    sink_lr: float = _setting(1e-3, "Learning rate of sinks.", at_least=0, at_most=1)
    warmup_fraction: float = _fraction(0.05, "Fraction of the steps over which learning rates rise.")
    max_grad_norm: float = _setting(1.0, "Largest norm of a gradient.", above=0, at_most=1e6)
    gradients: str = _setting(
        "normalise",
        "Gradients of text and recall text: each clipped, that of recall text scaled to text's, or their sum clipped.",
        choices=GRADIENTS,
    )
    kl_weight: float = _weight(1.0, "Weight of the KL divergence from the teacher, per token.")
    ce_weight: float = _weight(0.5, "Weight of the cross-entropy of text, per token.")
    recall_fraction: float = _fraction(0.125, "Fraction of the sequences that are recall text.")
    answer_weight: float = _weight(
        0.5,
        "Weight of the cross-entropy of answers in recall text; with gradients normalised, "
        "the norm of their gradient relative to text's.",
    )
    max_facts: int = _count(16, "Largest number of facts in a sequence of recall text.", at_most=1 << 16)
    long_range_fraction: float = _fraction(
        0.0, "Fraction of the recall text whose questions are long-range, up to the whole sequence."
    )
    fact_warmup: float = _fraction(0.0, "Fraction of the steps over which the number of facts rises to its largest.")
    window_dropout: float = _fraction(0.0, "Fraction of the steps with a quarter of the window.")
    slots_off: bool = _setting(False, "Train window and sinks alone, as a baseline.")
    compile: str = _setting(
        "auto",
        "What torch.compile compiles; auto: layers on one GPU, else nothing.",
        choices=COMPILED,
        resumable=True,
    )
    save_every: int = _count(200, "Steps between checkpoints.", at_most=10**9, resumable=True)
    log_every: int = _count(10, "Steps between entries of the log.", at_most=10**9, resumable=True)
    budget: float | None = _setting(
        None,
        "Stop after this many seconds, with a checkpoint.",
        at_least=0,
        at_most=1e9,
        shown="no limit",
        resumable=True,
    )
    seed: int = _setting(0, "Seed of everything random.", at_least=0, at_most=(1 << 32) - 1)

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            check_value(setting.name, getattr(self, setting.name), setting.type, setting.metadata)
        answers = self.recall_fraction * self.answer_weight
        if self.kl_weight == self.ce_weight == answers == 0:
            raise ValueError("expected a loss, got kl_weight, ce_weight and answer_weight of 0")
        if self.long_tokens > self.tokens:
            raise ValueError(f"expected long_tokens of at most tokens, {self.tokens:g}, got {self.long_tokens:g}")

    def learning_rates(self, hidden_size: int) -> tuple[float, float, float]:
        """Learning rates of weights, gates and sinks for a model of this width.

        The defaults, 2e-3 and 8e-3, were best at a width of 576. Wider models get less in proportion, as Adam's
        steps need it (arXiv 2203.03466); that has not been measured here.

        >>> DistillSettings().learning_rates(576), DistillSettings(lr=1e-4).learning_rates(4608)
        ((0.002, 0.008, 0.001), (0.0001, 0.001, 0.001))
        """
        scale = min(1.0, TUNED_WIDTH / hidden_size)
        lr = LR * scale if self.lr is None else self.lr
        return lr, GATE_LR * scale if self.gate_lr is None else self.gate_lr, self.sink_lr

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share, by name."""
        kept = [f.name for f in dataclasses.fields(self) if not f.metadata.get("resumable")]
        return {name: getattr(self, name) for name in kept}


def check_value(name: str, value: Any, kind: str, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError unless a value is of its field's type, finite and within its bounds.

    `kind` is the field's annotation, such as "int" or "float | None"; a tuple's bounds are those of its entries.
    """
    kinds = kind.split(" | ")
    if value is None and "None" in kinds:
        return
    choices = metadata.get("choices")
    if choices is not None:
        if value not in choices:
            raise ValueError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")
        return
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"expected {name} to be True or False, got {value!r}")
        return
    if isinstance(value, (tuple, list)) and "tuple[int, ...]" in kinds:
        if not value and "int" in kinds:
            raise ValueError(f"expected {name} to be an int or a list of them, got an empty list")
        for entry in value:
            _check_number(name, entry, "int", metadata)
        return
    _check_number(name, value, "float" if "float" in kinds else "int", metadata)


def _check_number(name: str, value: Any, kind: str, metadata: Mapping[str, Any]) -> None:
    known: tuple[type, ...] = (int,) if kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, known):
        raise ValueError(f"expected {name} to be {'an int' if kind == 'int' else 'a number'}, got {value!r}")
    low, above, high = (metadata.get(bound) for bound in ("at_least", "above", "at_most"))
    inside = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
    if not (math.isfinite(value) and inside):
        raise ValueError(f"expected {name} {bounds(metadata)}, got {value}")


def bounds(metadata: Mapping[str, Any]) -> str:
    """The bounds of a setting in words.

    >>> bounds({"at_least": 0, "at_most": 1})
    'of at least 0 and at most 1'
    """
    words = {"at_least": "of at least", "above": "above", "at_most": "at most"}
    return " and ".join(f"{text} {metadata[name]:g}" for name, text in words.items() if metadata.get(name) is not None)


def option_name(setting: dataclasses.Field) -> str:
    """The name of a setting on the command line.

    >>> [option_name(f) for f in dataclasses.fields(DistillSettings) if f.name in ("num_slots", "batch_size")]
    ['--slots', '--batch-size']
    """
    return "--" + setting.metadata.get("option", setting.name).replace("_", "-")


def default_text(setting: dataclasses.Field) -> str:
    """The default of a setting in words."""
    shown = setting.metadata.get("shown")
    if shown is not None:
        return shown
    value = setting.default
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_table() -> str:
    """A Markdown table of all settings: option, default and meaning."""
    lines = ["| option | default | |", "|---|---|---|"]
    for setting in dataclasses.fields(DistillSettings):
        choices = setting.metadata.get("choices")
        meaning = setting.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
        lines.append(f"| `{option_name(setting)}` | {default_text(setting)} | {meaning} |")
    return "\n".join(lines) + "\n"
