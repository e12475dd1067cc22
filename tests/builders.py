"""Random inputs of `nha_attention`, what a call gives back, how far rounding may move it. Needs PyTorch alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nha import NHAOutput, nha_attention

TOKENWISE = ("q", "k", "v", "log_gate", "q_slot", "k_slot")


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `sinks` and `separate` (own slot queries and keys) switch the optional inputs."""

    batch: int = 2
    length: int = 37
    query_heads: int = 4
    heads: int = 2
    dim: int = 8
    value_dim: int = 6
    slots: int = 5
    window: int = 7
    sinks: int = 0
    separate: bool = True
    seed: int = 0


def make(case: Case, dtype: torch.dtype = torch.float64) -> dict:
    """Keyword arguments of `nha_attention`, without `window_size`."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    b, t, hq, h = case.batch, case.length, case.query_heads, case.heads
    inputs: dict = {
        "q": normal(b, t, hq, case.dim),
        "k": normal(b, t, h, case.dim),
        "v": normal(b, t, h, case.value_dim),
        "log_gate": -(normal(b, t, h, case.slots) ** 2),
    }
    if case.separate:
        inputs |= {"q_slot": normal(b, t, hq, case.dim), "k_slot": normal(b, t, h, case.dim)}
    if case.sinks:
        inputs["sink"] = (normal(h, case.sinks, case.dim), normal(h, case.sinks, case.value_dim))
    return inputs


def slice_tokens(inputs: dict, start: int, stop: int) -> dict:
    return {n: x[:, start:stop] if n in TOKENWISE else x for n, x in inputs.items()}


def leaves(inputs: dict) -> dict[str, Tensor]:
    """Fresh leaf tensors that require gradients; the sink's pair gets two names."""
    flat = {n: x for n, x in inputs.items() if n != "sink"}
    if "sink" in inputs:
        flat |= dict(zip(("sink_key", "sink_value"), inputs["sink"], strict=True))
    return {n: x.detach().clone().requires_grad_() for n, x in flat.items()}


def call(flat: dict[str, Tensor], function: Callable[..., NHAOutput] = nha_attention, **options) -> NHAOutput:
    """`nha_attention`, or a function that takes the same, on tensors from `leaves`."""
    flat = dict(flat)
    sink = (flat.pop("sink_key"), flat.pop("sink_value")) if "sink_key" in flat else None
    return function(**flat, sink=sink, **options)


def random_loss(output: NHAOutput, seed: int = 1) -> Tensor:
    """A random linear function of everything that was returned."""
    generator = torch.Generator().manual_seed(seed)
    parts = [output.out, output.slot_mass]
    if output.state is not None:
        parts += [output.state.slot_key, output.state.slot_value]
    total = output.out.new_zeros(())
    for x in parts:
        if x is not None:
            weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            total = total + (x * weight.to(x)).sum().to(total.dtype)
    return total


def gradients(flat: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(flat.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(flat.items(), grads, strict=True)}


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float64; NaN counts as infinite."""
    if actual.numel() == 0:
        return 0.0
    worst = (actual.double() - exact.double()).abs().max().item()
    return float("inf") if math.isnan(worst) else worst


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """The cost of rounding the exact result to `dtype`: half a unit in the last place of its largest entry."""
    return torch.finfo(dtype).eps * exact.abs().max().item() if exact.numel() else 0.0


def exponent_rounding(log_gate: Tensor, run: int = 16, most: float = math.inf) -> float:
    """Units that exp(x) of a rounded x may err by, |x|: half the largest sum of `run` log-gates [B, T, H, M] in a row.

    Half, because sums are taken from the middle of a run; those beyond `most` are not taken.
    """
    gate = F.pad(log_gate.detach().double().clamp(-5, 0), (0, 0, 0, 0, 0, run - 1))
    return 1 + min(gate.unfold(1, run, 1).sum(-1).abs().max().item(), most) / 2


def terms_behind(flat: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """The size of the terms that were summed where they may cancel: a result rounds like these, however small it is.

    Slots and outputs are weighted means of keys and values; a gate's gradient is a difference of inner products x . dx.
    """
    pairs = [(x.double() * exact["d" + n]).abs().sum(-1).max() for n, x in flat.items() if n != "log_gate"]
    key, value = (flat[n].detach().double().abs().max() for n in ("k_slot" if "k_slot" in flat else "k", "v"))
    return {"out": value, "slot_key": key, "slot_value": value, "dlog_gate": torch.stack(pairs).max()}
