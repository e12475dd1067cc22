"""A hybrid is a model of its own: with a configuration and a name of its own, and parameters that wrappers reach."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nha import NHAForCausalLM
from nha.models.adapter import to_hybrid
from nha.models.windows import attention_layers
from tests.models.families import hybrid, teacher, tokens


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def with_lora(model, **options):
    adapters = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(model, adapters).eval()


def test_a_model_that_shares_the_configuration_stays_what_it_is():
    config = teacher().config
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    wanted = logits(first, tokens(1, 30))
    to_hybrid(second, [8, -1, 8], num_slots=4)
    assert first.config is config and type(config).__name__ == "LlamaConfig"
    assert second.config is not config and second.config.window_sizes == [8, -1, 8]
    assert {id(m.config) for m in second.modules() if hasattr(m, "config")} == {id(second.config)}
    assert torch.equal(logits(first, tokens(1, 30)), wanted)


def test_what_was_named_after_a_hybrid_in_memory_is_never_the_original(tmp_path):
    teacher().save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original").eval()
    to_hybrid(model, [8, 8, 8], num_slots=4)
    assert model.config.converted_from == "original"
    with_lora(model, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    for name in (model.name_or_path, model.config.name_or_path):
        with pytest.raises(OSError, match="save_pretrained"):
            AutoModelForCausalLM.from_pretrained(name)
    with pytest.raises(OSError, match="save_pretrained"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_an_adapter_of_a_saved_hybrid_is_read_again_on_the_hybrid(tmp_path):
    model, ids = hybrid("llama", [8, -1, 8]), tokens(1, 30)
    model.save_pretrained(tmp_path / "hybrid")
    tuned = with_lora(model, target_modules=["q_proj", "g_proj"])
    tuned.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert type(again.get_base_model()).__name__ == "NHALlamaForCausalLM"
    assert torch.equal(logits(again, ids), logits(tuned, ids))


@pytest.mark.parametrize(
    "options", [{"target_parameters": ["nha.sink_key", "nha.sink_value"]}, {"target_modules": ["g_proj"]}]
)
def test_an_adapter_on_sinks_or_gates_counts_as_if_it_were_merged(options):
    model, ids = hybrid("llama", 8).double(), tokens(2, 30)
    plain = logits(model, ids)
    tuned = with_lora(copy.deepcopy(model), **({"target_modules": []} | options)).double()
    found = logits(tuned, ids)
    assert not torch.allclose(found, plain, atol=1e-3)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, ids), plain)
    assert torch.allclose(logits(tuned.merge_and_unload(), ids), found, atol=1e-9)


@pytest.mark.parametrize("sinks", [0, 1])
def test_offloaded_weights_give_the_same_bits(tmp_path, sinks):
    from accelerate import cpu_offload

    model = hybrid("llama", [8, -1, 8], sinks=sinks)
    model.save_pretrained(tmp_path / "hybrid")
    inner = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    ends = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    options = {"device_map": inner | ends | {"lm_head": "cpu"}, "offload_folder": str(tmp_path / "off")}
    from_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", **options).eval()
    from_memory = copy.deepcopy(model)
    cpu_offload(from_memory, execution_device="cpu", offload_buffers=True)
    for length in (8, 30):
        for offloaded in (from_disk, from_memory):
            assert torch.equal(logits(offloaded, tokens(1, length)), logits(model, tokens(1, length)))
    assert attention_layers(from_disk)[2].nha.g_proj.weight.device.type == "meta"


def test_a_model_made_from_scratch_is_named_when_it_is_saved(tmp_path):
    from nha import NHAConfig

    model = NHAForCausalLM(NHAConfig.tiny())
    model.save_pretrained(tmp_path / "scratch")
    assert model.config.name_or_path == model.name_or_path == str(tmp_path / "scratch")
