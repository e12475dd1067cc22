"""Compile every kernel of a call for a GPU that is not present; report registers, spills and shared memory.

Run as a program: `python -m tests.triton.compile_chunk '{"dtype": "bf16", "capability": 90}' ...` prints a JSON line
per kernel of each case (see `tests.gpu.cases.KernelCase`). A launch is recorded instead of run; the tensors stay on the
CPU and are never touched by a kernel.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import nha.ops.triton
from tests.gpu.cases import KernelCase, make, place, results
from tests.triton.compilation import SHARED_MEMORY

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "u1",
}


def compile_launch(kernel, args, kwargs, capability=90):
    """The compiled kernel of one recorded launch, specialised as Triton would."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        one = type(value) is int and value == 1 and parameter.name not in free
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and parameter.name not in free:
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {n: kwargs[n] for n in ("num_warps", "num_stages", "maxnreg") if kwargs.get(n) is not None}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled):
    """Registers, bytes of stack (spills), bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack": found["STACK"], "shared": compiled.metadata.shared}


def record(function):
    """(kernel, args, kwargs) of every launch of `function`, one per specialisation, without running any."""
    launches = {}

    def run(kernel, *args, grid, warmup, **kwargs):
        key = (kernel.fn.__name__, *(str(v) for v in kwargs.values()))
        launches.setdefault(key, (kernel, args, kwargs))

    original, JITFunction.run = JITFunction.run, run
    try:
        function()
    finally:
        JITFunction.run = original
    return list(launches.values())


def launches(case):
    """The launches of a case, forward and backward, without running any."""
    from nha.ops import backends

    backends._triton_reason = lambda: None  # as on a machine with a GPU
    return record(lambda: results(case, place(make(case, seed=0), "cpu"), "triton"))


def limit_shared_memory(limit):
    """Plan kernels for a GPU whose blocks have `limit` bytes of shared memory."""
    for module in pkgutil.walk_packages(nha.ops.triton.__path__, "nha.ops.triton."):
        loaded = importlib.import_module(module.name)
        if hasattr(loaded, "shared_memory"):
            loaded.shared_memory = lambda device: limit


def report(launches_of):
    """Compile the launches of every shape on the command line and print a JSON line for each."""
    for index, text in enumerate(sys.argv[1:]):
        options = json.loads(text)
        capability = options.pop("capability", 90)
        limit_shared_memory(SHARED_MEMORY[capability])
        for kernel, args, kwargs in launches_of(options):
            row = {"case": index, "shape": options, "kernel": kernel.fn.__name__, "warps": kwargs["num_warps"]}
            start = time.perf_counter()
            try:
                row |= resources(compile_launch(kernel, args, kwargs, capability))
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[-500:]}"
            row["seconds"] = round(time.perf_counter() - start, 1)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    report(lambda options: launches(KernelCase(**options)))
