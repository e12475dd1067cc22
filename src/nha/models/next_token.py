"""The attention of one token of each sequence on a CPU, in few operations that write into the states of a layer.

A layer gets here from its family's code, with queries and keys that are rotated. Where the family projects and rotates
as Llama does, `token_attention` takes the place of that code too, and rotates by products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nha.models.cache import NHACacheLayer
from nha.models.head_windows import LayerCache
from nha.models.masks import HybridMask
from nha.models.rotary import RotaryStyle
from nha.models.same_code import ATTENTIONS, computes_as
from nha.ops import NHAState
from nha.ops.heads import HeadGroup
from nha.ops.rotary import Tables, shared_distance, token_rotation, unrotate_token
from nha.ops.single_token import FusedRing, Sink, can_write, read_rows, supports_step, write_token


def is_next_token(module: Any, x: Tensor, length: int, mask: Any, cache: LayerCache | None) -> bool:
    """Whether a segment of `length` tokens is one of each sequence that can be written into the states of its layer.

    `x` are queries or hidden states, `mask` is what the layer got as its attention mask.
    """
    if length != 1 or cache is None or module.mass_observer is not None:
        return False
    if not (mask is None or (isinstance(mask, HybridMask) and mask.padding is None)):
        return False
    parts = [cache] if isinstance(cache, NHACacheLayer) else cache.parts
    beyond = any(isinstance(part, NHACacheLayer) and is_full(part.state) for part in parts)
    return all(
        isinstance(part, NHACacheLayer) and part.appends_only and can_step(part.state, x, may_be_filling=beyond)
        for part in parts
    )


def is_full(state: NHAState | None) -> bool:
    """Whether a window is as long as it gets: from here on no layer has the bits of full attention."""
    if isinstance(state, FusedRing):
        return not state.is_filling
    return state is not None and state.key.shape[1] == state.window_size


def can_step(state: NHAState | None, x: Tensor, *, may_be_filling: bool = False) -> bool:
    """Whether a state is a ring that can be written, or one that can become a ring now (`supports_step`)."""
    if isinstance(state, FusedRing):
        return can_write(state, x)
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    return supports_step(state, (x[:, :1],), may_be_filling=may_be_filling)


def defers_gates(module: Any) -> bool:
    """Whether the log-gates of a token may be computed when it leaves the window.

    Those of exact slots depend on the tokens before. An adapter may be switched off, or another on, until then.
    """
    return module.slot_write == "soft" and isinstance(module.nha.g_proj, nn.Linear)


class LayerGates:
    """Log-gates of a layer, or of some of its heads, for `FusedRing.defer_gates`.

    The sink and the tables of the slots' distance that came with the latest gates are kept beside them.
    """

    def __init__(self, module: Any, group: HeadGroup | None):
        self.module = module
        self.index = slice(None) if group is None else group.index
        self.sink: Sink | None = None
        self.distance: Tables | None = None
        self._made_of: Sink | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Log-gates [B, n, H, M] of hidden states [B, n, hidden]."""
        slots = self.module.nha(hidden)
        self.distance = shared_distance(slots.tables)
        if not self._holds(slots.sink, hidden.dtype):
            self._made_of, self.sink = slots.sink, None
            if slots.sink is not None:
                self.sink = slots.sink[0][self.index].to(hidden.dtype), slots.sink[1][self.index].to(hidden.dtype)
        gate = slots.log_gate[:, :, self.index]
        return gate[..., :0] if self.module.ablation == "slots_off" else gate

    def _holds(self, sink: Sink | None, dtype: torch.dtype) -> bool:
        """Whether the sink that is kept is a view of this one, so that it changes with it."""
        last = self._made_of
        if sink is None or last is None or sink[0] is not last[0] or sink[1] is not last[1]:
            return False
        return self.sink is not None and self.sink[0].dtype == sink[0].dtype == dtype


class Part(NamedTuple):
    """The memory of a layer, or of a group of its heads, as a step needs it."""

    ring: FusedRing
    gates: LayerGates
    log_gate: Tensor | None  # [B, 1, H, M] of the token, where it is written at once: without a window


def prepare(module: Any, part: NHACacheLayer, group: HeadGroup | None, hidden: Tensor) -> Part:
    """Let the state of a layer, or of a group of its heads, be a ring that holds the present sink."""
    ring, log_gate = part.state, None
    gates: Any = ring.pending.gates if isinstance(ring, FusedRing) and ring.pending is not None else None
    if gates is None or gates.module is not module:
        gates = LayerGates(module, group)
        log_gate = gates(hidden)
    if not isinstance(ring, FusedRing) or not ring.hold_sink(gates.sink):
        assert ring is not None
        ring = part.state = FusedRing.of(ring, gates.sink)
    if not ring.block_size:
        return Part(ring, gates, log_gate)
    if ring.pending is None or ring.pending.gates is not gates:
        ring.defer_gates(gates, hidden)
    return Part(ring, gates, None)


