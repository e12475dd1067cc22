"""`nha_attention` and `nha_decode`: their contract, and which implementation runs."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from nha.ops import backends
from nha.ops.autocast import autocast_inputs
from nha.ops.backends import can_skip_autograd, can_skip_dispatch, needs_grad
from nha.ops.chunked import chunked
from nha.ops.full_attention import full_attention
from nha.ops.reference import reference
from nha.ops.state import MAX_NEW, NHAState, RingState
from nha.ops.validation import check_factors, check_inputs, unsupported
from nha.ops.varlen import each_sequence


class NHAOutput(NamedTuple):
    """`out` [B, T, HQ, Dv]; `state` after the segment, if asked for; `slot_mass` [B, T, HQ], if asked for.

    >>> import torch
    >>> found = NHAOutput(torch.zeros(1, 3, 2, 4), None, None)
    >>> found.out.shape, found.state is None
    (torch.Size([1, 3, 2, 4]), True)
    """

    out: Tensor
    state: NHAState | None
    slot_mass: Tensor | None


@autocast_inputs
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

    At token t the window holds tokens t-W+1 .. t and the M slots hold tokens 0 .. t-W, written by a gated linear
    RNN as they leave the window:

        S_t = exp(a_t) * S_{t-1} + (1 - exp(a_t)) (x) x_t                          (keys and values alike)
        o_t = softmax(scale * [q_slot K_sink^T | q_slot Ks^T | q K_window^T]) [V_sink ; Vs ; V_window]

    Sink and slots are active once a token has been written to the slots (t >= W) or when `state` holds slots given
    by the caller, so a sequence no longer than W gets plain full attention. Under `torch.autocast` every input but
    `log_gate` is cast to its dtype.

    Args:
        q: [B, T, HQ, D] queries of the window; query head h reads KV head h // (HQ // H).
        k: [B, T, H, D] keys of the window.
        v: [B, T, H, Dv] values of window and slots.
        log_gate: [B, T, H, M] natural log of the share a slot keeps, clamped to [-5, 0]. May be None with
            `window_size=-1`.
        window_size: tokens in the window, at most 2 ** 24; 0 is a pure linear RNN, -1 full attention without slots.
        q_slot: [B, T, HQ, D] queries of the slots, default `q`.
        k_slot: [B, T, H, D] keys of the slots, default `k`.
        sink: constant (key [H, S, D], value [H, S, Dv]).
        scale: factor of all scores, finite and above 0, default D ** -0.5.
        softcap: cap scores as c * tanh(score / c), as Gemma 2 does.
        state: the state that earlier segments returned, or `NHAState.from_slots(...)`.
        return_state: also return the state after this segment.
        attention_mask: [B, T] bool for this segment, False = padding, on the left or right of a row only. Holes
            are refused on the CPU; on other devices looking for them would stall.
        cu_seqlens: [N + 1] int32 boundaries of N sequences packed into one row (B == 1); a state then has N rows.
        return_slot_mass: also return the attention mass (share of the softmax) on sink and slots.
        impl: "auto", "reference", "chunked" or "triton"; one asked for by name never falls back.

    Returns:
        NHAOutput(out, state, slot_mass); `out` has the dtype of `v`, padding gets zeros.

    Raises:
        ValueError, TypeError: the inputs do not fit together; nothing has run.
        NotImplementedError: the implementation asked for cannot run here.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> q, k, v = (torch.randn(1, 5, 1, 4) for _ in range(3))
    >>> gate = torch.full((1, 5, 1, 2), -0.1)
    >>> whole = nha_attention(q, k, v, gate, window_size=2)
    >>> a = nha_attention(q[:, :3], k[:, :3], v[:, :3], gate[:, :3], window_size=2, return_state=True)
    >>> b = nha_attention(q[:, 3:], k[:, 3:], v[:, 3:], gate[:, 3:], window_size=2, state=a.state)
    >>> torch.allclose(whole.out, torch.cat([a.out, b.out], 1), atol=1e-6)
    True
    """
    check_inputs(
        q,
        k,
        v,
        log_gate,
        q_slot,
        k_slot,
        sink,
        window_size=window_size,
        state=state,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
    )
    check_factors(scale=scale, softcap=softcap)
    name = backends.resolve_impl(impl, q.device)
    log_gate = k.new_zeros(*k.shape[:3], 0) if log_gate is None else log_gate
    sink = None if sink is None else (sink[0].to(q.dtype), sink[1].to(v.dtype))
    state = None if state is None else state.aligned()
    short = False
    if name == "triton" and window_size != -1:
        short = state is not None and cu_seqlens is None and _can_decode(q, k, v, log_gate, q_slot, k_slot, sink, state)
        short = short and unsupported(q, v, log_gate, softcap, decoding=True) is None
        name = _triton_or_chunked(impl, q, v, log_gate, softcap, short)
    fresh = state is None
    # Nothing leaves the window. The kernels read later segments even then: the size of their state is fixed.
    within = window_size == -1 or (_holds_all(state, window_size, q.shape[1]) and (fresh or name != "triton"))
    simple = attention_mask is None and cu_seqlens is None and q.shape[1] >= window_size  # needs no empty state
    if fresh and (within or name != "triton" or (return_state and not simple)):
        shared = k_slot is None
        state = NHAState.empty(window_size, key=k, value=v, log_gate=log_gate, shared=shared, cu_seqlens=cu_seqlens)
    if state is not None and name == "triton" and not within:
        state = state.padded()
    q_slot = q if q_slot is None else q_slot
    k_slot = k if k_slot is None else k_slot
    options: dict[str, Any] = {"scale": q.shape[-1] ** -0.5 if scale is None else float(scale), "state": state}
    options["attention_mask"] = attention_mask
    packing: dict[str, Any] = {"softcap": softcap, "cu_seqlens": cu_seqlens}
    if name == "reference":
        out, mass, after = reference(q, k, v, log_gate, q_slot, k_slot, sink, **options, **packing)
    elif within:
        out, mass, after = full_attention(q, k, v, log_gate, k_slot, keep=return_state, **options, **packing)
    elif name == "triton" and short:
        from nha.ops.triton.decode.op import decode

        out, mass, after = decode(q, k, v, log_gate, q_slot, k_slot, sink, keep=return_state, **options)
    elif name == "triton":
        from nha.ops.triton.chunk.autograd import Segment, triton_attention

        options |= {"cu_seqlens": cu_seqlens, "window_size": window_size, "fresh": fresh, "keep": return_state}
        out, mass, after = triton_attention(Segment(q, k, v, log_gate, q_slot, k_slot), sink, **options)
    else:
        apply = partial(chunked, with_mass=return_slot_mass)
        inputs = (q, k, v, log_gate, q_slot, k_slot)
        if cu_seqlens is None:
            out, mass, after = apply(*inputs, sink, softcap=softcap, **options)
        else:
            out, mass, after = each_sequence(
                apply, inputs, options["scale"], softcap, options["state"], cu_seqlens, sink
            )
    return NHAOutput(out, after if return_state else None, mass if return_slot_mass else None)


