"""Options of the layer that is trained from scratch keep its laws: the cache, full attention, disk, gradients."""

from __future__ import annotations

import pytest
import torch

from nha import NHAConfig, NHAForCausalLM
from nha.models.config import PAPER_LAYER

OPTIONS = [{"qk_norm": True}, {"output_gate": True}, {"slot_features": "silu"}, {"slot_features": "relu"}]
OPTIONS += [{"value_activation": "silu"}, {"output_norm": "rms"}, PAPER_LAYER]
ALL = {"qk_norm": True, "output_gate": True, "slot_features": "silu"} | PAPER_LAYER


def model(**changes) -> NHAForCausalLM:
    torch.manual_seed(0)
    return NHAForCausalLM(NHAConfig.tiny(window_sizes=[4, -1], num_sinks=1, **changes)).eval()


def ids(length: int = 40) -> torch.Tensor:
    return torch.randint(2, 128, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_each_option_changes_the_model(changes):
    plain, other = model(), model(**changes)
    other.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert not torch.allclose(other(ids()).logits, plain(ids()).logits, atol=1e-4)


@torch.no_grad()
def test_segments_through_the_cache_equal_one_call():
    hybrid, cache, found = model(**ALL), None, []
    for part in ids().split([9, 1, 1, 29], 1):
        output = hybrid(part, past_key_values=cache, use_cache=True)
        found.append(output.logits)
        cache = output.past_key_values
    assert torch.allclose(torch.cat(found, 1), hybrid(ids()).logits, atol=1e-5)


@torch.no_grad()
def test_slot_features_do_not_touch_a_sequence_that_the_window_holds():
    hybrid, plain = model(slot_features="silu"), model()
    assert torch.equal(hybrid(ids(4)).logits, plain(ids(4)).logits)


def test_a_saved_model_has_the_same_bits_and_all_parameters_get_gradients(tmp_path):
    hybrid = model(**ALL)
    hybrid.save_pretrained(tmp_path)
    again = NHAForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids()).logits, hybrid(ids()).logits)
    hybrid(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hybrid.parameters() if p.requires_grad)


@torch.no_grad()
def test_the_published_layer_acts_on_values_and_normalizes_all_heads_together():
    attention = model(**PAPER_LAYER).model.layers[0].self_attn
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    values = torch.nn.functional.silu(attention.v_proj(x)).unflatten(-1, (2, 16))
    assert torch.equal(attention.project(x)[2], values)
    out = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(1))
    activated = torch.nn.functional.silu(out).flatten(2)
    normalized = activated / (activated.square().mean(-1, keepdim=True) + attention.config.rms_norm_eps).sqrt()
    assert torch.allclose(attention.output(out, x), attention.o_proj(normalized), atol=1e-6)


@pytest.mark.parametrize("name", ["slot_features", "value_activation", "output_norm"])
def test_an_unknown_function_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*gelu"):
        NHAConfig.tiny(**{name: "gelu"})


def test_the_deviation_of_the_gates_is_that_of_their_logits_at_any_width():
    for width in (64, 256):
        attention = model(hidden_size=width, gate_std=4.0, num_slots=32).model.layers[0].self_attn
        logits = attention.g_proj(torch.randn(256, width, generator=torch.Generator().manual_seed(0)))
        assert 3.5 < logits.std() < 4.5  # 64 rows of weights, some 6 % of error each
    assert model(gate_std=0.0).model.layers[0].self_attn.g_proj.weight.std() < 0.03
    with pytest.raises(ValueError, match="gate_std.*-1"):
        NHAConfig.tiny(gate_std=-1.0)


def test_gates_of_a_saved_model_are_not_drawn_again(tmp_path):
    hybrid = model(gate_std=4.0)
    hybrid.save_pretrained(tmp_path)
    again = NHAForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.gate_std == 4.0 and torch.equal(again(ids()).logits, hybrid(ids()).logits)
