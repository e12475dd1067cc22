"""How the kernels sit in PyTorch: operators, compilation, autocast, CUDA graphs, refusals, compile times.

A proof gets a `Setting` and returns its verdict in one line that begins with pass, FAIL or skip.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nha import nha_attention
from nha.bench.timing import captured
from nha.models.attend import Segment, attend
from nha.ops import RingState, full_prefill, implementations, nha_decode, resolve_impl
from nha.ops.rotary import unrotate_for_slots
from nha.ops.triton.full_decode import full_token
from nha.ops.triton.loss import chunk_loss as loss_kernel
from nha.ops.triton.unrotate import unrotate_for_slots as view_kernel
from tests.gpu.cases import Problem, make, place, results, rms

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Setting:
    """Where a proof runs; `tiny` asks for sizes that Triton's interpreter can bear."""

    device: str
    seed: int
    tiny: bool = False


def verdict(bad: list[str], found: str = "") -> str:
    return " ".join(["FAIL" if bad else "pass", *filter(None, (found, "; ".join(bad)))])


def small(**changes: Any) -> Problem:
    """A problem that takes every input at once."""
    sizes: dict[str, Any] = {
        "dim": 64,
        "value_dim": 64,
        "slots": 32,
        "window": 32,
        "length": 150,
        "heads": 2,
        "groups": 2,
    }
    return Problem(**(sizes | {"sinks": 1, "separate": True, "start": "filled"} | changes))


def little(setting: Setting, **changes: Any) -> Problem:
    """`small`, in the interpreter smaller still."""
    sizes = {"dtype": "fp32", "dim": 8, "value_dim": 6, "slots": 5, "window": 5, "length": 20, "heads": 1}
    return small(**(sizes | changes)) if setting.tiny else small(**changes)


