"""Checks of the kernels as PyTorch operators: refusals, opcheck, CUDA graphs, attention of full layers, compile times.

A check gets a `Setting` and raises AssertionError. With `tiny` set, those in CHECKS run in Triton's interpreter.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

from nha import nha_attention
from nha.bench.timing import captured
from nha.distill.loss import resolve_chunk_loss
from nha.ops import RingState, full_prefill, nha_decode
from nha.ops.rotary import unrotate_for_slots
from nha.ops.triton.full_decode import full_decode as full_decode_op
from nha.ops.triton.unrotate import unrotate_for_slots as unrotate_kernel
from tests.gpu.cases import KernelCase, make, place, results, rms
from tests.gpu.setting import Setting, expect_none


def small(**changes: Any) -> KernelCase:
    """A case that has every input."""
    sizes: dict[str, Any] = {
        "dim": 64,
        "value_dim": 64,
        "slots": 32,
        "window": 32,
        "length": 150,
        "heads": 2,
        "groups": 2,
    }
    return KernelCase(**(sizes | {"sinks": 1, "separate": True, "start": "filled"} | changes))


def interpretable(setting: Setting, **changes: Any) -> KernelCase:
    """`small`, and smaller still for the interpreter."""
    sizes = {"dtype": "fp32", "dim": 8, "value_dim": 6, "slots": 5, "window": 5, "length": 20, "heads": 1}
    return small(**(sizes | changes)) if setting.tiny else small(**changes)


def refusals(setting: Setting) -> None:
    """An unsupported call is refused in one line that names the value and the limit; "auto" runs it in PyTorch."""
    q = torch.randn(1, 9, 2, 16, device=setting.device)
    gate = -torch.rand(1, 9, 1, 4, device=setting.device)

    def arguments(dim: int = 16, slots: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        key = q.new_zeros(1, 9, 1, dim).to(dtype)
        return [q.new_zeros(1, 9, 2, dim).to(dtype), key, key, gate.new_zeros(1, 9, 1, slots).to(dtype)]

    refused: list[tuple[str, list[Tensor], dict[str, Any]]] = [
        (r"softcap=1\.5", arguments(), {"softcap": 1.5}),
        (r"float64.*float32", arguments(dtype=torch.float64), {}),
        (r"264.*256", arguments(dim=264, dtype=torch.bfloat16), {}),
        (r"129.*128", arguments(slots=129, dtype=torch.bfloat16), {}),
    ]
    wrong = []
    for pattern, given, options in refused:
        try:
            nha_attention(*given, window_size=3, impl="triton", **options)  # type: ignore[arg-type]
            wrong.append(f"{pattern} was not refused")
        except NotImplementedError as refusal:
            if not re.search(pattern, str(refusal)) or "\n" in str(refusal):
                wrong.append(f"expected {pattern} in one line, got {str(refusal)!r}")
        out = nha_attention(*given, window_size=3, **options).out  # type: ignore[arg-type]
        if not out.isfinite().all():
            wrong.append(f"auto gave no finite result for {pattern}")
    expect_none(wrong)


class CallRecorder(TorchDispatchMode):
    """Records calls of this library's operators: (operator, arguments, whether gradients were enabled)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "nha":
            self.calls.append((func, (args, kwargs or {}), torch.is_grad_enabled()))
        return func(*args, **(kwargs or {}))


