"""Every form is what it says, and the model is as before afterwards."""

from __future__ import annotations

import pytest
import torch

from nha.evaluate.variants import VARIANTS, use_variant
from nha.models.observe import ablate
from nha.models.windows import set_windows
from tests.models.families import hybrid, teacher, tokens


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_forms_are_what_they_say():
    ids = tokens(1, 40)
    found = {}
    model = hybrid("llama", [8, -1, 4])
    for form in VARIANTS:
        with use_variant(model, form):
            found[form] = logits(model, ids)
    assert torch.equal(found["hybrid"], logits(model, ids))
    assert torch.equal(found["full_attention"], logits(teacher(), ids))
    for form in ("slots_off", "window_off"):
        with ablate(model, form):
            assert torch.equal(found[form], logits(model, ids))
    set_windows(model, [14, -1, 10])
    with ablate(model, "slots_off"):
        assert torch.equal(found["longer_window"], logits(model, ids))


def test_an_error_inside_leaves_the_model_as_it_was():
    model, ids = hybrid("llama", [8, -1, 4]), tokens(1, 40)
    wanted = logits(model, ids)
    for form in VARIANTS:
        with pytest.raises(RuntimeError), use_variant(model, form):
            raise RuntimeError
        assert torch.equal(logits(model, ids), wanted)


@pytest.mark.parametrize(
    "model, form, message",
    [
        (hybrid(), "half", "expected a variant in"),
        (teacher(), "slots_off", "expected a hybrid model"),
        (teacher(), "hybrid", "expected a hybrid model"),
    ],
    ids=["name", "original", "original as hybrid"],
)
def test_forms_that_cannot_be_are_refused(model, form, message):
    with pytest.raises(ValueError, match=message), use_variant(model, form):
        pass
