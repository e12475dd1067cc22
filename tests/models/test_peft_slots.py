"""Initial slots are trained, saved, loaded and generated with through peft like any other method."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from nha.models.peft_slots import SlotsConfig, SlotsLayer, read
from nha.models.windows import attention_layers
from nha.ops import NHAState, nha_attention
from tests.inputs import assert_close_to
from tests.models.families import FAMILIES, hybrid, teacher, tokens


def with_slots(model, seed: int | None = 0, **options):
    """A model with initial slots, random ones if a seed is given."""
    model = get_peft_model(model, SlotsConfig(task_type="CAUSAL_LM", **options)).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_slots_are_trained_and_every_one_has_a_gradient(family):
    model = with_slots(hybrid(family, [8, -1, 0]))
    assert sorted(trainable(model)) == sorted(
        f"base_model.model.model.layers.{i}.self_attn.nha.nha_slots_{what}.default"
        for i in (0, 2)
        for what in ("key", "value")
    )
    model(input_ids=tokens(2, 20), labels=tokens(2, 20)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable(model).values())


def test_a_layer_reads_the_slots_from_its_first_token():
    model = with_slots(hybrid("llama", 8, sinks=0)).double()
    seen = {}

    def see(module, args, kwargs, output):
        seen["hidden"], seen["tables"], seen["out"] = kwargs["hidden_states"], kwargs["position_embeddings"], output[0]

    attention = attention_layers(model.get_base_model())[0]
    attention.register_forward_hook(see, with_kwargs=True)
    logits(model, tokens(2, 5))  # shorter than the window
    from nha.layer import log_gate
    from nha.ops.rotary import rotate, unrotate_for_slots

    hidden = seen["hidden"]
    q, k, v = (getattr(attention, f"{x}_proj")(hidden).unflatten(-1, (-1, 8)) for x in "qkv")
    q, k = rotate(q, *seen["tables"]), rotate(k, *seen["tables"])
    slot_q, slot_k = unrotate_for_slots(q, k, seen["tables"], (attention.nha.slot_cos, attention.nha.slot_sin))
    gate = log_gate(attention.nha.g_proj(hidden), 2)
    initial = (x.double().expand(2, -1, -1, -1) for x in attention.nha.initial)
    state = NHAState.from_slots(*initial, 8, shared_keys=False)
    wanted = nha_attention(q, k, v, gate, window_size=8, q_slot=slot_q, k_slot=slot_k, state=state, impl="reference")
    assert_close_to(seen["out"], attention.o_proj(wanted.out.flatten(2)))


def test_trained_saved_and_loaded_with_the_same_bits(tmp_path):
    ids = tokens(4, 24, seed=5)
    plain = logits(hybrid(), ids)
    model = with_slots(hybrid(), seed=None, start="random")
    optimizer = torch.optim.Adam(trainable(model).values(), 5e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * 2 * 3 * 2 * 6 * 8 + 2000
    loaded = PeftModel.from_pretrained(hybrid(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, ids), trained)
    assert torch.equal(logits(loaded.unload(), ids), plain)


@pytest.mark.parametrize("windows", [8, [8, -1, 0]], ids=str)
def test_generating_with_the_cache_equals_recomputing_without_it(windows):
    model = with_slots(hybrid("llama", windows)).double()
    ids = tokens(2, 12)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(input_ids=ids, **options))
    steps, cache = [], None
    for part in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):
        found = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        steps.append(found.logits)
    assert_close_to(torch.cat(steps, 1), logits(model, ids), "in segments")


def test_padded_and_packed_texts_start_with_the_slots_each():
    model = with_slots(hybrid("llama", [8, 8, 0])).double()
    parts = [tokens(1, 11, seed=1), tokens(1, 20, seed=2)]
    alone = [logits(model, part)[0] for part in parts]
    position = torch.cat([torch.arange(11), torch.arange(20)])[None]
    packed = logits(model, torch.cat(parts, 1), position_ids=position)[0]
    assert_close_to(packed, torch.cat(alone), "packed")
    padded = torch.zeros(2, 20, dtype=torch.long)
    mask = torch.zeros(2, 20, dtype=torch.long)
    padded[0, 9:], padded[1], mask[0, 9:], mask[1] = parts[0][0], parts[1][0], 1, 1
    found = logits(model, padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    assert_close_to(found[0, 9:], alone[0], "padded")
    assert_close_to(found[1], alone[1], "whole")


def test_slots_read_from_a_text_are_what_reading_it_leaves():
    model = with_slots(hybrid("llama", 8), seed=None).double()
    text = tokens(1, 30, seed=9)
    read(model, text)
    with model.disable_adapter():
        cache = model.get_base_model()(text, use_cache=True).past_key_values
    for module, layer in zip(attention_layers(model.get_base_model()), cache.layers, strict=True):
        assert torch.allclose(module.nha.initial[0].double(), layer.state.slot_key[0])
    with pytest.raises(ValueError, match="expected one text of more than 8 tokens"):
        read(model, text[:, :8])
    with pytest.raises(ValueError, match="expected a model with initial slots"):
        read(hybrid(), text)


def test_two_adapters_are_switched_between():
    model = with_slots(hybrid())
    ids = tokens(1, 20)
    first = logits(model, ids)
    model.add_adapter("second", SlotsConfig(task_type="CAUSAL_LM", start="random"))
    model.set_adapter("second")
    assert not torch.equal(logits(model, ids), first)
    assert all(".second" in name for name in trainable(model))
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model, ids), first)


def test_some_layers_alone():
    model = with_slots(hybrid(), layers_to_transform=[1])
    layers = [isinstance(m.nha, SlotsLayer) for m in attention_layers(model.get_base_model())]
    assert layers == [False, True, False]


def test_a_task_is_learnt_about_as_well_as_by_lora_of_equal_size():
    """The task: texts all start with the same 16 tokens, which neither method can know but by learning them."""
    prefix = tokens(1, 16, seed=77)
    generator = torch.Generator().manual_seed(0)

    def batch():
        tails = torch.randint(3, 97, (8, 8), generator=generator)
        return torch.cat([prefix.expand(8, -1), tails], 1)

    def learn(model, rate):
        optimizer = torch.optim.Adam(trainable(model).values(), rate)
        for _ in range(60):
            ids = batch()
            labels = ids.clone()
            labels[:, 16:] = -100
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
        return loss.item()

    slots = with_slots(hybrid(slots=6), seed=None, start="random")
    torch.manual_seed(0)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = get_peft_model(hybrid(slots=6), LoraConfig(r=1, target_modules=projections, task_type="CAUSAL_LM"))
    sizes = [sum(p.numel() for p in trainable(model).values()) for model in (slots, lora)]
    assert sizes == [576, 672]
    before = slots(input_ids=prefix, labels=prefix).loss.item()
    by_slots, by_lora = learn(slots, 5e-2), learn(lora, 5e-2)
    assert by_slots < 0.6 * before and by_slots < 1.5 * by_lora


def test_what_cannot_have_slots_is_refused():
    with pytest.raises(ValueError, match="expected a hybrid model, got LlamaForCausalLM"):
        with_slots(teacher())
    with pytest.raises(ValueError, match="expected start to be one of"):
        SlotsConfig(start="ones")
    with pytest.raises(NotImplementedError, match="initial slots cannot be merged"):
        with_slots(hybrid()).merge_and_unload()
    assert copy.deepcopy(with_slots(hybrid())) is not None
