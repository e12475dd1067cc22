"""Checks of tensors with more than 2^31 elements, whose offsets 32 bits cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nha import nha_attention
from tests.gpu.cases import rms
from tests.gpu.setting import Setting, expect_none

GIB = 2**30
OFFSETS_32 = 2**31  # elements from which on offsets need 64 bits
Part = Callable[[Tensor], Tensor]


def outputs_and_gradients(flat: dict[str, Tensor], window: int, grad: Tensor) -> dict[str, Tensor]:
    """out and gradients by name."""
    leaves = {n: x.detach().requires_grad_() for n, x in flat.items()}
    out = nha_attention(**leaves, window_size=window, impl="triton").out  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **{"d" + n: g for n, g in zip(leaves, grads, strict=True)}}


def compare(part: Part, flat: dict[str, Tensor], window: int, grad: Tensor) -> list[str]:
    """Where `part` of a call differs from the call on `part` of its inputs by more than the order of sums explains.

    A gate's gradient is a difference of inner products, and rounds like those.
    """
    whole = {n: part(x).clone() for n, x in outputs_and_gradients(flat, window, grad).items()}
    mine = {n: part(x).clone() for n, x in flat.items()}
    alone = outputs_and_gradients(mine, window, part(grad).clone())
    eps, wrong = torch.finfo(grad.dtype).eps, []
    pairs = max(rms((mine[n].double() * alone["d" + n]).sum(-1)) for n in ("q", "k", "v"))
    for name, x in alone.items():
        off = rms(whole[name].double() - x.double())
        limit = eps * (max(rms(x), pairs) if name == "dlog_gate" else rms(x))
        wrong += [] if off <= limit else [f"{name} differs by {off:.1e} rms > {limit:.1e}"]
    return wrong


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


def _require_memory(need: int) -> None:
    free = torch.cuda.mem_get_info()[0] // GIB
    if free < need:
        pytest.skip(f"needs {need} GiB of free GPU memory, has {free}")


def large(setting: Setting, of: str, need: int, part: Part, heads_first: bool = False, **sizes: int) -> None:
    """A call in which `of` has more than 2^31 elements, compared in one part; `need` is the memory in GiB."""
    if setting.tiny:
        sizes = {"batch": 2, "length": 20, "groups": 2, "heads": 2, "slots": 5, "dim": 8}
    else:
        _require_memory(need)
    flat, grad = drawn(setting, **sizes, heads_first=heads_first)
    assert flat[of].numel() > OFFSETS_32 or setting.tiny
    wrong = compare(part, flat, 5 if setting.tiny else 64, grad)
    if setting.device == "cuda":
        del flat, grad
        torch.cuda.empty_cache()
    expect_none(wrong)


def many_sequences(setting: Setting) -> None:
    """Forward and backward where queries, outputs and their gradients have 2^31 elements, in many sequences."""
    large(setting, "q", 36, lambda x: x[-1:], batch=257, length=2048, groups=4, heads=8, slots=64, dim=128)


def long_sequence(setting: Setting) -> None:
    """The same in one long sequence, for the last KV head."""
    heads = 2 if setting.tiny else 8
    large(
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


def many_keys(setting: Setting) -> None:
    """The same where keys, values and their gradients are as large as queries, and in memory heads come first."""
    heads = 2 if setting.tiny else 64
    large(
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


def far_apart(setting: Setting) -> None:
    """Sequences 2^31 elements apart in memory give the bits of adjacent ones."""
    sizes: dict[str, Any] = {"batch": 2, "length": 300, "groups": 4, "heads": 2, "slots": 64, "dim": 128}
    if setting.tiny:
        sizes |= {"length": 20, "heads": 1, "slots": 5, "dim": 8}
    flat, grad = drawn(setting, **sizes)
    stride = 4096 if setting.tiny else OFFSETS_32 + 64
    if not setting.tiny:
        _require_memory(6)
    buffer = grad.new_empty(stride + sum(x[0].numel() for x in flat.values()))
    spread, start = {}, 0
    for name, x in flat.items():
        spread[name] = buffer.as_strided(x.shape, (stride, *x.stride()[1:]), start).copy_(x)
        start += x[0].numel()
    window = 5 if setting.tiny else 64
    near, far = outputs_and_gradients(flat, window, grad), outputs_and_gradients(spread, window, grad)
    expect_none([f"{n} differs" for n, x in near.items() if not torch.equal(x, far[n])])


CHECKS: tuple[Callable[[Setting], None], ...] = (many_sequences, long_sequence, many_keys, far_apart)