def operators(setting: Setting) -> None:
    """torch.library.opcheck of every operator, with the arguments of real calls."""
    cases = [
        interpretable(setting),
        interpretable(setting, kind="packed", start="fresh", separate=False, sinks=0),
        interpretable(setting, kind="steps"),
        interpretable(setting, kind="ring"),
    ]
    seen: dict[tuple, str] = {}
    for case in cases:
        recorder = CallRecorder()
        with recorder:
            results(case, place(make(case, setting.seed), setting.device), "triton")
        for operator, (args, kwargs), recorded in recorder.calls:
            key = (str(operator), tuple(x is None for x in args))
            if key in seen:
                continue

            def fresh(x: Any, recorded: bool = recorded) -> Any:
                if not isinstance(x, Tensor):
                    return x
                return x.detach().clone().requires_grad_(recorded and x.requires_grad)

            given = tuple(fresh(x) for x in args), {n: fresh(x) for n, x in kwargs.items()}
            try:
                torch.library.opcheck(operator, *given)
                seen[key] = ""
            except Exception as failure:
                seen[key] = f"{operator}: {' '.join(str(failure).split())[:300]}"
    assert len({name for name, *_ in seen}) >= 3
    expect_none([x for x in seen.values() if x])


def decoding_in_a_cuda_graph(setting: Setting) -> None:
    """Tokens decoded by replaying a CUDA graph equal the sequence in one call."""
    case = small(start="fresh", kind="whole", length=80)
    flat = {n: x.detach() for n, x in place(make(case, setting.seed), setting.device).items()}
    sink = (flat.pop("sink_key"), flat.pop("sink_value"))
    options: dict[str, Any] = {"window_size": case.window, "sink": sink, "impl": "triton"}
    whole = nha_attention(**flat, **options).out  # type: ignore[arg-type]
    start = 50
    state = nha_attention(**{n: x[:, :start] for n, x in flat.items()}, return_state=True, **options).state  # type: ignore[arg-type]
    assert state is not None
    ring = RingState.of(state)
    token = {n: x[:, start : start + 1].clone() for n, x in flat.items()}

    out = flat["v"]

    def one() -> None:
        nonlocal out
        out = nha_decode(**token, sink=sink, state=ring).out  # type: ignore[arg-type]

    with torch.no_grad():
        replay = captured(one)  # which leaves the graph's own output in `out`
    for name, x in RingState.of(state).tensors().items():
        ring.tensors()[name].copy_(x)
    found = []
    for at in range(start, case.length):
        for name, x in token.items():
            x.copy_(flat[name][:, at : at + 1])
        replay()
        found.append(out.clone())
    off = rms(torch.cat(found, 1).double() - whole[:, start:].double())
    limit = 2 * torch.finfo(whole.dtype).eps * rms(flat["v"])
    assert off <= limit, f"rms difference {off:.2e} > {limit:.2e}"


def error_over_sdpa(found: Tensor, sdpa: Tensor, exact: Tensor) -> float:
    """The error of a result as a multiple of SDPA's error plus the rounding of its dtype."""
    return rms(found.double() - exact) / (rms(sdpa.double() - exact) + torch.finfo(found.dtype).eps * rms(exact))


def full_attention_of_a_token(setting: Setting) -> None:
    """Full attention of one token errs no more than SDPA: masked or not, few and many keys, in a CUDA graph."""
    dtype = torch.float32 if setting.tiny else torch.bfloat16
    shapes = (
        [(2, 300, 2, 3, 16)]
        if setting.tiny
        else [
            (1, 1, 8, 4, 128),
            (1, 131072, 8, 4, 128),
            (3, 5000, 8, 1, 64),
            (70, 1111, 4, 7, 80),
            (2, 4096, 4, 2, 256),
        ]
    )
    wrong, generator = [], torch.Generator(setting.device).manual_seed(setting.seed)
    for batch, length, heads, groups, dim in shapes:
        sizes = (batch, heads * groups, 1, dim), *[(batch, heads, length, dim)] * 2
        q, k, v = (torch.randn(n, generator=generator, device=setting.device).to(dtype) for n in sizes)
        place, row = torch.arange(length, device=q.device), torch.arange(batch, device=q.device)[:, None]
        prefix, padded = place <= length // 3 - row % 2, place >= length // 2 - row
        for mask in (None, prefix | (place == 0), padded | (place == length - 1)):
            mask = None if mask is None else mask.expand(batch, length)[:, None, None]
            rows, mean = q.unflatten(1, (heads, groups))[:, :, :, 0], []
            for i in range(batch):
                score = rows[i].double() @ k[i].double().mT * dim**-0.5
                score = score if mask is None else score.masked_fill(~mask[i], float("-inf"))
                mean.append(score.softmax(-1) @ v[i].double())
            exact, read = torch.stack(mean), [q]
            other = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)

            def one(read: list[Tensor] = read, inputs: tuple = (q, k, v, mask, dim**-0.5)) -> None:
                read[0] = full_decode_op(*inputs)

            with torch.no_grad():
                replay = captured(one) if setting.device == "cuda" else one
                replay()
            off = error_over_sdpa(read[0].view_as(exact), other, exact)
            if not off <= 2:
                wrong.append(f"{off:.1f} times SDPA's error with {batch} x {length} keys {'un' * (mask is None)}masked")
    expect_none(wrong)