def automatic(setting: Setting) -> str:
    """impl="auto" is triton on CUDA, and `nha doctor` says so and finds everything right."""
    wanted = "triton" if setting.device == "cuda" else "chunked"
    bad = [] if resolve_impl("auto", setting.device) == wanted else [f"auto is {resolve_impl('auto', setting.device)}"]
    if implementations()["triton"] != "available":
        bad.append(f"triton is {implementations()['triton']}")
    run = subprocess.run([sys.executable, "-m", "nha", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True)
    missing = re.search(r"No module named '(\w+)'", run.stderr)
    if missing:
        return verdict(bad, f"without nha doctor, which needs {missing[1]}")
    if not run.stdout.startswith("{"):
        return verdict([*bad, f"nha doctor printed {(run.stdout + run.stderr)[-200:]!r}"])
    doctor = json.loads(run.stdout)
    if doctor["chosen"] != wanted or not doctor["healthy"]:
        bad.append(f"nha doctor chose {doctor['chosen']} and found healthy={doctor['healthy']}")
    return verdict(bad, f"doctor: {doctor['why']}")


def refusals(setting: Setting) -> str:
    """What the kernels cannot do is refused in one line that names it and the limit; "auto" then takes another way."""
    q = torch.randn(1, 9, 2, 16, device=setting.device)
    gate = -torch.rand(1, 9, 1, 4, device=setting.device)

    def arguments(dim: int = 16, slots: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        key = q.new_zeros(1, 9, 1, dim).to(dtype)
        return [q.new_zeros(1, 9, 2, dim).to(dtype), key, key, gate.new_zeros(1, 9, 1, slots).to(dtype)]

    asked: list[tuple[str, list[Tensor], dict[str, Any]]] = [
        (r"softcap=1\.5", arguments(), {"softcap": 1.5}),
        (r"float64.*float32", arguments(dtype=torch.float64), {}),
        (r"264.*256", arguments(dim=264, dtype=torch.bfloat16), {}),
        (r"129.*128", arguments(slots=129, dtype=torch.bfloat16), {}),
    ]
    bad = []
    for wanted, given, options in asked:
        try:
            nha_attention(*given, window_size=3, impl="triton", **options)  # type: ignore[arg-type]
            bad.append(f"{wanted} was not refused")
        except NotImplementedError as refusal:
            if not re.search(wanted, str(refusal)) or "\n" in str(refusal):
                bad.append(f"expected {wanted} in one line, got {str(refusal)!r}")
        out = nha_attention(*given, window_size=3, **options).out  # type: ignore[arg-type]
        if not out.isfinite().all():
            bad.append(f"auto gave no finite result for {wanted}")
    return verdict(bad)


class Recorder(TorchDispatchMode):
    """Collects the calls of this library's operators: (operator, arguments, whether gradients were recorded)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "nha":
            self.calls.append((func, (args, kwargs or {}), torch.is_grad_enabled()))
        return func(*args, **(kwargs or {}))


def operators(setting: Setting) -> str:
    """torch.library.opcheck of every operator, with the arguments of real calls."""
    problems = [
        little(setting),
        little(setting, kind="packed", start="fresh", separate=False, sinks=0),
        little(setting, kind="steps"),
        little(setting, kind="ring"),
    ]
    seen: dict[tuple, str] = {}
    for problem in problems:
        recorder = Recorder()
        with recorder:
            results(problem, place(make(problem, setting.seed), setting.device), "triton")
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
    names = sorted({name for name, *_ in seen})
    return verdict([x for x in seen.values() if x], f"{len(seen)} calls of {', '.join(names)}")


def hybrid(setting: Setting) -> Any:
    """A hybrid Llama of three layers (slots and window, full attention, slots alone), in float32."""
    from tests.models.families import hybrid as build

    # Weights as large as those of the tiny model would make errors of bfloat16 as large as the gradients.
    sizes = {} if setting.tiny else {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.1}
    model: Any = build("llama", [8, -1, 0], **sizes)
    return model.to(setting.device)


def token_ids(setting: Setting, batch: int, length: int) -> Tensor:
    from tests.models.families import tokens

    return tokens(batch, length, seed=setting.seed).to(setting.device)


def step(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of a training step; `model` may be compiled."""
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    named = ((n.removeprefix("_orig_mod."), x.grad) for n, x in model.named_parameters())
    return {"loss": loss.detach()} | {n: x.clone() for n, x in named if x is not None}


def no_worse(found: dict[str, Tensor], other: dict[str, Tensor], exact: dict[str, Tensor], eps: float) -> list[str]:
    """Whether `found` errs more than twice as much as `other` and its rounding, judged by `exact`.

    Gradients of all parameters are scaled to one size and judged together: a few numbers of one err by chance.
    """
    bad = [f"no gradient of {name}" for name in sorted(exact.keys() - found.keys())][:1]
    off, limit = 0.0, 0.0
    for name in exact.keys() & found.keys():
        size = max(rms(exact[name]), 1e-3 * exact["loss"].item())
        off += (rms(found[name].double() - exact[name]) / size) ** 2
        limit += (2 * (rms(other[name].double() - exact[name]) / size + eps)) ** 2
    return bad if off <= limit else [*bad, f"rms error of all gradients {off**0.5:.2e} > {limit**0.5:.2e}"]


def compiled(model: Any, setting: Setting, **options: Any) -> Any:
    """The model through torch.compile without a graph break."""
    from torch._inductor import config

    torch._dynamo.reset()
    config.compile_threads = 2  # other processes compile as well
    chosen: dict[str, Any] = {"backend": "aot_eager"} if setting.tiny else options
    return torch.compile(model, fullgraph=True, **chosen)


def training(setting: Setting) -> str:
    """A hybrid's training step compiles without a graph break and errs no more than eager."""
    model, ids = hybrid(setting).train(), token_ids(setting, 2, 40 if setting.tiny else 200)
    exact = step(copy.deepcopy(model).double(), ids)
    dtype = torch.float32 if setting.tiny else torch.bfloat16
    model = model.to(dtype)
    eager = step(model, ids)
    start = time.perf_counter()
    found = step(compiled(model, setting), ids)
    seconds = time.perf_counter() - start
    return verdict(no_worse(found, eager, exact, torch.finfo(dtype).eps), f"compiled in {seconds:.0f} s")


def packed(setting: Setting) -> str:
    """Packed texts get compiled what they get eager: slots that are live from the start, and window and sink alone."""
    lengths, window, dim = ((5, 12, 3), 4, 16) if setting.tiny else ((150, 700, 30, 400), 64, 64)
    total, dtype = sum(lengths), torch.float32 if setting.tiny else torch.bfloat16
    generator = torch.Generator(setting.device).manual_seed(setting.seed)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=setting.device).to(dtype)

    cu = torch.tensor([0, *lengths, 0], dtype=torch.int32, device=setting.device).cumsum(0, dtype=torch.int32)
    given = [drawn(1, total, heads, dim) for heads in (6, 2, 2, 6, 2)]
    sink, start = (drawn(2, 1, dim), drawn(2, 1, dim)), (drawn(2, 16, dim), drawn(2, 16, dim))
    cases = [("no slots", 0, None), ("live slots", 16, start)]
    bad = []
    for name, slots, initial in cases[:1] if setting.device == "cpu" else cases:  # a CPU takes such texts one by one
        gate = -drawn(1, total, 2, slots).abs()

        def read(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            q_slot: Tensor,
            k_slot: Tensor,
            cu: Tensor,
            gate: Tensor = gate,
            initial: Any = initial,
        ) -> Tensor:
            segment = Segment(q, k, v, gate, q_slot, k_slot, mask=None, cu_seqlens=cu)
            return attend(segment, window_size=window, scale=None, sink=sink, layer=None, initial=initial)

        eager = read(*given, cu).double()
        off = rms(compiled(read, setting, dynamic=False)(*given, cu).double() - eager)
        if not off <= 2 * torch.finfo(dtype).eps * rms(eager):
            bad.append(f"{name}: off by {off:.1e} rms")
    return verdict(bad)


def decoding(setting: Setting) -> str:
    """A hybrid's decoding step compiles once, without a graph break, runs as a CUDA graph and keeps its addresses."""
    from transformers import StaticCache

    from nha.models.cache import nha_layers

    model, ids, start = hybrid(setting), token_ids(setting, 2, 30), 14
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, use_cache=False).logits
        eager = model(ids, use_cache=False).logits
        one = compiled(model, setting, mode="reduce-overhead")
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(ids[:, :start], past_key_values=cache, use_cache=True)
        held = [x.data_ptr() for layer in nha_layers(cache) for x in layer.state.tensors().values()]  # type: ignore[union-attr]
        found, began, seconds = [], time.perf_counter(), 0.0
        try:
            for at in range(start, 30):
                if at == start + 2:
                    seconds = time.perf_counter() - began
                    torch.compiler.set_stance("fail_on_recompile")
                position = torch.full((2, 1), at, device=ids.device)
                options = {"past_key_values": cache, "use_cache": True, "position_ids": position}
                found.append(one(ids[:, at : at + 1], **options).logits.clone())
        finally:
            torch.compiler.set_stance("default")
    now = [x.data_ptr() for layer in nha_layers(cache) for x in layer.state.tensors().values()]  # type: ignore[union-attr]
    bad = [] if held == now else ["the state moved"]
    logits = torch.cat(found, 1).double() - exact[:, start:]
    limit = 2 * (rms(eager[:, start:].double() - exact[:, start:]) + torch.finfo(torch.float32).eps * rms(exact))
    if not rms(logits) <= limit:
        bad.append(f"logits rms error {rms(logits):.2e} > {limit:.2e}")
    return verdict(bad, f"compiled in {seconds:.0f} s")


