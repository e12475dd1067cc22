"""NHA in plain PyTorch for any device: exact, chunkwise, O(T) memory, differentiable in every tensor input.

The sequence is walked in groups of a few hundred tokens, sized so that a group's scores stay in the cache.
Inside a group, slots advance in sub-chunks of 16 tokens and window scores are computed in tiles of queries.
The backward pass recomputes one group at a time from the slots at its border.

Per sub-chunk, with `L` the running sum of its log-gates, `mid = L[last] / 2` and `s = 1 - exp(log_gate)`:

    rise = exp(L - mid)      fall = s * exp(mid - L)      half = exp(mid)
    slots read at token i    rise_i * (half * S + sum_{j <= i} fall_j (x) x_j)
    slots after the chunk    half * (half * S + sum_j fall_j (x) x_j)

With log-gates >= -5 no exponent exceeds 40 in size, so float32 holds every factor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nha.ops.padding import align_left, restore
from nha.ops.state import NHAState, advance, slot_dtype
from nha.ops.varlen import each_sequence

CHUNK = 16  # tokens whose gates are factorised together; 16 * 5 / 2 = 40 bounds the exponents
GATE_FLOOR = -5.0
GROUP_ELEMENTS = 1 << 20  # scores of one group, about what stays in the cache


class _Plan(NamedTuple):
    """How a segment is cut: `chunk` tokens a slot step, `tile` queries a window block, `group` tokens a pass."""

    length: int
    window: int
    chunk: int
    tile: int
    group: int
    blocks: int  # key blocks of `tile` tokens that one query tile can see

    @property
    def lead(self) -> int:
        """Key positions needed before the first query, in whole tiles."""
        return (self.blocks - 1) * self.tile if self.window else 0

    def spans(self) -> list[tuple[int, int]]:
        return [(a, min(a + self.group, self.length)) for a in range(0, self.length, self.group)]


def _plan(batch: int, length: int, query_heads: int, slots: int, window: int) -> _Plan:
    chunk = min(CHUNK, length)
    tile = chunk
    while tile < min(window, length) // 2 and tile < 128:
        tile *= 2
    blocks = 1 + -(-(window - 1) // tile) if window else 0
    row = batch * query_heads * (slots + blocks * tile)
    group = tile * max(1, min(GROUP_ELEMENTS // (row * tile), -(-length // tile)))
    return _Plan(length, window, chunk, tile, group, blocks)


class _Group(NamedTuple):
    """One group's tensors, heads first: everything that its scores and outputs are made of."""

    query: Tensor  # [B, H, tiles, tile * G, D], scaled
    slot_query: Tensor  # [B, H, n, chunk * G, D], scaled
    window_key: Tensor | None  # [B, H, tiles, blocks * tile, D]
    window_value: Tensor | None
    token_key: Tensor  # [B, H, n, chunk, D], what the slots take in
    token_value: Tensor
    rise: Tensor  # [B, H, n, chunk, M]
    fall: Tensor
    half: Tensor  # [B, H, n, M, 1]
    slots: Tensor  # [B, H, n, M, D + Dv], half * the slots entering each sub-chunk


def _heads_first(x: Tensor, start: int, stop: int, size: int) -> Tensor:
    """x [B, T, H, D] -> [B, H, size, D] of tokens start..stop; what lies outside the sequence is zero."""
    inside = x[:, max(start, 0) : max(stop, 0)].transpose(1, 2)
    before = max(-start, 0)
    after = size - before - inside.shape[2]
    return F.pad(inside, (0, 0, before, after)) if before or after else inside


