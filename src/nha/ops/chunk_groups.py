"""One group of tokens of the chunked implementation: its tensors, decays, scores and softmax weights.

Per chunk, with `L` the running sum of its log-gates, `mid = L[last] / 2` and `s = 1 - exp(log_gate)`:

    q_decay = exp(L - mid)      k_decay = s * exp(mid - L)      half_decay = exp(mid)
    slots read at token i       q_decay_i * (half_decay * S + sum_{j <= i} k_decay_j (x) x_j)
    slots after the chunk       half_decay * half_decay * S + half_decay * sum_j k_decay_j (x) x_j

With log-gates >= -5 no exponent exceeds 16 * 5 / 2 = 40 in size, so float32 holds every factor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16  # tokens whose gates are factorised together: bounds the exponents
MAX_TILE = 128  # queries of a window block
GATE_FLOOR = -5.0
GROUP_ELEMENTS = 1 << 19  # scores of one group, about what stays in the cache


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


def group_size(batch: int, query_heads: int, slots: int, window: int) -> int:
    """Tokens of a group. They do not depend on T, so that one compiled graph serves every length."""
    tile = tile_size(CHUNK, window)
    scores = batch * query_heads * (slots + key_blocks(window, tile) * tile) * tile
    return tile * torch.sym_max(1, GROUP_ELEMENTS // scores)  # type: ignore[return-value]


def make_plan(batch: int, length: int, query_heads: int, slots: int, window: int) -> Plan:
    chunk = min(CHUNK, length)
    tile = tile_size(chunk, min(window, length))
    group = group_size(batch, query_heads, slots, window)
    return Plan(length, window, chunk, tile, group, key_blocks(window, tile))


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
    slots: Tensor  # [B, H, n, M, D + Dv], before each chunk

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


def heads_first(x: Tensor, start: int, stop: int, size: int) -> Tensor:
    """x [B, T, H, D] -> [B, H, size, D] of tokens start..stop; positions outside the sequence are zero."""
    inside = x[:, max(start, 0) : max(stop, 0)].transpose(1, 2)
    before = max(-start, 0)
    after = size - before - inside.shape[2]
    return F.pad(inside, (0, 0, before, after)) if before or after else inside


def scaled_queries(q: Tensor, heads: int, start: int, stop: int, size: int, scale: float) -> Tensor:
    """q [B, T, H * G, D] -> [B, H, size * G, D], scaled, ordered by token and then by head of the group."""
    batch, _, query_heads, dim = q.shape
    part = q[:, start:stop].unflatten(2, (heads, query_heads // heads)).transpose(1, 2) * scale
    part = F.pad(part, (0, 0, 0, 0, 0, size - (stop - start)))
    return part.reshape(batch, heads, -1, dim)


def window_tiles(x: Tensor, plan: Plan) -> Tensor:
    """Keys [B, H, lookback + tokens, D] -> the blocks that each query tile sees, [B, H, tiles, blocks * tile, D]."""
    blocks = x.unflatten(2, (-1, plan.tile)).unfold(2, plan.blocks, 1)  # [B, H, tiles, tile, D, blocks]
    return blocks.permute(0, 1, 2, 5, 3, 4).flatten(3, 4)


def sum_tiles(grad: Tensor, plan: Plan) -> Tensor:
    """The transpose of `window_tiles`: gradients of the blocks summed back onto their tokens."""
    grad = grad.unflatten(3, (plan.blocks, plan.tile))
    batch, heads, tiles, _, _, dim = grad.shape
    out = grad.new_zeros(batch, heads, tiles + plan.blocks - 1, plan.tile, dim)
    for block in range(plan.blocks):
        out[:, :, block : block + tiles] += grad[:, :, :, block]
    return out.flatten(2, 3)


def decays(log_gate: Tensor, plan: Plan, size: int, span: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """q_decay, k_decay, half_decay (module docstring) of one group of log-gates [B, T, H, M]."""
    # Contiguous, or every product would copy the decays that are made of it.
    gate = heads_first(log_gate, *span, size).clamp(GATE_FLOOR, 0).contiguous().unflatten(2, (-1, plan.chunk))
    total = gate.cumsum(-2)
    mid = total[..., -1:, :] / 2
    q_decay = total.sub_(mid).exp_()
    k_decay = gate.expm1_().neg_().div_(q_decay)
    return q_decay, k_decay, mid.exp_().transpose(-1, -2)


def advance_slots(slots: Tensor, half_decay: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """Slots through the chunks of a group: (those before each one, those after the last). `written` is overwritten."""
    written *= half_decay
    decay, before = half_decay.square(), torch.empty_like(written)
    before[:, :, 0] = slots
    last = written.shape[2] - 1
    for index in range(last):
        torch.addcmul(written[:, :, index], decay[:, :, index], before[:, :, index], out=before[:, :, index + 1])
    return before, torch.addcmul(written[:, :, last], decay[:, :, last], before[:, :, last])


def load_group(
    inputs: tuple[Tensor, ...], plan: Plan, span: tuple[int, int], slots: Tensor, scale: float
) -> tuple[Group, Tensor]:
    """The group of one span and the slots after it."""
    q, k, v, q_slot, k_slot, log_gate = inputs
    start, stop = span
    heads, window = k.shape[2], plan.window
    size = -(-(stop - start) // plan.tile) * plan.tile
    q_decay, k_decay, half_decay = decays(log_gate, plan, size, span)
    tokens = torch.cat([heads_first(k_slot, start, stop, size), heads_first(v, start, stop, size)], -1)
    tokens = tokens.unflatten(2, (-1, plan.chunk))
    before, slots = advance_slots(slots, half_decay, k_decay.transpose(-1, -2) @ tokens)
    window_key = window_value = None
    if window:
        first, last = start + window - plan.lookback, start + window + size
        window_key = window_tiles(heads_first(k, first, last, plan.lookback + size), plan)
        window_value = window_tiles(heads_first(v, first, last, plan.lookback + size), plan)
    query = scaled_queries(q, heads, start, stop, size, scale)
    slot_query = scaled_queries(q_slot, heads, start, stop, size, scale)
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


def triangle(rows: int, chunk: int, device: torch.device) -> Tensor:
    """[chunk * G, chunk] bool: the tokens of a chunk that are in the slots at each query."""
    token = torch.arange(rows, device=device)[:, None] // (rows // chunk)
    return token >= torch.arange(chunk, device=device)


def band(plan: Plan, groups: int, like: Tensor) -> Tensor:
    """[tile * G, blocks * tile] of 0 and -inf: the window as a band, its last column the query's own token."""
    query = torch.arange(plan.tile * groups, device=like.device)[:, None] // groups
    distance = query + plan.lookback - torch.arange(plan.blocks * plan.tile, device=like.device)
    visible = (distance >= 0) & (distance < plan.window)
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill_(~visible, float("-inf"))


