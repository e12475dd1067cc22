"""A diagnosis of this installation: versions, missing packages, and every implementation against the reference."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nha.report.requirements import OPTIONAL, install_line, missing

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ("torch", "transformers", "safetensors", "triton")
LENGTH, WINDOW = 83, 13  # of the self-check


@dataclass
class SelfCheck:
    """One implementation against the reference in float64.

    `error` and `allowed` are relative to the largest entry of what is compared (the worst of outputs, final
    slots and gradients); `allowed` is twice the error of the reference itself in float32 plus float32's rounding,
    also of the exponents that fast implementations factorise.
    """

    implementation: str
    device: str
    passed: bool
    error: float
    allowed: float
    seconds: float
    message: str = ""


def versions() -> dict[str, str | None]:
    """Installed versions by package name, None where a package is absent."""
    from nha import __version__

    found: dict[str, str | None] = {"nha": __version__, "python": platform.python_version()}
    for name in (*REQUIRED, *(name.split("[")[0] for name, _ in OPTIONAL.values())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def self_check(implementation: str, device: str) -> SelfCheck:
    """Outputs, final slots and gradients of `implementation` in float32 beside the reference in float64.

    The case is small and takes every path at once: grouped heads, odd sizes, a sink, slot keys of their own and
    two segments of different length.
    """
    eps = exponent_units() * 2.0**-23
    truth, rounded = reference_results()
    started = time.perf_counter()
    try:
        ours = _run(implementation, device, "float32")
    except Exception as failure:
        seconds = time.perf_counter() - started
        message = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return SelfCheck(implementation, device, False, float("nan"), float("nan"), seconds, message)
    worst = (-1.0, 0.0, 1.0)
    for name, exact in truth.items():
        size = exact.abs().max().item()
        band = (rounded[name].double() - exact).abs().max().item() / size
        error = (ours[name].double().cpu() - exact).abs().max().item() / size
        error = error if math.isfinite(error) else math.inf
        allowed = 2 * (band + eps)
        worst = max(worst, (error / allowed, error, allowed))
    passed = worst[0] <= 1
    message = "" if passed else "differs from the reference"
    return SelfCheck(implementation, device, passed, worst[1], worst[2], time.perf_counter() - started, message)


@functools.cache
def reference_results() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The case as the reference computes it in float64 and in float32."""
    return _run("reference", "cpu", "float64"), _run("reference", "cpu", "float32")


def exponent_units() -> float:
    """Units that exp(x) of a rounded x errs by: half the largest sum of 16 log-gates in a row, and one of its own.

    >>> round(exponent_units())
    6
    """
    gate = _inputs("cpu", "float64")[0]["gate"].detach()
    return 1 + gate.unfold(1, 16, 1).sum(-1).abs().max().item() / 2


def _inputs(device: str, dtype: str) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(device, getattr(torch, dtype))

    shape = (1, LENGTH)
    q, q_slot = random(*shape, 4, 16), random(*shape, 4, 16)
    k, k_slot, v = random(*shape, 2, 16), random(*shape, 2, 16), random(*shape, 2, 16)
    gate = torch.nn.functional.logsigmoid(random(*shape, 2, 8)) / 2
    sink = (random(2, 1, 16), random(2, 1, 16))
    leaves = {"q": q, "k": k, "v": v, "gate": gate, "q_slot": q_slot, "k_slot": k_slot}
    return {n: x.requires_grad_() for n, x in leaves.items()}, sink


def _run(implementation: str, device: str, dtype: str) -> dict[str, Tensor]:
    import torch

    from nha.ops import nha_attention

    leaves, sink = _inputs(device, dtype)
    q, k, v, gate, q_slot, k_slot = leaves.values()
    outs, state = [], None
    for part in (slice(0, 37), slice(37, LENGTH)):
        result = nha_attention(
            q[:, part],
            k[:, part],
            v[:, part],
            gate[:, part],
            window_size=WINDOW,
            q_slot=q_slot[:, part],
            k_slot=k_slot[:, part],
            sink=sink,
            state=state,
            return_state=True,
            impl=implementation,
        )
        outs.append(result.out)
        state = result.state
    assert state is not None
    whole = torch.cat(outs, 1)
    grads = torch.autograd.grad(whole.square().sum(), list(leaves.values()))
    seen = {"out": whole, "slot_key": state.slot_key, "slot_value": state.slot_value}
    seen.update({f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return {name: x.detach() for name, x in seen.items()}


def diagnosis() -> dict[str, Any]:
    """Everything `nha doctor` reports, as plain data."""
    import torch

    from nha.ops import implementations, resolve_impl

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    known = implementations()
    chosen = resolve_impl("auto", device)
    names = [name for name, status in known.items() if status == "available"]
    checks = [self_check(name, device) for name in names]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    reason = "a CUDA GPU is usable" if cuda else "no usable CUDA GPU was found"
    absent = missing(OPTIONAL)
    return {
        "versions": versions(),
        "missing": [
            {"package": OPTIONAL[name][0], "use": OPTIONAL[name][1], "install": install_line([name])} for name in absent
        ],
        "install": install_line(absent) if absent else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "device": device,
        "implementations": known,
        "chosen": chosen,
        "why": f"On {device} ({reason}) impl='auto' is {chosen}, the fastest implementation that runs",
        "checks": [asdict(check) for check in checks],
        "healthy": all(check.passed for check in checks),
    }
