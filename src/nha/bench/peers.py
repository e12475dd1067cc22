"""Implementations to time on the same tensors [B, T, heads, D]: this library's, and every peer that is installed.

triton, chunked         nha_attention by that implementation
sdpa-cudnn, sdpa-flash  full causal attention through SDPA
flex-window             FlexAttention over a sliding window, compiled
fa2-window              FlashAttention-2 over a sliding window (torch.nn.attention.varlen)
gsa, gsa-expanded       flash-linear-attention's chunk_gsa, with grouped heads or with keys and values repeated
gsa+window              chunk_gsa and flex-window, merged; w0+window: nha_attention with W = 0 and flex-window, merged
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nha import nha_attention
from nha.bench.timing import CUDA
from nha.ops import RingState, nha_decode

Forward = Callable[[], Tensor]
Inputs = dict[str, Tensor]
BLOCK = 128
FULL = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
OURS = ("triton", "chunked")
GATED = (*OURS, "gsa", "gsa-expanded", "gsa+window", "w0+window")
COMPILED = ("flex-window", "gsa+window", "w0+window")


def missing(name: str) -> str | None:
    """The reason why a peer cannot run here, or None."""
    if name in ("gsa", "gsa-expanded", "gsa+window") and find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    if name == "fa2-window" and not CUDA:
        return "FlashAttention needs a GPU"
    return None


def full(name: str, flat: Inputs) -> Forward:
    """Full causal attention."""
    q, k, v = (flat[n].transpose(1, 2) for n in ("q", "k", "v"))
    backend = FULL[name] if CUDA else SDPBackend.MATH

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return forward


def window_mask(length: int, window: int, device: torch.device | str):
    """The block mask of a causal sliding window, made without a mask of T x T."""
    from torch.nn.attention.flex_attention import BlockMask

    def inside(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < window)

    count = -(-length // BLOCK)
    row = torch.arange(count, device=device)[:, None]
    column = torch.arange(count, device=device)[None]
    touched = (column <= row) & (row * BLOCK - (column * BLOCK + BLOCK - 1) < window)
    whole = (column < row) & (row * BLOCK + BLOCK - 1 - column * BLOCK < window)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1).int()[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(touched & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=inside, seq_lengths=(length, length)
    )


@cache
def compiled_flex(merging: bool) -> Callable:
    """FlexAttention over [B, heads, T, D] with its log-sum-exp, merged with another output where `merging`."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        assert isinstance(out, Tensor)
        return out

    def merge(q: Tensor, k: Tensor, v: Tensor, mask, other: Tensor, other_lse: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        out, aux = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped, return_aux=AuxRequest(lse=True))
        assert aux.lse is not None
        weight = torch.sigmoid(aux.lse - other_lse)[..., None].to(out.dtype)
        return out * weight + other * (1 - weight)

    function = merge if merging else attend
    return torch.compile(function, dynamic=False) if CUDA else function


def flex_window(window: int, flat: Inputs) -> Forward:
    """FlexAttention over the window alone."""
    q, k, v = (flat[n].transpose(1, 2) for n in ("q", "k", "v"))
    mask, attend = window_mask(q.shape[2], window, q.device), compiled_flex(False)
    return lambda: attend(q, k, v, mask).transpose(1, 2)


