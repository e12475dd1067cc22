"""Every refusal of the operator, each in one line with what was expected and what was given; needs no Triton.

Nothing has run when one of these raises. Numbers are read on the CPU only (`padding.readable`): elsewhere that would
stall the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nha.ops.padding import check_padding_mask, readable
from nha.ops.state import NHAState, RingState, check_window_size, slot_dtype

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)
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
    return None


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


def _check_tensor(name: str, x: Any, shape: str) -> Tensor:
    """The tensor; refuses what is no tensor of as many dimensions as `shape`, such as "[B, T, H, D]"."""
    if not isinstance(x, Tensor) or x.dim() != shape.count(",") + 1:
        got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected {name} to be a tensor {shape}, got {got}")
    return x


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"expected {name} of shape {letters} = {list(shape)}, got {list(x.shape)}")


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
    shapes = {"q": "[B, T, HQ, D]", "k": "[B, T, H, D]", "v": "[B, T, H, Dv]"}
    shapes |= {"log_gate": "[B, T, H, M]", "q_slot": "[B, T, HQ, D]", "k_slot": "[B, T, H, D]"}
    given = {"q": q, "k": k, "v": v, "log_gate": log_gate, "q_slot": q_slot, "k_slot": k_slot}
    tensors: dict[str, Tensor] = {}
    for name, x in given.items():
        if x is not None or name in ("q", "k", "v"):
            tensors[name] = _check_tensor(name, x, shapes[name])
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
        shape = shapes[name]
        _check_shape(name, x, tuple(sizes[letter] for letter in shape.strip("[]").split(", ")), shape)
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
        ("sink key", sink[0], "[H, S, D]", q.shape[3]),
        ("sink value", sink[1], "[H, S, Dv]", v.shape[3]),
    ):
        _check_tensor(name, x, letters)
        _check_shape(name, x, (heads, sink[0].shape[1], size), letters)
        if x.dtype not in DTYPES:
            raise TypeError(f"expected {name} to be floating point, got {x.dtype}")
        _check_device(name, x, q)


def check_mask(attention_mask: Any, q: Tensor) -> None:
    """Raise ValueError for what is no padding mask of a segment q [B, T, ...]."""
    _check_tensor("attention_mask", attention_mask, "[B, T]")
    _check_shape("attention_mask", attention_mask, tuple(q.shape[:2]), "[B, T] for this segment")
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"expected attention_mask of torch.bool, got {attention_mask.dtype}")
    _check_device("attention_mask", attention_mask, q)
    check_padding_mask(attention_mask)


def check_cu_seqlens(cu_seqlens: Any, q: Tensor) -> None:
    """Raise ValueError for what does not cut q [1, T, ...] into sequences."""
    _check_tensor("cu_seqlens", cu_seqlens, "[N + 1]")
    batch, length = q.shape[:2]
    if batch != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
        got = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype} with B = {batch}"
        raise ValueError(f"expected cu_seqlens to be torch.int32 [N + 1] with N >= 1 and B = 1, got {got}")
    _check_device("cu_seqlens", cu_seqlens, q)
    if readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or sorted(bounds) != bounds:
            raise ValueError(f"expected cu_seqlens to rise from 0 to T = {length}, got {bounds}")


def check_state(state: NHAState) -> None:
    """Raise TypeError or ValueError for a state whose tensors do not fit together or do not fit its window."""
    if not isinstance(state, NHAState):
        raise TypeError(f"expected state to be an NHAState, got {type(state).__name__}")
    check_window_size(state.window_size)
    shapes = {"slot_key": "[B, H, M, D]", "slot_value": "[B, H, M, Dv]", "key": "[B, n, H, D]"}
    shapes |= {"value": "[B, n, H, Dv]", "window_slot_key": "[B, n, H, D]", "window_log_gate": "[B, n, H, M]"}
    shapes |= {"num_tokens": "[B]"}
    if isinstance(state, RingState):
        shapes["arrival_counter"] = "[B, H + 1]"
    for name, shape in shapes.items():
        if name != "window_slot_key" or state.window_slot_key is not None:
            _check_tensor(f"state.{name}", getattr(state, name), shape)
    batch, heads, slots, dim = state.slot_key.shape
    width, window_size = state.key.shape[1], state.window_size
    exact = isinstance(state, RingState)
    if window_size >= 0 and (width != window_size if exact else width > window_size):
        limit = f"{window_size}" if exact else f"at most {window_size}"
        raise ValueError(f"expected state.key of {limit} tokens with window_size={window_size}, got {width}")
    sizes = {
        "B": batch,
        "H": heads,
        "M": slots,
        "D": dim,
        "Dv": state.slot_value.shape[3],
        "n": width,
        "H + 1": heads + 1,
    }
    of_inputs, of_slots = state.key.dtype, slot_dtype(state.key.dtype)
    dtypes = {"value": of_inputs, "window_slot_key": of_inputs, "slot_key": of_slots, "slot_value": of_slots}
    dtypes |= {"num_tokens": torch.int64, "arrival_counter": torch.int32}
    for name, x in state.tensors().items():
        letters = shapes[name]
        expected = tuple(sizes[letter] for letter in letters.strip("[]").split(", "))
        _check_shape(f"state.{name}", x, expected, letters)
        if x.dtype != dtypes.get(name, x.dtype):
            raise TypeError(f"expected state.{name} of {dtypes[name]} beside keys of {of_inputs}, got {x.dtype}")
        if name in ("key", "window_log_gate") and x.dtype not in DTYPES:
            raise TypeError(f"expected state.{name} to be floating point, got {x.dtype}")
        if x.device != state.key.device:
            raise ValueError(f"expected state.{name} on {state.key.device} like state.key, got {x.device}")
    if batch and readable(state.num_tokens):
        lowest, highest = (int(x) for x in state.num_tokens.aminmax())
        if lowest < 0 or (width != window_size and highest > width):
            limit = "0 or more" if width == window_size else f"0 to {width}, all of a window of {window_size} so far"
            raise ValueError(f"expected state.num_tokens of {limit}, got {lowest} to {highest}")


def _check_state_fits(
    state: NHAState, window_size: int, sizes: tuple[int, int, int, int, int], shared: bool, q: Tensor
) -> None:
    batch, heads, slots, dim, value_dim = sizes
    if state.window_size != window_size:
        raise ValueError(f"expected a state of window_size={window_size}, got one of {state.window_size}")
    _check_shape("state.slot_key", state.slot_key, (batch, heads, slots, dim), "[B, H, M, D]")
    _check_shape("state.slot_value", state.slot_value, (batch, heads, slots, value_dim), "[B, H, M, Dv]")
    if window_size and (state.window_slot_key is None) != shared:
        was = "without" if state.window_slot_key is None else "with"
        raise ValueError(f"expected k_slot to be given or left out as before, but the state was made {was} k_slot")
    if state.key.dtype != q.dtype:
        raise TypeError(f"expected a state of {q.dtype} inputs, got one of {state.key.dtype}")
    _check_device("state", state.key, q)
