"""Random inputs of `nha_attention`, every way to run them, and bounds for the kernels' errors.

The kernels are compared with the reference in float64 on the CPU, and on long sequences with `chunked` in float64,
which the laws prove equal to it. Bounds come from data: twice the error of the reference in the precision of the
inputs, plus its rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nha import NHAState
from nha.ops import RingState, nha_decode
from nha.ops.state import slot_dtype
from tests.builders import TOKENWISE, call, error, exponent_rounding, slice_tokens, terms_behind

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STATE = {
    "slot_key": "start_key",
    "slot_value": "start_value",
    "key": "window_key",
    "value": "window_value",
    "window_slot_key": "window_slot_key",
    "window_log_gate": "window_log_gate",
}
CHUNKED_FROM = 1500  # tokens from which on `chunked` is the reference: the loop would take minutes


@dataclass(frozen=True)
class KernelCase:
    """Sizes of one call, how it is run (`kind`), the state it starts from (`start`) and the values of its inputs.

    kind: whole; left, right (the last sequence is padded there); packed; segments (of any length, one token too);
        steps (a prompt, then single tokens and 15 at once, without gradients); ring (the same, written in place).
    start: fresh; filled (a full window and slots, as earlier segments leave them); slots (handed in, active).
    gates: a key of GATES. layout: plain; heads-first; sliced and odd (views into memory full of NaN, the odd ones at
        addresses that are no multiple of 16 bytes). query_scale multiplies all queries.
    """

    dtype: str = "bf16"
    dim: int = 128
    value_dim: int = 128
    slots: int = 64
    window: int = 64
    heads: int = 2
    groups: int = 4
    batch: int = 1
    length: int = 150
    kind: str = "whole"
    start: str = "fresh"
    sinks: int = 0
    separate: bool = False
    gates: str = "random"
    wide_gates: bool = False  # float32 next to 16-bit inputs
    layout: str = "plain"
    query_scale: float = 1.0

    def __str__(self) -> str:
        sizes = (
            f"{self.dtype} D{self.dim} Dv{self.value_dim} M{self.slots} W{self.window} B{self.batch} T{self.length} "
            f"H{self.heads} G{self.groups}"
        )
        default = KernelCase()
        names = ("kind", "start", "sinks", "separate", "gates", "wide_gates", "layout", "query_scale")
        changed = [f"{n}={getattr(self, n)}" for n in names if getattr(self, n) != getattr(default, n)]
        return " ".join([sizes, *changed])

    @property
    def num_sequences(self) -> int:
        """Sequences with a state of their own."""
        return len(boundaries(self)) - 1 if self.kind == "packed" else self.batch

    @property
    def reference(self) -> str:
        return "chunked" if self.length >= CHUNKED_FROM else "reference"


def boundaries(case: KernelCase) -> list[int]:
    """cu_seqlens of packed sequences, one of them empty."""
    n = case.length
    return [0, 3, 3, 2 * n // 3, n]


def _fill(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, uniform: torch.full_like(gate, value)


def _alternating(gate: Tensor, uniform: Tensor) -> Tensor:
    return torch.where(torch.arange(gate.shape[1])[:, None, None] % 2 == 0, 0.0, -5.0).double().expand_as(gate)


def _needs_subchunks(gate: Tensor, uniform: Tensor) -> Tensor:
    """In every 50 tokens a third of the slots forgets all: log-gates of some chunks sum to less than -140."""
    stretch = uniform[:, ::50].repeat_interleave(50, 1)[:, : gate.shape[1]]
    return torch.where(stretch < 1 / 3, -2.5 - 2.5 * uniform, gate)


def _mixed(gate: Tensor, uniform: Tensor) -> Tensor:
    extreme = torch.where(uniform < 0.2, 0.0, torch.where(uniform < 0.4, -5.0, -1e4))
    return torch.where(uniform < 0.5, extreme, gate)


# Functions of mild log-gates and of uniform numbers, both [B, T, H, M].
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "random": lambda gate, uniform: gate,
    "learned": lambda gate, uniform: F.logsigmoid(6 + 12 * (uniform - 0.5)) / 8,
    "zero": _fill(0.0),
    "floor": _fill(-5.0),
    "below": _fill(-1e4),
    "above": _fill(1e4),
    "alternating": _alternating,
    "mixed": _mixed,
    "needs_subchunks": _needs_subchunks,
}


def make(case: KernelCase, seed: int) -> dict[str, Tensor]:
    """Leaf tensors by name on the CPU, in the dtypes that the call gets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    p, dtype = case, DTYPES[case.dtype]
    b, t, h, hq, w = p.batch, p.length, p.heads, p.heads * p.groups, max(p.window, 0)
    gate_dtype = torch.float32 if p.wide_gates else dtype

    def gates(*shape: int) -> Tensor:
        uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return GATES[p.gates](-normal(*shape).square(), uniform).to(gate_dtype)

    flat = {
        "q": normal(b, t, hq, p.dim) * p.query_scale,
        "k": normal(b, t, h, p.dim),
        "v": normal(b, t, h, p.value_dim),
    }
    if p.separate:
        flat |= {"q_slot": normal(b, t, hq, p.dim) * p.query_scale, "k_slot": normal(b, t, h, p.dim)}
    if p.sinks:
        flat |= {"sink_key": normal(h, p.sinks, p.dim), "sink_value": normal(h, p.sinks, p.value_dim)}
    if p.start == "filled":
        flat |= {
            "window_key": normal(p.num_sequences, w, h, p.dim),
            "window_value": normal(p.num_sequences, w, h, p.value_dim),
        }
        if p.separate:
            flat["window_slot_key"] = normal(p.num_sequences, w, h, p.dim)
    flat = {n: x.to(dtype) for n, x in flat.items()}
    flat["log_gate"] = gates(b, t, h, p.slots)
    if p.start == "filled":
        flat["window_log_gate"] = gates(p.num_sequences, w, h, p.slots)
    if p.start != "fresh":
        flat["start_key"] = normal(p.num_sequences, h, p.slots, p.dim).float()
        flat["start_value"] = normal(p.num_sequences, h, p.slots, p.value_dim).float()
    return {n: x.requires_grad_() for n, x in flat.items()}