def autocast(setting: Setting) -> str:
    """Under autocast a float32 hybrid trains in bfloat16, and the operator takes mixed dtypes, as SDPA does."""
    kind = "cpu" if setting.device == "cpu" else "cuda"
    model, ids = hybrid(setting).train(), token_ids(setting, 2, 40)
    exact = step(copy.deepcopy(model).double(), ids)
    low = step(copy.deepcopy(model).bfloat16(), ids)
    bad = []
    try:
        with torch.autocast(kind, torch.bfloat16):
            bad += no_worse(step(model, ids), low, exact, torch.finfo(torch.bfloat16).eps)
    except Exception as failure:
        bad.append(f"the model raised {type(failure).__name__}: {' '.join(str(failure).split())[:200]}")
    flat = place(make(replace(small(), dtype="fp32", start="fresh"), setting.seed), setting.device)
    q, k, v, gate = (flat[n].detach() for n in ("q", "k", "v", "log_gate"))
    try:
        with torch.autocast(kind, torch.bfloat16):
            mixed = nha_attention(q, k, v.bfloat16(), gate, window_size=8).out
        plain = nha_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), gate, window_size=8).out
        if mixed.dtype != torch.bfloat16 or not torch.equal(mixed, plain):
            bad.append(f"mixed inputs gave {mixed.dtype} and {rms(mixed.double() - plain.double()):.1e} off")
    except TypeError as failure:
        bad.append(f"mixed inputs raised {failure}")
    return verdict(bad)