def prepare_parts(module: Any, cache: LayerCache, hidden: Tensor) -> list[Part]:
    """`prepare` for the parts of a layer."""
    if isinstance(cache, NHACacheLayer):
        return [prepare(module, cache, None, hidden)]
    return [prepare(module, part, group, hidden) for part, group in zip(cache.parts, cache.groups, strict=True)]


def next_token(
    module: Any,
    inputs: tuple[Tensor, ...],
    hidden: Tensor,
    tables: Tables | None,
    cache: LayerCache,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """The outputs [B, 1, HQ, Dv] of `is_next_token`'s token: rotated queries, keys and values [B, heads, 1, D] in."""
    q, k, v = inputs
    parts = prepare_parts(module, cache, hidden)
    ring, gates, _ = parts[0]
    query = q.to(ring.memory.dtype).reshape(*k.shape[:2], -1, q.shape[3])  # of all heads, which parts may share out
    slot_query, slot_key = query, k
    if tables is not None:
        assert gates.distance is not None
        interleaved = module.rotary_style.interleaved
        slot_query, slot_key = unrotate_token(query, k, tables, gates.distance, interleaved=interleaved)
    token = torch.cat((k, v, slot_key), 3)
    return read_parts(parts, cache, query, slot_query, token, hidden, scaling, softcap)


def read_parts(
    parts: list[Part],
    cache: LayerCache,
    query: Tensor,
    slot_query: Tensor,
    token: Tensor,
    hidden: Tensor,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """Write a token [B, H, 1, D + Dv + D] and read it, [B, 1, HQ, Dv]: queries [B, H, HQ / H, D]."""
    batch = token.shape[0]
    if isinstance(cache, NHACacheLayer):
        cache.length += 1
        out = read_part(parts[0], query, slot_query, token, hidden, scaling, softcap)
        return out.view(batch, 1, -1, out.shape[2])
    size = token.shape[3] - 2 * query.shape[3]
    out = query.new_empty(*query.shape[:3], size, dtype=parts[0].ring.dtype)
    for part, group, own in zip(parts, cache.groups, cache.parts, strict=True):
        own.length += 1
        i = group.index
        rows = read_part(part, query[:, i], slot_query[:, i], token[:, i], hidden, scaling, softcap)
        out[:, i] = rows.view(batch, -1, *rows.shape[1:])
    return out.view(batch, 1, -1, size)


def read_part(
    part: Part,
    query: Tensor,
    slot_query: Tensor,
    token: Tensor,
    hidden: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """`read_rows` of the heads of one part."""
    if part.log_gate is not None:
        write_token(part.ring, token, part.log_gate)
    rows, slot_rows = query.flatten(0, 1), slot_query.flatten(0, 1)
    return read_rows(part.ring, rows, slot_rows, token, scale=scaling, softcap=softcap, hidden=hidden)


def token_attention(
    module: Any, hidden: Tensor, tables: Tables | None, mask: Any, cache: LayerCache | None
) -> Tensor | None:
    """The outputs [B, 1, hidden] of an attention module for one token of each sequence; None where this cannot be."""
    if hidden.shape[1] != 1 or tables is None or module.training or module.observer is not None:
        return None
    if not defers_gates(module) or module.rotary_style != RotaryStyle():
        return None
    if not computes_as(module.family, *ATTENTIONS):
        return None
    if not is_next_token(module, hidden, 1, mask, cache):
        return None
    assert cache is not None
    parts, (batch, dim) = prepare_parts(module, cache, hidden), (hidden.shape[0], module.head_dim)
    distance = parts[0].gates.distance
    if distance is None or not tables[0].shape == distance[0].shape == (1, 1, dim):
        return None
    rotation = token_rotation(tables, distance, module.scaling)
    dtype = rotation.key.dtype
    if dtype != parts[0].ring.memory.dtype:
        return None
    q, k, v = (linear(hidden).view(-1, dim) for linear in (module.q_proj, module.k_proj, module.v_proj))
    key = torch.mm(k if k.dtype == dtype else k.to(dtype), rotation.key)
    key = key if k.dtype == dtype else key.to(k.dtype)
    token = torch.cat((key[:, :dim], v, key[:, dim:]), 1).view(batch, -1, 1, 3 * dim)
    rows = torch.mm(q if q.dtype == dtype else q.to(dtype), rotation.query).view(batch, token.shape[1], -1, 2 * dim)
    out = read_parts(parts, cache, rows[..., :dim], rows[..., dim:], token, hidden, 1.0)
    return module.o_proj(out.view(batch, 1, -1))
