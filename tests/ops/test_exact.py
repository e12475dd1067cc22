"""Exact slots: which tokens are kept and where, in segments, rows and packs, and what gradient their scores get."""

from __future__ import annotations

import math

import pytest
import torch

from nha import NativeHybridAttention, NHAState, load_state, nha_attention, save_state
from nha.layer import write_order
from nha.ops import RingState
from nha.ops.exact import FILL, WRITE, WriteOrder, exact_log_gate, kept_tokens
from nha.ops.packed_state import PackedState
from tests.builders import Case, make
from tests.inputs import assert_close_to

LEFT = math.exp(WRITE)  # what a write leaves of a slot


def scores(batch=1, length=30, heads=2, seed=0, dtype=torch.float64):
    return torch.randn(batch, length, heads, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def alone(score, slots, kept=None, start=0, **options):
    index = start + torch.arange(score.shape[1]).expand(score.shape[0], -1)
    return exact_log_gate(score, slots, WriteOrder(index, kept), **options)


def oracle(inputs, score, head, window, slots):
    """Outputs [T, D] of one query and KV head: a list of slots, written one by one as tokens leave the window."""
    q, k, v, q_slot, k_slot = (inputs[n][0, :, head] for n in ("q", "k", "v", "q_slot", "k_slot"))
    places, kept, outs = {}, 0, []
    memory = [(torch.zeros_like(k[0]), torch.zeros_like(v[0]))] * slots
    for token in range(len(q)):
        if score[0, token, head] > 0:
            places[token], kept = kept % slots, kept + 1
        elif token < slots:
            places[token] = slots - 1 - (token - kept)
        leaves = token - window
        if leaves in places:
            old = memory[places[leaves]]
            new = (k_slot[leaves], v[leaves])
            mixed = tuple(LEFT * x + (1 - LEFT) * y for x, y in zip(old, new, strict=True))
            memory = [mixed if place == places[leaves] else slot for place, slot in enumerate(memory)]
        near = range(max(0, leaves + 1), token + 1)
        far = memory if leaves >= 0 else []
        score_of = [q_slot[token] @ key for key, _ in far] + [q[token] @ k[s] for s in near]
        weights = (torch.stack(score_of) * q.shape[1] ** -0.5).softmax(0)
        outs.append(weights @ torch.stack([value for _, value in far] + [v[s] for s in near]))
    return torch.stack(outs)


@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_attention_reads_the_list_of_kept_tokens(window, impl):
    inputs = make(Case(batch=1, length=40, query_heads=2, heads=2, slots=4))
    score = scores(length=40)
    inputs["log_gate"] = alone(score, 4)[0]
    out = nha_attention(**inputs, window_size=window, impl=impl).out[0]
    for head in range(2):
        assert_close_to(out[:, head], oracle(inputs, score, head, window, 4))


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("stops", [(1, 2, 3), (7, 11), (29,)], ids=str)
def test_segments_continue_the_count(stops, fill):
    score = scores(3)
    whole, total = alone(score, 5, fill=fill)
    parts, kept = [], None
    for start, stop in zip((0, *stops), (*stops, 30), strict=True):
        gate, kept = alone(score[:, start:stop], 5, kept, start, fill=fill)
        parts.append(gate)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(kept, total)
    assert torch.equal(kept_tokens(whole), score > 0) and torch.equal(total, (score > 0).sum(1))


def test_padded_rows_count_real_tokens_alone():
    score, mask = scores(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[0, :6], mask[1, 13:] = False, False
    gate, kept = exact_log_gate(score, 4, write_order(score, None, mask, None))
    assert not gate[~mask].any()
    for row in range(2):
        own, count = alone(score[row][mask[row]][None], 4)
        assert torch.equal(gate[row][mask[row]], own[0]) and torch.equal(kept[row], count[0])


def test_packed_sequences_count_alone():
    score, cu = scores(1, 20), torch.tensor([0, 7, 7, 16], dtype=torch.int32)  # the last four tokens belong to none
    before = torch.tensor([[3, 1], [2, 0], [9, 4]])
    order = WriteOrder(torch.cat([torch.arange(7), torch.arange(9), torch.arange(4)])[None], before, cu)
    gate, kept = exact_log_gate(score, 4, order)
    for row, (start, stop) in enumerate([(0, 7), (7, 7), (7, 16)]):
        own, count = alone(score[:, start:stop], 4, before[row][None])
        assert torch.equal(gate[:, start:stop], own)
        assert torch.equal(kept[row], count[0] if stop > start else before[row])


@pytest.mark.parametrize("bias", [-9.0, 0.0, 9.0])
def test_no_slot_is_free_after_as_many_tokens(bias):
    gate = alone(scores(4) + bias, 6)[0]
    assert (gate[:, :6] <= WRITE).any(1).all()
    assert ((gate == 0).sum(-1) >= 5).all()  # a token takes one slot at most
    assert not (gate[:, 6:] == FILL).any()


def test_the_gradient_of_a_score_is_that_of_its_probability_at_its_slot():
    score = scores(2).requires_grad_()
    gate, _ = alone(score, 4)
    weight = torch.randn(gate.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((gate * weight).sum(), score)
    count = (score > 0).cumsum(1) - (score > 0).long()
    p = score.sigmoid().detach()
    wanted = WRITE * p * (1 - p) * weight.gather(-1, count.remainder(4)[..., None])[..., 0]
    forced = ((gate == FILL) & (torch.arange(4) == count.remainder(4)[..., None])).any(-1)
    torch.testing.assert_close(found, wanted.masked_fill(forced, 0))


@pytest.mark.parametrize("window", [0, 5, 64, -1])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_layer_reads_segments_as_it_reads_the_whole(window, sinks, tmp_path):
    torch.manual_seed(0)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "num_slots": 3, "num_sinks": sinks, "slot_write": "exact"}
    layer = NativeHybridAttention(16, window_size=window, **sizes).double()
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    whole, last = layer(x, return_state=True)
    assert layer.g_proj.weight.shape[0] == 2 and 0 < int(last.num_kept.min()) < 30
    parts, state = [], None
    for start, stop in ((0, 4), (4, 5), (5, 17), (17, 30)):
        out, state = layer(x[:, start:stop], state=state, return_state=True)
        save_state(state, tmp_path / "state")
        state = load_state(tmp_path / "state")
        parts.append(out)
    assert_close_to(torch.cat(parts, 1), whole)
    assert torch.equal(state.num_kept, last.num_kept)
    packed, _ = layer(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 30, 60], dtype=torch.int32))
    assert_close_to(packed.view(2, 30, 16), whole)


def test_a_ring_that_takes_tokens_back_takes_back_what_they_kept():
    score = scores(2, 9)
    gate, kept = alone(score, 3)
    key = torch.randn(2, 9, 2, 4, dtype=torch.float64)
    state = NHAState.empty(2, key=key, value=key, log_gate=gate, shared=True)
    ring = RingState.of(state, 5)
    for start, stop in ((0, 5), (5, 9)):
        ring.append(key[:, start:stop], key[:, start:stop], gate[:, start:stop], None)
    ring.num_kept = kept.clone()
    packed = PackedState.of(ring, "bfloat16").map(torch.clone)
    assert isinstance(packed, PackedState)
    for one in (ring, packed):
        one.rollback(3)
        one.rollback(1)
    for found in (ring, ring.aligned(), packed, packed.unpack()):
        assert found.num_kept is not None
        assert torch.equal(found.num_kept, (score[:, :5] > 0).sum(1))


def test_unknown_ways_to_write_are_refused():
    with pytest.raises(ValueError, match="slot_write .* soft, exact, got 'hard'"):
        NativeHybridAttention(16, 2, slot_write="hard")