def graph(setting: Setting) -> str:
    """Single tokens that a CUDA graph writes into the state equal the sequence in one call."""
    if setting.device == "cpu":
        return "skip a CUDA graph needs a GPU"
    problem = small(start="fresh", kind="whole", length=80)
    flat = {n: x.detach() for n, x in place(make(problem, setting.seed), setting.device).items()}
    sink = (flat.pop("sink_key"), flat.pop("sink_value"))
    options: dict[str, Any] = {"window_size": problem.window, "sink": sink, "impl": "triton"}
    whole = nha_attention(**flat, **options).out  # type: ignore[arg-type]
    start = 50
    state = nha_attention(**{n: x[:, :start] for n, x in flat.items()}, return_state=True, **options).state  # type: ignore[arg-type]
    assert state is not None
    held = RingState.of(state)
    token = {n: x[:, start : start + 1].clone() for n, x in flat.items()}

    out = flat["v"]

    def one() -> None:
        nonlocal out
        out = nha_decode(**token, sink=sink, state=held).out  # type: ignore[arg-type]

    with torch.no_grad():
        replay = captured(one)  # which leaves the graph's own output in `out`
    for name, x in RingState.of(state).tensors().items():
        held.tensors()[name].copy_(x)
    found = []
    for at in range(start, problem.length):
        for name, x in token.items():
            x.copy_(flat[name][:, at : at + 1])
        replay()
        found.append(out.clone())
    off = rms(torch.cat(found, 1).double() - whole[:, start:].double())
    limit = 2 * torch.finfo(whole.dtype).eps * rms(flat["v"])
    return verdict([] if off <= limit else [f"rms difference {off:.2e} > {limit:.2e}"], f"off by {off:.1e} rms")


def times_as_far(found: Tensor, sdpa: Tensor, exact: Tensor) -> float:
    """How many times as far from the truth a result is as SDPA's and the rounding of one of its dtype together."""
    return rms(found.double() - exact) / (rms(sdpa.double() - exact) + torch.finfo(found.dtype).eps * rms(exact))


def full_decoding(setting: Setting) -> str:
    """One token under full attention equals the definition, masked or not, with few and many keys, as a CUDA graph."""
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
    bad, most, generator = [], 0.0, torch.Generator(setting.device).manual_seed(setting.seed)
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
                read[0] = full_token(*inputs)

            with torch.no_grad():
                replay = captured(one) if setting.device == "cuda" else one
                replay()
            off = times_as_far(read[0].view_as(exact), other, exact)
            most = max(most, off)
            if not off <= 2:
                bad.append(f"{off:.1f} times as far off with {batch} x {length} keys {'un' * (mask is None)}masked")
    return verdict(bad, f"at most {most:.2f} times as far off as SDPA and its rounding")


