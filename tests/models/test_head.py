"""Logits made from hidden states are those of the model, for every family."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import nha.models.head as module
from nha import NHAConfig, NHAForCausalLM
from nha.models.families import FAMILIES as SUPPORTED
from nha.models.head import check_head, head_logits, hidden_states, token_losses
from tests.models.families import FAMILIES, hybrid, teacher, tokens


@pytest.mark.parametrize("family", [name for name in SUPPORTED if name in CONFIG_MAPPING])
def test_the_head_gives_the_logits_of_every_family(family):
    check_head(teacher(family), tokens(1, 8))


def test_a_family_with_a_factor_of_its_own_is_refused():
    class Louder(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="llama"):
        check_head(Louder(teacher("llama").config), tokens(1, 8))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [teacher, hybrid], ids=["original", "hybrid"])
def test_the_head_gives_the_models_own_logits(family, make):
    model, ids = make(family), tokens(2, 24)
    with torch.no_grad():
        assert torch.equal(head_logits(model, hidden_states(model, ids)), model(ids, use_cache=False).logits)


def test_a_cap_on_the_logits_is_kept():
    model, ids = teacher("gemma2", final_logit_softcapping=0.5), tokens(1, 12)
    with torch.no_grad():
        found = head_logits(model, hidden_states(model, ids))
        assert torch.equal(found, model(ids, use_cache=False).logits)
    assert found.abs().max() <= 0.5


@pytest.mark.parametrize("elements", [1, 97 * 7, 1 << 28])
def test_losses_do_not_depend_on_how_many_logits_are_made_at_a_time(elements, monkeypatch):
    monkeypatch.setattr(module, "ELEMENTS", elements)
    model, ids = teacher("granite"), tokens(1, 30)
    with torch.no_grad():
        hidden = hidden_states(model, ids)[0, :-1]
        wanted = F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none")
        assert torch.allclose(token_losses(model, hidden, ids[0, 1:]), wanted, atol=1e-6)


@pytest.mark.parametrize("make_model", [hybrid, lambda: NHAForCausalLM(NHAConfig.tiny()).eval()], ids=["llama", "nha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_token_is_read_with_the_same_bits_and_without_a_batch_of_products(make_model, dtype):
    model = make_model().to(dtype)
    ids = tokens(1, 40)
    with torch.no_grad(), torch.profiler.profile() as profiler:
        logits = model(ids, logits_to_keep=1).logits
    names = [event.name for event in profiler.events()]
    head = names.index("aten::linear", len(names) - 1 - names[::-1].index("aten::linear"))
    assert "aten::mm" in names[head:] and "aten::bmm" not in names[head:]
    model.get_output_embeddings()._forward_pre_hooks.clear()
    with torch.no_grad():
        assert torch.equal(model(ids, logits_to_keep=1).logits, logits)
