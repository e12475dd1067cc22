"""Compile every kernel of a call for a GPU that is not there and report its registers, spills and shared memory.

Run as a program: `python -m tests.triton.compile_only '{"dtype": "bfloat16", ...}' ...` prints a JSON line per kernel.
A launch is recorded instead of run; the tensors stay on the CPU and are never touched by a kernel.
"""

import json
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

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
CONSUMER, CONSUMER_SHARED = (86, 89, 120), 99 << 10  # compute capabilities with 100 KB of shared memory
OPTIONS = ("num_warps", "num_stages", "maxnreg", "num_ctas", "grid", "warmup")


def compile_launch(kernel, args, kwargs, capability=90):
    """The compiled kernel of one recorded launch, specialised as the launcher would."""
    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        one = type(value) is int and value == 1 and parameter.name not in free
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and parameter.name not in free:
                attributes[(place,)] = [["tt.divisibility", 16]]
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
    """(kernel, args, kwargs) of every launch that `function` makes, one for each specialisation."""
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


def call(
    dtype="bfloat16", dim=128, value_dim=None, slots=64, window=64, groups=4, sinks=1, length=2048, heads=8, state=False
):  # fmt: skip
    """Forward and backward launches of one shape, going on from a `state` or not, without running anything."""
    from nha.ops.triton import launch

    q = torch.empty(1, length, heads * groups, dim, dtype=getattr(torch, dtype))
    k, v = q.new_empty(1, length, heads, dim), q.new_empty(1, length, heads, value_dim or dim)
    gate = k.new_empty(1, length, heads, slots)
    sink = (q.new_empty(heads, sinks, dim), v.new_empty(heads, sinks, v.shape[3])) if sinks else (None, None)
    start, first, past = (None, None), None, 0
    if state:
        start = torch.empty(1, heads, slots, dim), torch.empty(1, heads, slots, v.shape[3])
        first, past = torch.zeros(1, dtype=torch.int64), window
        k, v, gate = (torch.cat([x[:, :past], x], 1) for x in (k, v, gate))
    inputs = launch.Inputs(q, k, v, None, None, gate, *start, *sink, first, None, window, past, 0.1, False)
    launch.every_kernel(inputs)


def main():
    from nha.ops.triton import launch, plan

    for text in sys.argv[1:]:
        options = json.loads(text)
        capability = options.pop("capability", 90)
        if capability in CONSUMER:
            plan.shared_memory = launch.shared_memory = lambda device: CONSUMER_SHARED
        for kernel, args, kwargs in record(lambda options=options: call(**options)):
            row = {"shape": options, "kernel": kernel.fn.__name__, "warps": kwargs["num_warps"]}
            start = time.perf_counter()
            try:
                row |= resources(compile_launch(kernel, args, kwargs, capability))
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
            row["seconds"] = round(time.perf_counter() - start, 1)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
