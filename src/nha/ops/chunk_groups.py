"""One group of tokens of the chunked implementation: its tensors, decays, scores and softmax weights.

Per chunk, with `L` the running sum of its log-gates, `mid = L[last] / 2` and `s = 1 - exp(log_gate)`:

    q_decay = exp(L - mid)      k_decay = s * exp(mid - L)      half_decay = exp(mid)
    slots read at token i       q_decay_i * (half_decay * S + sum_{j <= i} k_decay_j (x) x_j)
    slots after the chunk       half_decay * half_decay * S + half_decay * sum_j k_decay_j (x) x_j

The slots are kept as half_decay * S, so that no product with them needs another pass.

With log-gates >= -5 no exponent exceeds 16 * 5 / 2 = 40 in size, so float32 holds every factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 16  # tokens whose gates are factorised together: bounds the exponents
MAX_TILE = 128  # queries of a window block
GATE_FLOOR = -5.0
GROUP_ELEMENTS = 3 << 18  # scores and slots of one group, which stay in the cache
MAX_SPARE = 1 << 25  # bytes of a workspace that is kept
MAX_VIEWS = 1 << 10  # of a workspace that is kept: every length of a segment adds some


class Plan(NamedTuple):
    """How a segment is cut: `chunk` tokens per slot step, `tile` queries per window block, `group` tokens per pass."""

    length: int
    window: int
    chunk: int
    tile: int
    group: int
    blocks: int  # key blocks of `tile` tokens that one query tile can see

    @property
    def lookback(self) -> int:
        """Key positions needed before the first query, in whole tiles."""
        return (self.blocks - 1) * self.tile if self.window else 0

    def spans(self) -> list[tuple[int, int]]:
        return [(a, min(a + self.group, self.length)) for a in range(0, self.length, self.group)]


def tile_size(chunk: int, span: int) -> int:
    tile = chunk
    while tile < span // 2 and tile < MAX_TILE:
        tile *= 2
    return tile


def key_blocks(window: int, tile: int) -> int:
    return 1 + -(-(window - 1) // tile) if window else 0


class Sizes(NamedTuple):
    """Sizes of a segment that decide the tokens of a group, besides the window; `width` is D + Dv."""

    batch: int
    query_heads: int
    heads: int
    slots: int
    width: int

    @classmethod
    def of(cls, q: Tensor, slots: Tensor) -> Sizes:
        """The sizes of queries [B, T, HQ, D] and slots [B, H, M, D + Dv]."""
        return cls(q.shape[0], q.shape[2], *slots.shape[1:])


def group_size(sizes: Sizes, window: int) -> int:
    """Tokens of a group. They do not depend on T, so that one compiled graph serves every length."""
    tile = tile_size(CHUNK, window)
    scores = sizes.query_heads * (sizes.slots + key_blocks(window, tile) * tile)
    elements = sizes.batch * tile * (scores + sizes.heads * sizes.slots * sizes.width // CHUNK)
    # Without slots nothing is counted where the window is read elsewhere.
    return tile * torch.sym_max(1, GROUP_ELEMENTS // torch.sym_max(1, elements))  # type: ignore[return-value]


def make_plan(sizes: Sizes, length: int, window: int) -> Plan:
    chunk = min(CHUNK, length)
    tile = tile_size(chunk, min(window, length))
    group = group_size(sizes, window)
    count = -(-length // group)
    group = -(-length // (count * tile)) * tile  # as many groups, of nearly one size
    return Plan(length, window, chunk, tile, group, key_blocks(window, tile))


def slots_only(plan: Plan, sizes: Sizes, same_groups: bool) -> Plan:
    """The plan of a segment whose windows are read elsewhere, in larger groups unless they must stay the same."""
    if not same_groups:
        plan = make_plan(sizes, plan.length, 0)
    return plan._replace(window=0, tile=plan.chunk, blocks=0)


class Workspace:
    """Memory that the groups of a pass use in turn, and one pass after another (`workspace`).

    What is allocated anew costs a page fault for every 4 KiB, which takes as long as some of the products.

    >>> space = Workspace(torch.zeros(1))
    >>> space.take("x", 2, 3).data_ptr() == space.take("x", 5).data_ptr()
    True
    """

    def __init__(self, like: Tensor):
        self.like = like.new_empty(0)
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[tuple[object, ...], Tensor] = {}
        self.parts: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
        self.masks: dict[tuple[object, ...], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in self.buffers.values())

    def take(self, name: str, *shape: int) -> Tensor:
        """The buffer of this name, uninitialised, with this shape; what was taken under the name before is gone."""
        view = self.views.get((name, *shape))
        if view is None:
            size = math.prod(shape)
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape[0] < size:
                buffer = self.buffers[name] = self.like.new_empty(size)
                self.views = {key: own for key, own in self.views.items() if key[0] != name}
                self.parts = {key: own for key, own in self.parts.items() if key[0] != name}
            view = self.views[name, *shape] = buffer[:size].view(shape)
        return view

    def take_chunks(self, name: str, *shape: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`take` of a shape [B, H, n, ...], and its views of each chunk [B, H, ...]."""
        whole = self.take(name, *shape)
        chunks = self.parts.get((name, *shape))
        if chunks is None:
            chunks = self.parts[name, *shape] = whole.unbind(2)
        return whole, chunks

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b` with equal batch dimensions, in the buffer of this name."""
        rows, columns = a.shape[-2], b.shape[-1]
        a, b, batch = a.flatten(0, -3), b.flatten(0, -3), a.shape[:-2]
        torch.bmm(a, b, out=self.take(name, len(a), rows, columns))
        return self.take(name, *batch, rows, columns)


_spare: dict[tuple[object, ...], Workspace] = {}  # workspaces of passes that are over


@contextmanager
def workspace(like: Tensor) -> Iterator[Workspace]:
    """A workspace for tensors like this one; a CPU's is kept for the next pass, unless it is large.

    A pass takes it out of the store, so that threads never share one.

    >>> with workspace(torch.zeros(1)) as one:
    ...     with workspace(torch.zeros(1)) as other:
    ...         one is other
    False
    """
    # What inference mode made cannot be written outside it.
    key = like.dtype, torch.is_inference_mode_enabled()
    kept = type(like) is Tensor and like.device.type == "cpu"
    space = (_spare.pop(key, None) if kept else None) or Workspace(like)
    yield space
    if kept and space.nbytes <= MAX_SPARE and len(space.views) + len(space.parts) + len(space.masks) <= MAX_VIEWS:
        _spare[key] = space


class Group(NamedTuple):
    """One group's tensors, heads first: everything that its scores and outputs are made of."""

    query: Tensor  # [B, H, tiles, tile * G, D], scaled
    slot_query: Tensor  # [B, H, n, chunk * G, D], scaled
    window_key: Tensor | None  # [B, H, tiles, blocks * tile, D]
    window_value: Tensor | None
    tokens: Tensor  # [B, H, n, chunk, D + Dv], keys beside values, written to the slots
    q_decay: Tensor  # [B, H, n, chunk, M]
    k_decay: Tensor
    half_decay: Tensor  # [B, H, n, M, 1]
    slots: Tensor  # [B, H, n, M, D + Dv], before each chunk, times its `half_decay`

    @property
    def token_key(self) -> Tensor:
        return self.tokens[..., : self.query.shape[-1]]

    @property
    def token_value(self) -> Tensor:
        return self.tokens[..., self.query.shape[-1] :]


class Scores(NamedTuple):
    """One group's softmax weights and what their gradients need."""

    weights: Tensor  # [B, H, size * G, S + M + blocks * tile]
    slot_scores: Tensor  # [B, H, n, chunk * G, M], before `q_decay`
    qk: Tensor  # [B, H, n, chunk * G, chunk], masked
    slope: Tensor | None  # with a softcap the derivative of the capped scores, shaped as the weights


def heads_first(x: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
    """Write x [B, T, H, D] of tokens start..stop into out [B, H, size, D]; positions outside the sequence are zero."""
    inside = x[:, max(start, 0) : max(stop, 0)]
    before, count, size = max(-start, 0), inside.shape[1], out.shape[2]
    if before:
        out[:, :, :before].zero_()
    if before + count < size:
        out[:, :, before + count :].zero_()
    (out if count == size else out[:, :, before : before + count]).copy_(inside.transpose(1, 2))
    return out


def scaled_queries(
    q: Tensor, heads: int, span: tuple[int, int], size: int, scale: float, space: Workspace, name: str
) -> Tensor:
    """q [B, T, H * G, D] -> [B, H, size * G, D], scaled, ordered by token and then by head of the group."""
    batch, _, query_heads, dim = q.shape
    count = span[1] - span[0]
    part = q[:, span[0] : span[1]].unflatten(2, (heads, query_heads // heads)).transpose(1, 2)
    rows = space.take(name, batch, heads, size, query_heads // heads, dim)
    if count < size:
        rows[:, :, count:].zero_()
    inside = rows if count == size else rows[:, :, :count]
    if q.dtype == rows.dtype:
        torch.mul(part, scale, out=inside)
    else:
        inside.copy_(part).mul_(scale)
    return space.take(name, batch, heads, size * query_heads // heads, dim)


def window_tiles(x: Tensor, plan: Plan, span: tuple[int, int], space: Workspace, name: str) -> Tensor:
    """Keys [B, T, H, D] of a span -> the blocks that each query tile sees, [B, H, tiles, blocks * tile, D].

    The span are `lookback` tokens and those of whole tiles; positions outside the sequence are zero.
    """
    (start, stop), (batch, _, heads, dim), tile = span, x.shape, plan.tile
    count = (stop - start) // tile - plan.blocks + 1
    tiles = space.take(name, batch, heads, count, plan.blocks * tile, dim)
    if start < 0 or stop > x.shape[1]:
        inside = heads_first(x, start, stop, space.take(name + "_inside", batch, heads, stop - start, dim))
    else:
        inside = x[:, start:stop].transpose(1, 2)
    blocks = inside.unfold(2, plan.blocks * tile, tile)  # [B, H, tiles, D, blocks * tile]
    return tiles.copy_(blocks.mT)


def sum_tiles(grad: Tensor, plan: Plan) -> Tensor:
    """The transpose of `window_tiles`: gradients of the blocks summed back onto their tokens."""
    grad = grad.unflatten(3, (plan.blocks, plan.tile))
    batch, heads, tiles, _, _, dim = grad.shape
    out = grad.new_zeros(batch, heads, tiles + plan.blocks - 1, plan.tile, dim)
    for block in range(plan.blocks):
        out[:, :, block : block + tiles] += grad[:, :, :, block]
    return out.flatten(2, 3)


def decays(
    log_gate: Tensor, plan: Plan, size: int, span: tuple[int, int], space: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """q_decay, k_decay, half_decay (module docstring) of one group of log-gates [B, T, H, M]."""
    batch, _, heads, slots = log_gate.shape
    # Contiguous, or every product would copy the decays that are made of it.
    heads_first(log_gate, *span, space.take("k_decay", batch, heads, size, slots))
    gate = space.take("k_decay", batch, heads, size // plan.chunk, plan.chunk, slots).clamp_(GATE_FLOOR, 0)
    total = torch.cumsum(gate, -2, out=space.take("q_decay", *gate.shape))
    mid = total[..., -1:, :] / 2
    q_decay = total.sub_(mid).exp_()
    k_decay = gate.expm1_().neg_().div_(q_decay)
    return q_decay, k_decay, mid.exp_().transpose(-1, -2)


def advance_slots(
    slots: Tensor, tokens: Tensor, k_decay: Tensor, half_decay: Tensor, space: Workspace
) -> tuple[Tensor, Tensor]:
    """Slots through the chunks of a group: (those before each one times its `half_decay`, those after the last)."""
    decay, factors = space.take_chunks("decay", *half_decay.shape)
    torch.mul(half_decay[:, :, :-1], half_decay[:, :, 1:], out=decay[:, :, :-1])
    factors[-1].copy_(half_decay[:, :, -1])
    decay_to_next = torch.mul(k_decay, decay.mT, out=space.take("decay_to_next", *k_decay.shape))
    written = space.product("written", decay_to_next.mT, tokens)
    _, writes = space.take_chunks("written", *written.shape)
    before, states = space.take_chunks("slots", *written.shape)
    torch.mul(slots, half_decay[:, :, 0], out=states[0])
    for state, write, factor, following in zip(states, writes, factors, states[1:], strict=False):
        torch.addcmul(write, factor, state, out=following)
    return before, torch.addcmul(writes[-1], factors[-1], states[-1])


def load_group(
    inputs: tuple[Tensor, ...], plan: Plan, span: tuple[int, int], slots: Tensor, scale: float, space: Workspace
) -> tuple[Group, Tensor]:
    """The group of one span, in the memory of `space`, and the slots after it."""
    q, k, v, q_slot, k_slot, log_gate = inputs
    start, stop = span
    heads, window = k.shape[2], plan.window
    size = -(-(stop - start) // plan.tile) * plan.tile
    q_decay, k_decay, half_decay = decays(log_gate, plan, size, span, space)
    batch, dim, width = q.shape[0], q.shape[3], slots.shape[3]
    tokens = space.take("tokens", batch, heads, size, width)
    heads_first(k_slot, start, stop, tokens[..., :dim])
    heads_first(v, start, stop, tokens[..., dim:])
    tokens = space.take("tokens", batch, heads, size // plan.chunk, plan.chunk, width)
    before, slots = advance_slots(slots, tokens, k_decay, half_decay, space)
    window_key = window_value = None
    if window:
        first, last = start + window - plan.lookback, start + window + size
        window_key = window_tiles(k, plan, (first, last), space, "keys")
        window_value = window_tiles(v, plan, (first, last), space, "values")
    query = scaled_queries(q, heads, span, size, scale, space, "query")
    slot_query = scaled_queries(q_slot, heads, span, size, scale, space, "slot_query")
    group = Group(
        query.unflatten(2, (size // plan.tile, -1)),
        slot_query.unflatten(2, (size // plan.chunk, -1)),
        window_key,
        window_value,
        tokens,
        q_decay,
        k_decay,
        half_decay,
        before,
    )
    return group, slots


def triangle(rows: int, chunk: int, space: Workspace) -> Tensor:
    """[chunk * G, chunk] of 0 and 1: the tokens of a chunk that are in the slots at each query."""
    found = space.masks.get(key := (rows, chunk))
    if found is None:
        device = space.like.device
        token = torch.arange(rows, device=device)[:, None] // (rows // chunk)
        found = space.masks[key] = (token >= torch.arange(chunk, device=device)).to(space.like.dtype)
    return found


def band(plan: Plan, groups: int, space: Workspace) -> Tensor:
    """[tile * G, blocks * tile] of 0 and -inf: the window as a band, its last column the query's own token."""
    key = plan.tile, plan.window, groups
    found = space.masks.get(key)
    if found is None:
        device = space.like.device
        query = torch.arange(plan.tile * groups, device=device)[:, None] // groups
        distance = query + plan.lookback - torch.arange(plan.blocks * plan.tile, device=device)
        visible = (distance >= 0) & (distance < plan.window)
        none = torch.zeros_like(visible, dtype=space.like.dtype)
        found = space.masks[key] = none.masked_fill_(~visible, float("-inf"))
    return found


def score_group(
    group: Group,
    plan: Plan,
    start: int,
    sink_key: Tensor,
    first: Tensor | None,
    slots_active: bool,
    softcap: float,
    space: Workspace,
    log_sum: Tensor | None = None,
) -> Scores:
    """Softmax weights of one group, whose first query is `start`, in the memory of `space`.

    `first` [B] is the first key position in use, None where all are and slots are active. Where the window is read
    elsewhere, `log_sum` [B, tokens, HQ] is its log-sum-exp, and the last column of the weights that of its output.
    """
    batch, heads, chunks, rows, dim = group.slot_query.shape
    per_kv, sinks, num_slots = rows // plan.chunk, sink_key.shape[1], group.q_decay.shape[-1]
    width = plan.blocks * plan.tile if log_sum is None else 1
    score = space.take("score", batch, heads, chunks * rows, sinks + num_slots + width)
    on_sink, on_slots, on_window = score.split([sinks, num_slots, width], -1)
    if log_sum is not None:
        pack(log_sum[..., None], per_kv, on_window)
    qk = mask_unwritten(space.product("qk", group.slot_query, group.token_key.mT), plan, space)
    slot_scores = space.product("slot_scores", group.slot_query, group.slots[..., :dim].mT)
    slot_scores.flatten(0, 2).baddbmm_(qk.flatten(0, 2), group.k_decay.flatten(0, 2))
    times_q_decay(slot_scores, group, plan, on_slots.unflatten(2, (chunks, -1)))
    if sinks:
        on_sink.copy_(group.slot_query.flatten(2, 3) @ sink_key.mT)
    tiles = None
    if group.window_key is not None:
        tiles = on_window.unflatten(2, (group.window_key.shape[2], -1))
        scores = space.product("window_scores", group.query, group.window_key.mT)
        tiles = tiles.copy_(scores) if softcap else torch.add(scores, band(plan, per_kv, space), out=tiles)
    slope = None
    if softcap:
        score.div_(softcap).tanh_()
        slope = 1 - score.square()
        score.mul_(softcap)
        tiles = None if tiles is None else tiles.add_(band(plan, per_kv, space))
    if first is not None:
        if not slots_active:
            token = torch.arange(start, start + chunks * plan.chunk, device=first.device)
            inactive = (token < first[:, None]).repeat_interleave(per_kv, 1)[:, None, :, None]
            score[..., : sinks + num_slots].masked_fill_(inactive, float("-inf"))
        if tiles is not None:
            tile = torch.arange(tiles.shape[2], device=first.device)[:, None] * plan.tile
            column = torch.arange(tiles.shape[-1], device=first.device) + start + plan.window - plan.lookback
            unused = tile + column < first[:, None, None]  # [B, tiles, blocks * tile]
            tiles.masked_fill_(unused[:, None, :, None], float("-inf"))
    return Scores(torch.softmax(score, -1, out=score), slot_scores, qk, slope)


def times_q_decay(rows: Tensor, group: Group, plan: Plan, out: Tensor | None = None) -> Tensor:
    """[B, H, n, chunk * G, M] times `q_decay` of each row's token."""
    wide = None if out is None else out.unflatten(3, (plan.chunk, -1))
    return torch.mul(rows.unflatten(3, (plan.chunk, -1)), group.q_decay.unsqueeze(4), out=wide).flatten(3, 4)


def mask_unwritten(rows: Tensor, plan: Plan, space: Workspace) -> Tensor:
    """Zero the tokens that are not in the slots yet, in place: rows [B, H, n, chunk * G, chunk]."""
    return rows.mul_(triangle(rows.shape[3], plan.chunk, space))


def pack(x: Tensor, per_kv: int, out: Tensor) -> None:
    """Values [B, T, H * G, ...] into the rows [B, H, size * G, ...] of a group; zeros behind the last token."""
    count, heads = x.shape[1], out.shape[1]
    rows = out.unflatten(2, (-1, per_kv))
    rows[:, :, :count] = x.unflatten(2, (heads, per_kv)).transpose(1, 2)
    rows[:, :, count:] = 0


def unpack(rows: Tensor, per_kv: int, out: Tensor) -> None:
    """Rows [B, H, size * G, ...] into out [B, T, H * G, ...], without the padding of the last group."""
    out.unflatten(2, (rows.shape[1], per_kv)).copy_(by_token(rows, per_kv, out.shape[1]))


def by_token(rows: Tensor, per_kv: int, count: int) -> Tensor:
    """Rows [B, H, size * G, ...] as [B, count, H, G, ...], without the padding of the last group."""
    return rows.unflatten(2, (-1, per_kv))[:, :, :count].transpose(1, 2)