def flash_window(window: int, flat: Inputs) -> Forward:
    """FlashAttention-2 over the window alone; keys and values are repeated where it does not support grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    batch, length = flat["q"].shape[:2]
    groups = flat["q"].shape[2] // flat["k"].shape[2]
    cuts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=flat["q"].device)
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict = {"window_size": (window - 1, 0)} | ({"enable_gqa": groups > 1} if grouped else {})

    def forward() -> Tensor:
        q, k, v = (flat[n].flatten(0, 1) for n in ("q", "k", "v"))
        if not grouped:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        out = varlen_attn(q, k, v, cuts, cuts, length, length, **options)
        assert isinstance(out, Tensor)
        return out.unflatten(0, (batch, length))

    return forward


def gated_slots(flat: Inputs, expanded: bool) -> Forward:
    """flash-linear-attention's Gated Slot Attention."""
    from fla.ops.gsa import chunk_gsa  # type: ignore[import-not-found]

    groups = flat["q"].shape[2] // flat["k"].shape[2]

    def forward() -> Tensor:
        q, k, v, gate = (flat[n] for n in ("q", "k", "v", "log_gate"))
        if expanded:
            k, v, gate = (x.repeat_interleave(groups, 2) for x in (k, v, gate))
        return chunk_gsa(q, k, v, 1 - gate.exp(), gate)[0]

    return forward


def slots_alone(flat: Inputs) -> Forward:
    return lambda: nha_attention(**flat, window_size=0, impl="triton").out  # type: ignore[arg-type]


def composition(name: str, window: int, flat: Inputs) -> Forward:
    """Slots and window in separate calls, merged by their log-sum-exps: NHA without kernels of its own.

    No implementation of the slots returns its log-sum-exp; a constant takes its place, which makes this a lower bound.
    """
    slots = gated_slots(flat, False) if name == "gsa+window" else slots_alone(flat)
    q, k, v = (flat[n].transpose(1, 2) for n in ("q", "k", "v"))
    mask, merge = window_mask(q.shape[2], window, q.device), compiled_flex(True)
    lse = torch.zeros(q.shape[:3], device=q.device)
    return lambda: merge(q, k, v, mask, slots().transpose(1, 2), lse).transpose(1, 2)


def forward_of(name: str, window: int, flat: Inputs) -> Forward:
    """A function that calls an implementation on q, k, v and log_gate, and returns [B, T, HQ, D]."""
    if name in OURS:
        return lambda: nha_attention(**flat, window_size=window, impl=name).out  # type: ignore[arg-type]
    if name in FULL:
        return full(name, flat)
    if name == "flex-window":
        return flex_window(window, flat)
    if name == "fa2-window":
        return flash_window(window, flat)
    if name in ("gsa", "gsa-expanded"):
        return gated_slots(flat, name == "gsa-expanded")
    if name in ("gsa+window", "w0+window"):
        return composition(name, window, flat)
    raise ValueError(f"expected an implementation that is timed here, got {name!r}")


def decoding(name: str, window: int, length: int, flat: Inputs) -> Forward:
    """A function that decodes one token after `length` tokens; the kernels write into the state."""
    q, k = flat["q"], flat["k"]
    batch, _, heads, dim = k.shape
    if name in FULL:
        keys, values = (torch.randn(batch, heads, length, dim, device=k.device, dtype=k.dtype) for _ in range(2))
        backend = FULL[name] if CUDA else SDPBackend.MATH

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True)

        return forward
    state = running_state(window, length, flat)
    if name == "triton":
        ring = RingState.of(state)
        return lambda: nha_decode(**flat, state=ring).out  # type: ignore[arg-type]
    options: dict = {"window_size": window, "state": state, "return_state": True}
    return lambda: nha_attention(**flat, impl=name, **options).out  # type: ignore[arg-type]


def running_state(window: int, length: int, flat: Inputs):
    """A random state after `length` tokens."""
    from nha import NHAState

    k, v, gate = (flat[n] for n in ("k", "v", "log_gate"))
    batch, _, heads, slots = gate.shape

    def normal(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, like.shape[-1], device=like.device, dtype=dtype or like.dtype)

    kept = torch.float32
    return NHAState(
        window_size=window,
        slot_key=normal(k, batch, heads, slots, dtype=kept),
        slot_value=normal(v, batch, heads, slots, dtype=kept),
        key=normal(k, batch, window, heads),
        value=normal(v, batch, window, heads),
        window_slot_key=None,
        window_log_gate=-normal(gate, batch, window, heads).abs() / 8,
        num_tokens=torch.full((batch,), length, device=k.device),
    )
