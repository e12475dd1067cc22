"""Parameters, operations, memory and time of a run, before its first step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nha.models.config import FULL
from nha.ops.heads import all_windows
from nha.train.loss import MAX_LOGITS
from nha.train.settings import TrainSettings

# Dense bf16 operations per second of a GPU whose name contains the key; the first match counts.
PEAK_OPERATIONS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
ASSUMED_UTILISATION = 0.35  # of the peak, where nothing has been measured
BACKWARD = 2  # operations of the backward pass, relative to those of the forward pass
STATE_TOKENS = 64  # between states of the slots that the backward pass reads
LOGIT_COPIES = 3  # of a chunk in float32: logits, log-probabilities, gradient


@dataclass(frozen=True)
class Estimate:
    """Parameters, operations, memory and time of a run.

    Attributes:
        parameters: all that is trained.
        operations_per_token: of forward and backward pass, with all windows of a step.
        steps, tokens: of the whole run.
        weights_bytes: weights, gradients and optimizer on each device.
        activation_bytes: of one micro-batch on each device, about.
        seconds: of the whole run at `utilisation` of the devices' peak; None where the peak is unknown.
        utilisation: fraction of the peak.
    """

    parameters: int
    operations_per_token: float
    steps: int
    tokens: float
    weights_bytes: float
    activation_bytes: float
    seconds: float | None
    utilisation: float = ASSUMED_UTILISATION

    @property
    def total_bytes(self) -> float:
        """Memory on each device, about."""
        return self.weights_bytes + self.activation_bytes


def peak_operations(device: str | None = None) -> float | None:
    """Dense bf16 operations per second of a GPU by name, by default of the one that is there; None if unknown.

    >>> peak_operations("NVIDIA H100 80GB HBM3"), peak_operations("another")
    (989000000000000.0, None)
    """
    if device is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for name, peak in PEAK_OPERATIONS.items() if name.lower() in device.lower()), None)


def keys_per_query(seq_len: int, window: int) -> float:
    """Keys in the window of a query, on average over a sequence; -1 is the whole past.

    >>> keys_per_query(4, -1), keys_per_query(4, 1), keys_per_query(4, 2), keys_per_query(4, 0)
    (2.5, 1.0, 1.75, 0.0)
    """
    window = seq_len if window < 0 else min(window, seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def attention_operations(config: Any, seq_len: int) -> float:
    """Operations of attention for a token in the forward pass, projections not counted.

    A query reads its window, M slots and the sinks, and a token is written to M slots. Layers of other models than
    hybrids are counted as full attention.
    """
    layers, heads = config.num_hidden_layers, getattr(config, "num_attention_heads", None)
    if heads is None:
        return 0.0
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    total = 0.0
    for each in getattr(config, "window_sizes", None) or [FULL] * layers:
        windows = all_windows([each])  # one, or one for each KV head
        for window in windows:
            slots = 0 if window == FULL or window >= seq_len else config.num_slots
            sinks = config.num_sinks if slots else 0
            keys = heads * (keys_per_query(seq_len, window) + slots + sinks) + kv_heads * slots
            total += 4.0 * dim * keys / len(windows)
    return total


def operations_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """Operations of forward and backward pass for a token: two for each weight of a matrix product, and attention.

    Embeddings are looked up; a head that shares their table multiplies with it. Recomputed activations do not count.

    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model = NHAForCausalLM(NHAConfig.tiny(window_sizes=-1))
    >>> operations_per_token(model, 15) == 3 * (2 * sum(
    ...     m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "g_proj" not in n
    ... ) + 2 * 4 * 16 * 4 * 8)
    True
    """
    unused = {id(p) for p in model.parameters() if not p.requires_grad}
    matrices = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in unused
    )
    return (1 + BACKWARD) * (2.0 * matrices + attention_operations(model.config, seq_len))


def layer_numbers(config: Any, window: Any, seq_len: int, compiled: bool) -> float:
    """Numbers of a token that one layer keeps for the backward pass, about.

    Compiled, these are inputs and outputs of norms, projections and attention, and three times the width of the
    feed-forward part; uncompiled, norms and the activation keep more. Slots keep their own queries and keys, gates
    twice, and a state every 64 tokens.
    """
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", 1)
    dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads, inner = getattr(config, "num_key_value_heads", None) or heads, getattr(config, "intermediate_size", 0)
    windows = all_windows([window])  # one, or one for each KV head
    share = sum(w != FULL and w < seq_len for w in windows) / len(windows)
    slots = getattr(config, "num_slots", 0) * kv_heads  # gates of exact slots as well: they are made of scores
    of_slots = (heads + kv_heads) * dim + 2 * slots + 2 * slots * dim / STATE_TOKENS
    numbers = 4 * hidden + 2 * (heads + kv_heads) * dim + share * of_slots + 3 * (inner or hidden)
    return numbers if compiled else numbers + 2 * hidden + (inner or hidden)


def activation_bytes(config: Any, settings: TrainSettings, seq_len: int, world: int, size: int) -> float:
    """Memory of the activations of one micro-batch, about; `size` is the bytes of a number.

    With gradient checkpointing only one layer keeps all of its own, and the others their input.
    """
    tokens = settings.micro_batch(world)[0] * seq_len
    hidden, layers = config.hidden_size, config.num_hidden_layers
    compiled = settings.compile == "layers" or (settings.compile == "auto" and size == 2)
    windows = getattr(config, "window_sizes", None) or [FULL] * layers
    kept = [layer_numbers(config, window, seq_len, compiled) for window in windows]
    numbers = layers * hidden + max(kept) if settings.gradient_checkpointing else sum(kept)
    logits = min(tokens * config.vocab_size, MAX_LOGITS) * 4 * LOGIT_COPIES
    return float(tokens * (numbers + 4 * hidden) * size + logits)


def weights_bytes(model: PreTrainedModel, settings: TrainSettings, world: int) -> float:
    """Memory of weights, gradients and optimizer on each device: 16 bytes of a parameter under AdamW, 12 under Muon.

    With DDP 8 bytes more on several devices: it keeps another copy of gradients for its messages, and on two H200s most
    runs took a third.
    """
    count = sum(p.numel() for p in model.parameters())
    muon = 0
    if settings.optimizer == "muon":
        stack: Any = model.get_decoder()
        muon = sum(p.numel() for p in stack.layers.parameters() if p.dim() == 2)
    total = 16.0 * count - 4.0 * muon
    if settings.parallel == "fsdp":
        return total / world
    return total + (8.0 * count if world > 1 else 0.0)


def estimate(
    model: PreTrainedModel,
    settings: TrainSettings,
    *,
    seq_len: int | None = None,
    world: int = 1,
    device: str | None = None,
    utilisation: float = ASSUMED_UTILISATION,
) -> Estimate:
    """The estimate of a run on `world` devices of a name (default: of the GPU that is there).

    The model may lie on the meta device. `utilisation` is what a run is assumed to reach of the devices' peak.

    >>> from nha.train.presets import model_config
    >>> from nha import NHAForCausalLM
    >>> settings = TrainSettings(preset="340m", tokens=15e9, batch_size=256, micro_batch_size=16)
    >>> with torch.device("meta"):
    ...     model = NHAForCausalLM(model_config(settings, 32000))
    >>> found = estimate(model, settings, world=8, device="H100")
    >>> round(found.parameters / 1e6), found.steps, round(found.seconds / 3600, 1)
    (354, 28610, 3.3)
    """
    seq_len = seq_len or settings.seq_len
    size = 4 if settings.dtype == "float32" or (settings.dtype == "auto" and not (device or _has_gpu())) else 2
    operations = operations_per_token(model, seq_len) * settings.windows_per_step
    peak = peak_operations(device)
    steps = settings.steps(seq_len)
    tokens = float(steps * settings.batch_size * seq_len)
    return Estimate(
        parameters=sum(p.numel() for p in model.parameters()),
        operations_per_token=operations,
        steps=steps,
        tokens=tokens,
        weights_bytes=weights_bytes(model, settings, world),
        activation_bytes=activation_bytes(model.config, settings, seq_len, world, size),
        seconds=None if peak is None else tokens * operations / (peak * utilisation * world),
        utilisation=utilisation,
    )


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def device_bytes() -> int:
    """Memory of the GPU, or of the machine without one."""
    if _has_gpu():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no such call on this system
        return 1 << 62


def check_memory(found: Estimate, available: int | None = None) -> None:
    """Raise ValueError if a run cannot fit: its weights alone, or with activations, far exceed the device's memory.

    Activations are estimated, so that a run is refused only where they would have to be half as large.
    """
    available = device_bytes() if available is None else available
    if found.weights_bytes + found.activation_bytes / 2 > available:
        parts = f"{found.weights_bytes / 2**30:.1f} GiB of weights, gradients and optimizer"
        raise ValueError(
            f"expected a run of at most {available / 2**30:.1f} GiB, got {parts} and about "
            f"{found.activation_bytes / 2**30:.1f} GiB of activations: lower micro_batch_size or turn on "
            "gradient_checkpointing"
        )
