"""The slots' and the sink's share of the softmax are those of the definition, and watching changes nothing."""

from __future__ import annotations

import pytest
import torch

from nha import NHAConfig, NHAForCausalLM
from nha.evaluate.mass import slot_mass
from nha.models.observe import observe_mass
from nha.models.segment import Reading, Segment, attend
from nha.models.windows import attention_layers
from tests.models.families import hybrid, teacher, tokens


def definition(segment, window, sink):
    """Shares of slots and sink [T, HQ], token by token, as the definition reads."""
    length, heads, dim = segment.query.shape[1:]
    groups, scale = heads // segment.key.shape[2], dim**-0.5
    slots = torch.zeros(length, heads, dtype=torch.float64)
    sinks = torch.zeros(length, heads, dtype=torch.float64)
    for head in range(heads):
        kv = head // groups
        key, gate = segment.key[0, :, kv].double(), segment.log_gate[0, :, kv].double().clamp(-5, 0).exp()
        state, states = torch.zeros(gate.shape[1], dim, dtype=torch.float64), []
        for t in range(length):
            state = gate[t, :, None] * state + (1 - gate[t])[:, None] * key[t]
            states.append(state)
        for t in range(window, length):
            query = scale * segment.query[0, t, head].double()
            scores = [
                query @ sink[0][kv].double().T,
                query @ states[t - window].T,
                query @ key[t - window + 1 : t + 1].T,
            ]
            weights = torch.cat(scores).softmax(0)
            count = sink[0].shape[1]
            sinks[t, head], slots[t, head] = weights[:count].sum(), weights[count : count + gate.shape[1]].sum()
    return slots, sinks


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_shares_are_those_of_the_definition(impl):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    segment = Segment(
        draw(1, 20, 4, 8), draw(1, 20, 2, 8), draw(1, 20, 2, 8), -draw(1, 20, 2, 5).abs(), None, None, None, None
    )
    sink, seen = (draw(2, 2, 8), draw(2, 2, 8)), []
    out, _ = attend(segment, Reading(6, sink=sink, impl=impl, observe_mass=lambda *shares: seen.append(shares)))
    assert torch.equal(out, attend(segment, Reading(6, sink=sink, impl=impl))[0])
    slots, sinks = definition(segment, 6, sink)
    assert torch.allclose(seen[0][0][0].double(), slots, atol=1e-5)
    assert torch.allclose(seen[0][1][0].double(), sinks, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_every_layer_with_slots_has_a_share_and_no_other(family):
    found = slot_mass(hybrid(family, [8, -1, 4]), tokens(2, 40))
    for shares in (found.slots, found.sink, found.max_head):
        assert [share is None for share in shares] == [False, True, False]
        assert all(0 <= share <= 1 for share in shares if share is not None)
    known = [share for share in found.slots if share is not None]
    assert found.mean == pytest.approx(sum(known) / 2)
    assert all(a <= b for a, b in zip(known, [t for t in found.max_head if t is not None], strict=True))


def test_a_model_trained_from_scratch_is_measured_too():
    torch.manual_seed(0)
    model = NHAForCausalLM(NHAConfig.tiny(window_sizes=[4, -1])).eval()
    found = slot_mass(model, torch.arange(40)[None])
    assert found.slots[0] is not None and 0 < found.slots[0] < 1 and found.sink[0] == 0
    assert found.slots[1] is None


def test_watching_changes_no_logit_and_ends_with_its_context():
    model, ids = hybrid("llama", 8), tokens(2, 40)
    with torch.no_grad():
        wanted, seen = model(ids, use_cache=False).logits, []
        with observe_mass(model, lambda *shares: seen.append(shares)):
            assert torch.equal(model(ids, use_cache=False).logits, wanted)
        assert [layer for layer, _, _ in seen] == [0, 1, 2]
        model(ids, use_cache=False)
    assert len(seen) == 3
    assert all(module.mass_observer is None for module in attention_layers(model))


def test_only_hybrids_have_slots():
    with pytest.raises(ValueError, match="expected a hybrid model, got LlamaForCausalLM"):
        slot_mass(teacher(), tokens(1, 20))
