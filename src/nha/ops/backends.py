"""The implementations of the operator, which of them run on this machine, and when their gradients are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import Parameter

H100_SHARED_MEMORY = 227 << 10  # bytes that a block may use
HAS_TRITON = find_spec("triton") is not None  # looked up once: torch.compile cannot trace it


def _triton_reason() -> str | None:
    """Why the GPU kernels cannot run on this machine, or None."""
    if not HAS_TRITON:
        return "not available: Triton is not installed, use impl='chunked'"
    if torch.cuda.is_available():
        return None
    import triton  # pyright: ignore[reportMissingImports]

    if not triton.knobs.runtime.interpret:  # pyright: ignore[reportAttributeAccessIssue]
        return "not available: this machine has no CUDA device, use impl='chunked'"
    return None


def implementations() -> dict[str, str]:
    """The implementations by name, each "available" or with the reason why it cannot run here.

    >>> implementations()["chunked"]
    'available'
    """
    return {
        "reference": "available",
        "chunked": "available",
        "triton": _triton_reason() or "available",
    }


def resolve_impl(impl: str, device: torch.device | str = "cpu") -> str:
    """The implementation that `impl` names; "auto" is the fastest one that runs on `device`.

    Raises ValueError for an unknown name and NotImplementedError for one that cannot run here: an implementation
    asked for by name never falls back to another.

    >>> resolve_impl("auto")
    'chunked'
    """
    if impl == "auto":
        usable = torch.device(device).type == "cuda" and _triton_reason() is None
        return "triton" if usable else "chunked"
    known = implementations()
    if impl not in known:
        raise ValueError(f"expected impl to be 'auto' or one of {sorted(known)}, got {impl!r}")
    if known[impl] != "available":
        raise NotImplementedError(f"impl={impl!r} is {known[impl]}")
    return impl


def can_skip_autograd(tensors: Sequence[Tensor | None], impl: str = "auto") -> bool:
    """Whether `impl` is the kernels on the first tensor's device and no gradient is needed: some kernels have none."""
    first = tensors[0]
    return first is not None and resolve_impl(impl, first.device) == "triton" and not needs_grad(tensors)


def can_skip_dispatch(tensors: Sequence[object]) -> bool:
    """Whether an operator's own function may be called past PyTorch's dispatcher, which costs more than some kernels.

    It may where nothing is differentiated, traced, mapped, wrapped or watched: plain tensors (and other arguments).

    >>> can_skip_dispatch([torch.ones(2), None, 3]), can_skip_dispatch([torch.ones(2, requires_grad=True)])
    (True, False)
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    found = [x for x in tensors if isinstance(x, Tensor)]
    wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore
    return not needs_grad(found) and all(type(x) in (Tensor, Parameter) and not wrapped(x) for x in found)


def compile_kernels(run: Callable[[], object], device: torch.device) -> None:
    """Compile the kernels that a call and its gradients launch, side by side, and run none of them.

    What the call computes from them is undefined, so `run` must change nothing. Where it fails, kernels are compiled
    when they are launched.
    """
    if not HAS_TRITON or device.type != "cuda":
        return
    from nha.ops.triton.threads import can_compile_in_threads, compiling

    if can_compile_in_threads():
        # Without threads of its own, autograd launches kernels from the thread that compiles them.
        with suppress(Exception), compiling(), torch.autograd.set_multithreading_enabled(False):
            run()


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use on a device; those of an H100 where there is no GPU."""
    if device.type != "cuda":
        return H100_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records what is done with one of the tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