def double(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x.detach().double().requires_grad_() for n, x in flat.items()}


def place(flat: dict[str, Tensor], device: torch.device | str, layout: str = "plain") -> dict[str, Tensor]:
    """The leaves on a device; those with a token dimension in a memory layout (see `KernelCase`)."""

    def arranged(x: Tensor) -> Tensor:
        if layout == "heads-first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        spare = {"sliced": 16 // x.element_size(), "odd": 1}[layout]
        batch, length, heads, dim = x.shape
        around = x.new_full((batch, length + 2, heads + 1, dim + spare), float("nan"))
        return around[:, 1:-1, 1:, :dim].copy_(x)

    found = {n: x.detach().to(device) for n, x in flat.items()}
    if layout != "plain":
        found |= {n: arranged(x) for n, x in found.items() if n in TOKENWISE}
    return {n: x.detach().requires_grad_() for n, x in found.items()}


def first_state(case: KernelCase, flat: dict[str, Tensor]) -> NHAState | None:
    """The state before the call; the last of several sequences has filled half of its window and no slots."""
    if case.start == "fresh":
        return None
    window, q = case.window, flat["q"]
    if case.start == "slots":
        return NHAState.from_slots(
            flat["start_key"].to(slot_dtype(q.dtype)),
            flat["start_value"].to(slot_dtype(q.dtype)),
            window,
            dtype=q.dtype,
            shared_keys=not case.separate,
        )
    seen = torch.arange(case.num_sequences, device=q.device) + window + 3
    tensors: dict = {field: flat.get(name) for field, name in STATE.items()}
    if case.num_sequences > 1 and window > 1:
        seen[-1] = window // 2
        used = (torch.arange(window, device=q.device) >= window - seen[:, None])[..., None, None]
        whole = (seen >= window)[:, None, None, None]
        for field, x in tensors.items():
            if x is not None:
                tensors[field] = torch.where(whole if field in ("slot_key", "slot_value") else used, x, 0)
    return NHAState(window_size=window, num_tokens=seen, **tensors)