def full_attention_of_a_segment(setting: Setting) -> None:
    """Full attention of a later segment errs no more than SDPA with a mask."""
    dtype = torch.float32 if setting.tiny else torch.bfloat16
    shapes = (
        [(2, 5, 17, 2, 3, 16)]
        if setting.tiny
        else [
            (1, 1024, 4096, 8, 4, 128),
            (1, 512, 2000, 8, 4, 128),
            (2, 300, 333, 4, 7, 64),
            (1, 100, 1000, 2, 1, 80),
        ]
    )
    wrong, generator = [], torch.Generator(setting.device).manual_seed(setting.seed)
    for batch, length, seen, heads, groups, dim in shapes:
        sizes = (batch, heads * groups, length, dim), *[(batch, heads, seen, dim)] * 2
        q, k, v = (torch.randn(n, generator=generator, device=setting.device).to(dtype) for n in sizes)
        mask = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(seen - length)
        keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
        score = (q.double() @ keys.double().mT * dim**-0.5).masked_fill(~mask, float("-inf"))
        exact = (score.softmax(-1) @ values.double()).transpose(1, 2)
        other = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2)
        with torch.no_grad():
            off = error_over_sdpa(full_prefill(q, k, v), other, exact)
        if not off <= 2:
            wrong.append(f"{off:.1f} times SDPA's error with the last {length} of {seen} tokens")
    expect_none(wrong)


