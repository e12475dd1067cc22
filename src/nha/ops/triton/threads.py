"""Kernels compiled by several threads: one after another, those of a model take some 15 s in a process without a cache.

A call of the model names its kernels, their dtypes and sizes, as no list could. Here the call is made for that alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton
from triton.runtime.jit import JITFunction

MAX_THREADS = 16
_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def can_compile_in_threads() -> bool:
    """Whether this Triton compiles in threads (3.5 or later), and kernels are compiled at all."""
    return hasattr(triton, "AsyncCompileMode") and os.environ.get("TRITON_INTERPRET", "0") != "1"


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
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        JITFunction.run = run
        _compiling.reset(token)
