"""Launch every kernel once: a program for compute-sanitizer, `python3 -m tests.gpu.one_pass [SEED]`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

import nha.ops.triton
from nha.ops.int8_rows import Int8Rows
from nha.ops.triton.full_decode import full_decode as full_decode_op
from nha.ops.triton.int8_rows import write_rows
from nha.ops.triton.merge import merge
from nha.ops.triton.pointwise import add_norm, attention_inputs, silu_product
from nha.ops.triton.ring import ring_after_prompt
from nha.ops.triton.token import Norm, token_inputs, token_linear, token_mlp
from nha.ops.triton.unrotate import unrotate_for_slots
from tests.gpu.cases import make, place, results
from tests.gpu.kernel_checks import interpretable
from tests.gpu.setting import Setting, expect_none


def kernels() -> dict[str, Any]:
    """Every Triton kernel of the library that is launched from the host, by name."""
    found = {}
    for module in pkgutil.walk_packages(nha.ops.triton.__path__, "nha.ops.triton."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if "kernel" in name and hasattr(value, "run"):
                found[name] = value
    return found


@contextmanager
def launched() -> Iterator[set[str]]:
    """Collects the names of the kernels that are launched, at least for the first time, within it."""
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


def layer_results(device: str) -> list[torch.Tensor]:
    """Outputs of the kernels around attention, for one token and for three, with two heads of 16 and eight slots."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    x, norm = random(1, 1, 32), Norm(torch.ones(32, device=device), 1e-5)
    turns = torch.ones(1, 1, 16, device=device), torch.zeros(1, 1, 16, device=device)
    q, k, v, gate = ((random(rows, 32), None) for rows in (32, 32, 32, 16))
    token = token_inputs(x, norm, (q, k, v), gate, turns, turns, head_dim=16, num_slots=8)
    inner = token_mlp(x, norm, random(48, 32), random(48, 32))
    found = [
        *token,
        inner,
        token_linear(inner, random(32, 48), x),
        *add_norm(x, *norm, x),
        silu_product(inner.clone(), inner),
    ]
    positions: Any = [t.expand(1, 3, 16) for t in turns]
    found += attention_inputs(random(1, 3, 2, 16), random(1, 3, 2, 16), random(1, 3, 2, 8), positions, turns)
    return [y for y in found if y is not None]


def cache_differences(device: str) -> list[str]:
    """Wrong results of the kernels of a cache with full attention: rows in 8 bits, and the merging of two parts."""
    wrong = []
    x, start = torch.randn(2, 2, 3, 16, device=device), torch.tensor(1, device=device)
    rows = Int8Rows(torch.zeros(2, 2, 4, 16, dtype=torch.int8, device=device), torch.ones(2, 2, 4, 1, device=device))
    write_rows(x, *rows, start)
    if not all(torch.equal(held[:, :, 1:], new) for held, new in zip(rows, Int8Rows.of(x), strict=True)):
        wrong.append("rows in 8 bits are not those of the definition")
    out, total = torch.zeros_like(x), torch.zeros(2, 2, 3, 1, device=device)
    merge(out, total, x, total.clone())
    if not (torch.allclose(out, x / 2) and torch.allclose(total, torch.full_like(total, 2).log())):
        wrong.append("two parts of equal mass are not merged into their mean")
    return wrong


def one_pass(setting: Setting) -> None:
    """Launch every kernel, forward, backward and decoding, on a few small cases; every result is finite."""
    whole = interpretable(setting)
    plain = replace(whole, start="fresh", sinks=0, separate=False)
    cases = [
        whole,
        plain,
        replace(plain, window=0, gates="needs_subchunks"),
        replace(plain, kind="packed"),
        replace(whole, kind="steps", batch=2),
        replace(whole, kind="ring"),
        replace(plain, length=20 if setting.tiny else 700),
    ]
    wrong = []
    with launched() as names:
        for case in cases:
            found = results(case, place(make(case, setting.seed), setting.device), "triton")
            wrong += [f"{n} of {case} is not finite" for n, x in found.items() if not x.isfinite().all()]
        for length in (9, 1100):  # in one split, and in several
            q, k = (torch.randn(2, n, t, 16, device=setting.device) for n, t in ((6, 1), (2, length)))
            mask = torch.arange(length, device=q.device).expand(2, 1, 1, -1) < length - 3
            if not full_decode_op(q, k, k, mask, 0.25).isfinite().all():
                wrong.append(f"full attention of {length} keys is not finite")
            tables = torch.ones(1, length, 12, device=q.device), torch.zeros(1, length, 12, device=q.device)
            keys = k.transpose(1, 2)
            if not torch.equal(unrotate_for_slots(keys, keys, *tables, *(x[:, :1] for x in tables))[1], keys):
                wrong.append(f"un-rotating {length} keys by nothing changes them")
            gate, slots = -keys[..., :8].abs(), torch.zeros(2, 2, 8, 16, device=q.device)
            ring = ring_after_prompt(keys, keys, gate, keys, (slots, slots), 8)
            if not torch.equal(ring.aligned().key, keys[:, -8:]):
                wrong.append(f"the ring after {length} tokens does not hold the last of them")
        if not all(x.isfinite().all() for x in layer_results(setting.device)):
            wrong.append("a kernel around attention is not finite")
        wrong += cache_differences(setting.device)
    missing = sorted(kernels().keys() - names)
    expect_none(wrong + [f"{name} was not launched" for name in missing])


if __name__ == "__main__":
    one_pass(Setting("cuda", int(sys.argv[1]) if sys.argv[1:] else 0))
