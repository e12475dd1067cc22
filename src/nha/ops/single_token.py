"""One token of each sequence on a CPU: a step of few operations that writes into its state.

On a CPU a token waits for the calls of small operations. Sink, slots and window therefore lie in one buffer: one
softmax and one product with the values serve all three, one write stores a token, and no tensor is copied to grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nha.ops.backends import needs_grad
from nha.ops.chunk_groups import GATE_FLOOR
from nha.ops.padding import readable
from nha.ops.state import NHAState

Sink = tuple[Tensor, Tensor]  # key [H, S, D], value [H, S, Dv]


class Views(NamedTuple):
    """Parts of a buffer as the operations of a step take them: making a view takes as long as a small product."""

    slot_key: Tensor  # [B * H, D, S + M]
    window_key: Tensor  # [B * H, D, W]
    value: Tensor  # [B * H, S + M + W, Dv]
    slots: Tensor  # [B, H, M, D + Dv], keys beside values
    tokens: Tensor  # [B, W, H, D + D + Dv + M], the ring
    written: Tensor  # [B, H, W, 1, D + Dv], what a token of the ring will add to the slots
    gates: Tensor  # [B, H, W, M, 1]

    @classmethod
    def of(cls, memory: Tensor, dim: int, slots: int, window: int) -> Views:
        places, width = memory.shape[2:]
        first, rows, tokens = places - window, memory.flatten(0, 1), memory[:, :, places - window :]
        return cls(
            rows[:, :first, dim : 2 * dim].transpose(1, 2),
            rows[:, first:, :dim].transpose(1, 2),
            rows[:, :, 2 * dim : width - slots],
            memory[:, :, first - slots : first, dim : width - slots],
            tokens.transpose(1, 2),
            tokens[..., None, dim : width - slots],
            tokens[..., width - slots :, None],
        )


@dataclass(kw_only=True)
class FusedRing(NHAState):
    """A state whose window is full, in one buffer that `read_token` updates in place.

    The tensors of an `NHAState` are views of the buffer, those of the window in ring order: the newest of n tokens of
    the longest sequence lies at index (n - 1) mod W for all sequences, so that a copy continues with the same bits.
    Whatever maps, copies or pickles a state gets an `NHAState` from it.

    >>> state = NHAState.from_slots(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), window_size=3).padded()
    >>> state.key[0, :, 0, 0] = torch.tensor([4.0, 5.0, 6.0])
    >>> state.num_tokens += 7  # the last were tokens 4, 5 and 6
    >>> ring = FusedRing.of(state)
    >>> ring.key[0, :, 0, 0].tolist(), ring.aligned().key[0, :, 0, 0].tolist()
    ([6.0, 4.0, 5.0], [4.0, 5.0, 6.0])
    """

    dtype: torch.dtype  # of the inputs; the buffer has that of the slots
    gate_dtype: torch.dtype
    memory: Tensor  # [B, H, S + M + W, D + D + Dv + M]: key, slot key, value and log-gates of every place
    views: Views
    cursor: int  # index in the ring of the oldest token, where the next one goes
    sink: Sink | None = None  # what the first S places hold
    sink_version: tuple[int, ...] = ()

    @classmethod
    def of(cls, state: NHAState, sink: Sink | None = None) -> FusedRing:
        """A copy of a state, without gradients; its window must be full (`supports_step`)."""
        state, window = state.aligned(), state.window_size
        batch, heads, slots, dim = state.slot_key.shape
        value_dim, sinks = state.slot_value.shape[3], 0 if sink is None else sink[0].shape[1]
        width, first = 2 * dim + value_dim + slots, sinks + slots
        memory = state.slot_key.new_zeros(batch, heads, first + window, width)
        key, slot_key, value, gate = memory.split([dim, dim, value_dim, slots], -1)
        ring = cls(
            window_size=window,
            slot_key=slot_key[:, :, sinks:first],
            slot_value=value[:, :, sinks:first],
            key=key[:, :, first:].transpose(1, 2),
            value=value[:, :, first:].transpose(1, 2),
            window_slot_key=None if state.window_slot_key is None else slot_key[:, :, first:].transpose(1, 2),
            window_log_gate=gate[:, :, first:].transpose(1, 2),
            num_tokens=state.num_tokens.detach().clone(),
            slots_active=state.slots_active,
            num_kept=None if state.num_kept is None else state.num_kept.detach().clone(),
            dtype=state.key.dtype,
            gate_dtype=state.window_log_gate.dtype,
            memory=memory,
            views=Views.of(memory, dim, slots, window),
            cursor=int(state.num_tokens.max()) % window if window else 0,
        )
        slot_ring = state.key if state.window_slot_key is None else state.window_slot_key
        ring.slot_key.copy_(state.slot_key.detach())
        ring.slot_value.copy_(state.slot_value.detach())
        ring.key.copy_(_rolled(state.key.detach(), ring.cursor))
        ring.value.copy_(_rolled(state.value.detach(), ring.cursor))
        slot_key[:, :, first:].copy_(_rolled(slot_ring.detach(), ring.cursor).transpose(1, 2))
        ring.window_log_gate.copy_(_rolled(state.window_log_gate.detach(), ring.cursor))
        ring.hold_sink(sink)
        return ring

    def hold_sink(self, sink: Sink | None) -> bool:
        """Write a sink into the buffer, unless it holds it; False if it has no place for one of this size."""
        held, dim = self.sink, self.key.shape[3]
        if sink is None or (held is not None and held[0] is sink[0] and held[1] is sink[1]):
            versions = () if sink is None else (_version(sink[0]), _version(sink[1]))
            if versions == self.sink_version and -1 not in versions:
                return True
        sinks = 0 if sink is None else sink[0].shape[1]
        if sinks != self.memory.shape[2] - self.slot_key.shape[2] - self.window_size:
            return False
        if sink is not None:
            self.memory[:, :, :sinks, dim : 2 * dim] = sink[0].detach()
            self.memory[:, :, :sinks, 2 * dim : 2 * dim + sink[1].shape[2]] = sink[1].detach()
            self.sink, self.sink_version = sink, (_version(sink[0]), _version(sink[1]))
        return True

    def aligned(self) -> NHAState:
        """A copy of the state with its window oldest first, as in an `NHAState`."""
        cache = {name: _rolled(getattr(self, name), -self.cursor) for name in ("key", "value", "window_log_gate")}
        slot_ring = self.window_slot_key
        return NHAState(
            window_size=self.window_size,
            slot_key=self.slot_key.clone(memory_format=torch.contiguous_format),
            slot_value=self.slot_value.clone(memory_format=torch.contiguous_format),
            key=cache["key"].to(self.dtype),
            value=cache["value"].to(self.dtype),
            window_slot_key=None if slot_ring is None else _rolled(slot_ring, -self.cursor).to(self.dtype),
            window_log_gate=cache["window_log_gate"].to(self.gate_dtype),
            num_tokens=self.num_tokens.clone(),
            slots_active=self.slots_active,
            num_kept=None if self.num_kept is None else self.num_kept.clone(),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the tensors of an `NHAState`."""
        return self.aligned().tensors()

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffer."""
        counters = (self.num_tokens, self.num_kept)
        return self.memory.nbytes + sum(x.nbytes for x in counters if x is not None)

    def map(self, function: Any) -> NHAState:
        """An `NHAState` with a function applied to each of its tensors."""
        return self.aligned().map(function)

    def padded(self) -> NHAState:
        """The `NHAState`, whose window is full."""
        return self.aligned()

    def __reduce__(self) -> Any:
        return _same, (self.aligned(),)


def _same(state: NHAState) -> NHAState:
    return state


def _version(x: Tensor) -> int:
    """How often a tensor was written; -1 where PyTorch does not count that."""
    return -1 if x.is_inference() else x._version


def _rolled(x: Tensor, shift: int) -> Tensor:
    """A contiguous copy of x [B, W, H, ...], rolled along W."""
    return x.roll(shift, 1) if x.shape[1] else x.clone(memory_format=torch.contiguous_format)


def supports_step(state: NHAState | None, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether `read_token` can continue `state` with `tensors`, one token of each sequence, the first of them queries.

    It can on a CPU where no gradient is needed, no graph is traced and the window is full.

    >>> x = torch.zeros(1, 1, 1, 4)
    >>> supports_step(NHAState.empty(2, key=x, value=x, log_gate=x, shared=True), (x, x, x, x))  # no token yet
    False
    """
    q = tensors[0]
    if state is None or state.window_size < 0 or q is None or q.shape[1] != 1 or not readable(q):
        return False
    if needs_grad(tensors):
        return False
    if isinstance(state, FusedRing):
        return _is_writable(state)
    if type(state) is not NHAState or state.key.shape[1] != state.window_size or not readable(state.num_tokens):
        return False
    if torch.is_grad_enabled() and needs_grad([*state.tensors().values()]):
        return False
    return int(state.num_tokens.min()) >= max(state.window_size, 1)


