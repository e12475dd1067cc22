"""Caches whose newest tokens can be taken back at no cost, and assisted decoding on them."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from nha import load_cache, save_cache
from nha.models import cache as cache_module
from nha.models.cache import allow_rollback, nha_layers
from nha.models.segment import Inputs
from nha.ops import RingState
from tests.inputs import assert_close_to
from tests.models.families import hybrid, teacher, tokens

WINDOWS = [[8, 8, 8], [8, -1, 0], [3, 8, -1]]


def read(model, ids, cache=None, **kwargs) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs)


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0, **options)


@pytest.fixture
def without_replay(monkeypatch):
    """Neither a snapshot of a state nor a second reading of tokens."""

    def refused(*args: Any) -> Any:
        raise AssertionError("tokens were read again")

    def snapshot(self, state):
        assert state is None, "a state was copied"

    monkeypatch.setattr(Inputs, "advance", refused)
    monkeypatch.setattr(cache_module.NHACacheLayer, "_snapshot", snapshot)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("max_rollback", [1, 4, 9])
def test_random_steps_back_equal_reading_anew(windows, max_rollback, without_replay, tmp_path):
    draw = random.Random(max_rollback)
    model = hybrid("llama", windows).double()
    cache: Any = DynamicCache(config=model.config)
    allow_rollback(cache, max_rollback)
    ids = tokens(3, 0)
    for step in range(14):
        new = tokens(3, draw.choice([1, 2, max_rollback, max_rollback + 1, 20]), seed=step)
        ids = torch.cat([ids, new], 1)
        wanted = model(ids, use_cache=False).logits[:, -new.shape[1] :]
        assert_close_to(read(model, new, cache).logits, wanted)
        back = draw.randint(0, min(max_rollback, new.shape[1]))
        cache.crop(-back)
        ids = ids[:, : ids.shape[1] - back]
        assert cache.get_seq_length() == ids.shape[1]
        if step == 9:
            cache = copy.deepcopy(cache)
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            ids = ids[[2, 0, 0]]
    save_cache(cache, tmp_path / "cache", model)
    last = tokens(3, 1, seed=99)
    found = read(model, last, load_cache(tmp_path / "cache", model)).logits
    assert_close_to(found, model(torch.cat([ids, last], 1), use_cache=False).logits[:, -1:])


@pytest.mark.parametrize("windows", WINDOWS)
def test_the_furthest_token_counts(windows):
    """Up to R tokens behind the furthest one that was read, in one crop or in several, and none behind that."""
    model, ids = hybrid("llama", windows).double(), tokens(1, 40)
    cache = DynamicCache(config=model.config)
    allow_rollback(cache, 6)
    read(model, ids, cache)
    cache.crop(-2)
    cache.crop(-3)
    read(model, ids[:, 35:36], cache)
    with pytest.raises(RuntimeError, match="at most 2 .* got 3"):
        cache.crop(-3)
    assert cache.get_seq_length() == 36
    cache.crop(-2)
    wanted = model(ids[:, :37], use_cache=False).logits[:, 34:]
    assert_close_to(read(model, ids[:, 34:37], cache).logits, wanted)


@pytest.mark.parametrize("windows", WINDOWS)
def test_a_longer_draft_is_recorded_and_makes_room(windows):
    model, ids = hybrid("llama", windows).double(), tokens(1, 60)
    cache = DynamicCache(config=model.config)
    allow_rollback(cache, 3)
    read(model, ids[:, :30], cache)
    cache.activate_past_recording()
    cache.crop(-1)
    for back in (9, 12, 12):  # the second and third beyond the first draft's length are taken back by the ring
        start = cache.get_seq_length()
        read(model, ids[:, start : start + 12], cache)
        cache.crop(-back)
        kept = start + 12 - back
        again = copy.deepcopy(cache)
        wanted = model(ids[:, : kept + 2], use_cache=False).logits[:, kept:]
        assert_close_to(read(model, ids[:, kept : kept + 2], again).logits, wanted)
    assert {layer.max_rollback for layer in nha_layers(cache)} == {12}


def test_left_padded_rows_step_back():
    model, ids = hybrid("llama", [8, -1, 3]).double(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    position = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    allow_rollback(cache, 4)

    def part(start, stop):
        return read(
            model,
            ids[:, start:stop],
            cache,
            attention_mask=mask[:, :stop],
            position_ids=position[:, start:stop],
        ).logits

    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    part(0, 20)
    cache.crop(-3)
    part(17, 19)
    cache.crop(-2)
    assert_close_to(part(17, 30), wanted[:, 17:])


def test_a_cache_without_rollback_and_a_static_one_stay_as_they_are():
    model, ids = hybrid("llama", 8), tokens(1, 20)
    static = StaticCache(config=model.config, max_cache_len=64)
    allow_rollback(static, 4)
    for cache in (DynamicCache(config=model.config), static):
        read(model, ids, cache)
        assert not any(isinstance(layer.state, RingState) for layer in nha_layers(cache))
        with pytest.raises(RuntimeError, match="slots cannot forget"):
            nha_layers(cache)[0].crop(-1)
    with pytest.raises(ValueError, match="max_rollback"):
        allow_rollback(static, -1)


@pytest.mark.parametrize("how", ["prompt lookup", "model", "hybrid", "early exit"])
def test_assisted_decoding_copies_no_state_and_reads_nothing_twice(how, without_replay):
    model, ids = hybrid("llama", [8, -1, 3]), tokens(1, 6).repeat(1, 6)
    assistant: Any = {"model": teacher("llama"), "hybrid": hybrid("llama", [5, 5, 5])}.get(how)
    options: dict[str, Any] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "early exit": {"assistant_early_exit": 1},
    }.get(how, {"assistant_model": assistant})
    cache = DynamicCache(config=model.config)
    found = generate(model, ids, past_key_values=cache, **options)
    assert torch.equal(found, generate(model, ids))
    assert {layer.max_rollback for layer in nha_layers(cache)} == {5 if how == "prompt lookup" else 21}
    assert all(isinstance(layer.state, RingState) for layer in nha_layers(cache))


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("seed", range(4))
def test_assisted_decoding_equals_greedy_in_float32(seed, schedule):
    draw = random.Random(seed)
    model = hybrid("llama", [draw.choice([-1, 0, 1, 4, 8, 16]) for _ in range(3)])
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    ids = tokens(1, draw.randint(1, 9), seed=seed).repeat(1, draw.randint(1, 6))
    wanted = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=draw.randint(1, 12)), wanted)
    assistant = hybrid("llama", 4)
    assistant.generation_config.num_assistant_tokens = draw.randint(1, 9)
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    assert torch.equal(generate(model, ids, assistant_model=assistant), wanted)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    found = generate(model, padded, attention_mask=mask, prompt_lookup_num_tokens=5)
    assert torch.equal(found[:, 3:], wanted)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("read_before", [5, 20, 35])
def test_assisted_decoding_goes_on_from_a_filled_cache(windows, read_before):
    model, ids = hybrid("llama", windows).double(), tokens(1, 6).repeat(1, 6)
    cache = DynamicCache(config=model.config)
    read(model, ids[:, :read_before], cache)
    found = generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=4)
    assert torch.equal(found, generate(model, ids))


def test_a_rollback_may_be_allowed_and_forbidden_at_any_time():
    model, ids = hybrid("llama", [8, -1, 3]).double(), tokens(1, 44)
    cache = read(model, ids[:, :30]).past_key_values
    for place in range(30, 34):  # in a step for single tokens
        read(model, ids[:, place : place + 1], cache)
    allow_rollback(cache, 5)
    read(model, ids[:, 34:38], cache)
    cache.crop(-3)
    read(model, ids[:, 35:39], cache)
    allow_rollback(cache, 0)
    with pytest.raises(RuntimeError, match="at most 0 .* got 1"):
        cache.crop(-1)
    read(model, ids[:, 39:40], cache)
    with pytest.raises(RuntimeError, match="at most 0 .* got 1"):
        cache.crop(-1)
    wanted = model(ids, use_cache=False).logits[:, 40:]
    assert_close_to(read(model, ids[:, 40:], cache).logits, wanted)
