"""Where the kernels read and write: offsets beyond 32 bits, and one pass of each kernel under compute-sanitizer."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import nha.ops.triton
from nha import nha_attention
from nha.ops.triton.full_decode import full_token
from nha.ops.triton.loss import chunk_loss
from nha.ops.triton.unrotate import unrotate_for_slots
from tests.gpu.cases import make, place, results, rms
from tests.gpu.integration import ROOT, Setting, little, verdict

GIB = 2**30
BEYOND = 2**31  # elements that 32 bits cannot count
Part = Callable[[Tensor], Tensor]


def attend(flat: dict[str, Tensor], window: int, grad: Tensor) -> dict[str, Tensor]:
    """out and gradients by name."""
    leaves = {n: x.detach().requires_grad_() for n, x in flat.items()}
    out = nha_attention(**leaves, window_size=window, impl="triton").out  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}


def compare(part: Part, flat: dict[str, Tensor], window: int, grad: Tensor) -> list[str]:
    """Where `part` of a call differs from the call on `part` of its inputs by more than another order of sums may.

    A gate's gradient is a difference of inner products, and rounds like these.
    """
    whole = {n: part(x).clone() for n, x in attend(flat, window, grad).items()}
    mine = {n: part(x).clone() for n, x in flat.items()}
    alone = attend(mine, window, part(grad).clone())
    eps, bad = torch.finfo(grad.dtype).eps, []
    pairs = max(rms((mine[n].double() * alone["d" + n]).sum(-1)) for n in ("q", "k", "v"))
    for name, x in alone.items():
        off = rms(whole[name].double() - x.double())
        limit = eps * (max(rms(x), pairs) if name == "dlog_gate" else rms(x))
        bad += [] if off <= limit else [f"{name} differs by {off:.1e} rms > {limit:.1e}"]
    return bad


def drawn(
    setting: Setting, batch: int, length: int, groups: int, heads: int, slots: int, dim: int, heads_first: bool = False
) -> Any:
    """Random inputs by name and a gradient of the outputs, made on the device; in memory heads may come first."""
    generator = torch.Generator(setting.device).manual_seed(setting.seed)
    dtype = torch.float32 if setting.tiny else torch.bfloat16

    def normal(batch: int, length: int, heads: int, dim: int) -> Tensor:
        shape = (batch, heads, length, dim) if heads_first else (batch, length, heads, dim)
        x = torch.randn(shape, generator=generator, device=setting.device, dtype=dtype)
        return x.transpose(1, 2) if heads_first else x

    flat = {"q": normal(batch, length, heads * groups, dim), "k": normal(batch, length, heads, dim)}
    flat |= {"v": normal(batch, length, heads, dim), "log_gate": normal(batch, length, heads, slots).abs_().neg_()}
    return flat, normal(batch, length, heads * groups, dim)


def large(setting: Setting, of: str, need: int, part: Part, heads_first: bool = False, **sizes: int) -> str:
    """A call in which `of` has more than 2^31 elements, compared in one part; `need` is the memory in GiB."""
    if setting.tiny:
        sizes = {"batch": 2, "length": 20, "groups": 2, "heads": 2, "slots": 5, "dim": 8}
    elif torch.cuda.mem_get_info()[0] < need * GIB:
        return f"skip needs {need} GiB of free memory, has {torch.cuda.mem_get_info()[0] // GIB}"
    flat, grad = drawn(setting, **sizes, heads_first=heads_first)
    count = flat[of].numel()
    bad = compare(part, flat, 5 if setting.tiny else 64, grad)
    if count <= BEYOND and not setting.tiny:
        bad.append("not large enough")
    if setting.device == "cuda":
        del flat, grad
        torch.cuda.empty_cache()
    return verdict(bad, f"{of} of {count:,} elements")


def many_rows(setting: Setting) -> str:
    """Forward and backward where queries, outputs and their gradients have 2^31 elements, in many rows."""
    return large(setting, "q", 36, lambda x: x[-1:], batch=257, length=2048, groups=4, heads=8, slots=64, dim=128)


def long_row(setting: Setting) -> str:
    """The same in one long row, for the last KV head."""
    heads = 2 if setting.tiny else 8
    return large(
        setting,
        "q",
        34,
        lambda x: x[:, :, -(x.shape[2] // heads) :],
        batch=1,
        length=262240,
        groups=8,
        heads=heads,
        slots=64,
        dim=128,
    )


def many_keys(setting: Setting) -> str:
    """The same where keys, values and their gradients are as large as queries, and in memory heads come first."""
    heads = 2 if setting.tiny else 64
    return large(
        setting,
        "k",
        50,
        lambda x: x[:, :, -(x.shape[2] // heads) :],
        heads_first=True,
        batch=1,
        length=262240,
        groups=1,
        heads=heads,
        slots=16,
        dim=128,
    )


def far_apart(setting: Setting) -> str:
    """Rows 2^31 elements apart in memory give the bits of rows next to each other."""
    sizes = {"batch": 2, "length": 300, "groups": 4, "heads": 2, "slots": 64, "dim": 128}
    if setting.tiny:
        sizes |= {"length": 20, "heads": 1, "slots": 5, "dim": 8}
    flat, grad = drawn(setting, **sizes)
    stride = 4096 if setting.tiny else BEYOND + 64
    need = 6
    if not setting.tiny and torch.cuda.mem_get_info()[0] < need * GIB:
        return f"skip needs {need} GiB of free memory, has {torch.cuda.mem_get_info()[0] // GIB}"
    buffer = grad.new_empty(stride + sum(x[0].numel() for x in flat.values()))
    spread, start = {}, 0
    for name, x in flat.items():
        spread[name] = buffer.as_strided(x.shape, (stride, *x.stride()[1:]), start).copy_(x)
        start += x[0].numel()
    window = 5 if setting.tiny else 64
    near, far = attend(flat, window, grad), attend(spread, window, grad)
    bad = [f"{n} differs" for n, x in near.items() if not torch.equal(x, far[n])]
    return verdict(bad, f"rows {stride:,} elements apart")


# ---------------------------------------------------------------------------------------------------------------------
# Every kernel once.


def kernels() -> dict[str, Any]:
    """Every Triton kernel of the library by name."""
    found = {}
    for module in pkgutil.iter_modules(nha.ops.triton.__path__):
        for name, value in vars(importlib.import_module(f"nha.ops.triton.{module.name}")).items():
            if name.endswith("_kernel") and hasattr(value, "run"):
                found[name] = value
    return found


@contextmanager
def launched() -> Iterator[set[str]]:
    """The names of kernels that are launched, at least for the first time, from here on."""
    names: set[str] = set()
    kind = type(next(iter(kernels().values())))
    original = kind.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(self.fn.__name__)
        return original(self, *args, **kwargs)

    kind.run = run
    try:
        yield names
    finally:
        kind.run = original


def one_pass(setting: Setting) -> str:
    """Every kernel, forward, backward and decoding, on a few small problems; what comes back is finite."""
    whole = little(setting)
    plain = replace(whole, start="fresh", sinks=0, separate=False)
    problems = [
        whole,
        plain,
        replace(plain, window=0, gates="needs_subchunks"),
        replace(plain, kind="packed"),
        replace(whole, kind="steps", batch=2),
        replace(whole, kind="ring"),
        replace(plain, length=20 if setting.tiny else 700),
    ]
    bad = []
    with launched() as names:
        for problem in problems:
            found = results(problem, place(make(problem, setting.seed), setting.device), "triton")
            bad += [f"{n} of {problem} is not finite" for n, x in found.items() if not x.isfinite().all()]
        for length in (9, 1100):  # whole, and in parts
            q, k = (torch.randn(2, n, t, 16, device=setting.device) for n, t in ((6, 1), (2, length)))
            mask = torch.arange(length, device=q.device).expand(2, 1, 1, -1) < length - 3
            if not full_token(q, k, k, mask, 0.25).isfinite().all():
                bad.append(f"full attention of {length} keys is not finite")
            tables = torch.ones(1, length, 12, device=q.device), torch.zeros(1, length, 12, device=q.device)
            keys = k.transpose(1, 2)
            if not torch.equal(unrotate_for_slots(keys, keys, *tables, *(x[:, :1] for x in tables))[1], keys):
                bad.append(f"what slots see of {length} keys is not what is there")
        hidden, by = torch.randn(5, 16, device=setting.device), torch.ones(5, device=setting.device)
        grad = chunk_loss(hidden, hidden, hidden, torch.arange(5, device=by.device), by, by, 1.0, None)[3]
        if not grad.isfinite().all():
            bad.append("a gradient of the loss is not finite")
    missing = sorted(kernels().keys() - names)
    return verdict(bad + [f"{name} was not launched" for name in missing], f"{len(names)} kernels")


def sanitized(tool: str, setting: Setting) -> str:
    """`one_pass` under a tool of compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return "skip compute-sanitizer is not installed"
    if setting.device == "cpu":
        return "skip compute-sanitizer needs a GPU"
    own = [sys.executable, "-m", "tests.gpu.check", "--one-pass", "--seed", str(setting.seed)]
    plain = subprocess.run(own, cwd=ROOT, capture_output=True, text=True)  # compiles, so that nothing does below
    if plain.returncode:
        return f"FAIL without the tool already: {(plain.stdout + plain.stderr)[-300:]!r}"
    # The caching allocator would hide what is read or written beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # PyTorch asks the driver for functions that it can do without, and memcheck takes the answer for an error.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *options, *own]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = [line.removeprefix("=========").strip() for line in run.stdout.splitlines() if line.startswith("=========")]
    summary = next((line for line in reversed(said) if "SUMMARY" in line), "no summary")
    if run.returncode == 0 and re.search(r"^pass", run.stdout, re.MULTILINE):
        return f"pass {summary}"
    return f"FAIL exit {run.returncode}, {summary}; first: {' / '.join(said[1:6])[:500]}"


def memcheck(setting: Setting) -> str:
    """No access out of bounds or misaligned in any kernel."""
    return sanitized("memcheck", setting)


def racecheck(setting: Setting) -> str:
    """No hazard between threads in shared memory in any kernel."""
    return sanitized("racecheck", setting)
