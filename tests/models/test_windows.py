"""The configuration alone says which windows a model has, however it is changed."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nha import NHAConfig, NHAForCausalLM, set_windows
from nha.models.windows import attention_layers, temporary_windows
from tests.models.families import hybrid, teacher, tokens


def logits(model: Any, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.mark.parametrize("windows", [[16, 16, 16], [-1, -1, -1], [4, -1, 0]], ids=str)
def test_a_configuration_edited_by_hand_counts(windows):
    model, ids = hybrid("llama", [8, -1, 8]), tokens(2, 30)
    wanted = hybrid("llama", windows)
    model.config.window_sizes = windows
    assert torch.equal(logits(model, ids, use_cache=False), logits(wanted, ids, use_cache=False))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    written = [m.generate(ids, use_cache=cache, **options) for m in (model, wanted) for cache in (True, False)]
    assert all(torch.equal(written[0], other) for other in written[1:])


@pytest.mark.parametrize("make", [lambda: hybrid("llama", [8, -1, 4]), lambda: NHAForCausalLM(NHAConfig.tiny())])
def test_settings_named_to_from_pretrained_count_and_are_checked(make, tmp_path):
    make().save_pretrained(tmp_path)
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path, window_sizes=16).eval()
    wanted: Any = make().eval()
    layers = wanted.config.num_hidden_layers
    set_windows(wanted, [16] * layers)
    wanted.load_state_dict(found.state_dict())
    assert found.config.window_sizes == [16] * layers
    assert torch.equal(logits(found, tokens(1, 30)), logits(wanted, tokens(1, 30)))
    with pytest.raises(ValueError, match=f"expected {layers} window sizes, one per layer, got 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path, window_sizes=[16])
    with pytest.raises(ValueError, match="expected state_dtype to be one of .*, got 'int4'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, state_dtype="int4")


def test_one_entry_of_the_configuration_counts_as_well():
    model = hybrid("llama", 8)
    model.config.window_sizes[1] = -1
    assert torch.equal(logits(model, tokens(1, 30)), logits(hybrid("llama", [8, -1, 8]), tokens(1, 30)))


@pytest.mark.parametrize("windows", [[8, 8], [8, -2, 8]], ids=str)
def test_a_configuration_edited_to_what_cannot_be_is_refused(windows):
    model = hybrid("llama", 8)
    model.config.window_sizes = windows
    with pytest.raises(ValueError, match="window"):
        logits(model, tokens(1, 30))


def test_a_number_is_the_window_of_hybrid_layers_only():
    model = hybrid("llama", [8, -1, 4])
    set_windows(model, 128)
    assert model.config.window_sizes == [128, -1, 128]
    set_windows(model, [8, 8, -1])
    with temporary_windows(model, 16):
        assert model.config.window_sizes == [16, 16, -1]
    assert model.config.window_sizes == [8, 8, -1]


def test_minus_one_gives_the_original_back_and_only_a_list_the_hybrid():
    model, ids = hybrid("llama", [8, -1, 4]), tokens(1, 30)
    set_windows(model, -1)
    assert torch.equal(logits(model, ids), logits(teacher(), ids))
    with pytest.raises(ValueError, match="list of 3 windows"):
        set_windows(model, 8)
    assert model.config.window_sizes == [-1, -1, -1]
    set_windows(model, [8, -1, 4])
    assert torch.equal(logits(model, ids), logits(hybrid("llama", [8, -1, 4]), ids))


def test_layers_with_full_attention_ask_for_no_gradient_of_their_slots(tmp_path):
    from transformers import AutoModelForCausalLM

    def asking(model):
        return [any(x.requires_grad for x in layer.nha.parameters()) for layer in attention_layers(model)]

    model = hybrid("llama", [8, -1, 4])
    assert asking(model) == [True, False, True]
    model.save_pretrained(tmp_path)
    assert asking(AutoModelForCausalLM.from_pretrained(tmp_path)) == [True, False, True]
    with temporary_windows(model, -1):
        assert asking(model) == [True, False, True]
    set_windows(model, [-1, 8, 4])
    assert asking(model) == [False, True, True]
    model.requires_grad_(False)
    set_windows(model, [8, 8, 8])
    assert asking(model) == [True, False, False]  # only what was frozen for its window asks again
