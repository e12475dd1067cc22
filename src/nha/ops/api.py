"""The contract of `nha_attention`: what goes in, what comes out, and which implementation runs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops.autocast import reads_in_region
from nha.ops.chunked import chunked
from nha.ops.reference import reference
from nha.ops.ring import MAX_NEW, RingState
from nha.ops.segment import check_padding_mask, full_attention
from nha.ops.state import NHAState, slot_dtype
from nha.ops.validation import unsupported

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HAS_TRITON = find_spec("triton") is not None  # looked up once: torch.compile cannot trace it


class NHAOutput(NamedTuple):
    """`out` [B, T, HQ, Dv]; `state` after the segment, if asked for; `slot_mass` [B, T, HQ], if asked for."""

    out: Tensor
    state: NHAState | None
    slot_mass: Tensor | None


def _triton_reason() -> str | None:
    """Why the GPU kernels cannot run on this machine, or None."""
    if not HAS_TRITON:
        return "not available: Triton is not installed, use impl='chunked'"
    if torch.cuda.is_available():
        return None
    import triton  # pyright: ignore[reportMissingImports]

    if not triton.knobs.runtime.interpret:
        return "not available: this machine has no CUDA device, use impl='chunked'"
    return None


def implementations() -> dict[str, str]:
    """Every implementation with "available" or the reason why it cannot run here.

    >>> implementations()["chunked"]
    'available'
    """
    return {
        "reference": "available",
        "chunked": "available",
        "triton": _triton_reason() or "available",
    }


def resolve_impl(impl: str, device: torch.device | str = "cpu") -> str:
    """The implementation that `impl` names; "auto" is the fastest one that runs on `device`.

    Raises ValueError for an unknown name and NotImplementedError for one that cannot run here: an implementation
    asked for by name never falls back to another.

    >>> resolve_impl("auto")
    'chunked'
    """
    if impl == "auto":
        usable = torch.device(device).type == "cuda" and _triton_reason() is None
        return "triton" if usable else "chunked"
    known = implementations()
    if impl not in known:
        raise ValueError(f"expected impl to be 'auto' or one of {sorted(known)}, got {impl!r}")
    if known[impl] != "available":
        raise NotImplementedError(f"impl={impl!r} is {known[impl]}")
    return impl


@reads_in_region
def nha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    *,
    window_size: int,
    q_slot: Tensor | None = None,
    k_slot: Tensor | None = None,
    sink: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    state: NHAState | None = None,
    return_state: bool = False,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_slot_mass: bool = False,
    impl: str = "auto",
) -> NHAOutput:
    """Native Hybrid Attention (arXiv 2510.07019): slots and a sliding window under one softmax.

    At token t the window holds tokens t-W+1 .. t and the M slots hold tokens 0 .. t-W, taken in by a gated
    linear RNN as they leave the window:

        S_t = exp(a_t) * S_{t-1} + (1 - exp(a_t)) (x) x_t                          (keys and values alike)
        o_t = softmax(scale * [q_slot K_sink^T | q_slot Ks^T | q K_window^T]) [V_sink ; Vs ; V_window]

    Sink and slots take part once a token has been taken in (t >= W) or when `state` brings slots along, so a
    sequence no longer than W sees plain full attention. In a region of autocast all but `log_gate` take its dtype.

    Args:
        q: [B, T, HQ, D] queries of the window; query head h reads KV head h // (HQ // H).
        k: [B, T, H, D] keys of the window.
        v: [B, T, H, Dv] values of window and slots.
        log_gate: [B, T, H, M] natural log of the share a slot keeps, clamped to [-5, 0]. May be None with
            `window_size=-1`.
        window_size: tokens in the window; 0 is a pure linear RNN, -1 full attention without slots.
        q_slot, k_slot: what the slots see instead of `q`, `k` (same shapes).
        sink: constant (key [H, S, D], value [H, S, Dv]).
        scale: factor of all scores, default D ** -0.5.
        softcap: cap scores as c * tanh(score / c), as Gemma 2 does.
        state: what earlier segments left, or `NHAState.from_slots(...)`.
        return_state: also return the state after this segment.
        attention_mask: [B, T] bool for this segment, False = padding, on the left or right of a row only. The
            shape of the mask's pattern is checked on the CPU; elsewhere that would stall the device.
        cu_seqlens: [N + 1] int32 boundaries of N sequences packed into one row (B == 1); a state then has N rows.
        return_slot_mass: also return the share of the softmax that went to sink and slots.
        impl: "auto", "reference", "chunked" or "triton"; one asked for by name never falls back.

    Returns:
        NHAOutput(out, state, slot_mass); `out` has the dtype of `v`, padding gets zeros.

    Raises:
        ValueError, TypeError: the inputs do not fit together; nothing has run.
        NotImplementedError: the implementation asked for cannot run here.

    >>> torch.manual_seed(0); q, k, v = (torch.randn(1, 5, 1, 4) for _ in range(3))  # doctest: +ELLIPSIS
    <torch._C.Generator ...>
    >>> gate = torch.full((1, 5, 1, 2), -0.1)
    >>> whole = nha_attention(q, k, v, gate, window_size=2)
    >>> a = nha_attention(q[:, :3], k[:, :3], v[:, :3], gate[:, :3], window_size=2, return_state=True)
    >>> b = nha_attention(q[:, 3:], k[:, 3:], v[:, 3:], gate[:, 3:], window_size=2, state=a.state)
    >>> torch.allclose(whole.out, torch.cat([a.out, b.out], 1), atol=1e-6)
    True
    """
    _check(q, k, v, log_gate, window_size, q_slot, k_slot, sink, state, attention_mask, cu_seqlens)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"expected softcap to be None or above 0, got {softcap}")
    state = None if state is None else state.aligned()
    name = resolve_impl(impl, q.device)
    if attention_mask is not None:
        check_padding_mask(attention_mask)
    if log_gate is None:
        log_gate = k.new_zeros(*k.shape[:3], 0)
    short = False
    if name == "triton" and window_size != -1:
        if state is not None and q.shape[1] <= MAX_NEW and cu_seqlens is None:
            read = [q, k, v, log_gate, q_slot, k_slot, *(sink or ()), *state.tensors().values()]
            short = not needs_grad(read) and unsupported(q, v, log_gate, softcap, decoding=True) is None
        name = _triton_or_chunked(impl, q, v, log_gate, softcap, short)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    fresh, shared = state is None, k_slot is None
    within = window_size == -1 or (fresh and window_size >= q.shape[1])
    if fresh and (return_state or within or name != "triton"):
        state = NHAState.empty(window_size, key=k, value=v, log_gate=log_gate, shared=shared, cu_seqlens=cu_seqlens)
    q_slot = q if q_slot is None else q_slot
    k_slot = k if k_slot is None else k_slot
    options = {
        "scale": scale,
        "softcap": softcap,
        "state": state,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
    }
    if name == "reference":
        out, mass, after = reference(q, k, v, log_gate, q_slot, k_slot, sink, **options)
    elif within:
        out, mass, after = full_attention(q, k, v, log_gate, k_slot, keep=return_state, **options)
    elif name == "triton" and short:
        from nha.ops.triton.decode.op import decode

        own = {"scale": scale, "state": state, "attention_mask": attention_mask, "keep": return_state}
        out, mass, after = decode(q, k, v, log_gate, q_slot, k_slot, sink, **own)
    elif name == "triton":
        from nha.ops.triton.chunk.autograd import triton_attention

        own = options | {"window_size": window_size, "fresh": fresh, "keep": return_state}
        out, mass, after = triton_attention(q, k, v, log_gate, q_slot, k_slot, sink, **own)
    else:
        out, mass, after = chunked(q, k, v, log_gate, q_slot, k_slot, sink, **options)
    return NHAOutput(out, after if return_state else None, mass if return_slot_mass else None)


def supports_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *more: Tensor | None,
    softcap: float | None = None,
    impl: str = "auto",
) -> bool:
    """Whether `nha_decode` goes on with texts whose inputs are like these (any T; `more` holds what else is read).

    It does on a GPU, with dtypes and sizes that its kernel knows, as long as no gradient is asked for.

    >>> q = torch.zeros(1, 1, 2, 4)
    >>> supports_decode(q, q, q, q)  # on a CPU
    False
    """
    return (
        can_skip_autograd([q, k, v, log_gate, *more], impl)
        and unsupported(q, v, log_gate, softcap, decoding=True) is None
    )


@reads_in_region
def nha_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    state: RingState,
    q_slot: Tensor | None = None,
    k_slot: Tensor | None = None,
    sink: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
) -> NHAOutput:
    """`nha_attention` for the next 1 to 16 tokens of running texts, which are written into `state` where it is.

    One launch reads the state once and writes the slots and the new tokens; the state's tensors keep their addresses
    and nothing depends on how many tokens were seen, so that a CUDA graph can replay it. No gradients.

    Args:
        state: `RingState.of(...)` what earlier segments left.
        others: as for `nha_attention`.

    Returns:
        NHAOutput(out, state, slot_mass); the state is the one given.

    Raises:
        ValueError, TypeError: the inputs do not fit together; nothing has run.
        NotImplementedError: there is no GPU, or a shape or dtype that the kernel does not know.
    """
    if not isinstance(state, RingState):
        raise TypeError(f"expected a RingState, got {type(state).__name__}; make one with RingState.of(state)")
    _check(q, k, v, log_gate, state.window_size, q_slot, k_slot, sink, state, attention_mask, None)
    if q.shape[1] > MAX_NEW:
        raise ValueError(f"expected at most {MAX_NEW} new tokens, got {q.shape[1]}")
    if needs_grad([q, k, v, log_gate, q_slot, k_slot, *(sink or ()), *state.tensors().values()]):
        raise ValueError("expected inputs that need no gradients, got some that do; decode under torch.no_grad()")
    resolve_impl("triton", q.device)
    if attention_mask is not None:
        check_padding_mask(attention_mask)
    _triton_or_chunked("triton", q, v, log_gate, None, True)
    from nha.ops.triton.decode.op import decode_in_place

    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, mass = decode_in_place(
        q, k, v, log_gate, q_slot, k_slot, sink, scale=factor, state=state, attention_mask=attention_mask
    )
    return NHAOutput(out, state, mass)


def can_skip_autograd(tensors: Sequence[Tensor | None], impl: str = "auto") -> bool:
    """Whether `impl` is the kernels where the first tensor is, and no gradient is asked for: some of them have none."""
    first = tensors[0]
    return first is not None and resolve_impl(impl, first.device) == "triton" and not needs_grad(tensors)


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether gradients of some of the tensors may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _triton_or_chunked(impl: str, q: Tensor, v: Tensor, log_gate: Tensor, softcap: float | None, short: bool) -> str:
    """ "triton", or "chunked" where "auto" meets inputs that the kernels do not take; NotImplementedError if asked."""
    reason = unsupported(q, v, log_gate, softcap, short)
    if reason is None:
        return "triton"
    if impl == "auto":
        return "chunked"
    raise NotImplementedError(f"impl='triton' cannot run {reason}; use impl='chunked'")


def _check(q, k, v, log_gate, window_size, q_slot, k_slot, sink, state, attention_mask, cu_seqlens) -> None:
    """Raise for inputs that do not fit together, in one line: what was expected and what came."""
    named = {"q": q, "k": k, "v": v, "log_gate": log_gate, "q_slot": q_slot, "k_slot": k_slot}
    for name, x in named.items():
        if x is None and name in ("log_gate", "q_slot", "k_slot"):
            continue
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected {name} to be a tensor of 4 dimensions [B, T, heads, dim], got {got}")
    if not isinstance(window_size, int) or isinstance(window_size, bool) or window_size < -1:
        raise ValueError(f"expected window_size to be an int >= -1, got {window_size!r}")
    batch, length, query_heads, dim = q.shape
    heads, value_dim = k.shape[2], v.shape[3]
    if length == 0 or batch == 0:
        raise ValueError(f"expected at least one row and one token, got q of shape {list(q.shape)}")
    if heads == 0 or query_heads % heads:
        raise ValueError(f"expected query heads to be a multiple of KV heads, got {query_heads} and {heads}")
    _expect("k", k, (batch, length, heads, dim))
    _expect("v", v, (batch, length, heads, value_dim))
    if log_gate is None and window_size != -1:
        raise ValueError(f"expected log_gate [B, T, H, M] with window_size={window_size}, got None")
    slots = 0 if log_gate is None else log_gate.shape[3]
    if log_gate is not None:
        _expect("log_gate", log_gate, (batch, length, heads, slots))
        if slots == 0 and window_size == 0:
            raise ValueError("expected at least one slot with window_size=0, got M = 0")
    if q_slot is not None:
        _expect("q_slot", q_slot, (batch, length, query_heads, dim))
    if k_slot is not None:
        _expect("k_slot", k_slot, (batch, length, heads, dim))
    if sink is not None:
        if not isinstance(sink, (tuple, list)) or len(sink) != 2:
            raise ValueError("expected sink to be a pair (key [H, S, D], value [H, S, Dv])")
        count = sink[0].shape[1] if sink[0].dim() == 3 else -1
        _expect("sink key", sink[0], (heads, count, dim))
        _expect("sink value", sink[1], (heads, count, value_dim))
    tensors = [x for x in (k, v, q_slot, k_slot) if x is not None]
    if q.dtype not in DTYPES or any(x.dtype != q.dtype for x in tensors):
        got = [str(x.dtype).removeprefix("torch.") for x in (q, *tensors)]
        raise TypeError(f"expected q, k, v (and q_slot, k_slot) to share one floating dtype, got {got}")
    if log_gate is not None and log_gate.dtype not in DTYPES:
        raise TypeError(f"expected log_gate to be floating point, got {log_gate.dtype}")
    for name, x in (*named.items(), ("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens)):
        if x is not None and x.device != q.device:
            raise ValueError(f"expected every tensor on {q.device} like q, got {name} on {x.device}")
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("expected attention_mask (padding) or cu_seqlens (packing), got both")
    wanted = (batch, length)
    if attention_mask is not None and (tuple(attention_mask.shape) != wanted or attention_mask.dtype != torch.bool):
        got = f"{list(attention_mask.shape)} {attention_mask.dtype}"
        raise ValueError(f"expected attention_mask to be bool {list(wanted)} for this segment, got {got}")
    rows = batch
    if cu_seqlens is not None:
        if batch != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
            got = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype} with B = {batch}"
            raise ValueError(f"expected cu_seqlens to be int32 [N + 1] with B = 1, got {got}")
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != length or sorted(bounds) != bounds:
                raise ValueError(f"expected cu_seqlens to rise from 0 to T = {length}, got {bounds}")
        rows = cu_seqlens.shape[0] - 1
    if state is not None:
        _check_state(state, window_size, (rows, heads, slots, dim, value_dim), k_slot is None, q)


def _expect(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"expected {name} of shape {list(shape)}, got {list(x.shape)}")


def _check_state(state: NHAState, window_size: int, sizes: tuple, shared: bool, q: Tensor) -> None:
    batch, heads, slots, dim, value_dim = sizes
    if state.window_size != window_size:
        raise ValueError(f"expected a state of window_size={window_size}, got one of {state.window_size}")
    _expect("state.slot_key", state.slot_key, (batch, heads, slots, dim))
    _expect("state.slot_value", state.slot_value, (batch, heads, slots, value_dim))
    if window_size and (state.window_slot_key is None) != shared:
        was = "without" if state.window_slot_key is None else "with"
        raise ValueError(f"expected k_slot to be given or left out as before, but the state was made {was} k_slot")
    if state.slot_key.dtype != slot_dtype(q.dtype) or state.key.dtype != q.dtype:
        raise TypeError(f"expected a state of {q.dtype} inputs, got one of {state.key.dtype}")
    if state.slot_key.device != q.device:
        raise ValueError(f"expected a state on {q.device}, got one on {state.slot_key.device}")