def can_write(state: FusedRing, q: Tensor) -> bool:
    """`supports_step` for a token that follows another, with queries `q`: nothing but the modes can have changed."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(q.device.type):
        return False
    return _is_writable(state) and readable(q)


def _is_writable(state: FusedRing) -> bool:
    """Whether steps may write: what inference mode made is read-only outside it."""
    return torch.is_inference_mode_enabled() or not state.memory.is_inference()


def read_token(
    state: FusedRing,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    q_slot: Tensor | None = None,
    k_slot: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The outputs [B, 1, HQ, Dv] of the next token of every sequence, which is written into `state`.

    The inputs are those of `nha_attention` with T = 1 and are not checked; the sink is what the state holds.
    """
    views, dtype, dim = state.views, state.memory.dtype, q.shape[3]
    token = [k, k if k_slot is None else k_slot, v, log_gate]
    if state.window_size:
        gate, written = views.gates.select(2, state.cursor), views.written.select(2, state.cursor)
        views.slots.lerp_(written, gate.clamp(GATE_FLOOR, 0).expm1_().neg_())  # the token that leaves
        views.tokens.narrow(1, state.cursor, 1).copy_(torch.cat(token, 3))
        state.cursor = (state.cursor + 1) % state.window_size
    else:
        written = torch.cat(token[1:3], 3).transpose(1, 2).to(dtype)
        gate = log_gate.transpose(1, 2).mT.to(dtype)
        views.slots.lerp_(written, gate.clamp(GATE_FLOOR, 0).expm1_().neg_())
    state.num_tokens.add_(1)
    rows = (views.value.shape[0], -1, dim)
    query = (q if q.dtype == dtype else q.to(dtype)).reshape(rows)
    slot_query = query
    if q_slot is not None:
        slot_query = (q_slot if q_slot.dtype == dtype else q_slot.to(dtype)).reshape(rows)
    score = torch.bmm(slot_query, views.slot_key)
    if state.window_size:
        score = torch.cat((score, torch.bmm(query, views.window_key)), 2)
    score.mul_(dim**-0.5 if scale is None else scale)
    if softcap is not None:
        score.div_(softcap).tanh_().mul_(softcap)
    out = torch.bmm(score.softmax(2), views.value).view(q.shape[0], 1, q.shape[2], -1)
    return out if state.dtype == dtype else out.to(state.dtype)
