"""NHA in plain PyTorch for any device: exact, chunkwise, O(T) memory, differentiable in every tensor input.

The sequence is processed in groups of a few hundred tokens, sized so that a group's scores stay in the cache. Inside a
group, slots advance in chunks of 16 tokens and window scores are computed in tiles of queries; wide windows are read by
a fused kernel (`nha.ops.fused_window`). The backward pass recomputes one group at a time from the slots before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from nha.ops.backends import needs_grad
from nha.ops.chunk_groups import (
    GATE_FLOOR,
    Group,
    Plan,
    Scores,
    Sizes,
    Workspace,
    by_token,
    group_size,
    heads_first,
    load_group,
    make_plan,
    mask_unwritten,
    scaled_queries,
    score_group,
    slots_only,
    sum_tiles,
    times_q_decay,
    unpack,
    workspace,
)
from nha.ops.full_attention import causal_attention
from nha.ops.fused_window import fused_window_attention, has_fused_window
from nha.ops.padding import align_left, restore
from nha.ops.state import NHAState, advance, slot_dtype


class Options(NamedTuple):
    """How `_forward` reads a segment: its arguments of these names."""

    window: int
    scale: float
    softcap: float
    slots_active: bool
    with_mass: bool
    keep_starts: bool


def _compute(
    out: Tensor, given: tuple[Tensor, ...], first: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Slot mass, slots after the segment, and those before each group (`keep_starts`); the outputs go into `out`.

    `given` are the arguments of `_forward` from `q` to `sink_value`. Slots and sinks are in float32 or float64; the
    others may be in 16 bits where no fused kernel reads the window.
    """
    q, k, v, q_slot, k_slot, log_gate, slots, sink_key, sink_value = given
    batch, length, query_heads, _ = q.shape
    window, scale, softcap, slots_active, with_mass, keep_starts = options
    sinks, num_slots, per_kv = sink_key.shape[1], log_gate.shape[-1], query_heads // k.shape[2]
    sizes = Sizes.of(q, slots)
    plan = make_plan(sizes, length, window)
    log_sum = None
    if has_fused_window(q, v, window, softcap):
        log_sum = fused_window_attention(q, k, v, window=window, scale=scale, first=first, out=out)
        plan = slots_only(plan, sizes, keep_starts)
    mass = slots.new_zeros(batch, length, query_heads)
    starts = []
    with workspace(slots) as space:
        for start, stop in plan.spans():
            if keep_starts:
                starts.append(slots)
            group, slots = load_group((q, k, v, q_slot, k_slot, log_gate), plan, (start, stop), slots, scale, space)
            unused = first if start < window else None
            sums = None if log_sum is None else log_sum[:, start:stop]
            weights = score_group(group, plan, start, sink_key, unused, slots_active, softcap, space, sums).weights
            result = by_token(_read(group, plan, weights, sink_value, space), per_kv, stop - start)
            own = out[:, start:stop].unflatten(2, (-1, per_kv))
            if log_sum is None:
                own.copy_(result)
            else:
                torch.addcmul(result, own, by_token(weights[..., -1:], per_kv, stop - start), out=own)
            if with_mass:
                unpack(weights[..., : sinks + num_slots].sum(-1), per_kv, mass[:, start:stop])
    return mass, slots, starts


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
    first: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
    slots_active: bool,
    with_mass: bool,
    keep_starts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass over T queries; keys, values and gates begin W tokens before the first query.

    q, q_slot [B, T, HQ, D]; k, v, k_slot [B, W + T, H, ...]; log_gate [B, W + T, H, M]; slots [B, H, M, D + Dv];
    first [B] is the first key position in use, None where all are and slots are active. All floating tensors share one
    dtype.
    Returns out [B, T, HQ, Dv], mass [B, T, HQ] (zeros unless `with_mass`), the slots after the segment, and those
    before every group and after (none unless `keep_starts`).
    """
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    options = Options(window, scale, softcap, slots_active, with_mass, keep_starts)
    given = (q, k, v, q_slot, k_slot, log_gate, slots, sink_key, sink_value)
    mass, slots, starts = _compute(out, given, first, options)
    # Those after the segment too: a first dimension that may be 1 would be compiled apart.
    kept = torch.stack([*starts, slots]) if keep_starts else slots.new_empty(0, *slots.shape)
    return out, mass, slots.clone(), kept


def _read(group: Group, plan: Plan, weights: Tensor, sink_value: Tensor, space: Workspace) -> Tensor:
    """The outputs [B, H, size * G, Dv] of a group with these softmax weights."""
    sinks, num_slots, dim = sink_value.shape[1], group.q_decay.shape[-1], group.query.shape[-1]
    on_sink, on_slots, on_window = weights.tensor_split([sinks, sinks + num_slots], -1)
    on_slots = on_slots.unflatten(2, (group.q_decay.shape[2], -1))
    decayed = times_q_decay(on_slots, group, plan, space.take("decayed", *on_slots.shape))
    token_weights = mask_unwritten(space.product("token_weights", decayed, group.k_decay.mT), plan, space)
    result = space.product("result", token_weights, group.token_value)
    result.flatten(0, 2).baddbmm_(decayed.flatten(0, 2), group.slots[..., dim:].flatten(0, 2))
    result = result.flatten(2, 3)
    if group.window_value is not None:
        tiles = group.query.shape[2]
        on_window = on_window.unflatten(2, (tiles, -1)).flatten(0, 2)
        result.unflatten(2, (tiles, -1)).flatten(0, 2).baddbmm_(on_window, group.window_value.flatten(0, 2))
    if sinks:
        values = sink_value.expand(len(result), -1, -1, -1).flatten(0, 1)
        result.flatten(0, 1).baddbmm_(on_sink.flatten(0, 1), values)
    return result


@_forward.register_fake
def _(q, k, v, q_slot, k_slot, log_gate, slots, sink_key, sink_value, first, window, *options):
    length, group = q.shape[1], group_size(Sizes.of(q, slots), window)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    starts = slots.new_empty((length + group - 1) // group + 1 if options[-1] else 0, *slots.shape)
    return out, q.new_empty(q.shape[:3]), torch.empty_like(slots), starts


@dataclass
class _Gradients:
    """Gradients while the groups are added to them; window keys and values are heads first and padded to tiles."""

    q: Tensor
    q_slot: Tensor
    k_slot: Tensor
    log_gate: Tensor
    window_key: Tensor  # [B, H, T + lookback + tile, D]
    window_value: Tensor
    token_value: Tensor  # [B, H, T, Dv], as written to the slots
    sink_key: Tensor
    sink_value: Tensor
    slots: Tensor  # [B, H, M, D + Dv], of the slots after the group that is next


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
    first: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
    slots_active: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, q_slot, k_slot, log_gate, slots, sink key and sink value, group by group from the end."""
    (batch, length), heads = q.shape[:2], k.shape[2]
    plan = make_plan(Sizes.of(q, grad_slots), length, window)
    padded = length + plan.lookback + plan.tile
    grads = _Gradients(
        q=torch.empty_like(q),
        q_slot=torch.empty_like(q_slot),
        k_slot=torch.zeros_like(k_slot),
        log_gate=torch.zeros_like(log_gate),
        window_key=k.new_zeros(batch, heads, padded, k.shape[-1]),
        window_value=v.new_zeros(batch, heads, padded, v.shape[-1]),
        token_value=v.new_zeros(batch, heads, length, v.shape[-1]),
        sink_key=torch.zeros_like(sink_key),
        sink_value=torch.zeros_like(sink_value),
        slots=grad_slots,
    )
    with workspace(q) as space:
        for index, (start, stop) in reversed(list(enumerate(plan.spans()))):
            span = start, stop
            group, _ = load_group((q, k, v, q_slot, k_slot, log_gate), plan, span, starts[index], scale, space)
            unused = first if start < window else None
            scores = score_group(group, plan, start, sink_key, unused, slots_active, softcap, space)
            size = plan.chunk * group.q_decay.shape[2]
            do = scaled_queries(grad_out, heads, span, size, 1.0, space, "do")
            dmass = scaled_queries(grad_mass[..., None], heads, span, size, 1.0, space, "dmass")
            raw = heads_first(log_gate, start, stop, log_gate.new_empty(len(q), heads, size, log_gate.shape[3]))
            _add_group(grads, group, plan, span, scores, (sink_key, sink_value), raw, do, dmass, scale, space)
    if not window:
        grads.q.zero_()
    dk, dv = (_from_padded(x, plan, window + length) for x in (grads.window_key, grads.window_value))
    dv[:, :length] += grads.token_value.transpose(1, 2)
    slots = grads.slots.clone()
    return grads.q, dk, dv, grads.q_slot, grads.k_slot, grads.log_gate, slots, grads.sink_key, grads.sink_value


