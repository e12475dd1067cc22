"""Cost of a distillation before it begins: parameters, memory, steps and time, from the model's shapes alone."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nha.distill.run import make_mixture, teacher_mixture
from nha.distill.settings import DistillSettings
from nha.distill.student import linear_layers
from nha.models.config import FULL, plan_windows
from nha.ops.heads import Window, per_head

# Peak of dense matrix products in bf16, FLOP/s, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "L4": 121e12}
OTHER_PEAK = 100e12
CPU_FLOPS = 50e9  # of one core, measured
LOGITS_BYTES = 2 << 30  # while the loss is computed, 2^28 logits at a time
# Bytes of a token, layer and unit of width for the backward pass: fitted to SmolLM2-135M and 1B, and to 3B and 8B.
ACTIVATION_BYTES = 31.5
CHECKPOINTED_BYTES = 2
STATE_BYTES = 16  # of a trained number: float32 copy, gradient and two moments
SECOND_GRADIENT_BYTES = 4  # text and recall text have gradients of their own, when activations are gone


@dataclass(frozen=True)
class Measured:
    """The speed of a distillation that was measured.

    Attributes:
        name: of the model's size.
        tokens_per_s: on all devices.
        flops_per_token: as `flops_per_token` counts them.
        gpus: how many, each with a peak of 989 TFLOP/s.
    """

    name: str
    tokens_per_s: float
    flops_per_token: float
    gpus: int = 1

    @property
    def fraction(self) -> float:
        """Of the peak of the devices."""
        return self.tokens_per_s * self.flops_per_token / (self.gpus * PEAKS["H100"])


# By how a step runs. SmolLM2 with compiled layers on an H100; 1B, 3B and 8B with random weights and without compiled
# layers on one H200, and sharded over two (results/cost). Activations are recomputed in the last two kinds.
MEASURED = {
    "on one GPU": (Measured("SmolLM2-135M", 254_000, 0.964e9), Measured("1B", 48_149, 8.008e9)),
    "recomputed": (Measured("3B", 14_022, 21.38e9), Measured("8B", 7_165, 48.75e9)),
    "sharded": (
        Measured("1B", 49_166, 8.008e9, gpus=2),
        Measured("3B", 26_258, 21.38e9, gpus=2),
        Measured("8B", 10_676, 48.75e9, gpus=2),
    ),
}


def measured_fraction(kind: str, flops: float) -> tuple[float, str]:
    """The fraction of a GPU's peak at so many FLOPs a token, and the names of what it was measured with.

    Between two measured sizes it is interpolated in the logarithm of the FLOPs; beyond them it is that of the nearest.

    >>> [round(measured_fraction("on one GPU", flops)[0], 2) for flops in (1e8, 0.964e9, 2.8e9, 8.008e9, 1e11)]
    [0.25, 0.25, 0.32, 0.39, 0.39]
    >>> measured_fraction("sharded", 1e9)[1]
    '1B'
    """
    rows = sorted(MEASURED[kind], key=lambda row: row.flops_per_token)
    for low, high in pairwise(rows):
        if low.flops_per_token < flops < high.flops_per_token:
            share = math.log(flops / low.flops_per_token) / math.log(high.flops_per_token / low.flops_per_token)
            return low.fraction + share * (high.fraction - low.fraction), f"{low.name} and {high.name}"
    nearest = min(rows, key=lambda row: abs(math.log(flops / row.flops_per_token)))
    return nearest.fraction, nearest.name


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        parameters, trainable: of the hybrid, and those that are trained.
        tokens, steps: of the whole run, on all devices.
        teacher_tokens: the first of them, which train the teacher.
        flops_per_token: teacher, student and gradients, as a mean over the run.
        memory_bytes: on each device.
        seconds: of training, without compilation and alignment.
        device: the device's name, and how many.
        assumed: the fraction of the device's peak that `seconds` assumes, and with what it was measured, in words.
    """

    parameters: int
    trainable: int
    tokens: int
    steps: int
    teacher_tokens: int
    flops_per_token: float
    memory_bytes: float
    seconds: float
    device: str
    assumed: str


