"""Models and settings that vLLM cannot run exactly are refused by name, before anything is loaded."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

from nha import NHAConfig
from nha.models.config import hybrid_config_class
from nha.serve.checks import check_architecture, check_model, check_run, check_version
from nha.serve.plugin import architectures, base_architecture, mark_layers


def run(pipeline=1, dtype="torch.float32", drafts=None, config=None, processes=1):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline, tensor_parallel_size=processes),
        model_config=SimpleNamespace(dtype=dtype, hf_config=config or NHAConfig.tiny()),
        speculative_config=None if drafts is None else SimpleNamespace(method=drafts),
    )


@pytest.mark.parametrize("version", [None, "0.26.0", "1.0"])
def test_an_untested_version_is_refused(version):
    with pytest.raises(ValueError, match=str(version)):
        check_version(version)


def test_windows_that_cannot_be_are_refused_with_their_layer():
    config = hybrid_config_class("llama")(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config.window_sizes = [8, [8, 16, 16]]
    with pytest.raises(ValueError, match="2 window sizes for layer 1"):
        check_model(config)
    config.window_sizes = [8, [8, 16]]
    check_model(config)


def test_a_model_that_is_no_hybrid_is_refused():
    with pytest.raises(ValueError, match="llama"):
        check_model(SimpleNamespace(model_type="llama"))


def test_exact_slots_are_refused():
    with pytest.raises(ValueError, match="slot_write.*exact"):
        check_model(NHAConfig.tiny(slot_write="exact"))
    with pytest.raises(ValueError, match="kv_cache_dtype='auto'.*got 'int8'"):
        check_model(NHAConfig.tiny(kv_cache_dtype="int8"))


@pytest.mark.parametrize("changes", [{"output_gate": True}, {"output_norm": "rms"}])
def test_options_of_all_heads_are_for_one_process(changes):
    (name,) = changes
    check_model(NHAConfig.tiny(**changes))
    check_run(run(config=NHAConfig.tiny(**changes)))
    with pytest.raises(ValueError, match=f"{name}.*got 2"):
        check_run(run(config=NHAConfig.tiny(**changes), processes=2))


def test_experts_that_were_not_tested_are_refused():
    with pytest.raises(ValueError, match="phimoe"):
        check_model(SimpleNamespace(model_type="nha-phimoe", window_sizes=[8]))


@pytest.mark.parametrize("name", ["NHAGemma3ForConditionalGeneration", "NHAHeliumForCausalLM"])
def test_a_family_that_vllm_lacks_is_refused(name):
    with pytest.raises(ValueError, match=name):
        check_architecture(name, known=False)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pipeline": 2}, "pipeline_parallel_size=1"),
        ({"dtype": "torch.float64"}, "float64"),
        ({"drafts": "eagle"}, "eagle"),
    ],
)
def test_settings_that_are_not_exact_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        check_run(run(**settings))


def test_exact_settings_are_accepted():
    check_run(run())
    check_run(run(drafts="ngram"))
    check_run(run(drafts="ngram_gpu"))


def test_every_causal_hybrid_has_a_base():
    found = architectures()
    assert {"NHALlamaForCausalLM", "NHAQwen3ForCausalLM", "NHAGemma2ForCausalLM", "NHAForCausalLM"} <= set(found)
    assert base_architecture("NHAGemma2ForCausalLM") == "Gemma2ForCausalLM"


def test_a_model_with_states_is_marked_where_its_layers_had_full_attention():
    config = hybrid_config_class("qwen2")(num_hidden_layers=3, window_sizes=[8, -1, 8])
    mark_layers(config)
    assert set(config.layer_types) == {"linear_attention"}


def test_layers_beside_sliding_ones_keep_their_kinds():
    config = hybrid_config_class("gemma2")(num_hidden_layers=2, window_sizes=[-1, 8])
    before = list(config.layer_types)
    mark_layers(config)
    assert config.layer_types == before


def test_a_model_of_full_attention_alone_is_marked_so():
    config = NHAConfig.tiny(window_sizes=-1)
    mark_layers(config)
    assert set(config.layer_types) == {"full_attention"}


def test_a_configuration_is_pickled_by_its_family():
    config = hybrid_config_class("llama")(num_hidden_layers=2, window_sizes=[8, -1])
    data = pickle.dumps(config)
    assert b"NHALlamaConfig" not in data
    again = pickle.loads(data)
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict()
