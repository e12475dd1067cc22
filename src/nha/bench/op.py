"""Time the operator beside every peer that is installed, in one run.

Times are medians by CUDA events with a cold L2 cache; the host is ahead except in rows of decoding. extra_bytes is the
peak beyond inputs, outputs and their gradients; first_call_s includes what an implementation compiles, from a cold
cache. In rows of decoding T is the number of tokens before the timed one, and "-graph" means a replayed CUDA graph.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nha.ops
from nha.bench import peers
from nha.bench.resumable import complete
from nha.bench.roofline import roofline_fraction
from nha.bench.timing import (
    CUDA,
    DEVICE,
    captured,
    ceilings,
    first_call,
    median_ms,
    peak_bytes,
    require_gpu,
    stamp,
)
from nha.io import write_atomically

COLUMNS = (
    "impl",
    "pass",
    "B",
    "T",
    "HQ",
    "H",
    "D",
    "M",
    "W",
    "dtype",
    "ms",
    "extra_bytes",
    "first_call_s",
    "gpu",
    "torch",
    "triton",
    "date",
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
LLAMA = {"HQ": 32, "H": 8, "D": 128, "M": 64}  # Llama-3-8B
QWEN = {"HQ": 28, "H": 4, "D": 128, "M": 64}  # Qwen2.5-7B
SMOLLM = {"HQ": 9, "H": 3, "D": 64, "M": 64}  # SmolLM2-135M
TOKENS = 32768
GRAPH = "-graph"


@dataclass(frozen=True)
class Row:
    """One measurement: an implementation, a pass and a shape."""

    impl: str
    kind: str  # fwd, fwd+bwd or decode
    shape: tuple[tuple[str, int], ...]  # B, T, HQ, H, D, M, W
    dtype: str = "bf16"

    @property
    def fields(self) -> dict[str, Any]:
        return {"impl": self.impl, "pass": self.kind, **dict(self.shape), "dtype": self.dtype}

    def __str__(self) -> str:
        sizes = " ".join(f"{n}{x}" for n, x in self.shape)
        return f"{self.impl} {self.kind} {sizes} {self.dtype}"


def make_row(
    impl: str, kind: str, sizes: dict[str, int], batch: int, length: int, window: int, dtype: str = "bf16"
) -> Row:
    """A row of the table; W is -1 for full attention."""
    window = -1 if impl.removesuffix(GRAPH) in peers.FULL else window
    shape = {"B": batch, "T": length, **sizes, "W": window}
    return Row(impl, kind, tuple(shape.items()), dtype)


def tensors(fields: dict[str, Any], length: int) -> dict[str, Tensor]:
    """Random leaf tensors q, k, v [B, length, heads, D] and log_gate [B, length, H, M]."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype = DTYPES[fields["dtype"]]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE, dtype=dtype)

    b, hq, h, d, m = (fields[n] for n in ("B", "HQ", "H", "D", "M"))
    flat = {"q": normal(b, length, hq, d), "k": normal(b, length, h, d), "v": normal(b, length, h, d)}
    flat["log_gate"] = F.logsigmoid(normal(b, length, h, m)) / 8
    return {n: x.requires_grad_() for n, x in flat.items()}


def prepare(row: Row) -> tuple[Callable[[], object], int]:
    """The call that a row times, and the bytes of its outputs and gradients."""
    fields = row.fields
    name = row.impl.removesuffix(GRAPH)
    if row.kind == "decode":
        flat = {n: x.detach() for n, x in tensors(fields, 1).items()}
        step = peers.decoding(name, fields["W"], fields["T"], flat)

        def one() -> object:
            with torch.no_grad():
                return step()

        return (captured(one) if row.impl.endswith(GRAPH) else one), 0
    flat = tensors(fields, fields["T"])
    leaves = [flat[n] for n in ("q", "k", "v")]
    if name in peers.GATED and fields["W"] >= 0:
        leaves.append(flat["log_gate"])
    forward = peers.forward_of(name, fields["W"], flat)
    if row.kind == "fwd":

        def run() -> object:
            with torch.no_grad():
                return forward()

        return run, flat["q"].nbytes
    grad = torch.randn_like(flat["q"])
    run = lambda: torch.autograd.grad(forward(), leaves, grad, allow_unused=True)  # noqa: E731  (no gates where W >= T)
    return run, flat["q"].nbytes + sum(x.nbytes for x in leaves)


