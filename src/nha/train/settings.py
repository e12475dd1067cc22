"""The settings of training from scratch in one dataclass: the source of the command line, the docs table and checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nha.settings import (
    MAX_WINDOW,
    OUTPUT_NORMS,
    SLOT_FEATURES,
    SLOT_WRITES,
    VALUE_ACTIVATIONS,
    check_settings,
    count,
    fraction,
    identity_of,
    parse_ints,
    parse_window,
    setting,
    weight,
)

PRESETS = ("tiny", "20m", "60m", "340m", "1.3b")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")
PACKINGS = ("documents", "joined")
DTYPES = ("auto", "float32", "bfloat16")
COMPILED = ("auto", "layers", "nothing")
PARALLEL = ("ddp", "fsdp")
MAX_TOKENS = 10**15


@dataclass(frozen=True)
class TrainSettings:
    """All that a run depends on besides the text. A run is resumed with the same settings only.

    Raises ValueError for a value outside the bounds that the field's metadata names, and for NaN and infinity.

    >>> TrainSettings(preset="60m").batch_size
    32
    >>> TrainSettings(schedule="linear")
    Traceback (most recent call last):
    ValueError: expected schedule to be one of cosine, wsd, got 'linear'
    """

    preset: str = setting("20m", "Shape of the model.", choices=PRESETS)
    window_size: int | tuple[int | tuple[int, ...], ...] = setting(
        64,
        "Tokens of every window, or a list with one entry per layer; -1: full attention, 0: a linear RNN.",
        at_least=-1,
        at_most=MAX_WINDOW,
        option="window",
        parse=parse_window,
    )
    full_layers: tuple[int, ...] = setting(
        (),
        "Layers with full attention, such as 3,7.",
        at_least=0,
        at_most=1 << 16,
        parse=parse_ints,
        shown="none",
    )
    random_windows: tuple[int, ...] = setting(
        (),
        "Windows that each step draws one of, such as 0,16,64,256,-1, for one model that works with every window.",
        at_least=-1,
        at_most=MAX_WINDOW,
        parse=parse_ints,
        shown="none",
    )
    windows_per_step: int = count(
        1,
        "Random windows that a step draws; it reads its sequences once with each, and the loss is their mean.",
        at_most=1 << 10,
    )
    num_slots: int = count(64, "Slots per KV head.", at_most=1 << 16, option="slots")
    num_sinks: int = count(0, "Learned sinks per KV head.", at_least=0, at_most=1 << 10, option="sinks")
    qk_norm: bool = setting(True, "Normalize queries and keys of every head.")
    output_gate: bool = setting(False, "Multiply what attention returns by a sigmoid of the layer's input.")
    slot_features: str = setting("none", "Function of the queries and keys that the slots see.", choices=SLOT_FEATURES)
    slot_write: str = setting(
        "soft", "How slots are written: every token by gates, or kept tokens in a slot each.", choices=SLOT_WRITES
    )
    value_activation: str = setting("none", "Function of the values.", choices=VALUE_ACTIVATIONS)
    output_norm: str = setting(
        "none", "Normalize what attention returns, after a SiLU or without one.", choices=OUTPUT_NORMS
    )
    gate_std: float = setting(
        0.0,
        "Standard deviation of the gates' logits before training; 0: weights as all others.",
        at_least=0,
        at_most=100,
    )
    tokens: float = setting(150e6, "Tokens to train on, on all GPUs together.", at_least=1, at_most=MAX_TOKENS)
    batch_size: int = count(32, "Sequences of a step, on all GPUs together.", at_most=1 << 20)
    seq_len: int = count(2048, "Tokens of a sequence.", at_least=2)
    micro_batch_size: int = count(
        0, "Sequences in one forward pass on each GPU; 0: all of a step.", at_least=0, at_most=1 << 16
    )
    packing: str = setting(
        "documents",
        "Whether attention ends where a document does, or documents are joined into one text.",
        choices=PACKINGS,
    )
    lr: float = setting(1e-3, "Learning rate at its peak.", above=0, at_most=1)
    optimizer: str = setting(
        "adamw", "Optimizer; muon takes the matrices of layers, and AdamW the rest.", choices=OPTIMIZERS
    )
    weight_decay: float = weight(0.1, "Weight decay of matrices.")
    beta2: float = setting(0.95, "Decay of AdamW's second moment.", above=0, at_most=0.99999)
    schedule: str = setting(
        "cosine", "Learning rate after the warm-up: cosine, or wsd (constant, then a decay).", choices=SCHEDULES
    )
    warmup_fraction: float = fraction(0.02, "Fraction of the steps over which the learning rate rises.")
    decay_fraction: float = fraction(0.2, "Fraction of the steps over which wsd decays.")
    final_lr_fraction: float = fraction(0.1, "Learning rate at the end, relative to its peak.")
    max_grad_norm: float = setting(1.0, "Largest norm of a gradient.", above=0, at_most=1e6)
    max_spike: float = setting(
        2.0,
        "Stop if the loss, averaged since the last entry of the log, exceeds the lowest of the ten entries before by "
        "more than this many nats.",
        above=0,
        at_most=1e6,
        resumable=True,
    )
    dtype: str = setting(
        "auto",
        "Dtype to compute in; weights are float32.",
        choices=DTYPES,
        shown="bfloat16 on a GPU, float32 on a CPU",
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass, to save memory.")
    parallel: str = setting(
        "ddp", "Several GPUs: each holds all weights (ddp), or a part of them (fsdp).", choices=PARALLEL, resumable=True
    )
    compile: str = setting(
        "auto", "What torch.compile compiles; auto: layers on a GPU.", choices=COMPILED, resumable=True
    )
    eval_every: int = count(
        0, "Steps between measurements of the held-out loss; 0: at the end only.", at_least=0, resumable=True
    )
    eval_sequences: int = count(64, "Held-out sequences to measure with, if there are as many.", resumable=True)
    save_every: int = count(
        500, "Steps between checkpoints; 0: only where the run is stopped.", at_least=0, at_most=10**9, resumable=True
    )
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
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError("expected optimizer adamw with parallel fsdp, since muon needs whole matrices, got muon")
        most = max(1, len(self.random_windows))
        if self.windows_per_step > most:
            raise ValueError(
                f"expected windows_per_step of at most {most}, as many as random_windows, got {self.windows_per_step}"
            )

    def steps(self, seq_len: int | None = None) -> int:
        """Optimizer steps in all.

        >>> TrainSettings(tokens=1e6, batch_size=8, seq_len=1000).steps()
        125
        """
        return max(1, round(self.tokens / (self.batch_size * (seq_len or self.seq_len))))

    def micro_batch(self, world: int = 1) -> tuple[int, int]:
        """Sequences in one forward pass on each of `world` devices, and forward passes of a step.

        Raises ValueError if the sequences of a step cannot be spread evenly.

        >>> TrainSettings(batch_size=32, micro_batch_size=4).micro_batch(world=2)
        (4, 4)
        """
        own, rest = divmod(self.batch_size, world)
        size = self.micro_batch_size or own
        if rest or not own or own % size:
            raise ValueError(
                f"expected batch_size to be a multiple of {max(1, size)} sequences on each of {world} devices, "
                f"got {self.batch_size}"
            )
        return size, own // size

    def lr_factor(self, step: int, steps: int) -> float:
        """Learning rate of a step relative to its peak: a linear warm-up, then a cosine or a constant and a decay.

        >>> short = TrainSettings(schedule="wsd", warmup_fraction=0.2, decay_fraction=0.4, final_lr_fraction=0.0)
        >>> [round(short.lr_factor(step, 10), 2) for step in (0, 1, 5, 6, 8, 9)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]
        """
        warmup = min(1.0, (step + 1) / max(1.0, self.warmup_fraction * steps))
        if self.schedule == "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))
        else:
            length = self.decay_fraction * steps
            shape = min(1.0, max(0.0, steps - step) / length) if length else 1.0
        return warmup * ((1 - self.final_lr_fraction) * shape + self.final_lr_fraction)

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share, by name."""
        return identity_of(self)
