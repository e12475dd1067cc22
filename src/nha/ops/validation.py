"""Every refusal of the operator, each in one line with what was expected and what was given; needs no Triton.

Nothing has run when one of these raises. Numbers are read on the CPU only (`padding.readable`): elsewhere that would
stall the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nha.ops.backends import shared_memory
from nha.ops.padding import check_padding_mask, readable
from nha.ops.state import (
    DTYPES,
    LETTERS,
    NHAState,
    RingState,
    check_shape,
    check_state,
    check_tensor,
    check_window_size,
)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM, MAX_SLOTS = 256, 128
# In float32 wide heads leave room for fewer slots, and the decoding kernel takes none.
NARROW_DIM, WIDE_SLOTS = 128, 64
MAX_GROUPS = 16  # query heads of a KV head that the kernel of one token under full attention takes


def unsupported(q: Tensor, v: Tensor, log_gate: Tensor, softcap: float | None, decoding: bool) -> str | None:
    """Why the kernels, or that for decoding, cannot run these inputs, in one line, or None.

    >>> q = torch.empty(1, 9, 4, 512)
    >>> unsupported(q, q, torch.empty(1, 9, 4, 64), None, decoding=False)
    'head dims 512 and 512 in torch.float32: the kernels go up to 256'
    """
    if softcap is not None:
        return f"softcap={softcap}: the kernels have none"
    if q.dtype not in KERNEL_DTYPES:
        return f"dtype {q.dtype}: the kernels know float32, bfloat16 and float16"
    exact, width, slots = q.dtype == torch.float32, max(q.shape[-1], v.shape[-1]), log_gate.shape[-1]
    max_dim = NARROW_DIM if exact and decoding else MAX_DIM
    if width > max_dim:
        return f"head dims {q.shape[-1]} and {v.shape[-1]} in {q.dtype}: the kernels go up to {max_dim}"
    max_slots = WIDE_SLOTS if exact and width > NARROW_DIM else MAX_SLOTS
    if not 1 <= slots <= max_slots:
        beside = f" with head dims {q.shape[-1]} and {v.shape[-1]}" if max_slots < MAX_SLOTS else ""
        return f"{slots} slots in {q.dtype}{beside}: the kernels take 1 to {max_slots}"
    if exact and width > NARROW_DIM and (needed := wide_bytes(slots)) > (available := shared_memory(q.device)):
        dims = f"{slots} slots with head dims {q.shape[-1]} and {v.shape[-1]} in {q.dtype}"
        return f"{dims}: a block needs {needed} bytes of shared memory, this GPU has {available}"
    return None


def wide_bytes(slots: int) -> int:
    """Bytes of shared memory of the largest kernel in float32 with heads of 256, as compiled for a GPU with 100 KB.

    >>> wide_bytes(16), wide_bytes(64)
    (100352, 201728)
    """
    return 66560 + 2112 * max(16, 1 << (slots - 1).bit_length())


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    q_slot: Tensor | None,
    k_slot: Tensor | None,
    sink: tuple[Tensor, Tensor] | None,
    *,
    window_size: int,
    state: NHAState | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise TypeError or ValueError for inputs of `nha_attention` that do not fit together."""
    check_window_size(window_size)
    _check_tokens(q, k, v, log_gate, q_slot, k_slot, window_size)
    if sink is not None:
        _check_sink(sink, q, k, v)
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("expected attention_mask (padding) or cu_seqlens (packing), got both")
    sequences = q.shape[0]
    if attention_mask is not None:
        check_mask(attention_mask, q)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q)
        sequences = cu_seqlens.shape[0] - 1
    if state is not None:
        if not isinstance(state, RingState):  # a ring was checked when it was made
            check_state(state)
        slots = 0 if log_gate is None else log_gate.shape[3]
        _check_state_fits(state, window_size, (sequences, k.shape[2], slots, q.shape[3], v.shape[3]), k_slot is None, q)


def check_factors(**factors: float | None) -> None:
    """Raise TypeError or ValueError for a factor of the scores, None aside, that is not finite and above 0.

    >>> check_factors(scale=0.125, softcap=-1.0)
    Traceback (most recent call last):
    ValueError: expected softcap to be None or a finite number above 0, got -1.0
    """
    for name, x in factors.items():
        if x is None:
            continue
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise TypeError(f"expected {name} to be None or a number, got {type(x).__name__}")
        if not 0 < x < math.inf:  # compiled, a scale may be a symbol, which math.isfinite does not take
            raise ValueError(f"expected {name} to be None or a finite number above 0, got {x}")


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"expected {name} on {q.device} like q, got {x.device}")


