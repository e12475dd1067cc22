"""Linear layers of a decoder and its head in float32 on a CPU, multiplied by the library that is faster there.

PyTorch multiplies in float32 with MKL, which on AMD's processors reaches less than half of the rate of oneDNN and reads
weights more slowly. PyTorch brings both libraries; the processor alone decides which one multiplies. For the time of a
forward pass each layer has a `forward` of its own. What hooks, quantizes or replaces a layer finds an ordinary one
before and after.
"""

from __future__ import annotations

import platform
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ELEMENTS = 1 << 16  # of a weight: below, either library takes as long as the call
CPU_INFO = Path("/proc/cpuinfo")
FOUND, HEAD = "_nha_linears", "_nha_head"  # of a decoder, beside its parameters


class Found(NamedTuple):
    """A linear layer, where it is held under which name, and the `forward` that replaces its own."""

    held: dict[str, Any]
    name: str
    module: nn.Linear
    forward: partial[Tensor]


@cache
def prefers_onednn() -> bool:
    """Whether products in float32 take less time with oneDNN on this machine: on a processor of AMD, beside MKL."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    about = CPU_INFO.read_text(errors="replace") if CPU_INFO.is_file() else platform.processor()
    return "AuthenticAMD" in about


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of x [..., in] and a weight [out, in], in float32 with oneDNN: without gradients.

    PyTorch's own product where a gradient may be needed or the numbers are others.

    >>> with torch.no_grad():
    ...     onednn_linear(torch.ones(2, 256), torch.ones(8, 256))[0, 0].item()
    256.0
    """
    unable = torch.is_grad_enabled() or torch.compiler.is_compiling() or not torch.backends.mkldnn.is_available()
    if unable or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def multiply(parameters: dict[str, Tensor | None], x: Tensor) -> Tensor:
    """The forward pass of a linear layer with these parameters."""
    weight = parameters["weight"]
    assert weight is not None
    return onednn_linear(x, weight, parameters["bias"])


def is_large(module: Any) -> bool:
    """Whether a module is a linear layer whose product is worth a library of its own.

    >>> is_large(nn.Linear(256, 256)), is_large(nn.Linear(16, 16))
    (True, False)
    """
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    return module.weight.numel() >= MIN_ELEMENTS and module.weight.is_contiguous()


def find_linears(stack: nn.Module) -> list[Found]:
    """The large linear layers below a decoder, and its head."""
    held: list[tuple[dict[str, Any], str]] = [(x._modules, name) for x in stack.modules() for name in x._modules]
    held += [(vars(stack), HEAD)] if HEAD in vars(stack) else []
    return [
        Found(where, name, where[name], partial(multiply, where[name]._parameters))
        for where, name in held
        if is_large(where[name])
    ]


def can_replace(stack: nn.Module) -> bool:
    """Whether oneDNN may multiply in the next forward pass of a decoder, and takes less time there.

    >>> with torch.enable_grad():
    ...     can_replace(nn.Linear(2, 2))
    False
    """
    if torch.is_grad_enabled() or not prefers_onednn() or torch.is_autocast_enabled("cpu"):
        return False
    functorch = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    if functorch is not None or torch._C._len_torch_dispatch_stack():
        return False
    first = next(stack.parameters(), None)
    return first is not None and first.dtype == torch.float32 and first.device.type == "cpu"


def replace_linears(stack: nn.Module) -> list[nn.Module]:
    """Let `multiply` compute the linear layers of a decoder; returns those whose `forward` must be removed behind it.

    The head comes later and removes its own (`after_head`).
    """
    found: list[Found] | None = vars(stack).get(FOUND)
    if found is None or any(x.held.get(x.name) is not x.module for x in found):
        found = vars(stack)[FOUND] = find_linears(stack)
    replaced: list[nn.Module] = []
    for _, name, module, forward in found:
        if "forward" not in (own := vars(module)):
            own["forward"] = forward
            if name != HEAD:
                replaced.append(module)
    return replaced


def forget_head(stack: nn.Module) -> None:
    """Let PyTorch multiply the head of a decoder again, which a pass without it has left replaced."""
    head = vars(stack).get(HEAD)
    if head is not None:
        after_head(head)


def after_head(head: nn.Module, *_: Any) -> None:
    """The hook of a head behind its forward pass: let PyTorch multiply again."""
    forward: Any = vars(head).get("forward")
    if getattr(forward, "func", None) is multiply:
        del vars(head)["forward"]
