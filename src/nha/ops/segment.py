"""What every fast implementation shares: padded rows, the tail of earlier segments, plain full attention."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nha.ops.state import NHAState, slot_dtype


def check_padding_mask(attention_mask: Tensor) -> None:
    """Raise ValueError for a mask [B, T] with holes; only checked where reading it does not stall a device."""
    if attention_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return
    starts = attention_mask[:, 1:] & ~attention_mask[:, :-1]
    runs = starts.sum(1) + attention_mask[:, 0]
    if bool((runs > 1).any()):
        row = int(runs.argmax())
        raise ValueError(
            f"expected padding on the left or right only, got a mask with holes in row {row}; "
            "use cu_seqlens for packed sequences"
        )


def sequence_of(cu_seqlens: Tensor, token: Tensor) -> Tensor:
    """Which packed sequence each token [T] is in; the number of sequences behind the last.

    Looks into all of `cu_seqlens`: compiled for a GPU by PyTorch 2.11, a search in a slice begins before the slice.

    >>> sequence_of(torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.arange(6)).tolist()
    [0, 0, 0, 2, 2, 3]
    """
    return torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1


def align_left(attention_mask: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Move the real tokens of every row [B, T, ...] to its start; what follows them is arbitrary but finite."""
    length = attention_mask.shape[1]
    first = attention_mask.int().argmax(1, keepdim=True)
    index = (torch.arange(length, device=attention_mask.device) + first).clamp_max(length - 1)
    return [x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:])) for x in inputs]


def restore(attention_mask: Tensor, x: Tensor) -> Tensor:
    """Undo `align_left` for an output [B, T, ...]; padding gets zeros."""
    first = attention_mask.int().argmax(1, keepdim=True)
    index = (torch.arange(x.shape[1], device=x.device) - first).clamp_min(0)
    shape = [*attention_mask.shape] + [1] * (x.dim() - 2)
    moved = x.gather(1, index.view(shape).expand_as(x))
    return torch.where(attention_mask.view(shape), moved, 0)


def advance(
    state: NHAState,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    k_slot: Tensor,
    slots: tuple[Tensor, Tensor],
    count: Tensor | None,
) -> NHAState:
    """The state after a segment: the given slots and the last tokens of tail and segment.

    `count` [B] is the number of real tokens of each (left-aligned) row, None if all are.
    """
    length = k.shape[1]
    width = state.key.shape[1] + length if state.window_size < 0 else state.window_size

    def tail(old: Tensor, new: Tensor) -> Tensor:
        joined = torch.cat([old, new.to(old.dtype)], 1)
        if count is None:
            return joined[:, joined.shape[1] - width :].clone()
        index = torch.arange(joined.shape[1] - width, joined.shape[1], device=new.device) - length + count[:, None]
        return joined.gather(1, index.clamp_min(0)[..., None, None].expand(-1, -1, *new.shape[2:]))

    return replace(
        state,
        slot_key=slots[0],
        slot_value=slots[1],
        key=tail(state.key, k),
        value=tail(state.value, v),
        window_slot_key=None if state.window_slot_key is None else tail(state.window_slot_key, k_slot),
        window_log_gate=tail(state.window_log_gate, log_gate),
        num_tokens=state.num_tokens + (length if count is None else count),
    )


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    k_slot: Tensor,
    *,
    scale: float,
    softcap: float | None,
    state: NHAState,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    keep: bool = True,
) -> tuple[Tensor, Tensor, NHAState]:
    """Causal attention over tail and segment through SDPA; nothing is ever committed to the slots.

    Without `keep` the state returned is the old one.
    """
    if cu_seqlens is not None:
        return each_sequence(full_attention, (q, k, v, log_gate, k_slot), scale, softcap, state, cu_seqlens)
    count = None
    if attention_mask is not None:
        q, k, v, log_gate, k_slot = align_left(attention_mask, q, k, v, log_gate, k_slot)
        count = attention_mask.sum(1)
    past, length = state.key.shape[1], q.shape[1]
    keys, values, mask = k, v, None
    if state.window_size < 0 and past:
        keys, values = torch.cat([state.key, k], 1), torch.cat([state.value, v], 1)
        token = torch.arange(past + length, device=q.device)
        query = past + torch.arange(length, device=q.device)[:, None]
        mask = (token <= query) & (token >= past - state.num_tokens[:, None, None])
        mask = mask[:, None]
    heads = [x.transpose(1, 2) for x in (q, keys, values)]
    if softcap is None:
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
        ).transpose(1, 2)
    else:
        out = capped_attention(*heads, mask=mask, scale=scale, softcap=softcap).transpose(1, 2)
    mass = q.new_zeros((), dtype=slot_dtype(q.dtype)).expand(q.shape[:3])
    if keep:
        state = advance(state, k, v, log_gate, k_slot, (state.slot_key, state.slot_value), count)
    if attention_mask is not None:
        out = restore(attention_mask, out)
    return out, mass, state


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention with scores capped as c * tanh(score / c): q [B, HQ, T, D], k, v [B, H, Tk, ...]; SDPA has none."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    if mask is None:
        mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril()
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    score = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    weights = score.masked_fill(~mask, float("-inf")).softmax(-1, dtype=slot_dtype(q.dtype))
    return weights.to(v.dtype) @ v


def each_sequence(
    function,
    inputs: tuple[Tensor, ...],
    scale: float,
    softcap: float | None,
    state: NHAState,
    cu_seqlens: Tensor,
    *extra,
):
    """Run packed sequences one by one and pack the results; states are joined row by row."""
    bounds = cu_seqlens.tolist()
    results = []
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        own = state.select(torch.tensor([row], device=state.num_tokens.device))
        if start == stop:
            nothing = inputs[2].new_zeros(1, 0, inputs[0].shape[2], inputs[2].shape[3])
            results.append((nothing, nothing[..., 0].to(slot_dtype(inputs[0].dtype)), own))
            continue
        part = [x[:, start:stop] for x in inputs]
        options = {
            "scale": scale,
            "softcap": softcap,
            "state": own,
            "attention_mask": None,
            "cu_seqlens": None,
        }
        results.append(function(*part, *extra, **options))
    outs, masses, states = zip(*results, strict=True)
    return torch.cat(outs, 1), torch.cat(masses, 1), NHAState.join(list(states))