def _holds_all(state: NHAState | None, window_size: int, length: int) -> bool:
    """Whether the window holds all tokens so far and `length` more, and no slots are active."""
    if state is None:
        return length <= window_size
    return not state.slots_active and state.key.shape[1] + length <= window_size


def _can_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    q_slot: Tensor | None,
    k_slot: Tensor | None,
    sink: tuple[Tensor, Tensor] | None,
    state: NHAState,
) -> bool:
    """Whether the decoding kernel may run: few tokens, and no gradients, which it does not have."""
    inputs = [q, k, v, log_gate, q_slot, k_slot, *(sink or ()), *state.tensors().values()]
    return q.shape[1] <= MAX_NEW and not needs_grad(inputs)


def supports_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *more: Tensor | None,
    softcap: float | None = None,
    impl: str = "auto",
) -> bool:
    """Whether `nha_decode` can continue sequences with inputs like these (any T; `more` holds all other inputs).

    It can on a GPU, with dtypes and sizes that its kernel supports, where no gradient is needed.

    >>> import torch
    >>> q = torch.zeros(1, 1, 2, 4)
    >>> supports_decode(q, q, q, q)  # on a CPU
    False
    """
    return (
        can_skip_autograd([q, k, v, log_gate, *more], impl)
        and unsupported(q, v, log_gate, softcap, decoding=True) is None
    )