def _check_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    q_slot: Tensor | None,
    k_slot: Tensor | None,
    window_size: int,
) -> None:
    if log_gate is None and window_size != -1:
        raise ValueError(f"expected log_gate [B, T, H, M] with window_size={window_size}, got None")
    given = {"q": q, "k": k, "v": v, "log_gate": log_gate, "q_slot": q_slot, "k_slot": k_slot}
    tensors: dict[str, Tensor] = {}
    for name, x in given.items():
        if x is not None or name in ("q", "k", "v"):
            tensors[name] = check_tensor(name, x, LETTERS[name])
    batch, length, query_heads, dim = q.shape
    heads, value_dim = k.shape[2], v.shape[3]
    if 0 in q.shape or heads == 0 or value_dim == 0:
        got = f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}"
        raise ValueError(f"expected at least one sequence, token, head and head dim, got {got}")
    if query_heads % heads:
        raise ValueError(f"expected query heads to be a multiple of KV heads, got {query_heads} and {heads}")
    slots = 0 if log_gate is None else log_gate.shape[3]
    if slots == 0 and window_size == 0:
        raise ValueError("expected at least one slot with window_size=0, got M = 0")
    sizes = {"B": batch, "T": length, "HQ": query_heads, "H": heads, "D": dim, "Dv": value_dim, "M": slots}
    for name, x in tensors.items():
        letters = LETTERS[name]
        check_shape(name, x, tuple([sizes[letter] for letter in letters]), letters)
        if name == "log_gate":
            if x.dtype not in DTYPES:
                raise TypeError(f"expected log_gate to be floating point, got {x.dtype}")
        elif q.dtype not in DTYPES:
            raise TypeError(f"expected q of one of {', '.join(map(str, DTYPES))}, got {q.dtype}")
        elif x.dtype != q.dtype:
            raise TypeError(f"expected {name} of {q.dtype} like q, got {x.dtype}")
        _check_device(name, x, q)


def _check_sink(sink: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not isinstance(sink, (tuple, list)) or len(sink) != 2:
        got = f"{len(sink)} of them" if isinstance(sink, (tuple, list)) else type(sink).__name__
        raise ValueError(f"expected sink to be a pair (key [H, S, D], value [H, S, Dv]), got {got}")
    heads = k.shape[2]
    for name, x, letters, size in (
        ("sink key", sink[0], ("H", "S", "D"), q.shape[3]),
        ("sink value", sink[1], ("H", "S", "Dv"), v.shape[3]),
    ):
        check_tensor(name, x, letters)
        check_shape(name, x, (heads, sink[0].shape[1], size), letters)
        if x.dtype not in DTYPES:
            raise TypeError(f"expected {name} to be floating point, got {x.dtype}")
        _check_device(name, x, q)


def check_mask(attention_mask: Any, q: Tensor) -> None:
    """Raise ValueError for what is no padding mask of a segment q [B, T, ...]."""
    check_tensor("attention_mask", attention_mask, ("B", "T"))
    check_shape("attention_mask", attention_mask, tuple(q.shape[:2]), ("B", "T"))
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"expected attention_mask of torch.bool, got {attention_mask.dtype}")
    _check_device("attention_mask", attention_mask, q)
    check_padding_mask(attention_mask)


def check_cu_seqlens(cu_seqlens: Any, q: Tensor) -> None:
    """Raise ValueError for what does not cut q [1, T, ...] into sequences."""
    check_tensor("cu_seqlens", cu_seqlens, ("N + 1",))
    batch, length = q.shape[:2]
    if batch != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
        got = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype} with B = {batch}"
        raise ValueError(f"expected cu_seqlens to be torch.int32 [N + 1] with N >= 1 and B = 1, got {got}")
    _check_device("cu_seqlens", cu_seqlens, q)
    if readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or sorted(bounds) != bounds:
            raise ValueError(f"expected cu_seqlens to rise from 0 to T = {length}, got {bounds}")


def _check_state_fits(
    state: NHAState, window_size: int, sizes: tuple[int, int, int, int, int], shared: bool, q: Tensor
) -> None:
    batch, heads, slots, dim, value_dim = sizes
    if state.window_size != window_size:
        raise ValueError(f"expected a state of window_size={window_size}, got one of {state.window_size}")
    check_shape("state.slot_key", state.slot_key, (batch, heads, slots, dim), LETTERS["slot_key"])
    check_shape("state.slot_value", state.slot_value, (batch, heads, slots, value_dim), LETTERS["slot_value"])
    if window_size and (state.window_slot_key is None) != shared:
        was = "without" if state.window_slot_key is None else "with"
        raise ValueError(f"expected k_slot to be given or left out as before, but the state was made {was} k_slot")
    if state.key.dtype != q.dtype:
        raise TypeError(f"expected a state of {q.dtype} inputs, got one of {state.key.dtype}")
    _check_device("state", state.key, q)
