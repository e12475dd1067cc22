"""The settings of a distillation in one dataclass: the source of the command line, the docs table and all checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nha.settings import (
    INITS,
    MAX_WINDOW,
    SLOT_WRITES,
    check_settings,
    count,
    fraction,
    identity_of,
    parse_ints,
    parse_window,
    setting,
    weight,
)

TRAINABLE = ("attention", "layers", "lora", "slots")
GRADIENTS = ("clip", "normalise", "together")
COMPILED = ("auto", "layers", "nothing")
LR, GATE_LR, TUNED_WIDTH = 2e-3, 8e-3, 576
MAX_TOKENS = 10**15
CONTROL = "control"  # the folder of a run in which its control is trained
TEACHER = "teacher"  # the folder of a run in which its teacher is trained


def width_scale(hidden_size: int) -> float:
    """Factor of the learning rates of matrices that read hidden states: 1 up to the width that they were tuned at.

    >>> width_scale(256), width_scale(1152)
    (1.0, 0.5)
    """
    return min(1.0, TUNED_WIDTH / hidden_size)


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

    window_size: int | tuple[int | tuple[int, ...], ...] = setting(
        64,
        "Tokens of every window, or a list with one entry per layer; -1: full attention.",
        at_least=-1,
        at_most=MAX_WINDOW,
        option="window",
        parse=parse_window,
    )
    num_slots: int = count(64, "Slots per KV head.", at_most=1 << 16, option="slots")
    full_layers: tuple[int, ...] = setting(
        (),
        "Layers that keep full attention, such as 8,18,20,23.",
        at_least=0,
        at_most=1 << 16,
        parse=parse_ints,
        shown="none",
    )
    init: str = setting("spread", "Start of the gates.", choices=INITS)
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
    write_reach: int = count(512, "Tokens that a kept token stays in exact slots, about; it sets how many are kept.")
    tokens: float = setting(20e6, "Tokens to train on, on all GPUs together.", at_least=1, at_most=MAX_TOKENS)
    batch_size: int = count(16, "Sequences of a step, on each GPU.", at_most=1 << 16)
    seq_len: int = count(2048, "Tokens of a sequence.", at_least=2)
    micro_batch_size: int = count(0, "Sequences in one forward pass; 0: all of a step.", at_least=0, at_most=1 << 16)
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass, to save memory.")
    long_tokens: float = setting(
        0.0, "How many of the tokens come in longer sequences, at the end.", at_least=0, at_most=MAX_TOKENS
    )
    long_seq_len: int = count(
        8192,
        "Tokens of these longer sequences; a teacher reads them in pieces that fit the tokens it was made for.",
        at_least=2,
    )
    teacher_tokens: float = setting(
        0.0,
        "How many of the tokens, the first, train the original with full attention; "
        "the hybrid is made from the result and distilled from it.",
        at_least=0,
        at_most=MAX_TOKENS,
    )
    align_steps: int = count(
        40, "Steps that align each layer by itself before training; 0: none.", at_least=0, at_most=10**6
    )
    align_sequences: int = count(32, "Sequences that layers are aligned on.", at_most=1 << 16)
    trainable: str = setting(
        "attention",
        "What is trained besides gates and sinks: the linear layers of attention, of whole layers, LoRA, or nothing.",
        choices=TRAINABLE,
    )
    lora_rank: int = count(16, "Rank of the LoRA adapters.", at_most=1 << 12)
    lr: float | None = setting(
        None,
        "Learning rate of weights.",
        at_least=0,
        at_most=1,
        shown=f"{LR:g} up to a hidden size of {TUNED_WIDTH}, less in proportion for wider models",
    )
    gate_lr: float | None = setting(
        None, "Learning rate of gates.", at_least=0, at_most=1, shown=f"{GATE_LR:g}, scaled in the same way"
    )
    sink_lr: float = setting(1e-3, "Learning rate of sinks.", at_least=0, at_most=1)
    warmup_fraction: float = fraction(0.05, "Fraction of the steps over which learning rates rise.")
    max_grad_norm: float = setting(1.0, "Largest norm of a gradient.", above=0, at_most=1e6)
    gradients: str = setting(
        "normalise",
        "Gradients of text and recall text: each clipped, that of recall text scaled to text's, or their sum clipped.",
        choices=GRADIENTS,
    )
    kl_weight: float = weight(1.0, "Weight of the KL divergence from the teacher, per token.")
    ce_weight: float = weight(0.5, "Weight of the cross-entropy of text, per token.")
    recall_fraction: float = fraction(0.125, "Fraction of the sequences that are recall text.")
    answer_weight: float = weight(
        0.5,
        "Weight of the cross-entropy of answers in recall text; with gradients normalised, "
        "the norm of their gradient relative to text's.",
    )
    max_facts: int = count(16, "Largest number of facts in a sequence of recall text.", at_most=1 << 16)
    long_range_fraction: float = fraction(
        0.0, "Fraction of the recall text whose questions are long-range, up to the whole sequence."
    )
    fact_warmup: float = fraction(0.0, "Fraction of the steps over which the number of facts rises to its largest.")
    window_dropout: float = fraction(0.0, "Fraction of the steps with a quarter of the window.")
    gate_shift: float = setting(
        0.0,
        "Added to the biases of the trained gates, so that slots keep what they hold up to e^x times as long; "
        "of soft slots.",
        at_least=0,
        at_most=20,
        resumable=True,
    )
    slots_off: bool = setting(False, "Train window and sinks alone, as a baseline.")
    compile: str = setting(
        "auto",
        "What torch.compile compiles; auto: layers on one GPU, else nothing.",
        choices=COMPILED,
        resumable=True,
    )
    save_every: int = count(200, "Steps between checkpoints.", at_most=10**9, resumable=True)
    log_every: int = count(10, "Steps between entries of the log.", at_most=10**9, resumable=True)
    budget: float | None = setting(
        None,
        "Stop after this many seconds, with a checkpoint.",
        at_least=0,
        at_most=1e9,
        shown="no limit",
        resumable=True,
    )
    seed: int = setting(0, "Seed of everything random.", at_least=0, at_most=(1 << 32) - 1)

    def __post_init__(self) -> None:
        check_settings(self)
        answers = self.recall_fraction * self.answer_weight
        if self.kl_weight == self.ce_weight == answers == 0:
            raise ValueError("expected a loss, got kl_weight, ce_weight and answer_weight of 0")
        if self.gate_shift and self.slot_write != "soft":
            raise ValueError(f"expected slot_write 'soft' with gate_shift, got {self.slot_write!r}")
        if self.long_tokens > self.tokens:
            raise ValueError(f"expected long_tokens of at most tokens, {self.tokens:g}, got {self.long_tokens:g}")
        self._check_teacher()

    def _check_teacher(self) -> None:
        if not self.teacher_tokens:
            return
        shorter = self.tokens - self.long_tokens
        if self.teacher_tokens > shorter or self.teacher_tokens == self.tokens:
            raise ValueError(
                f"expected teacher_tokens of less than tokens, {self.tokens:g}, and of at most the tokens in sequences "
                f"of seq_len, {shorter:g}, got {self.teacher_tokens:g}"
            )
        if self.trainable not in ("attention", "layers"):
            raise ValueError(f"expected trainable attention or layers with teacher_tokens, got {self.trainable!r}")

    def learning_rates(self, hidden_size: int) -> tuple[float, float, float]:
        """Learning rates of weights, gates and sinks for a model of this width.

        The defaults, 2e-3 and 8e-3, were best at a width of 576. Wider models get less in proportion, as Adam's
        steps need it (arXiv 2203.03466); that has not been measured here.

        >>> DistillSettings().learning_rates(576), DistillSettings(lr=1e-4).learning_rates(4608)
        ((0.002, 0.008, 0.001), (0.0001, 0.001, 0.001))
        """
        scale = width_scale(hidden_size)
        lr = LR * scale if self.lr is None else self.lr
        return lr, GATE_LR * scale if self.gate_lr is None else self.gate_lr, self.sink_lr

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share, by name."""
        found = identity_of(self)
        if not self.teacher_tokens:  # runs that began before this setting have none
            del found["teacher_tokens"]
        return found
