"""Layers that slide over a window of their own stay as they are, unless every layer does."""

import pytest
import torch

from nha import hybridize
from nha.models.config import plan_windows
from nha.models.windows import attention_layers
from tests.inputs import assert_close_to
from tests.models.families import hybrid, sliding, teacher, tokens

MIXED = [("gemma2", sliding(12)), ("gemma3_text", sliding(12))]
ALL = [("mistral", {"sliding_window": 12}), ("phi3", {"sliding_window": 12})]
each_mixed = pytest.mark.parametrize("family, changes", MIXED, ids=[x for x, _ in MIXED])
each_family = pytest.mark.parametrize("family, changes", MIXED + ALL, ids=[x for x, _ in MIXED + ALL])


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@each_mixed
def test_only_layers_with_full_attention_are_converted(family, changes):
    model = hybridize(teacher(family, **changes), 6, 20, calibration=tokens(4, 64))
    assert model.config.window_sizes == [-1, 20, -1]
    assert model.config.layer_types == list(changes["layer_types"])
    assert plan_windows(model.config, 20, full_layers=[1]) == [-1, -1, -1]
    assert plan_windows(model.config, [5, -1, 12]) == [5, -1, 12]


@pytest.mark.parametrize("family, changes", ALL, ids=[x for x, _ in ALL])
def test_where_all_layers_slide_all_are_converted(family, changes):
    model = hybridize(teacher(family, **changes), 6, 8, calibration=tokens(4, 64))
    assert model.config.window_sizes == [8, 8, 8]
    assert model.config.sliding_window == 12


@each_family
def test_a_sliding_layer_that_is_not_converted_stays_the_teachers(family, changes):
    """Before the first converted layer commits a token, the model is its teacher, far beyond the sliding windows."""
    windows = [-1, 60, -1] if "layer_types" in changes else [-1, -1, -1]
    ids = tokens(2, 60)
    assert torch.equal(logits(hybrid(family, windows, **changes), ids), logits(teacher(family, **changes), ids))


@each_family
def test_the_teacher_and_the_hybrid_generate_the_same_within_the_window(family, changes):
    windows = [-1, 60, -1] if "layer_types" in changes else [-1, -1, -1]
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = tokens(1, 20)
    found = hybrid(family, windows, **changes).double().generate(ids, **options)
    assert torch.equal(found, teacher(family, **changes).double().generate(ids, **options))


@each_family
@pytest.mark.parametrize("sizes", [[5, 1, 1, 20, 13], [13, 1, 12, 14]], ids=str)
def test_any_split_into_segments_gives_the_same_logits(family, changes, sizes):
    model, ids = hybrid(family, [-1, 8, 5], **changes).double(), tokens(2, 40)
    cache, found = None, []
    for piece in ids.split(sizes, 1):
        with torch.no_grad():
            output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    single = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps  # gemma2's own softmax is in float32
    ulps = 16 * single if family == "gemma2" else 1e5
    assert_close_to(torch.cat(found, 1), logits(model, ids, use_cache=False), family, ulps)
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "NHACacheLayer", "NHACacheLayer"]
    assert [layer.window_size for layer in attention_layers(model)] == [-1, 8, 5]
