"""The other Auto classes read hybrids too."""

from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from nha import NHAConfig, NHAForCausalLM
from tests.models.families import hybrid, tokens


@pytest.fixture(params=["llama", "gemma2"])
def saved(request, tmp_path):
    hybrid(request.param, [8, -1, 4]).save_pretrained(tmp_path)
    return tmp_path


def test_the_decoder_alone(saved):
    whole, alone = AutoModelForCausalLM.from_pretrained(saved).eval(), AutoModel.from_pretrained(saved).eval()
    assert alone.config.window_sizes == [8, -1, 4]
    for weight in (*whole.parameters(), *alone.parameters()):
        weight.data = weight.data.clone()
    with torch.no_grad():
        assert torch.equal(alone(tokens(1, 40)).last_hidden_state, whole.model(tokens(1, 40)).last_hidden_state)


def test_the_decoder_of_a_model_trained_from_scratch(tmp_path):
    NHAForCausalLM(NHAConfig.tiny()).save_pretrained(tmp_path)
    whole: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    alone = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(alone(tokens(1, 40)).last_hidden_state, whole.model(tokens(1, 40)).last_hidden_state)


def test_models_without_a_language_head_do_not_write(saved):
    """Else transformers warns, each time that one is loaded, of methods that it will take away."""
    for auto in (AutoModel, AutoModelForSequenceClassification):
        assert not hasattr(auto.from_pretrained(saved), "prepare_inputs_for_generation")


def test_a_classifier_starts_from_the_hybrids_decoder(saved, tmp_path_factory):
    whole, classifier = (
        auto.from_pretrained(saved, **options).eval()
        for auto, options in ((AutoModelForCausalLM, {}), (AutoModelForSequenceClassification, {"num_labels": 3}))
    )
    assert type(classifier.model.layers[0].self_attn).__name__.startswith("NHA")
    ids = tokens(2, 40)
    with torch.no_grad():
        found = classifier(ids).logits
        wanted = classifier.score(whole.model(ids).last_hidden_state[:, -1])
    assert found.shape == (2, 3) and (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    folder = tmp_path_factory.mktemp("classifier")
    classifier.save_pretrained(folder)
    again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, found, atol=1e-5)