def _add_group(
    grads: _Gradients,
    group: Group,
    plan: Plan,
    span: tuple[int, int],
    scores: Scores,
    sink: tuple[Tensor, Tensor],
    raw_gate: Tensor,
    do: Tensor,
    dmass: Tensor,
    scale: float,
    space: Workspace,
) -> None:
    """Add one group's gradients: `do` [B, H, size * G, Dv] and `dmass` [B, H, size * G, 1] are those of its outputs."""
    start, stop = span
    sinks, num_slots, chunks = sink[0].shape[1], group.q_decay.shape[-1], group.q_decay.shape[2]
    tiles, per_kv = group.query.shape[2], group.slot_query.shape[3] // plan.chunk
    slot_key, slot_value = group.slots.split([group.query.shape[-1], do.shape[-1]], -1)
    do_chunks = do.unflatten(2, (chunks, -1))
    sizes = [sinks, num_slots, plan.blocks * plan.tile]
    on_sink, on_slots, on_window = scores.weights.split(sizes, -1)
    on_slots = on_slots.unflatten(2, (chunks, -1))
    decayed = times_q_decay(on_slots, group, plan)
    dtoken = mask_unwritten(do_chunks @ group.token_value.transpose(-1, -2), plan, space)
    ddecayed = dtoken @ group.k_decay + do_chunks @ slot_value.transpose(-1, -2)
    dweights = [times_q_decay(ddecayed, group, plan).flatten(2, 3) + dmass]
    if sinks:
        dweights.insert(0, do @ sink[1].transpose(-1, -2) + dmass)
    if group.window_value is not None:
        dweights.append((do.unflatten(2, (tiles, -1)) @ group.window_value.transpose(-1, -2)).flatten(2, 3))
    dscore = torch._softmax_backward_data(  # pyright: ignore[reportPrivateImportUsage]
        torch.cat(dweights, -1), scores.weights, -1, scores.weights.dtype
    )
    if scores.slope is not None:
        dscore *= scores.slope
    d_sink, d_slots, d_window = dscore.split(sizes, -1)
    d_slots = d_slots.unflatten(2, (chunks, -1))

    # Scores read the slots with slot queries, outputs with the weights on the slots.
    dscores = times_q_decay(d_slots, group, plan)
    dq_decay = (d_slots * scores.slot_scores + on_slots * ddecayed).unflatten(3, (plan.chunk, per_kv)).sum(4)
    dqk = mask_unwritten(dscores @ group.k_decay.transpose(-1, -2), plan, space)
    token_weights = mask_unwritten(decayed @ group.k_decay.transpose(-1, -2), plan, space)
    dk_decay = scores.qk.transpose(-1, -2) @ dscores + dtoken.transpose(-1, -2) @ decayed
    d_token_key = dqk.transpose(-1, -2) @ group.slot_query
    d_token_value = token_weights.transpose(-1, -2) @ do_chunks
    d_slot_query = (dqk @ group.token_key + dscores @ slot_key).flatten(2, 3)
    dread = torch.cat([dscores.transpose(-1, -2) @ group.slot_query, decayed.transpose(-1, -2) @ do_chunks], -1)

    dtokens, dk_written, dend = _backward_slots(grads, group, dread)
    dgate = _gate_gradient(group, plan, raw_gate, dq_decay, dk_decay + dk_written, dend)
    d_token_key = (d_token_key + dtokens[..., : group.query.shape[-1]]).flatten(2, 3)
    d_token_value = (d_token_value + dtokens[..., group.query.shape[-1] :]).flatten(2, 3)
    grads.log_gate[:, start:stop] = dgate[:, :, : stop - start].transpose(1, 2)
    grads.k_slot[:, start:stop] = d_token_key[:, :, : stop - start].transpose(1, 2)
    grads.token_value[:, :, start:stop] = d_token_value[:, :, : stop - start]
    if sinks:
        d_slot_query += d_sink @ sink[0]
        grads.sink_key += torch.einsum("bhrs,bhrd->hsd", d_sink, group.slot_query.flatten(2, 3))
        grads.sink_value += torch.einsum("bhrs,bhrd->hsd", on_sink, do)
    unpack(d_slot_query * scale, per_kv, grads.q_slot[:, start:stop])
    if group.window_key is not None:
        d_window, on_window = (x.unflatten(2, (tiles, -1)) for x in (d_window, on_window))
        d_query = (d_window @ group.window_key).flatten(2, 3) * scale
        unpack(d_query, per_kv, grads.q[:, start:stop])
        keys = slice(start, start + plan.lookback + tiles * plan.tile)
        grads.window_key[:, :, keys] += sum_tiles(d_window.transpose(-1, -2) @ group.query, plan)
        grads.window_value[:, :, keys] += sum_tiles(on_window.transpose(-1, -2) @ do.unflatten(2, (tiles, -1)), plan)