def empty_model(config: Any) -> PreTrainedModel:
    """The model of a configuration without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def trained_parameters(model: PreTrainedModel, settings: DistillSettings, windows: Sequence[Window]) -> tuple[int, int]:
    """(weights, gates and sinks) that are trained."""
    layers: list[Any] = [model.get_submodule(name) for name in linear_layers(model, settings.trainable)]
    if settings.trainable == "lora":
        weights = sum(settings.lora_rank * (x.in_features + x.out_features) for x in layers)
    else:
        weights = sum(p.numel() for layer in layers for p in layer.parameters())
    config: Any = model.config.get_text_config()
    heads = config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    gates = heads * settings.num_slots * (config.hidden_size + 1)
    sinks = 2 * heads * settings.num_sinks * head_dim
    return weights, sum(window != FULL for window in windows) * (gates + sinks)


def flops_per_token(
    model: PreTrainedModel, settings: DistillSettings, windows: Sequence[Window], trained: int
) -> float:
    """FLOPs of a token after stage 0: the teacher's pass, the student's, gradients of activations and parameters."""
    config: Any = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    products = sum(p.numel() for p in model.parameters()) - (0 if tied else embeddings.weight.numel())
    long = settings.long_tokens / (settings.tokens - settings.teacher_tokens)
    mean_seq_len = (1 - long) * settings.seq_len + long * settings.long_seq_len
    full = 2 * mean_seq_len * width  # scores and values over half of the sequence
    heads = config.num_key_value_heads
    each = [window for layer in windows for window in per_head(layer, heads)]
    own = [full if w == FULL else 4 * (w + settings.num_slots) * width for w in each]
    teacher = settings.kl_weight > 0
    attention = teacher * full * len(windows) + 3 * sum(own) / heads
    return (4 + 2 * teacher) * products + 2 * trained + attention


def gathered_bytes(model: PreTrainedModel, size: int, world: int) -> float:
    """Bytes of embeddings and head, `size` a number, that FSDP gathers from the other devices for a whole step."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    sizes = {id(end.weight): end.weight.numel() for end in ends}
    return size * sum(sizes.values()) * (1 - 1 / world)


def estimate(
    config: Any, settings: DistillSettings, *, world: int = 1, device: str | None = None, cores: int | None = None
) -> Estimate:
    """The cost of distilling a model of this configuration on `world` devices of a name (default: what is here).

    >>> from transformers import LlamaConfig
    >>> small = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    >>> found = estimate(small, DistillSettings(tokens=65536), device="H100")
    >>> found.steps, found.tokens
    (2, 65536)
    """
    model = empty_model(config)
    text = config.get_text_config()
    given = settings.window_size
    windows = plan_windows(text, given if isinstance(given, int) else list(given), settings.full_layers)
    weights, gates = trained_parameters(model, settings, windows)
    trained = weights + gates
    parameters = sum(p.numel() for p in model.parameters()) + gates
    mixture = make_mixture(settings, world)
    tokens = sum(size * length for size, length in map(mixture.shape, range(mixture.steps))) * world
    flops, first = flops_per_token(model, settings, windows, trained), 0
    if settings.teacher_tokens:
        own = teacher_mixture(settings, world)
        first = own.steps * own.batch_size * own.seq_len * world
        alone = dataclasses.replace(settings, kl_weight=0.0, ce_weight=1.0, long_tokens=0.0, teacher_tokens=0.0)
        full = flops_per_token(model, alone, [FULL] * len(windows), weights)
        flops += (full - flops) * first / tokens
    rows = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    per_token = CHECKPOINTED_BYTES if settings.gradient_checkpointing else ACTIVATION_BYTES
    activations = rows * settings.seq_len * text.num_hidden_layers * text.hidden_size * per_token
    if device is None:
        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    size = 2 if device != "CPU" else 4  # bf16 or float32
    state = (size * parameters + STATE_BYTES * trained) / world
    in_backward = state + activations * size / 2 + LOGITS_BYTES + gathered_bytes(model, size, world)
    in_step = state + (SECOND_GRADIENT_BYTES * trained / world if settings.recall_fraction else 0)
    at_start = 2 * size * parameters if world > 1 else 0  # the whole model and a copy, before they are sharded
    if device == "CPU":
        cores = cores or torch.get_num_threads() or os.cpu_count() or 1
        speed, assumed = CPU_FLOPS * cores, f"{CPU_FLOPS / 1e9:.0f} GFLOP/s of each of {cores} cores"
    else:
        kind = "sharded" if world > 1 else "recomputed" if settings.gradient_checkpointing else "on one GPU"
        fraction, names = measured_fraction(kind, flops)
        peak = next((value for name, value in PEAKS.items() if name in device), OTHER_PEAK)
        speed = peak * fraction * world
        assumed = f"{100 * fraction:.0f} % of {peak / 1e12:.0f} TFLOP/s, measured with {names}"
    return Estimate(
        parameters=parameters,
        trainable=trained,
        tokens=tokens,
        steps=mixture.steps,
        teacher_tokens=first,
        flops_per_token=flops,
        memory_bytes=max(in_backward, in_step, at_start),
        seconds=tokens * flops / speed,
        device=device if world == 1 else f"{world} x {device}",
        assumed=assumed,
    )
