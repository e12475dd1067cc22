"""Cost of a distillation before it begins: parameters, memory, steps and time, from the model's shapes alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
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
# Fraction of the peak that SmolLM2-135M reached on one H100 (254,000 tokens/s), and 0.8 billion parameters on two with
# gradient checkpointing and without compiled layers.
UTILISATION = {"compiled": 0.25, "plain": 0.08}
CPU_FLOPS = 50e9  # of one core, measured
LOGITS_BYTES = 5 << 30  # while the loss is computed, 2^28 logits at a time
ACTIVATION_BYTES = 25  # of a token, layer and unit of width, measured with SmolLM2-135M (19 GiB in all)
CHECKPOINTED_BYTES = 3


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
        assumed: the fraction of the device's peak that `seconds` assumes, in words.
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
    shared = (size * parameters + 16 * trained) / world  # beside the weights: float32 copy, gradient and two moments
    if device == "CPU":
        cores = cores or torch.get_num_threads() or os.cpu_count() or 1
        speed, assumed = CPU_FLOPS * cores, f"{CPU_FLOPS / 1e9:.0f} GFLOP/s of each of {cores} cores"
    else:
        fraction = UTILISATION["plain" if world > 1 or settings.compile == "nothing" else "compiled"]
        peak = next((value for name, value in PEAKS.items() if name in device), OTHER_PEAK)
        speed, assumed = peak * fraction * world, f"{100 * fraction:.0f} % of {peak / 1e12:.0f} TFLOP/s"
    return Estimate(
        parameters=parameters,
        trainable=trained,
        tokens=tokens,
        steps=mixture.steps,
        teacher_tokens=first,
        flops_per_token=flops,
        memory_bytes=shared + activations * size / 2 + LOGITS_BYTES,
        seconds=tokens * flops / speed,
        device=device if world == 1 else f"{world} x {device}",
        assumed=assumed,
    )
