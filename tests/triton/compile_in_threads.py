"""Compile the ring's kernel in threads for an H100, on a machine without a GPU; prints what was compiled and run."""

import json
import threading
import types
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from nha.ops.triton.ring import ring_after_prompt, ring_kernel
from nha.ops.triton.threads import compiling


def launch(dtype: torch.dtype) -> None:
    k, gate = torch.zeros(1, 8, 2, 16, dtype=dtype), torch.zeros(1, 8, 2, 16)
    ring_after_prompt(k, k, gate, None, (gate, gate), 4)


def main() -> None:
    ran: list[str] = []
    loaded: list[bool] = []  # whether by another thread
    driver.set_active(
        types.SimpleNamespace(  # type: ignore[arg-type]
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    unbound: Any = CompiledKernel
    unbound.launch_metadata = lambda self, *args: ran.append(self.name)

    def load(self: Any) -> Any:
        loaded.append(threading.current_thread() is not threading.main_thread())
        return lambda *args: None

    unbound.run, unbound.function = property(load), None
    with compiling():
        for dtype in (torch.float32, torch.float16):
            launch(dtype)
    kernels = ring_kernel.device_caches[0][0]
    row: dict[str, Any] = {"compiled": [type(x).__name__ for x in kernels.values()], "launched_within": len(ran)}
    row["loaded"] = list(loaded)
    launch(torch.float32)
    print(json.dumps(row | {"launched": len(ran), "kernels": len(kernels)}))


if __name__ == "__main__":
    main()