def full_segments(setting: Setting) -> str:
    """A later segment under full attention, read in parts, is as close to the definition as attention with a mask."""
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
    bad, most, generator = [], 0.0, torch.Generator(setting.device).manual_seed(setting.seed)
    for batch, length, seen, heads, groups, dim in shapes:
        sizes = (batch, heads * groups, length, dim), *[(batch, heads, seen, dim)] * 2
        q, k, v = (torch.randn(n, generator=generator, device=setting.device).to(dtype) for n in sizes)
        mask = torch.ones(length, seen, dtype=torch.bool, device=q.device).tril(seen - length)
        keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
        score = (q.double() @ keys.double().mT * dim**-0.5).masked_fill(~mask, float("-inf"))
        exact = (score.softmax(-1) @ values.double()).transpose(1, 2)
        other = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2)
        with torch.no_grad():
            off = times_as_far(full_prefill(q, k, v), other, exact)
        most = max(most, off)
        if not off <= 2:
            bad.append(f"{off:.1f} times as far off with the last {length} of {seen} tokens")
    return verdict(bad, f"at most {most:.2f} times as far off as SDPA and its rounding")


def slot_views(setting: Setting) -> str:
    """What slots see of rotated queries and keys is right up to rounding, for one token and for many."""
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
    bad, generator = [], torch.Generator(setting.device).manual_seed(setting.seed)
    dtype = torch.float16 if setting.tiny else torch.bfloat16

    def drawn(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=generator, device=setting.device, dtype=dtype)

    for batch, length, heads, groups, dim, size in shapes:
        q, k = (drawn(batch, n, length, dim, dtype=dtype).transpose(1, 2) for n in (heads * groups, heads))
        near, far = (drawn(1, n, size // 2).repeat(1, 1, 2) for n in (length, 1))
        tables, distance = ((x.cos().to(dtype), x.sin().to(dtype)) for x in (near, far))
        found = view_kernel(q, k, *tables, *distance)
        last = slice(max(0, length - 1000), None)  # whose offsets are the largest
        exact = unrotate_for_slots(
            q[:, last].double(), k[:, last].double(), tuple(x[:, last] for x in tables), distance
        )
        for mine, wanted in zip(found, exact, strict=True):
            off = rms(mine[:, last].double() - wanted) / (torch.finfo(dtype).eps * rms(wanted))
            if not off <= 1:
                bad.append(f"{off:.1e} times its rounding off for {batch} x {length} tokens, {mine.shape[2]} heads")
    return verdict(bad)


def losses(setting: Setting) -> str:
    """Divergence, cross-entropy and gradient from logits in 16 bits are those of float64 up to rounding."""
    shapes = [(5, 16, 40, None)] if setting.tiny else [(700, 576, 49_152, None), (200, 512, 151_665, 30.0)]
    bad, generator = [], torch.Generator(setting.device).manual_seed(setting.seed)
    dtype = torch.float16 if setting.tiny else torch.bfloat16
    for count, hidden, vocabulary, cap in shapes:
        own, more, weight = (
            torch.randn(n, hidden, generator=generator, device=setting.device) for n in (count, count, vocabulary)
        )
        student, teacher, weight = (x.to(dtype) for x in (own, own + 0.3 * more, 0.2 * weight))
        target = torch.randint(vocabulary, (count,), generator=generator, device=setting.device)
        by = torch.rand(2, count, generator=generator, device=setting.device)
        found = loss_kernel(student, teacher, weight, target, *by, 1.0, cap)
        # From the very logits: a step in them is not the kernel's.
        raw = (student @ weight.T).double().requires_grad_()
        logits, wanted = (x if cap is None else cap * torch.tanh(x / cap) for x in (raw, (teacher @ weight.T).double()))
        logs, shares = logits.log_softmax(-1), wanted.softmax(-1)
        divergence = (shares * (wanted.log_softmax(-1) - logs)).sum(-1)
        cross = -logs.gather(1, target[:, None])[:, 0]
        (grad,) = torch.autograd.grad((by[0] * divergence + by[1] * cross).sum(), raw)
        largest = torch.finfo(torch.float32).eps * max(x.abs().max().item() for x in (logits, wanted))
        for name, mine, exact, limit in (
            ("divergence", found[0], divergence, 16 * largest),
            ("cross-entropy", found[1], cross, 16 * largest),
            ("gradient", found[3], grad @ weight.double(), torch.finfo(dtype).eps * rms(found[3])),
        ):
            off = rms(mine.double() - exact.detach())
            bad += [] if off <= limit else [f"{name} of {vocabulary} words is off by {off:.1e} > {limit:.1e}"]
    return verdict(bad)


def distilling(setting: Setting) -> str:
    """Distillation's passes of text and recall as CUDA graphs give the losses and gradients of single launches."""
    from nha.data.stream import pack
    from nha.distill.cuda_graphs import WARM, Recorder, forward_backward
    from nha.distill.student import Distillation

    if setting.device == "cpu":
        return "skip a CUDA graph needs a GPU"
    student = Distillation(hybrid(setting).bfloat16()).train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    recorder, bad = Recorder(student, parameters), []
    for turn in range(WARM + 3):
        rights, batches = [], []
        for name, lengths in (("text", (130, 9, 61)), ("recall", (70, 130))):
            ids = token_ids(replace(setting, seed=setting.seed + turn), 1, sum(lengths))[0].cpu().numpy()
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            batch = {n: torch.from_numpy(x) for n, x in pack([(ids, starts, ids % 5 == 0)]).items()}
            batch |= {"by_divergence": batch["follows"] / 200, "by_cross_entropy": batch["answers"] / 40}
            on_gpu = {n: x.to(setting.device) for n, x in batch.items()}
            rights.append(forward_backward(student, parameters, on_gpu, 130))
            batches.append((name, batch))
        passes = recorder(batches, 130)
        for (name, _), right, found in zip(batches, rights, passes, strict=True):
            pairs = zip((right[0], right[1], *right[2]), (found[0], found[1], *found[2]), strict=True)
            off = max(rms((x - y).double()) / max(rms(x.double()), 1e-12) for x, y in pairs if x is not None)
            if not off <= torch.finfo(torch.bfloat16).eps:
                bad.append(f"{name} of turn {turn} is off by {off:.1e}")
    return verdict(bad, f"{len(recorder.recordings)} recordings")


def no_retuning(setting: Setting) -> str:
    """After one short and one long sequence, no other length or batch compiles anything."""
    if setting.tiny:
        return "skip the interpreter compiles nothing"
    folder = tempfile.mkdtemp(prefix="nha-cold-")

    def run(batch: int, length: int) -> float:
        start = time.perf_counter()
        problem = Problem(batch=batch, length=length, heads=8)
        flat = place(
            {n: x[:, :1].expand(-1, length, -1, -1) for n, x in make(replace(problem, length=1), 0).items()},
            setting.device,
        )
        out = nha_attention(**flat, window_size=64, impl="triton").out  # type: ignore[arg-type]
        torch.autograd.grad(out, list(flat.values()), torch.ones_like(out))
        torch.cuda.synchronize()
        return time.perf_counter() - start

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        first = run(1, 300), run(1, 20000)
        kernels = len(list(Path(folder).rglob("*.cubin")))
        for batch, length in ((1, 301), (3, 1000), (2, 4096), (1, 32768), (16, 2048), (1, 6001)):
            run(batch, length)
    more = len(list(Path(folder).rglob("*.cubin"))) - kernels
    shutil.rmtree(folder, ignore_errors=True)
    found = f"{kernels} kernels, first calls beside other work {first[0]:.1f} s and {first[1]:.1f} s"
    return verdict([f"{more} more kernels compiled"] if more else [], found)
