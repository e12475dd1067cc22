"""Models read without slots: by blocks of the window where a text starts, and equal to the definition everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nha.models import segment as attending
from nha.models.cache import NHACacheLayer
from nha.models.observe import ablate, observe_mass
from nha.models.segment import Reading, Segment, attend
from tests.inputs import assert_close_to
from tests.models.families import hybrid, tokens
from tests.models.test_nha import build, generate, logits

LENGTH = 29
MODELS = {"hybrid": lambda: hybrid("llama", [8, -1, 4]).double(), "nha": lambda: build([8, 5])}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
each_window = pytest.mark.parametrize("window", [1, 7, LENGTH, LENGTH + 40])


@pytest.fixture
def blocks(monkeypatch):
    """How often `sliding_window_attention` ran, one entry each."""
    calls = []

    def spy(*args, **options):
        calls.append(options["window_size"])
        return original(*args, **options)

    original = attending.sliding_window_attention
    monkeypatch.setattr(attending, "sliding_window_attention", spy)
    return calls


def segment(separate: bool, seed: int = 0, length: int = LENGTH) -> Segment:
    """Three rows in float64, four query heads of two KV heads, no slots."""
    generator = torch.Generator().manual_seed(seed)

    def random(heads, dim):
        return torch.randn(3, length, heads, dim, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = random(4, 8), random(2, 8), random(2, 6)
    views = (random(4, 8), random(2, 8)) if separate else (None, None)
    return Segment(q, k, v, q.new_zeros(3, length, 2, 0), *views, None, None)


def sinks(count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not count:
        return None
    generator = torch.Generator().manual_seed(9)
    key, value = (torch.randn(2, count, dim, generator=generator, dtype=torch.float64) for dim in (8, 6))
    return key.requires_grad_(), value.requires_grad_()


@each_window
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("count", [0, 2])
def test_batches_equal_the_definition_gradients_too(window, count, separate, softcap, blocks):
    read, sink = segment(separate), sinks(count)
    reading = Reading(window, 0.3, sink, softcap)
    found, _ = attend(read, reading)
    assert bool(blocks) == (window < LENGTH)
    wanted, _ = attend(read, replace(reading, impl="reference"))
    assert_close_to(found, wanted)
    leaves = [x for x in (read.query, read.key, read.value, read.slot_query, *(sink or ())) if x is not None]
    weight = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    for ours, theirs in zip(
        *(torch.autograd.grad((x * weight).sum(), leaves, allow_unused=True) for x in (found, wanted)), strict=True
    ):
        zero = torch.zeros(())  # of what is not read: slot queries and sinks that never come alive
        assert_close_to(zero if ours is None else ours, zero if theirs is None else theirs)


@each_window
@pytest.mark.parametrize("separate", [False, True])
def test_a_prefill_leaves_the_state_that_chunks_leave(window, separate, blocks):
    read, more, sink = segment(separate), segment(separate, seed=1, length=5), sinks(1)
    found = []
    for impl in ("auto", "chunked"):
        layer = NHACacheLayer(window)
        layer.activate_past_recording()
        reading = Reading(window, 0.3, sink, impl=impl)
        first = layer.attend(read, reading)
        state = layer.state
        found.append((first, state, layer.attend(more, reading), layer))
    assert len(blocks) == (window < LENGTH)
    (first, state, then, layer), (wanted_first, wanted_state, wanted_then, wanted_layer) = found
    assert_close_to(first, wanted_first)
    assert_close_to(then, wanted_then)
    assert type(state) is type(wanted_state) and state.slots_active == wanted_state.slots_active
    assert state.window_size == wanted_state.window_size
    assert state.tensors().keys() == wanted_state.tensors().keys()
    for name, tensor in wanted_state.tensors().items():
        assert state.tensors()[name].dtype == tensor.dtype and torch.equal(state.tensors()[name], tensor), name
    for one in (layer, wanted_layer):
        one.crop(-8)
    assert torch.equal(layer.state.key, wanted_layer.state.key)


@each_model
def test_models_say_what_they_say_through_chunks(make, blocks, monkeypatch):
    model, ids = make(), tokens(3, 40)
    with ablate(model, "slots_off"):
        found, written = logits(model, ids), generate(model, ids)
        assert len(blocks) == 4
        monkeypatch.setattr(attending, "has_window_only", lambda *_: False)
        assert_close_to(found, logits(model, ids))
        assert torch.equal(written, generate(model, ids))
    assert len(blocks) == 4


@each_model
def test_padding_states_and_shares_go_through_chunks(make, blocks):
    model, ids = make(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    shares = []
    with ablate(model, "slots_off"):
        wanted = logits(model, ids)
        first = model(ids[:, :20], use_cache=True)
        blocks.clear()
        with torch.no_grad():
            padded = model(ids, attention_mask=mask).logits
            later = model(ids[:, 20:], past_key_values=first.past_key_values).logits
        with observe_mass(model, lambda *seen: shares.append(seen)):
            assert_close_to(logits(model, ids), wanted)
    assert not blocks and len(shares) == 2
    assert_close_to(padded[1], wanted[1])
    assert_close_to(later, wanted[:, 20:])


@pytest.mark.parametrize("packed", [False, True])
def test_a_window_of_nothing_without_slots_is_refused(packed):
    read = segment(False)
    if packed:
        rows = (x.flatten(0, 1)[None] for x in (read.query, read.key, read.value, read.log_gate))
        read = Segment(*rows, None, None, None, torch.tensor([0, LENGTH, 3 * LENGTH], dtype=torch.int32))
    with pytest.raises(ValueError, match="at least one slot"):
        attend(read, Reading(0, sink=sinks(1)))
