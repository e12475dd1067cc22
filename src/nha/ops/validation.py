"""What the operator refuses, and what the Triton kernels cannot run; needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from nha.ops.state import NHAState, check_window_size, slot_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels
OPERATOR_DTYPES = (*DTYPES, torch.float64)
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
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: the kernels know float32, bfloat16 and float16"
    exact, width, slots = q.dtype == torch.float32, max(q.shape[-1], v.shape[-1]), log_gate.shape[-1]
    most = NARROW_DIM if exact and decoding else MAX_DIM
    if width > most:
        return f"head dims {q.shape[-1]} and {v.shape[-1]} in {q.dtype}: the kernels go up to {most}"
    most = WIDE_SLOTS if exact and width > NARROW_DIM else MAX_SLOTS
    if not 1 <= slots <= most:
        beside = f" with head dims {q.shape[-1]} and {v.shape[-1]}" if most < MAX_SLOTS else ""
        return f"{slots} slots in {q.dtype}{beside}: the kernels take 1 to {most}"
    return None


def readable(x: Tensor) -> bool:
    """Whether the numbers of a tensor can be looked at here and now: on the CPU, outside compilation and `vmap`."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]
    return x.device.type == "cpu" and not wrapped


def check_state(state: NHAState) -> None:
    """Raise TypeError or ValueError for a state whose tensors do not fit together or do not fit its window.

    Token counts are checked on the CPU; elsewhere that would stall the device.
    """
    if not isinstance(state, NHAState):
        raise TypeError(f"expected state to be an NHAState, got {type(state).__name__}")
    check_window_size(state.window_size)
    shapes = {"slot_key": "[B, H, M, D]", "slot_value": "[B, H, M, Dv]", "key": "[B, W, H, D]"}
    shapes |= {"value": "[B, W, H, Dv]", "window_slot_key": "[B, W, H, D]", "window_log_gate": "[B, W, H, M]"}
    shapes |= {"num_tokens": "[B]"}
    for name, shape in shapes.items():
        x = getattr(state, name)
        if x is None and name == "window_slot_key":
            continue
        if not isinstance(x, Tensor) or x.dim() != shape.count(",") + 1:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected state.{name} to be a tensor {shape}, got {got}")
    batch, heads, slots, dim = state.slot_key.shape
    value_dim = state.slot_value.shape[3]
    width = state.key.shape[1] if state.window_size < 0 else state.window_size
    sizes = {
        "slot_value": (batch, heads, slots, value_dim),
        "key": (batch, width, heads, dim),
        "value": (batch, width, heads, value_dim),
        "window_slot_key": (batch, width, heads, dim),
        "window_log_gate": (batch, width, heads, slots),
        "num_tokens": (batch,),
    }
    floating = {"value": state.key.dtype, "window_slot_key": state.key.dtype}
    floating |= dict.fromkeys(("slot_key", "slot_value"), slot_dtype(state.key.dtype))
    for name, x in state.tensors().items():
        if name in sizes and tuple(x.shape) != sizes[name]:
            of = f"of window_size={state.window_size}, "
            raise ValueError(f"expected state.{name} {of}{shapes[name]} = {list(sizes[name])}, got {list(x.shape)}")
        if x.dtype != floating.get(name, x.dtype):
            raise TypeError(
                f"expected state.{name} of {floating[name]} beside keys of {state.key.dtype}, got {x.dtype}"
            )
        if x.device != state.key.device:
            raise ValueError(f"expected state.{name} on {state.key.device} like state.key, got {x.device}")
    for name in ("key", "window_log_gate"):
        if getattr(state, name).dtype not in OPERATOR_DTYPES:
            raise TypeError(f"expected state.{name} to be floating point, got {getattr(state, name).dtype}")
    count = state.num_tokens
    if count.dtype != torch.int64:
        raise TypeError(f"expected state.num_tokens of torch.int64, got {count.dtype}")
    if readable(count) and batch:
        least, most = (int(x) for x in count.aminmax())
        if least < 0 or (state.window_size < 0 and most > width):
            limit = f"0 to {width}" if state.window_size < 0 else "0 or more"
            raise ValueError(f"expected state.num_tokens of {limit}, got {least} to {most}")