def _queries(q: Tensor, heads: int, start: int, stop: int, size: int, scale: float) -> Tensor:
    """q [B, T, H * G, D] -> [B, H, size * G, D], scaled, rows ordered by token and then by head of the group."""
    batch, _, query_heads, dim = q.shape
    part = q[:, start:stop].unflatten(2, (heads, query_heads // heads)).transpose(1, 2) * scale
    part = F.pad(part, (0, 0, 0, 0, 0, size - (stop - start)))
    return part.reshape(batch, heads, -1, dim)


def _tiles(x: Tensor, plan: _Plan) -> Tensor:
    """Keys [B, H, lead + tokens, D] -> the blocks that each query tile sees, [B, H, tiles, blocks * tile, D]."""
    blocks = x.unflatten(2, (-1, plan.tile)).unfold(2, plan.blocks, 1)  # [B, H, tiles, tile, D, blocks]
    return blocks.permute(0, 1, 2, 5, 3, 4).flatten(3, 4)


def _untile(grad: Tensor, plan: _Plan) -> Tensor:
    """The transpose of `_tiles`: gradients of the blocks summed back onto their tokens."""
    grad = grad.unflatten(3, (plan.blocks, plan.tile))
    batch, heads, tiles, _, _, dim = grad.shape
    out = grad.new_zeros(batch, heads, tiles + plan.blocks - 1, plan.tile, dim)
    for block in range(plan.blocks):
        out[:, :, block : block + tiles] += grad[:, :, :, block]
    return out.flatten(2, 3)


def _gates(log_gate: Tensor, plan: _Plan, size: int, span: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """rise, fall, half (module docstring) of one group of log-gates [B, T, H, M]."""
    gate = _heads_first(log_gate, *span, size).clamp(GATE_FLOOR, 0).unflatten(2, (-1, plan.chunk))
    total = gate.cumsum(-2)
    mid = total[..., -1:, :] / 2
    rise = torch.exp(total - mid)
    fall = torch.expm1(gate).neg_() / rise
    return rise, fall, mid.exp().transpose(-1, -2)


def _advance(slots: Tensor, half: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """Slots through the sub-chunks of a group: (half * slots entering each one, slots after the last)."""
    entering = []
    for index in range(written.shape[2]):
        entering.append(half[:, :, index] * slots)
        slots = half[:, :, index] * (entering[-1] + written[:, :, index])
    return torch.stack(entering, 2), slots


def _load(inputs: tuple[Tensor, ...], plan: _Plan, span: tuple[int, int], slots: Tensor, scale: float):
    """The group of one span and the slots after it."""
    q, k, v, q_slot, k_slot, log_gate = inputs
    start, stop = span
    heads, window = k.shape[2], plan.window
    size = -(-(stop - start) // plan.tile) * plan.tile
    rise, fall, half = _gates(log_gate, plan, size, span)
    token_key = _heads_first(k_slot, start, stop, size).unflatten(2, (-1, plan.chunk))
    token_value = _heads_first(v, start, stop, size).unflatten(2, (-1, plan.chunk))
    written = fall.transpose(-1, -2) @ torch.cat([token_key, token_value], -1)
    entering, slots = _advance(slots, half, written)
    window_key = window_value = None
    if window:
        first, last = start + window - plan.lead, start + window + size
        window_key = _tiles(_heads_first(k, first, last, plan.lead + size), plan)
        window_value = _tiles(_heads_first(v, first, last, plan.lead + size), plan)
    query = _queries(q, heads, start, stop, size, scale)
    slot_query = _queries(q_slot, heads, start, stop, size, scale)
    group = _Group(
        query.unflatten(2, (size // plan.tile, -1)),
        slot_query.unflatten(2, (size // plan.chunk, -1)),
        window_key,
        window_value,
        token_key,
        token_value,
        rise,
        fall,
        half,
        entering,
    )
    return group, slots


def _triangle(rows: int, chunk: int, device: torch.device) -> Tensor:
    """[chunk * G, chunk] bool: the tokens of a sub-chunk that a query row has already committed."""
    token = torch.arange(rows, device=device)[:, None] // (rows // chunk)
    return token >= torch.arange(chunk, device=device)


def _band(plan: _Plan, groups: int, like: Tensor) -> Tensor:
    """[tile * G, blocks * tile] of 0 and -inf: the window as a band, its last column the query's own token."""
    query = torch.arange(plan.tile * groups, device=like.device)[:, None] // groups
    distance = query + plan.lead - torch.arange(plan.blocks * plan.tile, device=like.device)
    seen = (distance >= 0) & (distance < plan.window)
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, float("-inf"))


def _weights(
    group: _Group, plan: _Plan, start: int, sink_key: Tensor, first: Tensor, slots_active: bool, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Softmax weights [B, H, size * G, S + M + blocks * tile], slot scores before `rise`, and masked q.k.

    With a softcap also the derivative of the capped scores, shaped as the weights.
    """
    _, _, chunks, rows, dim = group.slot_query.shape
    per_kv = rows // plan.chunk
    qk = group.slot_query @ group.token_key.transpose(-1, -2)
    qk *= _triangle(rows, plan.chunk, qk.device)
    bare = qk @ group.fall + group.slot_query @ group.slots[..., :dim].transpose(-1, -2)
    parts = [_times_rise(bare, group, plan).flatten(2, 3)]
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
        dead = (token < first[:, None]).repeat_interleave(per_kv, 1)[:, None, :, None]
        old = len(parts) - (group.window_key is not None)
        parts[:old] = [part.masked_fill(dead, float("-inf")) for part in parts[:old]]
    if group.window_key is not None:
        score = parts[-1].unflatten(2, (group.window_key.shape[2], -1))
        score += _band(plan, per_kv, score)
        if start < plan.window:
            tile = torch.arange(score.shape[2], device=first.device)[:, None] * plan.tile
            column = torch.arange(score.shape[-1], device=first.device) + start + plan.window - plan.lead
            unseen = tile + column < first[:, None, None]  # [B, tiles, blocks * tile]
            score.masked_fill_(unseen[:, None, :, None], float("-inf"))
    return torch.cat(parts, -1).softmax(-1), bare, qk, slope


def _times_rise(rows: Tensor, group: _Group, plan: _Plan) -> Tensor:
    """[B, H, n, chunk * G, M] times `rise` of each row's token."""
    return (rows.unflatten(3, (plan.chunk, -1)) * group.rise.unsqueeze(4)).flatten(3, 4)


def _masked(rows: Tensor, plan: _Plan) -> Tensor:
    """Zero what a query row has not committed yet, in place: rows [B, H, n, chunk * G, chunk]."""
    return rows.mul_(_triangle(rows.shape[3], plan.chunk, rows.device))


def _unpack(rows: Tensor, per_kv: int, out: Tensor) -> None:
    """Rows [B, H, size * G, ...] into out [B, T, H * G, ...], without the padding of the last group."""
    count, heads = out.shape[1], rows.shape[1]
    rows = rows.unflatten(2, (-1, per_kv))[:, :, :count]
    out.unflatten(2, (heads, per_kv)).copy_(rows.transpose(1, 2))


@torch.library.custom_op("nha::chunked", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_slot: Tensor,
    k_slot: Tensor,
    log_gate: Tensor,
    slots: Tensor,
    sink_key: Tensor,
    sink_value: Tensor,
    first: Tensor,
    window: int,
    scale: float,
    softcap: float,
    slots_active: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass over T queries; keys, values and gates begin W tokens before the first query.

    q, q_slot [B, T, HQ, D]; k, v, k_slot [B, W + T, H, ...]; log_gate [B, W + T, H, M]; slots [B, H, M, D + Dv];
    first [B] is the first key position in use. All floating tensors share one dtype.
    Returns out [B, T, HQ, Dv], mass [B, T, HQ], the slots after the segment and those before every group.
    """
    batch, length, query_heads, dim = q.shape
    sinks, num_slots, per_kv = sink_key.shape[1], log_gate.shape[-1], query_heads // k.shape[2]
    plan = _plan(batch, length, query_heads, num_slots, window)
    out = q.new_empty(batch, length, query_heads, v.shape[-1])
    mass = q.new_empty(batch, length, query_heads)
    starts = []
    for start, stop in plan.spans():
        starts.append(slots)
        group, slots = _load((q, k, v, q_slot, k_slot, log_gate), plan, (start, stop), slots, scale)
        weights, *_ = _weights(group, plan, start, sink_key, first, slots_active, softcap)
        on_sink, on_slots, on_window = weights.split([sinks, num_slots, plan.blocks * plan.tile], -1)
        spread = _times_rise(on_slots.unflatten(2, (group.rise.shape[2], -1)), group, plan)
        result = _masked(spread @ group.fall.transpose(-1, -2), plan) @ group.token_value
        result += spread @ group.slots[..., dim:]
        result = result.flatten(2, 3)
        if group.window_value is not None:
            result += (on_window.unflatten(2, (group.query.shape[2], -1)) @ group.window_value).flatten(2, 3)
        if sinks:
            result += on_sink @ sink_value
        _unpack(result, per_kv, out[:, start:stop])
        _unpack(weights[..., : sinks + num_slots].sum(-1), per_kv, mass[:, start:stop])
    return out, mass, slots.clone(), torch.stack(starts)


@_forward.register_fake
def _(q, k, v, q_slot, k_slot, log_gate, slots, sink_key, sink_value, first, window, *_):
    batch, length, query_heads, _ = q.shape
    plan = _plan(batch, length, query_heads, log_gate.shape[-1], window)
    out = q.new_empty(batch, length, query_heads, v.shape[-1])
    starts = slots.new_empty(len(plan.spans()), *slots.shape)
    return out, q.new_empty(batch, length, query_heads), torch.empty_like(slots), starts


@torch.library.custom_op("nha::chunked_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_mass: Tensor,
    grad_slots: Tensor,
    starts: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_slot: Tensor,
    k_slot: Tensor,
    log_gate: Tensor,
    sink_key: Tensor,
    sink_value: Tensor,
    first: Tensor,
    window: int,
    scale: float,
    softcap: float,
    slots_active: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, q_slot, k_slot, log_gate, slots, sink key and sink value, group by group from the end.

    The choice of `mid` changes no result, so it is a constant here. Through the slots after a sub-chunk, the
    gradient of its total log-gate is the inner product of these slots with their gradient.
    """
    batch, length, query_heads, dim = q.shape
    heads, sinks, num_slots = k.shape[2], sink_key.shape[1], log_gate.shape[-1]
    per_kv = query_heads // heads
    plan = _plan(batch, length, query_heads, num_slots, window)
    dq, dq_slot = torch.empty_like(q), torch.empty_like(q_slot)
    padded = length + plan.lead + plan.tile
    dk, dv = (x.new_zeros(batch, heads, padded, x.shape[-1]) for x in (k, v))
    dv_slot = v.new_zeros(batch, heads, length, v.shape[-1])
    dk_slot, dgate = torch.zeros_like(k_slot), torch.zeros_like(log_gate)
    dsink_key, dsink_value = torch.zeros_like(sink_key), torch.zeros_like(sink_value)
    dslots = grad_slots
    for index, (start, stop) in reversed(list(enumerate(plan.spans()))):
        count = stop - start
        group, _ = _load((q, k, v, q_slot, k_slot, log_gate), plan, (start, stop), starts[index], scale)
        weights, bare, qk, slope = _weights(group, plan, start, sink_key, first, slots_active, softcap)
        tiles, chunks = weights.shape[2] // (plan.tile * per_kv), group.rise.shape[2]
        on_sink, on_slots, on_window = weights.split([sinks, num_slots, plan.blocks * plan.tile], -1)
        on_slots = on_slots.unflatten(2, (chunks, -1))
        spread = _times_rise(on_slots, group, plan)
        slot_key, slot_value = group.slots.split([dim, group.slots.shape[-1] - dim], -1)
        do = _queries(grad_out, heads, start, stop, chunks * plan.chunk, 1.0)
        do_chunks = do.unflatten(2, (chunks, -1))
        dmass = _queries(grad_mass[..., None], heads, start, stop, chunks * plan.chunk, 1.0)

        # Gradients of the softmax weights, then of the scores.
        reach = _masked(do_chunks @ group.token_value.transpose(-1, -2), plan)
        dspread = reach @ group.fall + do_chunks @ slot_value.transpose(-1, -2)
        parts = [_times_rise(dspread, group, plan).flatten(2, 3) + dmass]
        if sinks:
            parts.insert(0, do @ sink_value.transpose(-1, -2) + dmass)
        if group.window_value is not None:
            parts.append((do.unflatten(2, (tiles, -1)) @ group.window_value.transpose(-1, -2)).flatten(2, 3))
        dscore = torch._softmax_backward_data(  # pyright: ignore[reportPrivateImportUsage]
            torch.cat(parts, -1), weights, -1, weights.dtype
        )
        if slope is not None:
            dscore *= slope
        d_sink, d_slots, d_window = dscore.split([sinks, num_slots, plan.blocks * plan.tile], -1)
        d_slots = d_slots.unflatten(2, (chunks, -1))

        # Slots: scores read them with q_slot, outputs with the spread weights.
        dbare = _times_rise(d_slots, group, plan)
        drise = (d_slots * bare + on_slots * dspread).unflatten(3, (plan.chunk, per_kv)).sum(4)
        dqk = _masked(dbare @ group.fall.transpose(-1, -2), plan)
        read = _masked(spread @ group.fall.transpose(-1, -2), plan)
        dfall = qk.transpose(-1, -2) @ dbare + reach.transpose(-1, -2) @ spread
        d_token_key = dqk.transpose(-1, -2) @ group.slot_query
        d_token_value = read.transpose(-1, -2) @ do_chunks
        d_slot_query = (dqk @ group.token_key + dbare @ slot_key).flatten(2, 3)
        dread = torch.cat([dbare.transpose(-1, -2) @ group.slot_query, spread.transpose(-1, -2) @ do_chunks], -1)

        # The recurrence, backwards: what was written, then the slots entering each sub-chunk.
        tokens = torch.cat([group.token_key, group.token_value], -1)
        written = group.fall.transpose(-1, -2) @ tokens
        dwritten, dend = torch.empty_like(written), group.half.new_empty(group.half.shape[:-1])
        for chunk in reversed(range(chunks)):
            half = group.half[:, :, chunk]
            after = half * (group.slots[:, :, chunk] + written[:, :, chunk])
            dend[:, :, chunk] = (after * dslots).sum(-1)
            dwritten[:, :, chunk] = half * dslots
            dslots = half * (dwritten[:, :, chunk] + dread[:, :, chunk])
        dtokens = group.fall @ dwritten
        dfall = dfall + tokens @ dwritten.transpose(-1, -2)
        d_token_key = (d_token_key + dtokens[..., :dim]).flatten(2, 3)
        d_token_value = (d_token_value + dtokens[..., dim:]).flatten(2, 3)

        # Gates: L enters through rise and fall, s = 1 - exp(gate) through fall.
        raw = _heads_first(log_gate, start, stop, chunks * plan.chunk).unflatten(2, (chunks, -1))
        inside = raw.clamp(GATE_FLOOR, 0)
        dtotal = drise * group.rise - dfall * group.fall
        dtotal[..., -1, :] += dend
        dgroup = dtotal.flip(-2).cumsum(-2).flip(-2) - inside.exp() * dfall / group.rise
        dgroup = (dgroup * (raw == inside)).flatten(2, 3)[:, :, :count]

        dgate[:, start:stop] = dgroup.transpose(1, 2)
        dk_slot[:, start:stop] = d_token_key[:, :, :count].transpose(1, 2)
        dv_slot[:, :, start:stop] = d_token_value[:, :, :count]
        if sinks:
            d_slot_query += d_sink @ sink_key
            dsink_key += torch.einsum("bhrs,bhrd->hsd", d_sink, group.slot_query.flatten(2, 3))
            dsink_value += torch.einsum("bhrs,bhrd->hsd", on_sink, do)
        if group.window_key is not None and group.window_value is not None:
            d_window, on_window = (x.unflatten(2, (tiles, -1)) for x in (d_window, on_window))
            d_query = (d_window @ group.window_key).flatten(2, 3) * scale
            _unpack(d_query, per_kv, dq[:, start:stop])
            held = slice(start, start + plan.lead + tiles * plan.tile)
            dk[:, :, held] += _untile(d_window.transpose(-1, -2) @ group.query, plan)
            dv[:, :, held] += _untile(on_window.transpose(-1, -2) @ do.unflatten(2, (tiles, -1)), plan)
        _unpack(d_slot_query * scale, per_kv, dq_slot[:, start:stop])
    if not window:
        dq.zero_()
    dk, dv = (_from_padded(x, plan, window + length) for x in (dk, dv))
    dv[:, :length] += dv_slot.transpose(1, 2)
    return dq, dk, dv, dq_slot, dk_slot, dgate, dslots.clone(), dsink_key, dsink_value


def _from_padded(grad: Tensor, plan: _Plan, length: int) -> Tensor:
    """[B, H, lead + T + ..., D] -> [B, W + T, H, D]: `lead` may be longer or shorter than W by part of a tile."""
    grad = grad.transpose(1, 2)
    shift = plan.window - plan.lead
    grad = F.pad(grad, (0, 0, 0, 0, max(shift, 0), 0))[:, max(-shift, 0) :]
    return grad[:, :length].contiguous()


@_backward.register_fake
def _(grad_out, grad_mass, grad_slots, starts, q, k, v, q_slot, k_slot, log_gate, sink_key, sink_value, *_):
    like = (q, k, v, q_slot, k_slot, log_gate, grad_slots, sink_key, sink_value)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)


def _save(ctx, inputs, output) -> None:
    q, k, v, q_slot, k_slot, log_gate, _, sink_key, sink_value, first, *ctx.options = inputs
    ctx.save_for_backward(output[3], q, k, v, q_slot, k_slot, log_gate, sink_key, sink_value, first)
    ctx.set_materialize_grads(True)


def _differentiate(ctx, grad_out, grad_mass, grad_slots, _):
    grads = _backward(grad_out, grad_mass, grad_slots, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    q_slot: Tensor,
    k_slot: Tensor,
    sink: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    softcap: float | None,
    state: NHAState,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, NHAState]:
    """Outputs [B, T, HQ, Dv], slot mass [B, T, HQ] and the state after the segment (shapes as `nha_attention`)."""
    if cu_seqlens is not None:
        inputs = (q, k, v, log_gate, q_slot, k_slot)
        return each_sequence(chunked, inputs, scale, softcap, state, cu_seqlens, sink)
    count = None
    if attention_mask is not None:
        q, k, v, log_gate, q_slot, k_slot = align_left(attention_mask, q, k, v, log_gate, q_slot, k_slot)
        count = attention_mask.sum(1)
    window, length, dtype = state.window_size, q.shape[1], slot_dtype(q.dtype)
    window_slot_key = state.key if state.window_slot_key is None else state.window_slot_key

    def joined(tail: Tensor, new: Tensor) -> Tensor:
        return torch.cat([tail, new], 1).to(dtype) if window else new.to(dtype)

    gates = joined(state.window_log_gate, log_gate)[:, :length]
    if count is not None:
        kept = torch.arange(length, device=q.device) < count[:, None]
        gates = torch.where(kept[..., None, None], gates, 0)
    slots = torch.cat([state.slot_key, state.slot_value], -1)
    heads, dim = k.shape[2:]
    if sink is None:
        sink = (k.new_zeros(heads, 0, dim), v.new_zeros(heads, 0, v.shape[-1]))
    first = window - state.num_tokens.clamp_max(window)
    out, mass, slots, _ = _forward(
        q.to(dtype),
        joined(state.key, k),
        joined(state.value, v),
        q_slot.to(dtype),
        joined(window_slot_key, k_slot)[:, :length],
        gates,
        slots,
        sink[0].to(dtype),
        sink[1].to(dtype),
        first,
        window,
        scale,
        softcap or 0.0,
        state.slots_active,
    )
    after = advance(state, k, v, log_gate, k_slot, (slots[..., :dim], slots[..., dim:]), count)
    out = out.to(v.dtype)
    if attention_mask is not None:
        out, mass = restore(attention_mask, out), restore(attention_mask, mass)
    return out, mass, after
