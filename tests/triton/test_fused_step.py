"""Layers of one token in a few launches: the same outputs and tokens, in Triton's interpreter in float32."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import nha.models.fused_step
import nha.ops.backends
from nha import hybridize, set_windows
from nha.models import decode_graph
from nha.models.fused_step import fusing, is_fused, is_fused_now
from nha.models.windows import decoder, set_kv_cache_dtype
from tests.inputs import error, rounding
from tests.models.families import hybrid, teacher, tokens

WINDOWS = [8, -1, 0]


@pytest.fixture
def kernels(monkeypatch):
    """Lets "auto" choose the kernels, as it does on a GPU."""
    monkeypatch.setattr(nha.ops.backends, "resolve_impl", lambda impl, device="cpu": "triton")
    monkeypatch.setattr("nha.models.fused_step.resolve_impl", lambda impl, device="cpu": "triton")


def build(family="llama", dtype=torch.float32, **changes) -> Any:
    model: Any = hybrid(family, WINDOWS, slots=8, **changes)
    return model.to(dtype).requires_grad_(False)


@torch.no_grad()
def decode(model, ids, prompt):
    """Logits of single tokens in a static cache: after a prompt, and from the first token on after a reset."""
    cache, parts = StaticCache(config=model.config, max_cache_len=64), []
    model(ids[:, :prompt], past_key_values=cache, use_cache=True)
    for place in (*range(prompt, ids.shape[1]), 0, 1):
        if place == 0:
            cache.reset()
        options = {"past_key_values": cache, "use_cache": True, "position_ids": torch.tensor([[place]])}
        parts.append(model(ids[:, place : place + 1], **options).logits)
    return torch.cat(parts, 1)


def test_logits_of_tokens(kernels, monkeypatch):
    calls, compute = [], nha.models.fused_step.fused_token
    monkeypatch.setattr(nha.models.fused_step, "fused_token", lambda *a, **k: calls.append(a) or compute(*a, **k))
    model, ids = build("qwen2"), tokens(1, 11)  # which has biases
    found = decode(model, ids, 9)
    assert len(calls) == 4 * len(WINDOWS)
    with fusing(False):
        plain = decode(model, ids, 9)
    assert len(calls) == 4 * len(WINDOWS)
    exact = build("qwen2", torch.float64)(ids).logits
    exact = torch.cat([exact[:, 9:], exact[:, :2]], 1)
    assert error(found, exact) <= 2 * (error(plain, exact) + rounding(exact, torch.float32))


def test_tokens_read_and_write_keys_and_values_of_8_bits(kernels):
    model, ids = build("qwen2"), tokens(1, 11)
    unrounded = decode(model, ids, 9)
    set_kv_cache_dtype(model, "int8")
    found = decode(model, ids, 9)
    with fusing(False):
        plain = decode(model, ids, 9)
    # Where their float32 differs, a number of 8 bits may differ by a step.
    assert (found - plain).abs().mean() < 0.1 * (unrounded - plain).abs().mean()


@torch.no_grad()
def outputs(model, ids):
    """Logits of a prompt, a token and a segment, of a left-padded batch, and of a prompt within the window."""
    cache, mask = DynamicCache(config=model.config), torch.ones_like(ids)
    mask[0, :5] = 0
    parts = [model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 14), (14, 15), (15, 18))]
    return [*parts, model(ids, attention_mask=mask).logits * mask[..., None], model(ids[:, :6]).logits]


def test_logits_of_segments(monkeypatch):
    monkeypatch.setattr("nha.models.fused_step.resolve_impl", lambda impl, device="cpu": "triton")
    calls, compute = [], nha.models.fused_step.fused_segment
    monkeypatch.setattr(nha.models.fused_step, "fused_segment", lambda *a, **k: calls.append(a) or compute(*a, **k))
    model, ids = build("qwen2"), tokens(2, 18)
    with fusing(True), monkeypatch.context() as patch:
        # Gates come with the rotated queries and keys: the module of the slots, which computes them too, is not called.
        patch.setattr("nha.models.attention.slot_inputs", lambda *given: pytest.fail("gates were computed twice"))
        found = outputs(model, ids)
    assert len(calls) == 5 * len(WINDOWS) and not any("forward" in vars(x) for x in decoder(model).layers)
    with fusing(False):
        plain, exact = outputs(model, ids), outputs(build("qwen2", torch.float64), ids)
    assert len(calls) == 5 * len(WINDOWS)
    for got, same, wanted in zip(found, plain, exact, strict=True):
        assert error(got, wanted) <= 2 * (error(same, wanted) + rounding(wanted, torch.float32))


@torch.no_grad()
def test_sequences_that_windows_hold_have_the_bits_of_their_original(monkeypatch):
    monkeypatch.setattr("nha.models.fused_step.resolve_impl", lambda impl, device="cpu": "triton")
    calls, compute = [], nha.models.fused_step.fused_segment
    monkeypatch.setattr(nha.models.fused_step, "fused_segment", lambda *a, **k: calls.append(a) or compute(*a, **k))
    original: Any = teacher("llama")
    model: Any = hybridize(teacher("llama"), 8, [12, -1, 9], calibration=tokens(2, 40))  # which compares their bits
    calls.clear()
    for length in (1, 9):
        ids = tokens(2, length)
        for cache in (None, DynamicCache(config=model.config)):
            assert torch.equal(model(ids, past_key_values=cache).logits, original(ids).logits)
    assert not calls
    model(tokens(2, 10))
    assert len(calls) == 3
    set_windows(model, [-1, -1, -1])
    assert torch.equal(model(tokens(2, 30)).logits, original(tokens(2, 30)).logits)
    set_windows(model, [12, -1, 9])
    model(tokens(2, 30), output_attentions=True)
    assert len(calls) == 3


def test_gradients_and_observers_are_the_family_s(monkeypatch):
    monkeypatch.setattr("nha.models.fused_step.resolve_impl", lambda impl, device="cpu": "triton")
    monkeypatch.setattr(nha.models.fused_step, "fused_segment", lambda *a, **k: pytest.fail("no gradients here"))
    model, ids, seen = build(), tokens(1, 9), []
    with fusing(True):
        model.requires_grad_(True)(ids).logits.sum().backward()
    for layer in decoder(model).layers:
        layer.self_attn.observer = seen.append
    with torch.no_grad(), fusing(True):
        model(ids)
    assert len(seen) == len(WINDOWS)


def test_a_call_that_fails_leaves_no_trace(monkeypatch):
    monkeypatch.setattr("nha.models.fused_step.resolve_impl", lambda impl, device="cpu": "triton")
    model = build()
    monkeypatch.setattr(nha.models.fused_step, "fused_segment", lambda *a, **k: 1 / 0)
    with torch.no_grad(), fusing(True), pytest.raises(ZeroDivisionError):
        model(tokens(1, 9))
    assert not any("forward" in vars(x) for x in decoder(model).layers)


def test_generate_writes_the_same_tokens(kernels, monkeypatch):
    def capture(run):
        output, replayed = run(), []

        def replay():
            if replayed:  # recording computed the first
                output.logits.copy_(run().logits)
            replayed.append(True)

        return output, replay

    monkeypatch.setattr("nha.models.adapter.replay_prompt", lambda *given: None)  # see test_prompt_graph
    monkeypatch.setattr(decode_graph, "can_capture", lambda device: True)
    monkeypatch.setattr(decode_graph, "capture", capture)
    monkeypatch.setattr(decode_graph, "MIN_TOKENS", 4)
    calls, compute = [], nha.models.fused_step.fused_token
    monkeypatch.setattr(nha.models.fused_step, "fused_token", lambda *a, **k: calls.append(a) or compute(*a, **k))
    model, options = build(), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(tokens(1, 9), **options)
    assert len(calls) == 3 * len(WINDOWS)  # a step that is called, one that is recorded, one that is replayed
    with fusing(False):
        assert torch.equal(found, model.generate(tokens(1, 9), disable_compile=True, **options))
    assert len(calls) == 3 * len(WINDOWS)
    assert not any("forward" in vars(layer) for layer in decoder(model).layers)


class Wrapped(nn.Linear):
    pass


def replaced(model):
    layer = decoder(model).layers[0]
    wrapped = Wrapped(layer.mlp.up_proj.in_features, layer.mlp.up_proj.out_features, bias=False)
    layer.mlp.up_proj = wrapped
    return layer


def hooked(model):
    layer = decoder(model).layers[0]
    layer.self_attn.o_proj.forward = lambda x: x
    return layer


def in_two_dtypes(model):
    layer = decoder(model).layers[0]
    layer.input_layernorm.double()
    return layer


def with_other_activation(model):
    layer = decoder(model).layers[0]
    layer.mlp.act_fn = nn.GELU()
    return layer


def ablated(model):
    layer = decoder(model).layers[0]
    layer.self_attn.ablation = "slots_off"
    return layer


def with_initial_slots(model):
    layer = decoder(model).layers[0]
    layer.self_attn.nha.initial = (torch.zeros(2, 8, 8), torch.zeros(2, 8, 8))
    return layer


def watched(model):
    layer = decoder(model).layers[0]
    layer.mlp.register_forward_hook(lambda module, args, output: None)
    return layer


CHANGES = [replaced, hooked, in_two_dtypes, with_other_activation, ablated, with_initial_slots, watched]


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_not_the_family_s_is_left_alone(change):
    model = build()
    assert all(map(is_fused_now, decoder(model).layers))
    assert not is_fused(change(model))
    assert change is in_two_dtypes or not is_fused_now(decoder(model).layers[0])


@torch.no_grad()
def test_collected_hidden_states_leave_layers_fused():
    model, ids = build(), tokens(1, 9)
    found = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == len(WINDOWS) + 1
    assert all(map(is_fused_now, decoder(model).layers))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_families_that_compute_as_llama_does(family):
    assert all(map(is_fused, decoder(build(family)).layers))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "smollm3", "cohere", "phi3"])
def test_other_families_are_left_alone(family):
    assert not is_fused(decoder(build(family)).layers[0])


def test_slots_that_start_full_and_odd_sizes_are_left_alone():
    assert not is_fused(decoder(build(slots_from_start=True)).layers[0])
    assert not is_fused(decoder(hybrid("llama", WINDOWS, slots=6)).layers[0])
