"""Autocast: under `torch.autocast` the operator casts its inputs, as PyTorch's attention does."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable)


def cast_for_autocast(*tensors: Any) -> list[Any]:
    """Cast floating point tensors to the autocast dtype of their device; float64 and what is no tensor stay.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     [x if x is None else x.dtype for x in cast_for_autocast(torch.zeros(1), None, torch.arange(2))]
    [torch.bfloat16, None, torch.int64]
    """

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    return [cast(x) for x in tensors]


def autocast_inputs(function: Function) -> Function:
    """Cast every tensor argument except `log_gate` to the autocast dtype, then call with autocast disabled."""

    @wraps(function)
    def call(q: Tensor, *args: Any, **options: Any) -> Any:
        device = q.device.type if isinstance(q, Tensor) else "cpu"
        if not torch.is_autocast_enabled(device):
            return function(q, *args, **options)
        for name in options.keys() & {"k", "v", "q_slot", "k_slot"}:
            (options[name],) = cast_for_autocast(options[name])
        if isinstance(options.get("sink"), (tuple, list)):
            options["sink"] = tuple(cast_for_autocast(*options["sink"]))
        cast = cast_for_autocast(q, *args[:2])
        with torch.autocast(device, enabled=False):
            return function(*cast, *args[2:], **options)

    return call  # type: ignore[return-value]
