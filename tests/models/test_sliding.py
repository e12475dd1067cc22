"""Layers that slide over a window of their own stay theirs: their attention, their cache and their place."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from nha import hybridize, set_windows
from nha.models.cache import NHACacheLayer
from nha.models.config import plan_windows
from tests.inputs import assert_close_to
from tests.models.families import hybrid, sliding, teacher, tokens

OWN = 12
MIXED = ["gemma2", "gemma3_text"]
ALL_SLIDE = ["mistral", "phi3"]


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.mark.parametrize("family", MIXED)
def test_a_conversion_leaves_them_alone(family):
    config = teacher(family, **sliding(OWN)).config
    assert plan_windows(config, 8) == [-1, 8, -1]
    assert plan_windows(config, [8, 8, -1]) == [8, 8, -1]
    model = hybridize(teacher(family, **sliding(OWN)), 4, 8, calibration=tokens(4, 64))
    assert model.config.window_sizes == [-1, 8, -1]
    assert model.config.layer_types == teacher(family, **sliding(OWN)).config.layer_types


@pytest.mark.parametrize("family", ALL_SLIDE)
def test_a_conversion_takes_all_layers_where_all_slide(family):
    config = teacher(family, sliding_window=OWN).config
    assert plan_windows(config, 8) == [8, 8, 8]
    assert plan_windows(config, 8, [0]) == [-1, 8, 8]


@pytest.mark.parametrize("family, changes", [(f, sliding(OWN)) for f in MIXED] + [("mistral", {"sliding_window": OWN})])
def test_windows_of_minus_one_give_the_teacher_back_beyond_its_window(family, changes):
    ids, model, whole = tokens(2, 40), hybrid(family, 8, **changes), teacher(family, **changes)
    set_windows(model, -1)
    assert torch.equal(logits(model, ids), logits(whole, ids))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **settings), whole.generate(ids, **settings))


@pytest.mark.parametrize("family, changes", [(f, sliding(OWN)) for f in MIXED] + [("mistral", {"sliding_window": OWN})])
def test_short_texts_see_what_the_teacher_sees(family, changes):
    """Up to the smallest window of a converted layer nothing changes by one bit."""
    ids = tokens(2, 8)
    assert torch.equal(logits(hybrid(family, [-1, 8, -1], **changes), ids), logits(teacher(family, **changes), ids))


@pytest.mark.parametrize("family", MIXED)
def test_they_keep_their_own_cache(family):
    with torch.no_grad():
        cache = hybrid(family, [-1, 8, -1], **sliding(OWN))(tokens(1, 40), use_cache=True).past_key_values
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [DynamicSlidingWindowLayer, NHACacheLayer, DynamicSlidingWindowLayer]
    assert cache.layers[0].keys.shape[2] == OWN - 1
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("windows", [[-1, 8, -1], [5, 8, -1], [-1, 0, OWN]], ids=str)
def test_any_split_into_segments_gives_the_same_logits(family, windows):
    model, ids, cache, found = hybrid(family, windows, **sliding(OWN)).double(), tokens(2, 40), None, []
    for piece in ids.split([3, 1, 20, 1, 1, 14], 1):
        with torch.no_grad():
            output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    # Gemma 2's own code takes its softmax in float32, also beside float64 scores.
    single = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
    ulps = 16 * single if family == "gemma2" else 1e5
    assert_close_to(torch.cat(found, 1), logits(model, ids, use_cache=False), ulps=ulps)


@pytest.mark.parametrize("family", MIXED)
def test_saved_and_loaded_with_the_same_bits(family, tmp_path):
    model, ids = hybrid(family, [-1, 8, -1], **sliding(OWN)), tokens(1, 40)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_types == model.config.layer_types
    assert torch.equal(logits(loaded, ids), logits(model, ids))
