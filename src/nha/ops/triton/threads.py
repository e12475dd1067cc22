"""Kernels compiled by several threads: one after another, those of a model take some 15 s in a process without a cache.

A call of the model names its kernels, their dtypes and sizes, as no list could. Here the call is made for that alone.
Triton writes a launcher in C for every signature and has the C compiler build it at the first launch, some 0.15 s each:
threads do that too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MAX_THREADS = 16
_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def can_compile_in_threads() -> bool:
    """Whether this Triton compiles in threads (3.5 or later), and kernels are compiled at all."""
    return hasattr(triton, "AsyncCompileMode") and os.environ.get("TRITON_INTERPRET", "0") != "1"


class Loader(ThreadPoolExecutor):
    """Threads that load every kernel which they compile, on the device of the thread that made them."""

    def __init__(self, threads: int):
        super().__init__(threads)
        self.device = driver.active.get_current_device()  # pyright: ignore[reportAttributeAccessIssue]

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Compile a kernel by `fn`, and load it."""
        return super().submit(self._load, fn, *args, **kwargs)

    def _load(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kernel = fn(*args, **kwargs)
        with torch.cuda.device(self.device) if torch.cuda.is_available() else nullcontext():
            if kernel.run is None:  # reading it builds the launcher and loads the kernel
                raise RuntimeError("expected a launcher of a compiled kernel, got None")
        return kernel


@contextmanager
def compiling() -> Iterator[None]:
    """Within the block, compile the kernels that this thread launches, and run none: their outputs are undefined.

    The block ends when all are compiled. One that does not compile raises where it is launched later.
    """
    threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, MAX_THREADS)
    run, token = JITFunction.run, _compiling.set(True)

    def run_or_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=warmup or _compiling.get(), **kwargs)

    JITFunction.run = run_or_compile  # other threads launch as ever
    try:
        with Loader(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        JITFunction.run = run
        _compiling.reset(token)
