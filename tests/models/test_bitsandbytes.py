"""Models whose weights bitsandbytes keeps in 4 or 8 bits become hybrids, are saved and loaded, and train by LoRA."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from nha import hybridize
from nha.distill.run import distill
from nha.distill.student import Distillation
from nha.models.quantized import keep_unpacked
from tests.distill.material import material, settings, tiny

WINDOW = 8
BITS = {
    4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    8: BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).eval().save_pretrained(path)
    return path


@pytest.fixture(params=BITS)
def quantized(request, directory):
    config = BITS[request.param]
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, device_map="cpu").eval()


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(1))


def convert(model):
    text = torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(2))
    hybridize(model, num_slots=4, window_size=WINDOW, calibration=text)
    return model


@torch.no_grad()
def test_a_quantized_model_keeps_its_weights_and_its_predictions_within_the_window(quantized, ids):
    short = ids[:, :WINDOW]
    keep_unpacked(quantized)
    wanted = quantized(short).logits
    kinds = [type(module) for module in quantized.modules()]
    convert(quantized)
    torch.testing.assert_close(quantized(short).logits, wanted, rtol=0, atol=0)
    projections = [m for name, m in quantized.named_modules() if name.endswith(("q_proj", "down_proj"))]
    assert all(type(m) in kinds and type(m) is not torch.nn.Linear for m in projections)
    assert quantized(ids).logits.isfinite().all()


@torch.no_grad()
def test_a_quantized_hybrid_is_loaded_as_it_was_saved(quantized, ids, tmp_path):
    model = convert(quantized)
    model.save_pretrained(tmp_path / "hybrid")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", device_map="cpu").eval()
    assert isinstance(loaded, type(model)) and loaded.config.model_type.startswith("nha")
    keep_unpacked(loaded)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert loaded.generate(ids, **options).tolist() == model.generate(ids, **options).tolist()


def test_a_quantized_hybrid_learns_by_lora(quantized, ids):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(convert(quantized), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "g_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_gates_below_a_quantized_layer_learn_after_passes_without_gradients(quantized, ids, tmp_path):
    convert(quantized)
    with torch.no_grad():
        wanted = quantized(ids).logits
        quantized.save_pretrained(tmp_path)
        torch.testing.assert_close(quantized(ids).logits, wanted, rtol=0, atol=0)
    quantized(ids, labels=ids).loss.backward()
    for layer in quantized.model.layers:
        assert layer.self_attn.nha.g_proj.weight.grad.abs().max() > 0


def test_weights_packed_for_a_cpu_are_not_trained(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=BITS[4], device_map="cpu")
    weight = convert(model).model.layers[1].mlp.up_proj.weight
    weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj"):
        Distillation(model, trainable="lora")


@pytest.mark.parametrize("trainable", ["lora", "slots"])
def test_a_quantized_teacher_is_distilled(tmp_path, trainable):
    corpus, tokenizer = material(tmp_path)
    model = tiny(hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", quantization_config=BITS[4], device_map="cpu")
    done = distill(model, tokenizer, corpus, tmp_path / "run", settings(trainable=trainable, lr=5e-3, tokens=12 * 640))
    losses = [entry["loss"] for entry in done.log if "loss" in entry]
    assert done.finished and losses[-1] < losses[0]
