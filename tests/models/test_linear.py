"""Linear layers of a decoder on a CPU that oneDNN multiplies: nothing but the library changes, and nothing is left."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from nha.models import linear
from nha.models.adapter import to_hybrid
from nha.models.fused_step import fusing
from nha.models.head import check_head
from nha.models.linear import onednn_linear

WINDOW = 8


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        vocab_size=300,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    to_hybrid(model, [WINDOW, WINDOW], num_slots=8)
    return model


def replaced(model):
    return [module for module in model.modules() if "forward" in vars(module)]


@torch.no_grad()
def read(model, ids):
    """Logits of all but the last token in one segment, and of the last one after them."""
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :-1], past_key_values=cache).logits
    return torch.cat((first, model(ids[:, -1:], past_key_values=cache).logits), 1)


def test_onednn_multiplies_as_torch_does():
    x, layer = torch.randn(2, 5, 256), nn.Linear(256, 300)
    with torch.no_grad():
        for given in (x, x[:, ::2], x[0, 0], x[:, :0]):
            torch.testing.assert_close(onednn_linear(given, layer.weight, layer.bias), layer(given))
    assert onednn_linear(x, layer.weight).requires_grad


def test_only_the_library_changes(model, monkeypatch):
    calls = []
    monkeypatch.setattr(linear, "onednn_linear", lambda *x: calls.append(x) or onednn_linear(*x))
    ids = torch.randint(300, (1, 40))
    with fusing(False):
        expected = read(model, ids)
    assert not calls
    got = read(model, ids)
    assert len(calls) == 2 * (2 * 7 + 1)  # the gates are too small; the head
    bound = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(got, expected, atol=bound, rtol=0)
    assert not replaced(model)


def test_sequences_within_the_window_keep_their_bits(model):
    ids = torch.randint(300, (1, WINDOW))
    with torch.no_grad():
        got = model(ids).logits
        with fusing(False):
            assert torch.equal(got, model(ids).logits)


def test_a_pass_without_the_head_changes_no_later_one(model):
    ids = torch.randint(300, (1, 40))
    with torch.no_grad():
        model.model(ids)
        assert replaced(model) == [model.lm_head]
        got = model(ids[:, :WINDOW]).logits
        assert torch.equal(got, model.lm_head(model.model(ids[:, :WINDOW]).last_hidden_state))
        model.model(ids)
        check_head(model, ids)


def test_gradients_are_those_of_torch(model):
    model(torch.randint(300, (1, 40))).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_nothing_is_left_after_a_failure(model):
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        model(torch.randint(300, (1, 40)))
    assert replaced(model) == [model.lm_head]
    with torch.no_grad():
        model.lm_head(torch.zeros(1, 1, 256))
    assert not replaced(model)


def test_a_replaced_layer_is_found_and_a_copy_reads_its_own_weights(model):
    ids = torch.randint(300, (1, 40))
    read(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mlp = twin.model.layers[0].mlp
        mlp.up_proj = nn.Linear(256, 512, bias=False)
        for other in (twin.model.layers[1].mlp.up_proj, twin.lm_head):
            with torch.no_grad():
                other.weight.mul_(0.5)
        got = read(twin, ids)
        with fusing(False):
            expected = read(twin, ids)
        torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
        assert not torch.allclose(got, read(model, ids), rtol=0.1)