def unrotating(setting: Setting) -> None:
    """Queries and keys for the slots are un-rotated up to rounding, for one token and for many."""
    shapes = (
        [(2, 20, 2, 2, 16, 12)]
        if setting.tiny
        else [
            (1, 1, 8, 4, 128, 128),
            (64, 1, 3, 3, 64, 64),
            (3, 1000, 8, 1, 96, 48),
            (1, 600_000, 4, 8, 128, 128),
        ]
    )
    wrong, generator = [], torch.Generator(setting.device).manual_seed(setting.seed)
    dtype = torch.float16 if setting.tiny else torch.bfloat16

    def drawn(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=generator, device=setting.device, dtype=dtype)

    for batch, length, heads, groups, dim, size in shapes:
        q, k = (drawn(batch, n, length, dim, dtype=dtype).transpose(1, 2) for n in (heads * groups, heads))
        near, far = (drawn(1, n, size // 2).repeat(1, 1, 2) for n in (length, 1))
        tables, distance = [(x.cos().to(dtype), x.sin().to(dtype)) for x in (near, far)]
        found = unrotate_kernel(q, k, *tables, *distance)
        last = slice(max(0, length - 1000), None)  # whose offsets are the largest
        exact = unrotate_for_slots(
            q[:, last].double(), k[:, last].double(), (tables[0][:, last], tables[1][:, last]), distance
        )
        for mine, wanted in zip(found, exact, strict=True):
            off = rms(mine[:, last].double() - wanted) / (torch.finfo(dtype).eps * rms(wanted))
            if not off <= 1:
                wrong.append(f"{off:.1e} times its rounding off for {batch} x {length} tokens, {mine.shape[2]} heads")
    expect_none(wrong)


def losses(setting: Setting) -> None:
    """Distillation's KL, cross-entropy and gradient from logits in 16 bits equal those in float64 up to rounding."""
    shapes = [(5, 16, 40, None)] if setting.tiny else [(700, 576, 49_152, None), (200, 512, 151_665, 30.0)]
    wrong, generator = [], torch.Generator(setting.device).manual_seed(setting.seed)
    dtype = torch.float16 if setting.tiny else torch.bfloat16
    for count, hidden, vocabulary, cap in shapes:
        own, more, weight = (
            torch.randn(n, hidden, generator=generator, device=setting.device) for n in (count, count, vocabulary)
        )
        student, teacher, weight = (x.to(dtype) for x in (own, own + 0.3 * more, 0.2 * weight))
        target = torch.randint(vocabulary, (count,), generator=generator, device=setting.device)
        by = torch.rand(2, count, generator=generator, device=setting.device)
        found = resolve_chunk_loss(student)(student, teacher, weight, target, by[0], by[1], 1.0, cap)
        # From the same rounded logits: their rounding is not the kernel's.
        raw = (student @ weight.T).double().requires_grad_()
        logits, wanted = (x if cap is None else cap * torch.tanh(x / cap) for x in (raw, (teacher @ weight.T).double()))
        logs, shares = logits.log_softmax(-1), wanted.softmax(-1)
        kl = (shares * (wanted.log_softmax(-1) - logs)).sum(-1)
        cross = -logs.gather(1, target[:, None])[:, 0]
        (grad,) = torch.autograd.grad((by[0] * kl + by[1] * cross).sum(), raw)
        largest = torch.finfo(torch.float32).eps * max(x.abs().max().item() for x in (logits, wanted))
        for name, mine, exact, limit in (
            ("KL", found[0], kl, 16 * largest),
            ("cross-entropy", found[1], cross, 16 * largest),
            ("gradient", found[3], grad @ weight.double(), torch.finfo(dtype).eps * rms(found[3])),
        ):
            off = rms(mine.double() - exact.detach())
            wrong += [] if off <= limit else [f"{name} of {vocabulary} words is off by {off:.1e} > {limit:.1e}"]
    expect_none(wrong)


def compiling_once(setting: Setting) -> None:
    """After one short and one long sequence no other length or batch compiles a kernel."""
    folder = tempfile.mkdtemp(prefix="nha-cold-")

    def run(batch: int, length: int) -> None:
        case = KernelCase(batch=batch, length=length, heads=8)
        flat = place(
            {n: x[:, :1].expand(-1, length, -1, -1) for n, x in make(replace(case, length=1), 0).items()},
            setting.device,
        )
        out = nha_attention(**flat, window_size=64, impl="triton").out  # type: ignore[arg-type]
        torch.autograd.grad(out, list(flat.values()), torch.ones_like(out))
        torch.cuda.synchronize()

    with knobs.cache.scope():
        knobs.cache.dir = folder
        run(1, 300)
        run(1, 20000)
        kernels = len(list(Path(folder).rglob("*.cubin")))
        for batch, length in ((1, 301), (3, 1000), (2, 4096), (1, 32768), (16, 2048), (1, 6001)):
            run(batch, length)
    more = len(list(Path(folder).rglob("*.cubin"))) - kernels
    shutil.rmtree(folder, ignore_errors=True)
    assert kernels and not more, f"{more} more kernels compiled"


CHECKS: tuple[Callable[[Setting], None], ...] = (
    refusals,
    full_attention_of_a_token,
    full_attention_of_a_segment,
    unrotating,
    losses,
)
GPU_CHECKS: tuple[Callable[[Setting], None], ...] = (*CHECKS, operators, decoding_in_a_cuda_graph, compiling_once)
