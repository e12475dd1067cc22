"""A model of `nha train` with full attention is the Llama or Qwen3 model that it becomes before it is converted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nha import NHAConfig, NHAForCausalLM, hybridize
from nha.errors import BadInput
from nha.models import loading
from nha.models.plain import plain_config, to_plain

PROMPT = torch.arange(40)[None] % 97


def trained(**changes: Any) -> Any:
    torch.manual_seed(0)
    return NHAForCausalLM(NHAConfig.tiny(window_sizes=-1, **changes)).eval()


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_the_plain_model_gives_the_same_logits_and_tokens(changes):
    model = trained(**changes)
    plain: Any = to_plain(model)
    assert type(plain).__module__.startswith("transformers.")
    with torch.no_grad():
        torch.testing.assert_close(plain(PROMPT).logits, model(PROMPT).logits, rtol=1e-4, atol=1e-5)
    written = [m.generate(PROMPT, max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*written)


def test_it_becomes_a_hybrid_that_is_saved_and_loaded(tmp_path):
    model = hybridize(to_plain(trained()), num_slots=8, window_size=8, calibration=PROMPT)
    model.save_pretrained(tmp_path / "hybrid")
    again = loading.load_weights(loading.find(str(tmp_path / "hybrid")), "float32")
    with torch.no_grad():
        assert torch.equal(again.eval()(PROMPT).logits, model(PROMPT).logits)


@pytest.mark.parametrize("name, value", [("output_gate", True), ("output_norm", "rms"), ("value_activation", "silu")])
def test_parts_that_no_family_has_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        plain_config(NHAConfig.tiny(window_sizes=-1, **{name: value}))


def test_converting_it_directly_names_the_way():
    with pytest.raises(ValueError, match="to_plain"):
        hybridize(trained(), calibration=PROMPT)
    with pytest.raises(ValueError, match="got nha$"):
        hybridize(NHAForCausalLM(NHAConfig.tiny()), calibration=PROMPT)


def test_a_model_with_windows_is_refused():
    with pytest.raises(ValueError, match="windows of -1.*16"):
        plain_config(NHAConfig.tiny())


def test_a_directory_of_nha_train_is_found_as_what_it_becomes(tmp_path):
    trained(qk_norm=True).save_pretrained(tmp_path / "full")
    NHAForCausalLM(NHAConfig.tiny()).save_pretrained(tmp_path / "hybrid")
    trained(output_gate=True).save_pretrained(tmp_path / "gated")
    source = loading.find_to_convert(str(tmp_path / "full"))
    assert source.config is not None and source.config.model_type == "qwen3"
    hybrid = loading.find_to_convert(str(tmp_path / "hybrid"))
    assert hybrid.config is not None and loading.is_hybrid(hybrid.config)
    with pytest.raises(BadInput, match="output_gate"):
        loading.find_to_convert(str(tmp_path / "gated"))