def supports_prefill(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *more: Tensor | None, softcap: float | None, window_size: int
) -> bool:
    """Whether `nha_prefill` can read first segments like these without padding (`more` holds all other inputs).

    >>> import torch
    >>> q = torch.zeros(1, 9, 2, 4)
    >>> supports_prefill(q, q, q, q, softcap=None, window_size=4)  # on a CPU
    False
    """
    given = [q, k, v, log_gate, *more]
    if not 0 <= window_size < q.shape[1] or not can_skip_autograd(given) or not can_skip_dispatch(given):
        return False
    return all(unsupported(q, v, log_gate, softcap, decoding) is None for decoding in (False, True))


def nha_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    window_size: int,
    q_slot: Tensor | None = None,
    k_slot: Tensor | None = None,
    sink: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    num_tokens: Tensor | None = None,
) -> NHAOutput:
    """`nha_attention` for first segments longer than their window, whose state is a `RingState`. No gradients.

    For callers that have asked `supports_prefill`; its host takes less time than that of `nha_attention` and
    `RingState.of`. `num_tokens` [B] int64 are the tokens of each sequence before padding on the right, fewer than the
    window too: they stay on the device, so that a CUDA graph serves prompts of many lengths. Outputs of padding mean
    nothing. Raises ValueError and TypeError as `nha_attention` does.
    """
    no_mask: dict[str, Any] = {"window_size": window_size, "state": None, "attention_mask": None, "cu_seqlens": None}
    check_inputs(q, k, v, log_gate, q_slot, k_slot, sink, **no_mask)
    check_factors(scale=scale)
    from nha.ops.triton.chunk.autograd import Segment, triton_prefill

    sink = None if sink is None else (sink[0].to(q.dtype), sink[1].to(v.dtype))
    segment = Segment(q, k, v, log_gate, q if q_slot is None else q_slot, k if k_slot is None else k_slot)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, ring = triton_prefill(segment, sink, scale=factor, window_size=window_size, num_tokens=num_tokens)
    return NHAOutput(out, ring, None)


@autocast_inputs
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
    """`nha_attention` for the next 1 to 16 tokens of each sequence, which updates `state` in place. No gradients.

    One launch reads the state once and writes slots and new tokens. The state's tensors keep their addresses and no
    size depends on the number of tokens read, so that a CUDA graph can replay the step.

    Args:
        state: `RingState.of(state)` of the state that earlier segments returned.
        others: as for `nha_attention`.

    Returns:
        NHAOutput(out, state, slot_mass) with the state that was given.

    Raises:
        ValueError, TypeError: the inputs do not fit together; nothing has run.
        NotImplementedError: there is no GPU, or a shape or dtype that the kernel does not support.
    """
    if not isinstance(state, RingState):
        raise TypeError(f"expected a RingState, got {type(state).__name__}; make one with RingState.of(state)")
    check_inputs(
        q,
        k,
        v,
        log_gate,
        q_slot,
        k_slot,
        sink,
        window_size=state.window_size,
        state=state,
        attention_mask=attention_mask,
        cu_seqlens=None,
    )
    check_factors(scale=scale)
    limit = min(MAX_NEW, state.max_rollback or MAX_NEW)
    if q.shape[1] > limit:
        raise ValueError(f"expected at most {limit} new tokens, got {q.shape[1]}")
    if needs_grad([q, k, v, log_gate, q_slot, k_slot, *(sink or ()), *state.tensors().values()]):
        raise ValueError("expected inputs that need no gradients, got some that do; decode under torch.no_grad()")
    backends.resolve_impl("triton", q.device)
    _triton_or_chunked("triton", q, v, log_gate, None, True)
    from nha.ops.triton.decode.op import decode_in_place

    sink = None if sink is None else (sink[0].to(q.dtype), sink[1].to(v.dtype))
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, mass = decode_in_place(
        q, k, v, log_gate, q_slot, k_slot, sink, scale=factor, state=state, attention_mask=attention_mask
    )
    return NHAOutput(out, state, mass)


def _triton_or_chunked(impl: str, q: Tensor, v: Tensor, log_gate: Tensor, softcap: float | None, short: bool) -> str:
    """ "triton", or "chunked" for inputs that the kernels do not take; NotImplementedError if asked for by name."""
    reason = unsupported(q, v, log_gate, softcap, short)
    if reason is None:
        return "triton"
    if impl == "auto":
        return "chunked"
    raise NotImplementedError(f"impl='triton' cannot run {reason}; use impl='chunked'")
