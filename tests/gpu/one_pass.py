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
from nha.ops.triton.full_decode import full_decode as full_decode_op
from nha.ops.triton.ring import ring_after_prompt
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
    missing = sorted(kernels().keys() - names)
    expect_none(wrong + [f"{name} was not launched" for name in missing])


if __name__ == "__main__":
    one_pass(Setting("cuda", int(sys.argv[1]) if sys.argv[1:] else 0))