def score_group(
    group: Group, plan: Plan, start: int, sink_key: Tensor, first: Tensor, slots_active: bool, softcap: float
) -> Scores:
    """Softmax weights of one group, whose first query is `start`."""
    _, _, chunks, rows, dim = group.slot_query.shape
    per_kv = rows // plan.chunk
    qk = group.slot_query @ group.token_key.transpose(-1, -2)
    qk *= triangle(rows, plan.chunk, qk.device)
    slot_scores = (group.slot_query @ group.slots[..., :dim].transpose(-1, -2)).mul_(group.half_decay.mT)
    slot_scores += qk @ group.k_decay
    parts = [times_q_decay(slot_scores, group, plan).flatten(2, 3)]
    if sink_key.shape[1]:
        parts.insert(0, group.slot_query.flatten(2, 3) @ sink_key.transpose(-1, -2))
    if group.window_key is not None:
        parts.append((group.query @ group.window_key.transpose(-1, -2)).flatten(2, 3))
    slope = None
    if softcap:
        parts = [torch.tanh(part / softcap) for part in parts]
        slope = 1 - torch.cat(parts, -1).square()
        parts = [part * softcap for part in parts]
    if not slots_active and start < plan.window:
        token = torch.arange(start, start + chunks * plan.chunk, device=first.device)
        inactive = (token < first[:, None]).repeat_interleave(per_kv, 1)[:, None, :, None]
        count = len(parts) - (group.window_key is not None)
        parts[:count] = [part.masked_fill(inactive, float("-inf")) for part in parts[:count]]
    if group.window_key is not None:
        score = parts[-1].unflatten(2, (group.window_key.shape[2], -1))
        score += band(plan, per_kv, score)
        if start < plan.window:
            tile = torch.arange(score.shape[2], device=first.device)[:, None] * plan.tile
            column = torch.arange(score.shape[-1], device=first.device) + start + plan.window - plan.lookback
            unused = tile + column < first[:, None, None]  # [B, tiles, blocks * tile]
            score.masked_fill_(unused[:, None, :, None], float("-inf"))
    return Scores(torch.cat(parts, -1).softmax(-1), slot_scores, qk, slope)


def times_q_decay(rows: Tensor, group: Group, plan: Plan) -> Tensor:
    """[B, H, n, chunk * G, M] times `q_decay` of each row's token."""
    return (rows.unflatten(3, (plan.chunk, -1)) * group.q_decay.unsqueeze(4)).flatten(3, 4)


def mask_unwritten(rows: Tensor, plan: Plan) -> Tensor:
    """Zero the tokens that are not in the slots yet, in place: rows [B, H, n, chunk * G, chunk]."""
    return rows.mul_(triangle(rows.shape[3], plan.chunk, rows.device))


def unpack(rows: Tensor, per_kv: int, out: Tensor) -> None:
    """Rows [B, H, size * G, ...] into out [B, T, H * G, ...], without the padding of the last group."""
    count, heads = out.shape[1], rows.shape[1]
    rows = rows.unflatten(2, (-1, per_kv))[:, :, :count]
    out.unflatten(2, (heads, per_kv)).copy_(rows.transpose(1, 2))
