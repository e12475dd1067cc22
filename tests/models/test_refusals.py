"""Impossible requests are refused in one line with what was expected, before anything runs or is written."""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from nha import NHAConfig, NHAForCausalLM, hybridize, set_windows
from nha.errors import BadInput
from nha.models.adapter import to_hybrid
from nha.models.cache import nha_layers
from nha.models.config import check_windows, hybrid_config_class, plan_windows
from nha.models.families import FAMILIES, REFUSED, TABLE, check_family
from nha.models.loading import find, load_weights
from nha.models.windows import attention_layers
from tests.models.families import COMMON, hybrid, sliding, teacher, tokens

BAD_WINDOWS = [[8, 8], [8, 8, 8, 8], [], -2, [8, -2, 8], True, [8, False, 8], 8.0, [8, 8.0, 8], "8", ["8", 8, 8], None]


def refused(call, *words):
    """The call raises a ValueError of one line with these words."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def fingerprint(model):
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    return type(model), model.config.to_dict(), weights


def assert_unchanged(model, before):
    kind, config, weights = before
    assert type(model) is kind and model.config.to_dict() == config
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


# Families


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_work_is_named_with_the_reason(family):
    config = PreTrainedConfig()
    config.model_type = family
    refused(lambda: check_family(config), f"got {family}: {REFUSED[family]}")


def test_every_supported_family_exists_and_none_is_refused():
    assert not set(FAMILIES) & set(REFUSED)
    assert len({*FAMILIES, *REFUSED}) == len(TABLE)


def test_hybridizing_twice():
    model = hybrid("llama", 8)
    before = fingerprint(model)
    refused(lambda: hybridize(model, 4, 4, calibration=tokens(4, 64)), "not a hybrid yet", "nha-llama")
    refused(lambda: to_hybrid(model, [4, 4, 4]), "not a hybrid yet", "nha-llama")
    assert_unchanged(model, before)


def test_hybridizing_a_model_trained_from_scratch():
    model = NHAForCausalLM(NHAConfig.tiny())
    refused(lambda: hybridize(model, 4, 4, calibration=tokens(4, 64)), "not a hybrid yet")


def test_hybridizing_something_that_is_no_causal_language_model():
    model = teacher().model
    before = fingerprint(model)
    refused(lambda: to_hybrid(model, [4, 4, 4]), "expected a causal language model", "LlamaModel")
    assert_unchanged(model, before)


# Windows


@pytest.mark.parametrize("windows", BAD_WINDOWS, ids=str)
def test_windows_that_cannot_be(windows):
    model, whole = hybrid("llama", [8, -1, 0]), teacher()
    before, untouched = fingerprint(model), fingerprint(whole)
    refused(lambda: set_windows(model, windows), "window")
    refused(lambda: check_windows(whole.config, windows), "window")
    refused(lambda: hybridize(whole, 4, windows, calibration=tokens(4, 64)), "window")
    with pytest.raises((ValueError, StrictDataclassError), match="window"):  # types are checked by transformers
        hybrid_config_class("llama")(**(COMMON | {"window_sizes": windows}))
    assert_unchanged(model, before)
    assert_unchanged(whole, untouched)
    assert [layer.window_size for layer in attention_layers(model)] == [8, -1, 0]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_window_longer_than_a_layers_own(family):
    model = teacher(family, **sliding(12))
    before = fingerprint(model)
    words = ("at most 12", "layer 2", "got 13")
    refused(lambda: to_hybrid(model, [12, 64, 13]), *words)
    refused(lambda: hybridize(model, 4, [12, 64, 13], calibration=tokens(4, 64)), *words)
    assert_unchanged(model, before)
    live = hybrid(family, [12, 64, 12], **sliding(12))
    refused(lambda: set_windows(live, [12, 64, 13]), *words)
    refused(lambda: set_windows(live, 64), "at most 12", "layer 0")


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_window_longer_than_that_of_all_layers(family):
    model = teacher(family, sliding_window=12)
    refused(lambda: to_hybrid(model, [13, 8, 8]), "at most 12", "layer 0", "got 13")


@pytest.mark.parametrize("layer", [3, -4, 100])
def test_full_layers_that_do_not_exist(layer):
    model = teacher()
    before = fingerprint(model)
    refused(lambda: plan_windows(model.config, 8, [layer]), "full_layers", f"got {layer}")
    refused(lambda: hybridize(model, 4, 8, [layer], calibration=tokens(4, 64)), "full_layers")
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "name, value",
    [("num_slots", 0), ("num_slots", 2.5), ("num_slots", True), ("num_sinks", -1), ("slot_distance", -1)],
)
def test_numbers_that_cannot_be(name, value):
    model = teacher()
    before = fingerprint(model)
    refused(lambda: to_hybrid(model, [8, 8, 8], **{name: value}), name)
    assert_unchanged(model, before)


def test_set_windows_of_a_model_that_is_no_hybrid():
    refused(lambda: set_windows(teacher(), 8), "expected a hybrid model", "LlamaForCausalLM")


# Caches


def read(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options)


def refused_cache(model, cache, *words, rows=2):
    """The model does not read on with a cache, which keeps its length and its state."""
    length, states = cache.get_seq_length(), [copy.deepcopy(layer.state) for layer in nha_layers(cache)]
    refused(lambda: read(model, tokens(rows, 5), past_key_values=cache), *words)
    assert cache.get_seq_length() == length
    for layer, state in zip(nha_layers(cache), states, strict=True):
        assert all(
            torch.equal(x, y) for x, y in zip(layer.state.tensors().values(), state.tensors().values(), strict=True)
        )


@pytest.fixture
def cache():
    return read(hybrid("llama", 8), tokens(2, 20), use_cache=True).past_key_values


def test_a_cache_filled_by_the_teacher():
    full = read(teacher(), tokens(2, 20), use_cache=True).past_key_values
    refused_cache(hybrid("llama", 8), full, "expected an empty cache", "layer 0")
    refused_cache(hybrid("llama", [-1, 8, 8]), full, "expected an empty cache", "layer 1")


def test_a_prefix_of_keys_and_values_says_what_to_use_instead():
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(hybrid("llama", [8, -1, 8]), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    refused(lambda: model(input_ids=tokens(2, 10)), "expected an empty cache", "nha.models.peft_slots")


def test_a_hybrids_cache_in_the_teacher(cache):
    refused_cache(teacher(), cache, "cache", "NHACacheLayer")


def test_a_cache_made_with_other_windows(cache):
    refused_cache(hybrid("llama", 7), cache, "made with these windows", "window is 7")
    refused_cache(hybrid("llama", [8, -1, 8]), cache, "made with these windows", "layer 1")


def test_a_cache_of_a_model_of_another_shape(cache):
    refused_cache(hybrid("llama", 8, num_hidden_layers=2), cache, "2 layers", "3")
    refused_cache(hybrid("llama", 8, slots=5), cache, "[2, 5]", "[2, 6]")
    refused_cache(hybrid("llama", 8, num_key_value_heads=1), cache, "[2, 1, 6, 8]", "[2, 2, 6, 8]")


def test_a_cache_of_another_number_of_rows(cache):
    refused_cache(hybrid("llama", 8), cache, "[3, 6]", "[2, 6]", rows=3)


def test_a_cache_beside_packed_sequences(cache):
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    one = read(hybrid("llama", 8), tokens(1, 20), use_cache=True).past_key_values
    model = hybrid("llama", 8)
    refused(lambda: read(model, tokens(1, 5), past_key_values=one, cu_seq_lens_q=cu), "without a cache")
    assert one.get_seq_length() == 20


# Files


def saved(tmp_path, change=None):
    hybrid("llama", 8).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if change is not None:
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_truncated_checkpoint(tmp_path, size):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Exception, match="header"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_with_another_number_of_slots(tmp_path):
    saved(tmp_path)
    named = r"model\.layers\.0\.self_attn\.nha\.g_proj\.bias: \[12\] for \[18\]"
    with pytest.raises(ValueError, match=named):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_slots=9)


def test_an_original_of_another_vocabulary_is_refused_by_the_names_of_its_weights(tmp_path):
    teacher().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 70}))
    with pytest.raises(BadInput, match=r"lm_head\.weight: \[\d+, 32\] for \[70, 32\]"):
        load_weights(find(str(tmp_path)), "auto")


def test_a_head_of_another_shape_is_new_where_that_is_asked_for(tmp_path):
    AutoModelForSequenceClassification.from_config(hybrid("llama", 8).config).save_pretrained(tmp_path)
    load = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"score\.weight: \[2, 32\] for \[3, 32\]"):
        load(tmp_path, num_labels=3)
    assert load(tmp_path, num_labels=3, ignore_mismatched_sizes=True).num_labels == 3


@pytest.mark.parametrize("name", ["sink_key", "g_proj.weight", "slot_cos"])
def test_what_a_checkpoint_lacks_is_never_made_up(tmp_path, name):
    saved(tmp_path, lambda weights: {key: x for key, x in weights.items() if not key.endswith(name)})
    with pytest.raises(ValueError, match=rf"3 missing \(model\.layers\.0\.self_attn\.nha\.{name}, "):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# What slots cannot do


@pytest.mark.parametrize("model", [hybrid("llama", 8), hybrid("llama", [8, -1, 0]), NHAForCausalLM(NHAConfig.tiny())])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_mask_with_holes(model, use_cache):
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 10:12] = 0
    refused(lambda: read(model, tokens(2, 30), attention_mask=mask, use_cache=use_cache), "holes in row 1")


@pytest.mark.parametrize("model", [hybrid("llama", 8), hybrid("llama", [8, -1, 0]), NHAForCausalLM(NHAConfig.tiny())])
def test_a_mask_that_is_no_padding(model):
    for mask in (torch.zeros(2, 1, 30, 30), torch.ones(2, 1, 30, 30, dtype=torch.bool).tril()):
        refused(lambda mask=mask: read(model, tokens(2, 30), attention_mask=mask), "padding mask [B, T]", "30, 30")


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_another_attention_on_a_live_model(chosen):
    for model in (hybrid("llama", 8), hybrid("llama", [8, -1, 0]), NHAForCausalLM(NHAConfig.tiny())):
        model.set_attn_implementation(chosen)
        refused(lambda model=model: read(model, tokens(2, 30)), "attn_implementation='nha'", chosen)


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_another_attention_while_loading_changes_nothing(tmp_path, chosen):
    saved(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=chosen)
    assert torch.equal(read(model, tokens(2, 30)).logits, read(hybrid("llama", 8), tokens(2, 30)).logits)


def test_attention_dropout_in_training():
    ids = tokens(2, 30)
    for model in (
        hybrid("llama", 8, attention_dropout=0.1),
        NHAForCausalLM(NHAConfig.tiny(attention_dropout=0.1)),
    ):
        read(model.eval(), ids)
        refused(lambda model=model: model.train()(ids, labels=ids), "attention_dropout", "0.1")


def test_packed_rows_of_more_than_one():
    position = torch.cat([torch.arange(10), torch.arange(20)])[None].expand(2, -1)
    refused(lambda: read(hybrid("llama", 8), tokens(2, 30), position_ids=position), "one row", "[2, 30]")


def test_a_paged_cache():
    """Continuous batching shares pages among requests; a state is one request's own."""
    with pytest.raises(NotImplementedError, match=r"^[^\n]*NHALlamaForCausalLM.generate[^\n]*continuous batching"):
        hybrid("llama", 8).generate(tokens(2, 10), max_new_tokens=2, cache_implementation="paged")