def _cuts(case: KernelCase, impl: str) -> list[int]:
    """Where calls begin and end; the reference gets one call."""
    n = case.length
    if impl != "triton" or case.kind not in ("segments", "steps", "ring"):
        return [0, n]
    if case.kind == "segments":
        return sorted({0, 3, 4, n // 2, n // 2 + 1, n})
    start = max(n - 24, 0)
    return sorted({0, *range(start, min(start + 9, n)), n})


def outputs(case: KernelCase, flat: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """Every floating tensor that is returned: out, slot mass and the state's."""
    p, device = case, flat["q"].device
    options: dict = {"window_size": p.window, "return_state": True, "return_slot_mass": True, "impl": impl}
    if p.kind in ("left", "right"):
        mask = torch.ones(p.batch, p.length, dtype=torch.bool)
        pad = max(p.length // 3, 1)
        mask[-1, slice(0, pad) if p.kind == "left" else slice(-pad, None)] = False
        options["attention_mask"] = mask.to(device)
    if p.kind == "packed":
        options["cu_seqlens"] = torch.tensor(boundaries(p), dtype=torch.int32, device=device)
    inputs = {n: x for n, x in flat.items() if n in TOKENWISE or n.startswith("sink")}
    state, parts = first_state(p, flat), []
    for start, stop in itertools.pairwise(_cuts(p, impl)):
        part = slice_tokens(inputs, start, stop)
        ring = isinstance(state, RingState)
        parts.append(call(part, nha_decode, state=state) if ring else call(part, state=state, **options))
        state = parts[-1].state
        if p.kind == "ring" and impl == "triton":
            state = state if isinstance(state, RingState) else RingState.of(state)
    found = {"out": torch.cat([x.out for x in parts], 1), "mass": torch.cat([x.slot_mass for x in parts], 1)}
    assert state is not None
    return found | {n: x for n, x in state.aligned().padded().tensors().items() if x.is_floating_point()}


def results(case: KernelCase, flat: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """The outputs, and the gradients of a random linear function of them."""
    if case.kind in ("steps", "ring"):
        with torch.no_grad():
            return outputs(case, flat, impl)
    found = outputs(case, flat, impl)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=flat["q"].device)
    for x in found.values():
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x * weight.to(x)).sum().to(loss.dtype)
    grads = torch.autograd.grad(loss, list(flat.values()), allow_unused=True)
    pairs = zip(flat.items(), grads, strict=True)
    found |= {"d" + n: torch.zeros_like(x) if g is None else g for (n, x), g in pairs}
    return {n: x.detach() for n, x in found.items()}


def rms(x: Tensor) -> float:
    """Root mean square; NaN counts as infinite."""
    value = x.double().square().mean().sqrt().item() if x.numel() else 0.0
    return float("inf") if value != value else value


def relative_rounding(case: KernelCase, flat: dict[str, Tensor]) -> float:
    """The dtype's rounding, or that of the kernels' factors exp(x) where it is larger.

    The kernels factorise 16 tokens, or a chunk of 64 whose log-gates sum to no less than -140.
    """
    gates = [flat[n] for n in ("window_log_gate", "log_gate") if n in flat]
    exponent = max(exponent_rounding(g, run, 140.0) for g in gates for run in (16, 64) if g.numel())
    return max(exponent * torch.finfo(torch.float32).eps, torch.finfo(DTYPES[case.dtype]).eps)


KEYS = ("k", "k_slot", "window_key", "window_slot_key", "start_key", "sink_key")
VALUES = ("v", "window_value", "start_value", "sink_value")


def _sizes_of_score_gradients(
    flat: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """The largest and the mean size of the terms that gradients of queries and keys sum, before they cancel.

    A score's gradient is the inner product of a value with a random gradient, less that of `out` as rounded. It is
    multiplied with keys in the gradient of queries, and with queries in that of keys.
    """
    scale = flat["q"].shape[-1] ** -0.5
    read = {n: x.detach().double() for n, x in flat.items() if x.numel()}
    value = max(read[n].square().sum(-1).max() for n in VALUES if n in read) ** 0.5
    key = max(read[n].abs().max() for n in KEYS if n in read)
    largest = {name: float(value * key) * scale for name in ("dq", "dq_slot")}
    out = rms(exact["out"].square().sum(-1).sqrt()) * scale
    queries, keys = (
        {n: rms(read[n]) for n in names if n in read}
        for names in (("q", "q_slot"), ("k", "k_slot", "window_key", "window_slot_key"))
    )
    mean = {"d" + n: out * max(keys.values()) for n in queries} | {"d" + n: out * max(queries.values()) for n in keys}
    return largest, mean


def bounds(
    case: KernelCase, flat: dict[str, Tensor], exact: dict[str, Tensor], rounded: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Allowed errors by measure ("max", "rms") and name; `rounded` is the reference in the inputs' precision."""
    eps, has_grads = relative_rounding(case, flat), "dq" in exact
    read = {n: x for n, x in flat.items() if "log_gate" not in n and x.numel()}
    if has_grads:
        behind = {n: x.item() for n, x in terms_behind({"log_gate": flat["log_gate"], **read}, exact).items()}
    else:
        behind = {}
    for name, values in {
        "out": VALUES,
        "slot_value": ("v", "window_value", "start_value"),
        "slot_key": ("k_slot" if case.separate else "k", "window_slot_key", "window_key", "start_key"),
    }.items():
        behind[name] = max(flat[n].detach().abs().max().item() for n in values if n in flat and flat[n].numel())
    queries, keys = (flat[n].detach().double() for n in (("q_slot", "k_slot") if case.separate else ("q", "k")))
    score = (queries.square().sum(-1).sqrt().max() * rms(keys) * case.dim**-0.5).item()
    mass = exact["mass"]
    behind["mass"] = (mass * (1 + (1 - mass) * score)).max().item()  # it moves with what scores are off
    means = {}
    if has_grads:
        pairs = [(x.double() * exact["d" + n]).square().sum(-1).mean().sqrt() for n, x in read.items()]
        means = {n: torch.stack(pairs).max().item() for n in ("dlog_gate", "dwindow_log_gate")}
        behind["dwindow_log_gate"] = behind["dlog_gate"]
        largest, mean = _sizes_of_score_gradients(flat, exact)
        behind, means = behind | largest, means | mean
    for name in ("out", "slot_key", "slot_value"):
        means[name] = behind[name] / 3  # values are normal: the largest of many is some 3 deviations
    found: dict[str, dict[str, float]] = {"max": {}, "rms": {}}
    for name, x in exact.items():
        of_queries = name in ("dq", "dq_slot")  # not summed over tokens
        terms = case.length * case.heads * case.groups if name.startswith("d") and not of_queries else 1
        size = max(x.abs().max().item() if x.numel() else 0.0, behind.get(name, 0.0))
        found["max"][name] = 2 * (error(rounded[name], x) + eps * terms**0.5 * size)
        size = max(rms(x), means.get(name, 0.0))
        found["rms"][name] = 2 * (rms(rounded[name].double() - x) + eps * size)
    return found


def check(case: KernelCase, seed: int, device: torch.device | str) -> tuple[list[str], float]:
    """Everything that is wrong with the kernels' results, and the largest error as a fraction of its bound.

    Raises NotImplementedError for a shape that the kernels refuse.
    """
    flat = make(case, seed)
    placed = place(flat, device, case.layout)
    found = results(case, placed, "triton")
    again = results(case, placed, "triton")
    wrong = [f"{n} differs between two runs" for n, x in found.items() if not torch.equal(x, again[n])]
    where = device if case.reference == "chunked" else "cpu"
    if case.window == -1:
        wrong = []  # PyTorch's own kernels
    flat = place(flat, where)
    found = {n: x.to(where) for n, x in found.items()}
    exact = results(case, double(flat), case.reference)
    wrong += [f"{n} is not finite" for n, x in found.items() if (~x.isfinite() & exact[n].to(x.dtype).isfinite()).any()]
    if case.query_scale != 1:  # rounding has no useful bound for scores of 1e4: what the dtype can hold stays finite
        return wrong, 0.0
    limits = bounds(case, flat, exact, results(case, flat, case.reference))
    largest = 0.0
    for measure, of in (("max", error), ("rms", lambda a, b: rms(a.double() - b))):
        for name, limit in limits[measure].items():
            off = of(found[name], exact[name])
            if not off <= limit:
                wrong.append(f"{name} {measure} error {off:.2e} > {limit:.2e}")
            elif limit:
                largest = max(largest, off / limit)
    return wrong, largest