def _backward_slots(grads: _Gradients, group: Group, dread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over chunks backwards: gradients of tokens, of k_decay, and of each chunk's total log-gate.

    Through the slots after a chunk, the gradient of its total log-gate is the inner product of these slots with
    their gradient; the choice of `mid` changes no result and is a constant here. `dread` [B, H, n, M, D + Dv] is the
    gradient of the slots that the group's queries read.
    """
    tokens = group.tokens
    written = group.k_decay.transpose(-1, -2) @ tokens
    dwritten, dend = torch.empty_like(written), group.half_decay.new_empty(group.half_decay.shape[:-1])
    for chunk in reversed(range(written.shape[2])):
        half = group.half_decay[:, :, chunk]
        after = half * (group.slots[:, :, chunk] + written[:, :, chunk])
        dend[:, :, chunk] = (after * grads.slots).sum(-1)
        dwritten[:, :, chunk] = half * grads.slots
        grads.slots = half * (dwritten[:, :, chunk] + dread[:, :, chunk])
    return group.k_decay @ dwritten, tokens @ dwritten.transpose(-1, -2), dend


def _gate_gradient(group: Group, plan: Plan, raw: Tensor, dq_decay: Tensor, dk_decay: Tensor, dend: Tensor) -> Tensor:
    """Gradient [B, H, size, M] of log-gates `raw`: L enters through both decays, s = 1 - exp(gate) through k_decay."""
    raw = raw.unflatten(2, (-1, plan.chunk))
    inside = raw.clamp(GATE_FLOOR, 0)
    dtotal = dq_decay * group.q_decay - dk_decay * group.k_decay
    dtotal[..., -1, :] += dend
    dgate = dtotal.flip(-2).cumsum(-2).flip(-2) - inside.exp() * dk_decay / group.q_decay
    return (dgate * (raw == inside)).flatten(2, 3)


def _from_padded(grad: Tensor, plan: Plan, length: int) -> Tensor:
    """[B, H, lookback + T + ..., D] -> [B, W + T, H, D]: lookback and W may differ by part of a tile."""
    grad = grad.transpose(1, 2)
    shift = plan.window - plan.lookback
    grad = F.pad(grad, (0, 0, 0, 0, max(shift, 0), 0))[:, max(-shift, 0) :]
    return grad[:, :length].contiguous()


@_backward.register_fake
def _(grad_out, grad_mass, grad_slots, starts, q, k, v, q_slot, k_slot, log_gate, sink_key, sink_value, *_):
    like = (q, k, v, q_slot, k_slot, log_gate, grad_slots, sink_key, sink_value)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, q_slot, k_slot, log_gate, _, sink_key, sink_value, first, *ctx.options, _, _ = inputs
    ctx.save_for_backward(output[3], q, k, v, q_slot, k_slot, log_gate, sink_key, sink_value, first)
    ctx.set_materialize_grads(True)


def _differentiate(ctx: Any, grad_out: Tensor, grad_mass: Tensor, grad_slots: Tensor, _: Any) -> tuple[Any, ...]:
    grads = _backward(grad_out, grad_mass, grad_slots, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * 7


_forward.register_autograd(_differentiate, setup_context=_save)


def _one_by_one(operator: Any) -> Any:
    """A `vmap` rule that runs an operator on one sample after the other."""

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        samples = []
        for index in range(info.batch_size):
            taken = (x if d is None else x.select(d, index) for x, d in zip(inputs, in_dims, strict=True))
            samples.append(operator(*taken))
        outputs = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


_forward.register_vmap(_one_by_one(_forward))
_backward.register_vmap(_one_by_one(_backward))


def _refuse(*_: Any) -> Any:
    raise NotImplementedError("impl='chunked' has no forward-mode or second derivatives; use impl='reference'")


_backward.register_autograd(_refuse)


class _TransformedBackward(torch.autograd.Function):
    """`_backward` for `torch.func`."""

    generate_vmap_rule = True
    forward = staticmethod(_backward)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_refuse)  # type: ignore[assignment]
    jvp = staticmethod(_refuse)  # type: ignore[assignment]


class _Transformed(torch.autograd.Function):
    """`_forward` for `torch.func`, whose transforms do not see the gradients that operators register."""

    generate_vmap_rule = True
    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)
    jvp = staticmethod(_refuse)  # type: ignore[assignment]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return *_TransformedBackward.apply(*grads[:3], *ctx.saved_tensors, *ctx.options), *[None] * 7


def _is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return stack is not None or forward_ad._current_level >= 0


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
    with_mass: bool = True,
) -> tuple[Tensor, Tensor, NHAState]:
    """Outputs [B, T, HQ, Dv], slot mass [B, T, HQ] and the state after the segment (shapes as `nha_attention`).

    Without `with_mass` the slot mass is zeros.
    """
    count = None
    if attention_mask is not None:
        q, k, v, log_gate, q_slot, k_slot = align_left(attention_mask, q, k, v, log_gate, q_slot, k_slot)
        count = attention_mask.sum(1)
    past, length, dtype = state.key.shape[1], q.shape[1], slot_dtype(q.dtype)
    # A window wider than all tokens would hold no other one; `min` would keep the compiled window a symbol.
    window = state.window_size if past + length >= state.window_size else past + length
    transformed, given = (
        _is_transformed(),
        (q, k, v, log_gate, q_slot, k_slot, *state.tensors().values(), *(sink or ())),
    )
    grad = transformed or needs_grad(given)
    # Queries of a first segment that see nothing but the window are full attention; after them no key is missing.
    # Not where a graph is made, which would serve fewer lengths.
    first = not past and window < length and not state.slots_active
    eager = not grad and not torch.compiler.is_compiling()
    alone = window if first and eager else 0
    window_slot_key = state.key if state.window_slot_key is None else state.window_slot_key

    fused = has_fused_window(q, v, window, softcap or 0.0)
    # Groups of tokens are cast as they are loaded, and the outputs as they are stored.
    read = q.dtype if eager and not fused else dtype
    read_slot = q.dtype if eager else dtype

    def joined(cached: Tensor, new: Tensor, to: torch.dtype = read) -> Tensor:
        if alone or not window:
            return new.to(to)
        return torch.cat([F.pad(cached, (0, 0, 0, 0, window - past, 0)), new], 1).to(to)

    queries = length - alone
    gates = joined(state.window_log_gate, log_gate, log_gate.dtype if eager else dtype)[:, :queries]
    if count is not None:
        written = torch.arange(alone, length, device=q.device) < count[:, None]
        gates = torch.where(written[..., None, None], gates, 0)
    slots = torch.cat([state.slot_key, state.slot_value], -1)
    heads, dim = k.shape[2:]
    if sink is None:
        sink = (k.new_zeros(heads, 0, dim), v.new_zeros(heads, 0, v.shape[-1]))
    given = (
        q[:, alone:].to(read),
        joined(state.key, k),
        joined(state.value, v),
        q_slot[:, alone:].to(read_slot),
        joined(window_slot_key, k_slot, read_slot)[:, :queries],
        gates,
        slots,
        sink[0].to(dtype),
        sink[1].to(dtype),
    )
    unused = None if alone else window - state.num_tokens.clamp_max(window)
    options = Options(window, scale, softcap or 0.0, state.slots_active, with_mass, grad)
    if not eager:
        out, mass, slots, _ = (_Transformed.apply if transformed else _forward)(*given, unused, *options)
    else:
        out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=dtype if fused else v.dtype)
        mass, slots, _ = _compute(out[:, alone:], given, unused, options)
    after = advance(state, k, v, log_gate, k_slot, (slots[..., :dim], slots[..., dim:]), count)
    out = out.to(v.dtype)
    if alone:
        out[:, :alone] = causal_attention(q[:, :alone], k[:, :alone], v[:, :alone], scale=scale, softcap=softcap)
        mass = F.pad(mass, (0, 0, alone, 0)) if with_mass else mass.new_zeros(()).expand(out.shape[:3])
    if attention_mask is not None:
        out, mass = restore(attention_mask, out), restore(attention_mask, mass)
    return out, mass, after