def measure(row: Row) -> dict[str, Any]:
    """The columns ms, extra_bytes and first_call_s of a row."""
    run, expected = prepare(row)
    found: dict[str, Any] = {"first_call_s": round(first_call(run), 3)}
    peak = peak_bytes(run)
    found["extra_bytes"] = None if peak is None else max(peak - expected, 0)
    return found | {"ms": round(median_ms(run, host_ahead=row.kind != "decode"), 4)}


def rows(tiny: bool) -> list[Row]:
    """Every row, the most important first."""
    if tiny:
        return _tiny_rows()
    both, sdpa, windows = ("fwd", "fwd+bwd"), tuple(peers.FULL), ("flex-window", "fa2-window")
    constant = [(max(TOKENS // 2**n, 1), 2**n) for n in range(10, 18)]
    single = [(1, 2**n) for n in range(10, 15)]
    short, long = (16, 2048), (1, 32768)

    def block(impls: Iterable[str], sizes: dict, where: Iterable, of: Iterable[int], passes=both, dtype="bf16"):
        return [
            make_row(impl, kind, sizes, b, t, w, dtype)
            for b, t in where
            for w in of
            for impl in impls
            for kind in passes
        ]

    def decode(impls: Iterable[str], sizes: dict, batches: Iterable[int], seen: int, of: Iterable[int] = (64,)):
        return [
            make_row(impl + end, "decode", sizes, b, seen, w)
            for b in batches
            for w in of
            for impl in impls
            for end in ("", GRAPH)
        ]

    found = block(("triton", *sdpa), LLAMA, [short], [64])
    found += block(("triton",), LLAMA, [long, (4, 8192)], [64])
    found += block(("flex-window",), LLAMA, [c for c in constant if c[1] <= 32768], [64])
    found += block(("triton",), LLAMA, [short], [0, 512, -1])
    found += decode(("triton",), LLAMA, (64, 1, 8, 256), 32768)
    found += block(windows, LLAMA, [short], [64, 512]) + block(("gsa+window", "w0+window"), LLAMA, [short], [64])
    found += block(("gsa", "gsa-expanded"), LLAMA, [short], [0])
    found += block(("triton", *sdpa), LLAMA, [c for c in constant if c[1] <= 32768 and c != short], [64])
    for sizes in (SMOLLM, QWEN):
        found += block(("triton", *sdpa), sizes, [short, long], [64]) + block(("triton",), sizes, [short], [0, 512, -1])
        found += decode(("triton",), sizes, (64, 1), 32768)
    found += block(("triton",), LLAMA, [short, long], [32, 128, 2048])
    found += block(("triton",), LLAMA, [c for c in constant if c != short], [0, 512])
    found += decode(("sdpa-flash",), LLAMA, (1, 8, 64), 32768) + decode(("sdpa-flash",), LLAMA, (1, 64, 256), 2048)
    found += block(("triton",), LLAMA, constant[-2:], [64]) + block(sdpa, LLAMA, constant[-2:], [64], ("fwd",))
    found += block(("triton", *sdpa, "flex-window"), LLAMA, single, [64])
    found += block(("flex-window",), LLAMA, constant[-2:], [64])
    found += block(windows, LLAMA, [long], [64, 512]) + block(("w0+window", "gsa+window"), LLAMA, [long], [64])
    found += block(sdpa, LLAMA, constant[-2:], [64], ("fwd+bwd",))
    for sizes in (SMOLLM, QWEN):
        found += block(("triton", *sdpa), sizes, [c for c in constant if c not in (short, long)], [64])
        found += block(("flex-window",), sizes, constant, [64])
        found += block(("triton",), sizes, [short, long], [32, 128, 2048]) + block(("triton",), sizes, [long], [0, 512])
        found += block(windows, sizes, [short], [64])
        found += decode(("triton",), sizes, (8, 256), 32768)
    found += block(("triton",), LLAMA, single, [0, 512]) + decode(("triton",), LLAMA, (64,), 32768, (0, 512))
    found += block(("triton",), LLAMA, [c for c in constant if c not in (short, long)], [32, 128, 2048])
    found += block(("triton",), LLAMA, [c for c in constant if c != short], [-1])
    found += beside_windows(found)
    found += block(("triton",), LLAMA, [short], [64], dtype="fp16") + block(
        ("triton",), SMOLLM, [short], [64], dtype="fp32"
    )
    found += block(("chunked",), LLAMA, [short], [64])
    return list(dict.fromkeys(found))


def beside_windows(found: list[Row]) -> list[Row]:
    """The window alone, without slots, for every row of the kernels with a window and no decoding."""
    hybrids = [row for row in found if row.impl == "triton" and row.kind != "decode" and dict(row.shape)["W"] > 0]
    return [replace(row, impl="flex-window") for row in hybrids]


def _tiny_rows() -> list[Row]:
    sizes, other = {"HQ": 2, "H": 1, "D": 16, "M": 4}, {"HQ": 3, "H": 1, "D": 8, "M": 4}
    both = ("fwd", "fwd+bwd")
    found = [
        make_row(impl, kind, sizes, 2, 40, 9, "fp32") for impl in ("triton", "sdpa-cudnn", "chunked") for kind in both
    ]
    found += [make_row("triton", kind, other, 1, 20, w, "fp32") for w in (0, 5, -1) for kind in both]
    found += [make_row("triton" + end, "decode", sizes, 2, 50, 9, "fp32") for end in ("", GRAPH)]
    found += [
        make_row("sdpa-flash", "decode", sizes, 2, 50, 9, "fp32"),
        make_row("gsa", "fwd", sizes, 1, 20, 0, "fp32"),
    ]
    return found


def summary(done: list[dict[str, Any]], limits: dict[str, float]) -> str:
    """One line per implementation and shape: ms of each pass, percentage of the roofline, extra MiB, first call."""
    lines: dict[tuple, dict] = {}
    for one in done:
        key = tuple(one[n] for n in ("HQ", "H", "D", "dtype", "B", "T", "impl", "W"))
        lines.setdefault(key, {})[one["pass"]] = one
    text = [f"{'shape':<34}{'impl':<16}{'W':>5}   pass: ms (% of roofline, extra MiB, first call s)"]
    for (hq, h, d, label, b, t, name, window), passes in lines.items():
        cells = [
            f"{kind} {r['ms']:.3f} ({100 * roofline_fraction(r, limits):.0f}%, {(r['extra_bytes'] or 0) / 2**20:.0f}, "
            f"{r['first_call_s']:.1f})"
            for kind, r in passes.items()
        ]
        text.append(f"{f'{label} HQ{hq} H{h} D{d} B{b} T{t}':<34}{name:<16}{window:>5}   {'   '.join(cells)}")
    return "\n".join(text)


def measure_dated(row: Row, about: dict[str, Any], log: Callable[[str], None]) -> list[dict[str, Any]]:
    """The one row of a case, with machine, versions and date."""
    try:
        found = row.fields | measure(row) | about
    finally:
        if CUDA:
            torch.cuda.empty_cache()
    log(f"{found['ms']:>10.3f} ms  {row}")
    return [found]


def code_digest() -> str:
    """A digest of the operator's code: rows of other kernels are measured again."""
    files = sorted(Path(nha.ops.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def run(
    wanted: list[Row],
    out: Path,
    budget_s: float,
    tiny: bool,
    log: Callable[[str], None] = print,
    table_name: str = "ops.csv",
) -> int:
    """Measure rows into a table in `out`, starting none after `budget_s`; how many rows of this library failed.

    The table has the rows that are there. While some are missing, the next call takes them and measures the others
    (`nha.bench.resumable`). Raises ValueError without a GPU, unless `tiny`.
    """
    require_gpu(tiny)
    ends = time.monotonic() + budget_s
    if find_spec("triton") is not None:
        from triton import knobs

        # Kernels compile anew, so that first_call_s is that of a cold cache.
        knobs.cache.dir = tempfile.mkdtemp(prefix="triton-cold-")
    torch._dynamo.config.recompile_limit = 256  # a peer that compiles does so for every shape
    out.mkdir(parents=True, exist_ok=True)
    limits, dated = ceilings(), stamp("torch", "triton")
    write_atomically(out / "ceilings.json", json.dumps(limits | dated, indent=1) + "\n")
    log(f"copy {limits['bytes_per_s'] / 1e12:.2f} TB/s, matrix product {limits['operations_per_s'] / 1e12:.0f} TFLOP/s")
    about = {name: value for name, value in dated.items() if name != "date"} | {"code": code_digest()}
    absent = {row.impl: reason for row in wanted if (reason := peers.missing(row.impl)) is not None}
    there = {str(row): row for row in wanted if row.impl not in absent}
    cases = {name: partial(measure_dated, row, dated, log) for name, row in there.items()}
    for name, reason in absent.items():
        log(f"{name}: {reason}")
    done = complete(out / table_name, COLUMNS, cases, about, ends - time.monotonic(), log, in_part=True)
    log(summary(done.rows, limits))
    failed = sum(there[name].impl.removesuffix(GRAPH) in peers.OURS for name in done.failed)
    log(f"{len(done.failed)} rows failed, {failed} of them of this library")
    return failed
