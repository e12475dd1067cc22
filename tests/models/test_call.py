"""A cache or a mask that would not count in a forward pass is refused before anything is read."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from nha import NHAConfig, NHAForCausalLM, load_cache, save_cache
from tests.models.families import hybrid, tokens

MODELS = {
    "layers": lambda: hybrid("llama", [8, -1, 0]),
    "heads": lambda: hybrid("llama", [-1, [3, 8], [-1, 0]]),
    "nha": lambda: NHAForCausalLM(NHAConfig.tiny(window_sizes=[8, -1])).eval(),
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def read(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def padding(length, count):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :count] = 0
    return mask


@each_model
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("before, after", [(0, 5), (5, 0), (5, 4)])
@pytest.mark.parametrize("new", [1, 4])
def test_other_padding_than_the_cache_read_is_refused(make, static, before, after, new):
    model, ids = make(), tokens(2, 24)
    cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    read(model, ids[:, :20], attention_mask=padding(20, before), past_key_values=cache)
    with pytest.raises(ValueError, match=rf"\[20, {20 - before}\].*20 cached.*\[20, {20 - after}\]"):
        read(model, ids[:, 20 : 20 + new], attention_mask=padding(20 + new, after), past_key_values=cache)
    assert int(cache.get_seq_length()) == 20
    read(model, ids[:, 20 : 20 + new], attention_mask=padding(20 + new, before), past_key_values=cache)


@each_model
def test_padding_is_that_of_rows_that_were_reordered_taken_back_and_saved(make, tmp_path):
    model, ids, mask = make(), tokens(2, 24), padding(24, 5)
    cache = DynamicCache(config=model.config)
    read(model, ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
    cache.activate_past_recording()
    read(model, ids[:, 3:12], attention_mask=mask[:, :12], past_key_values=cache)
    cache.crop(-8)
    cache.reorder_cache(torch.tensor([1, 0]))  # type: ignore[arg-type]
    save_cache(cache, tmp_path / "cache", model)
    for one in (copy.deepcopy(cache), load_cache(tmp_path / "cache", model)):
        with pytest.raises(ValueError, match=r"\[0, 4\].*4 cached.*\[4, 0\]"):
            read(model, ids[:, 4:], attention_mask=mask, past_key_values=one)
        read(model, ids[:, 4:], attention_mask=mask.flip(0), past_key_values=one)


@each_model
@pytest.mark.parametrize("filled", [0, 10])
def test_a_cache_that_checkpointed_layers_would_not_get_is_refused(make, filled):
    model, ids = make(), tokens(2, 20)
    cache = DynamicCache(config=model.config)
    if filled:
        read(model, ids[:, :filled], past_key_values=cache)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=f"gradient checkpointing.*{filled} tokens"):
        model(ids[:, filled:], past_key_values=cache)
    assert cache.get_seq_length() == filled
    model(ids, labels=ids, use_cache=True).loss.backward()
    model.eval()
    model(ids[:, filled:], past_key_values=cache)
    assert cache.get_seq_length() == 20


@each_model
def test_padding_before_tokens_of_a_packed_sequence_is_refused(make):
    model, ids, mask = make(), tokens(1, 20), torch.ones(1, 20, dtype=torch.long)
    cu = torch.tensor([0, 8, 20], dtype=torch.int32)
    options = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 12, "max_length_k": 12}
    wanted = read(model, ids, **options)
    mask[:, 6:8], mask[:, 18:] = 0, 0  # at the end of each
    assert torch.equal(read(model, ids, attention_mask=mask, **options), wanted)
    for start, stop in ((0, 2), (8, 10), (12, 14)):
        wrong = mask.clone()
        wrong[:, start:stop] = 0
        with pytest.raises(ValueError, match=f"packed.*before token {stop}"):
            read(model, ids, attention_mask=wrong, **options)
