"""Launch a compiled kernel again without Triton's inspection of every argument.

That inspection takes longer on the CPU than most of these kernels run on the GPU. It depends on the dtypes of pointers,
on whether they are multiples of 16 and on the integers that a kernel is specialised for; `cache_key` stands for all
but the alignment.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton import knobs, runtime

_compiled: dict[Hashable, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], cache_key: Hashable, *arguments: Any, **constants: Any) -> None:
    """Launch `kernel` on a grid: its arguments in order, then its constants and options by name.

    Calls of one kernel, cache key and set of constants may differ in addresses and in the integers the kernel is not
    specialised for, and in nothing else. The kernel runs on the device of its first argument, a tensor.
    """
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, cache_key, *arguments, **constants)
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    aligned = all(not isinstance(x, Tensor) or value % 16 == 0 for x, value in zip(arguments, values, strict=True))
    key = (kernel.fn, cache_key, *constants.values())
    compiled = _compiled.get(key) if aligned else None
    if compiled is None:
        compiled = kernel[grid](*arguments, **constants)
        if aligned and compiled is not None:  # the interpreter and a recording return nothing
            _compiled[key] = compiled
        return
    names = kernel.arg_names
    fixed = [constants[name] for name in names[len(values) :]]
    active: Any = runtime.driver.active
    stream = active.get_current_stream(torch.cuda.current_device())
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    size = (*grid, 1, 1)[:3]
    metadata = compiled.launch_metadata(size, stream, *values, *fixed)
    compiled.run(*size, stream, compiled.function, compiled.packed_metadata, metadata, *hooks, *values, *fixed)
