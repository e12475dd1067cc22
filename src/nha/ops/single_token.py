"""One token of each sequence on a CPU: a step of few operations that writes into its state.

On a CPU a token waits for the calls of small operations and for the memory that it reads. Keys and values of sink,
slots and window therefore lie in one buffer without gaps: one softmax and one product with the values serve all three,
and no tensor is copied to grow. What a token adds to the slots is not read before it leaves the window and lies
elsewhere. Its log-gates may even be computed later: a layer reads the weights of its gate once for a block of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nha.ops.backends import needs_grad
from nha.ops.chunk_groups import GATE_FLOOR
from nha.ops.padding import readable
from nha.ops.state import NHAState

MAX_BLOCK = 16  # tokens whose log-gates are computed at once, if the window is as long
SPARE = 128  # places for tokens to come, in the buffer of a window that is not full yet
Sink = tuple[Tensor, Tensor]  # key [H, S, D], value [H, S, Dv]
Gates = Callable[[Tensor], Tensor]  # log-gates [B, n, H, M] of hidden states [B, n, hidden]


class Views(NamedTuple):
    """Parts of a buffer as the operations of a step take them: making a view takes as long as a small product."""

    slot_key: Tensor  # [B * H, D, S + M]
    window_key: Tensor  # [B * H, D, R]
    value: Tensor  # [B * H, S + M + R, Dv]
    slots: Tensor  # [B, H, M, D + Dv], keys beside values

    @classmethod
    def of(cls, memory: Tensor, dim: int, slots: int, room: int) -> Views:
        first, rows = memory.shape[2] - room, memory.flatten(0, 1)
        return cls(
            rows[:, :first, :dim].transpose(1, 2),
            rows[:, first:, :dim].transpose(1, 2),
            rows[:, :, dim:],
            memory[:, :, first - slots : first],
        )


class Block(NamedTuple):
    """Neighbours in the ring: tokens that leave one after the other, and the places of those that come."""

    start: int  # index in the ring of the first
    places: tuple[Tensor, ...]  # [B, H, 1, D + Dv] each: key and value
    slot_keys: tuple[Tensor, ...]  # [B, H, 1, D] each
    written: tuple[Tensor, ...]  # [B, H, 1, D + Dv] each, what a token that leaves adds to the slots
    shares: tuple[Tensor, ...]  # [B, H, M, 1] each, 1 - exp(log-gate) of it


@dataclass
class Pending:
    """Tokens of the present block whose log-gates nobody has computed yet, and how to."""

    gates: Gates
    hidden: Tensor  # [B, block, hidden], the hidden states that the gates are computed from, by place in the block
    rows: tuple[Tensor, ...]  # [B, 1, hidden] each, of `hidden`
    count: int = 0  # how many of the newest tokens are pending


@dataclass(kw_only=True)
class FusedRing(NHAState):
    """A state in one buffer that `read_token` updates in place.

    The tensors of an `NHAState` are views of the buffer, those of the window in ring order: the newest of n tokens of
    the longest sequence lies at index (n - 1) mod W for all sequences, so that a copy continues with the same bits.
    A window that is not full yet has room for R tokens, and gets more when they are there.
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
    memory: Tensor  # [B, H, S + M + R, D + Dv]: keys and values of sink, slots and window
    waiting: Tensor  # [B, H, R, D + M]: slot keys and log-gates of the window
    views: Views
    held: int  # tokens in the window, the same number for all sequences while they are fewer than W
    cursor: int  # index in the ring of the oldest token, where the next one goes
    block_size: int  # tokens of a block, but for the last of the ring, which may be shorter; 0 without a window
    block: Block | None = None  # the one of the cursor; None without a window
    pending: Pending | None = None
    sink: Sink | None = None  # what the first S places hold
    sink_version: tuple[int, ...] = ()
    steps: int = 0  # tokens that `num_tokens` does not count yet

    @classmethod
    def of(cls, state: NHAState, sink: Sink | None = None) -> FusedRing:
        """A copy of a state, without gradients, that `supports_step`."""
        state, window = state.aligned(), state.window_size
        held, block = state.key.shape[1], block_size(window)
        room = min(window, -(-(held + SPARE) // block) * block) if block else 0
        batch, heads, slots, dim = state.slot_key.shape
        value_dim, sinks = state.slot_value.shape[3], 0 if sink is None else sink[0].shape[1]
        first = sinks + slots
        memory = state.slot_key.new_zeros(batch, heads, first + room, dim + value_dim)
        waiting = state.slot_key.new_zeros(batch, heads, room, dim + slots)  # log-gates of 0 write nothing
        key, value = memory.split([dim, value_dim], -1)
        slot_key, gate = waiting.transpose(1, 2).split([dim, slots], -1)
        ring = cls(
            window_size=window,
            slot_key=key[:, :, sinks:first],
            slot_value=value[:, :, sinks:first],
            key=key[:, :, first:].transpose(1, 2),
            value=value[:, :, first:].transpose(1, 2),
            window_slot_key=None if state.window_slot_key is None else slot_key,
            window_log_gate=gate,
            num_tokens=state.num_tokens.detach().clone(),
            slots_active=state.slots_active,
            num_kept=None if state.num_kept is None else state.num_kept.detach().clone(),
            dtype=state.key.dtype,
            gate_dtype=state.window_log_gate.dtype,
            memory=memory,
            waiting=waiting,
            views=Views.of(memory, dim, slots, room),
            held=held,
            cursor=int(state.num_tokens.max()) % window if window else 0,
            block_size=block,
        )
        slot_ring = state.key if state.window_slot_key is None else state.window_slot_key
        ring.slot_key.copy_(state.slot_key.detach())
        ring.slot_value.copy_(state.slot_value.detach())
        ring.key[:, :held] = _rolled(state.key.detach(), ring.cursor)
        ring.value[:, :held] = _rolled(state.value.detach(), ring.cursor)
        slot_key[:, :held] = _rolled(slot_ring.detach(), ring.cursor)
        ring.window_log_gate[:, :held] = _rolled(state.window_log_gate.detach(), ring.cursor)
        ring.hold_sink(sink)
        if window:
            ring.open_block()
        return ring

    def hold_sink(self, sink: Sink | None) -> bool:
        """Write a sink into the buffer, unless it holds it; False if it has no place for one of this size."""
        held, dim = self.sink, self.key.shape[3]
        if sink is None or (held is not None and held[0] is sink[0] and held[1] is sink[1]):
            versions = () if sink is None else (_version(sink[0]), _version(sink[1]))
            if versions == self.sink_version and -1 not in versions:
                return True
        sinks = 0 if sink is None else sink[0].shape[1]
        if sinks != self.memory.shape[2] - self.slot_key.shape[2] - self.room:
            return False
        if sink is not None:
            self.memory[:, :, :sinks, :dim] = sink[0].detach()
            self.memory[:, :, :sinks, dim:] = sink[1].detach()
            self.sink, self.sink_version = sink, (_version(sink[0]), _version(sink[1]))
        return True

    @property
    def room(self) -> int:
        """Tokens of the window that the buffer has places for."""
        return self.waiting.shape[2]

    @property
    def is_filling(self) -> bool:
        """Whether the window is not full: no token has left it, and neither sink nor slots are read."""
        return self.held < self.window_size

    @property
    def num_tokens(self) -> Tensor:
        """[B] int64, tokens read by each sequence so far."""
        if self.steps:
            self._num_tokens, self.steps = self._num_tokens + self.steps, 0
        return self._num_tokens

    @num_tokens.setter
    def num_tokens(self, number: Tensor) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._num_tokens = number

    def rows(self, q: Tensor) -> Tensor:
        """Queries [B, 1, HQ, D] or [B, HQ, 1, D] as the products of a step take them, [B * H, HQ / H, D]."""
        q = q if q.dtype == self.memory.dtype else q.to(self.memory.dtype)
        return q.reshape(self.views.value.shape[0], -1, q.shape[3])

    def open_block(self) -> None:
        """Begin the block of the cursor, whose tokens leave from now on."""
        dim, start = self.key.shape[3], self.cursor - self.cursor % self.block_size
        size = min(self.block_size, self.room - start)
        first = self.memory.shape[2] - self.room + start
        places, waiting = self.memory[:, :, first : first + size], self.waiting[:, :, start : start + size]
        slot_keys, gate = waiting[..., :dim], waiting[..., dim:]
        written = torch.cat((slot_keys, places[..., dim:]), 3)
        share = gate.clamp(GATE_FLOOR, 0).expm1_().neg_().unsqueeze(4)
        self.block = Block(start, places.split(1, 2), slot_keys.split(1, 2), written.split(1, 2), share.unbind(2))

    def defer_gates(self, gates: Gates, like: Tensor) -> Pending:
        """From now on let `gates` compute log-gates when they are needed, from hidden states like these [B, 1, hidden].

        A block's gates are computed together, in one shape wherever its tokens came from: the same bits.
        """
        if self.pending is not None:
            self.settle(self.cursor)
        with torch.inference_mode(self.memory.is_inference()):
            hidden = like.new_zeros(like.shape[0], self.block_size, like.shape[2])
        self.pending = Pending(gates, hidden, hidden.split(1, 1))
        return self.pending

    def move_on(self) -> None:
        """Move the cursor to the next token, past the end of a block perhaps."""
        stop = self.cursor + 1
        self.held = max(self.held, stop)
        self.cursor = stop % self.window_size
        if self.cursor % self.block_size == 0:
            self.settle(stop)
            if self.cursor == self.room:
                self.make_room()
            else:
                self.open_block()

    def make_room(self) -> None:
        """Move to a buffer with places for more tokens of the window."""
        pending = self.pending
        vars(self).update(vars(FusedRing.of(self.aligned(), self.sink)))
        self.pending = pending

    def settle(self, stop: int) -> None:
        """Compute and store the log-gates that are pending, of the tokens before index `stop` of the ring."""
        pending = self.pending
        if pending is None or not pending.count:
            return
        end = (stop - 1) % self.block_size + 1
        with torch.inference_mode(self.memory.is_inference()), torch.no_grad(), torch.autocast("cpu", enabled=False):
            gates = pending.gates(pending.hidden)[:, end - pending.count : end]
            self.window_log_gate[:, stop - pending.count : stop] = gates
        pending.count = 0

    def aligned(self) -> NHAState:
        """A copy of the state with its window oldest first, as in an `NHAState`."""
        self.settle(self.cursor)
        slot_ring = self.window_slot_key

        def oldest_first(x: Tensor, dtype: torch.dtype) -> Tensor:
            return _rolled(x[:, : self.held], -self.cursor).to(dtype)

        return NHAState(
            window_size=self.window_size,
            slot_key=self.slot_key.clone(memory_format=torch.contiguous_format),
            slot_value=self.slot_value.clone(memory_format=torch.contiguous_format),
            key=oldest_first(self.key, self.dtype),
            value=oldest_first(self.value, self.dtype),
            window_slot_key=None if slot_ring is None else oldest_first(slot_ring, self.dtype),
            window_log_gate=oldest_first(self.window_log_gate, self.gate_dtype),
            num_tokens=self.num_tokens.clone(),
            slots_active=self.slots_active,
            num_kept=None if self.num_kept is None else self.num_kept.clone(),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the tensors of an `NHAState`."""
        return self.aligned().tensors()

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers, what a block writes and the hidden states of gates to come."""
        held = [self.memory, self.waiting, self.num_tokens]
        held += [] if self.num_kept is None else [self.num_kept]
        held += [] if self.pending is None else [self.pending.hidden]
        size = sum(x.nbytes for x in held)
        if self.block is not None:  # a shorter one counts as a whole block: the size does not change with the cursor
            size += self.block_size * (self.block.written[0].nbytes + self.block.shares[0].nbytes)
        return size

    def map(self, function: Any) -> NHAState:
        """An `NHAState` with a function applied to each of its tensors."""
        return self.aligned().map(function)

    def padded(self) -> NHAState:
        """The `NHAState` with room for its whole window."""
        return self.aligned().padded()

    def __reduce__(self) -> Any:
        return _same, (self.aligned(),)


def block_size(window: int) -> int:
    """Tokens of a block: the fewest blocks of at most `MAX_BLOCK` tokens make up a window.

    >>> [block_size(window) for window in (0, 5, 25, 64)]
    [0, 5, 13, 16]
    """
    return -(-window // -(-window // MAX_BLOCK)) if window else 0


def _same(state: NHAState) -> NHAState:
    return state


def _version(x: Tensor) -> int:
    """The number of writes to a tensor; -1 where PyTorch does not count them."""
    return -1 if x.is_inference() else x._version


def _rolled(x: Tensor, shift: int) -> Tensor:
    """A contiguous copy of x [B, W, H, ...], rolled along W."""
    return x.roll(shift, 1) if x.shape[1] else x.clone(memory_format=torch.contiguous_format)


def supports_step(state: NHAState | None, tensors: tuple[Tensor | None, ...], *, may_be_filling: bool = False) -> bool:
    """Whether `read_token` can continue `state` with `tensors`, one token of each sequence, the first of them queries.

    It can on a CPU where no gradient is needed, no graph is traced and the window is full. Where it `may_be_filling`, a
    window of fewer tokens does too, as many for each sequence: the numbers, but not the bits of full attention.

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
    held = state.key.shape[1]
    if type(state) is not NHAState or not readable(state.num_tokens):
        return False
    if torch.is_grad_enabled() and needs_grad([*state.tensors().values()]):
        return False
    if held == state.window_size:
        return int(state.num_tokens.min()) >= max(held, 1)
    return may_be_filling and held > 0 and not state.slots_active and bool((state.num_tokens == held).all())


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
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    k_slot = k if k_slot is None else k_slot.transpose(1, 2)
    query = state.rows(q)
    slot_query = query if q_slot is None else state.rows(q_slot)
    token = torch.cat((k, v, k_slot), 3)
    if state.block is None:
        write_token(state, token, log_gate)
    else:
        state.settle(state.cursor)  # the newest tokens are pending, and this one is not
        state.window_log_gate[:, state.cursor : state.cursor + 1] = log_gate
    out = read_rows(state, query, slot_query, token, scale=scale, softcap=softcap)
    return out.view(k.shape[0], 1, -1, v.shape[3])


def write_token(state: FusedRing, token: Tensor, log_gate: Tensor) -> None:
    """Write a token [B, H, 1, D + Dv + D], key, value and slot key, with log-gates [B, 1, H, M] to the slots."""
    dtype, dim = state.memory.dtype, state.key.shape[3]
    share = log_gate.transpose(1, 2).mT.to(dtype).clamp(GATE_FLOOR, 0).expm1_().neg_()
    state.views.slots.lerp_(torch.cat((token[..., -dim:], token[..., dim:-dim]), 3).to(dtype), share)


def read_rows(
    state: FusedRing,
    query: Tensor,
    slot_query: Tensor,
    token: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """`read_token` of `rows` of queries and of a token [B, H, 1, D + Dv + D]: key, value and slot key side by side.

    The outputs are [B * H, HQ / H, Dv]. Without a window the token must be in the slots already. The log-gates of a
    window are computed when they are needed from the token's `hidden` states [B, 1, hidden] (`defer_gates`), or the
    caller writes them. With a scale of 1 the queries are scaled already.
    """
    views, block, value = state.views, state.block, state.views.value
    if block is not None:
        place, dim = state.cursor - block.start, query.shape[2]
        views.slots.lerp_(block.written[place], block.shares[place])  # the token that leaves
        block.places[place].copy_(token[..., :-dim])
        block.slot_keys[place].copy_(token[..., -dim:])
    if state.is_filling:
        first, stop = views.slot_key.shape[2], state.cursor + 1
        score, value = torch.bmm(query, views.window_key[..., :stop]), value[:, first : first + stop]
    else:
        score = torch.bmm(slot_query, views.slot_key)
        if block is not None:
            score = torch.cat((score, torch.bmm(query, views.window_key)), 2)
    if scale != 1:
        score.mul_(query.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        score.div_(softcap).tanh_().mul_(softcap)
    out = torch.bmm(score.softmax(2), value)
    state.steps += 1
    if block is not None:
        pending = state.pending
        if hidden is not None and pending is not None:
            pending.rows[state.cursor - block.start].copy_(hidden)
            pending.count += 1
        state.move_on()
    return out if state.dtype == out.dtype else out.to(state.dtype)
