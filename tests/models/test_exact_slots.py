"""Models with exact slots: how many tokens a head kept is part of the memory, in every law of the caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from nha import NHAConfig, NHAForCausalLM, load_cache, save_cache
from nha.io import read_tensors, write_tensors
from nha.memory.store import MemoryStore
from nha.models.cache import allow_rollback, nha_layers
from nha.models.cache_file import fingerprint
from nha.models.config import hybrid_config_class
from nha.models.delta import apply_delta, save_delta
from nha.models.peft_slots import SlotsConfig
from nha.models.windows import attention_layers
from nha.ops.single_token import FusedRing
from nha.serve.checks import check_model
from tests.inputs import assert_close_to
from tests.models.families import hybrid, teacher, tokens

MIXED: list[Any] = [[3, 8], -1, [-1, 0]]
WINDOWS: list[Any] = [[8, -1, 0], [0, 8, 3], MIXED]
GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def converted(windows: Any = (8, -1, 0), **options):
    return hybrid("llama", list(windows), slot_write="exact", **options).double()


def scratch(windows: Any = (8, -1, 0), **options):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "num_slots": 5, "slot_write": "exact"} | options
    model = NHAForCausalLM(NHAConfig.tiny(window_sizes=list(windows), **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.double().eval()


each_model = pytest.mark.parametrize("make", [converted, scratch], ids=["llama", "nha"])
each_window = pytest.mark.parametrize("windows", WINDOWS, ids=str)


def read(model, ids, cache=None, **options) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options)


def whole(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


@each_model
@each_window
def test_steps_equal_recomputing(make, windows):
    model, ids = make(windows), tokens(2, 44)
    wanted, cache, found = whole(model, ids), DynamicCache(config=model.config), []
    for start, stop in ((0, 3), (3, 20), *((at, at + 1) for at in range(20, 30)), (30, 44)):
        found.append(read(model, ids[:, start:stop], cache).logits)
    assert_close_to(torch.cat(found, 1), wanted)
    counts = torch.cat([layer.num_kept for layer in nha_layers(cache)], 1)
    assert counts.min() >= 0 and counts.max() < 44 and len(counts.unique()) > 2


def test_a_token_on_a_cpu_is_one_step_with_its_count():
    model, ids = converted([8, 4, 8]), tokens(2, 40)
    cache = DynamicCache(config=model.config)
    read(model, ids[:, :30], cache)
    kept = [layer.num_kept.clone() for layer in nha_layers(cache)]
    for at in range(30, 40):
        read(model, ids[:, at : at + 1], cache)
    assert all(isinstance(layer.state, FusedRing) for layer in nha_layers(cache))
    pairs = zip(nha_layers(cache), kept, strict=True)
    assert any((layer.num_kept > before).any() for layer, before in pairs)


@each_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(make, side):
    model, ids = make(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 11) if side == "left" else slice(19, 30)] = 0
    real, place = mask[0].bool(), (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    found = read(model, ids, cache, attention_mask=mask, position_ids=place).logits
    alone = DynamicCache(config=model.config)
    assert_close_to(found[0, real], read(model, ids[:1, real], alone).logits[0])
    for layer, other in zip(nha_layers(cache), nha_layers(alone), strict=True):
        assert torch.equal(layer.num_kept[0], other.num_kept[0])


@each_model
@each_window
def test_generation_in_all_caches_equals_recomputing(make, windows):
    model, ids = make(windows), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    wanted = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), wanted)
    static = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=static, **GREEDY), wanted)
    beams = {"num_beams": 3, **GREEDY}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


@each_model
@each_window
@pytest.mark.parametrize("max_rollback", [0, 4])
def test_tokens_that_are_taken_back_no_longer_count(make, windows, max_rollback, tmp_path):
    model, ids = make(windows), tokens(2, 50)
    cache: Any = DynamicCache(config=model.config)
    allow_rollback(cache, max_rollback)
    read(model, ids[:, :9], cache)
    cache.activate_past_recording()
    cache.crop(0)
    length = 9
    for step, back in ((11, 3), (1, 1), (6, 5), (4, 0), (9, 9), (7, 2)):
        read(model, ids[:, length : length + step], cache)
        cache.crop(-back)
        length += step - back
    cache = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    save_cache(cache, tmp_path / "cache", model)
    rest = ids.flip(0)[:, length:]
    wanted = whole(model, ids.flip(0))[:, length:]
    assert_close_to(read(model, rest, load_cache(tmp_path / "cache", model)).logits, wanted)
    assert_close_to(read(model, rest, cache).logits, wanted)


def test_a_file_with_a_count_of_another_shape_is_refused(tmp_path):
    model, ids = converted(), tokens(2, 20)
    save_cache(read(model, ids).past_key_values, tmp_path / "cache", model)
    parts, metadata = read_tensors(tmp_path / "cache")
    parts["0.num_kept"] = parts["0.num_kept"][:, :1]
    write_tensors(tmp_path / "cache", parts, {k: v for k, v in metadata.items() if k != "sha256"})
    with pytest.raises(ValueError, match="num_kept.*layer 0"):
        load_cache(tmp_path / "cache", model)


def test_a_store_of_caches_goes_on_with_the_same_bits(tmp_path):
    model, ids = converted(), tokens(1, 50)
    store = MemoryStore(tmp_path, block_size=16)
    first, second = store.read(model, ids), store.read(model, ids)
    assert second.num_found == 48
    ours, theirs = (read(model, ids[:, 48:], found.cache).logits for found in (first, second))
    assert torch.equal(ours, theirs)
    assert_close_to(ours, whole(model, ids)[:, 48:])


@each_model
def test_configuration_and_weights_are_saved(make, tmp_path):
    model, ids = make().float(), tokens(1, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.slot_write == "exact"
    assert torch.equal(whole(loaded, ids), whole(model, ids))
    assert fingerprint(loaded) == fingerprint(model)


def test_compiled_and_static_steps_keep_their_tensors():
    model, ids = scratch([8, 0], num_hidden_layers=2), tokens(2, 24)
    cache = StaticCache(config=model.config, max_cache_len=64)
    step = torch.compile(model, backend="eager", fullgraph=True)
    found = [read(model, ids[:, :20], cache).logits]
    before = [x.data_ptr() for layer in nha_layers(cache) for x in layer.state.tensors().values()]
    with torch.no_grad():
        for at in range(20, 24):
            found.append(step(ids[:, at : at + 1], past_key_values=cache).logits)
    assert before == [x.data_ptr() for layer in nha_layers(cache) for x in layer.state.tensors().values()]
    assert_close_to(torch.cat(found, 1), whole(model, ids))


@each_model
def test_scores_get_a_gradient(make):
    model, ids = make(), tokens(2, 40)
    model.train()
    model(ids, labels=ids).loss.backward()
    for module, window in zip(attention_layers(model), model.config.window_sizes, strict=True):
        gates = getattr(module, "nha", module).g_proj
        assert gates.weight.shape[0] == model.config.num_key_value_heads
        assert gates.weight.grad is None if window == -1 else gates.weight.grad.abs().max() > 0


def test_slots_to_start_with_are_not_filled():
    from peft import get_peft_model

    model, ids = converted(), tokens(1, 40)
    adapted = get_peft_model(model, SlotsConfig(start="random"))
    cache = DynamicCache(config=model.config)
    parts = [read(adapted, ids[:, start : start + 10], cache).logits for start in range(0, 40, 10)]
    assert_close_to(torch.cat(parts, 1), whole(adapted, ids))


def test_a_delta_brings_scores(tmp_path):
    model, ids = hybrid("llama", 8, slot_write="exact"), tokens(1, 40)
    save_delta(tmp_path / "delta", model, {}, {}, dtype=torch.float32)
    other = teacher()
    apply_delta(other, tmp_path / "delta")
    for layer, own in zip(attention_layers(other), attention_layers(model), strict=True):
        layer.nha.reset_tables(own.nha.slot_cos, own.nha.slot_sin)
    torch.testing.assert_close(whole(other, ids), whole(model, ids))


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="slot_write .* got 'hard'"):
        NHAConfig.tiny(slot_write="hard")
    with pytest.raises(ValueError, match=r"slots_from_start.*exact"):
        hybrid_config_class("llama")(slot_write="exact", slots_from_start=True)
    with pytest.raises(ValueError, match=r"slot_write='soft'.*'exact'"):
        check_model(NHAConfig.tiny(slot_write="exact"))
