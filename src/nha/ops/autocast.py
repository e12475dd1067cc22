"""Regions of autocast, in which attention reads tensors in the region's dtype, as PyTorch's own does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable)


def in_region(*tensors: Any) -> list[Any]:
    """Tensors as a region of autocast around has them; what is not floating, double precision or no tensor stays.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     [x if x is None else x.dtype for x in in_region(torch.zeros(1), None, torch.arange(2))]
    [torch.bfloat16, None, torch.int64]
    """

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    return [cast(x) for x in tensors]


def reads_in_region(function: Function) -> Function:
    """Let a function of q, k, v, log_gate and named options read all but the log-gate `in_region`, and cast no more."""

    @wraps(function)
    def call(q: Tensor, *args: Any, **options: Any) -> Any:
        device = q.device.type if isinstance(q, Tensor) else "cpu"
        if not torch.is_autocast_enabled(device):
            return function(q, *args, **options)
        for name in options.keys() & {"k", "v", "q_slot", "k_slot"}:
            (options[name],) = in_region(options[name])
        if isinstance(options.get("sink"), tuple):
            options["sink"] = tuple(in_region(*options["sink"]))
        read = in_region(q, *args[:2])
        with torch.autocast(device, enabled=False):
            return function(*read, *args[2:], **options)

    return call  # type: ignore[return-value]
