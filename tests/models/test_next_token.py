"""One token on a CPU: projections and rotations in its own order give the numbers of the family's code."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from nha.models import adapter
from nha.models.cache import nha_layers
from nha.models.windows import attention_layers
from nha.ops import single_token
from nha.ops.single_token import FusedRing
from tests.inputs import assert_close_to, error
from tests.models.families import hybrid, tokens

WINDOWS: list[Any] = [5, [4, 16], [0, 8]]


def read(model, ids, start, cache=None):
    """Logits of tokens start .. one by one, after a prompt of those before, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        if not cache.get_seq_length():
            model(ids[:, :start], past_key_values=cache, use_cache=True)
        steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True) for t in range(start, ids.shape[1])]
    return torch.cat([step.logits for step in steps], 1), cache


@pytest.fixture
def taken(monkeypatch):
    """How often the step took the place of a family's code, by True or False."""
    counts = {True: 0, False: 0}

    def count(*args):
        out = token_attention(*args)
        if args[1].shape[1] == 1:
            counts[out is not None] += 1
        return out

    token_attention = adapter.token_attention
    monkeypatch.setattr(adapter, "token_attention", count)
    return counts


@pytest.mark.parametrize("family, own", [("llama", True), ("qwen2", True), ("mistral", True), ("qwen3", False)])
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_equal_the_same_text_read_at_once(family, own, batch, taken):
    model, ids = hybrid(family, WINDOWS).double(), tokens(batch, 60)
    found, _ = read(model, ids, 24)
    with torch.no_grad():
        assert_close_to(found, model(ids, use_cache=False).logits[:, 24:])
    assert taken == {own: 3 * 36, not own: 0}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_long_window_fills_while_others_are_full(batch, taken, monkeypatch):
    monkeypatch.setattr(single_token, "SPARE", 3)
    model, ids = hybrid("llama", [5, [4, 37], [0, 8]]).double(), tokens(batch, 60)
    found, cache = read(model, ids, 6)
    with torch.no_grad():
        assert_close_to(found, model(ids, use_cache=False).logits[:, 6:])
        assert taken == {True: 3 * 54, False: 0}
        model(ids[:, :1], past_key_values=cache)
    layer: Any = cache.layers[1]
    part = layer.parts[1]
    assert part.state.held == part.state.room == 37 and int(part.state.num_tokens[0]) == 61


def test_a_window_that_no_other_outgrows_keeps_the_bits_of_full_attention(taken):
    model, ids = hybrid("llama", [30, [20, 40], [20, 40]]), tokens(1, 16)
    read(model, ids, 6)
    assert taken == {True: 0, False: 3 * 10}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_that_share_a_window_are_read_together(family, batch):
    windows: Any = [[4, 4, 16], 5, [8, 2, 8]]
    shape = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}
    model, ids = hybrid(family, windows, **shape).double(), tokens(batch, 60)
    found, _ = read(model, ids, 24)
    with torch.no_grad():
        assert_close_to(found, model(ids, use_cache=False).logits[:, 24:])


def test_a_scale_of_the_positions_stays(taken):
    model, ids = hybrid("llama", [4] * 3).double(), tokens(1, 40)
    rotary = model.model.rotary_emb
    rotary.attention_scaling = 1.25
    for module in attention_layers(model):
        module.nha.slot_cos *= 1.25
        module.nha.slot_sin *= 1.25
    found, _ = read(model, ids, 24)
    with torch.no_grad():
        assert_close_to(found, model(ids, use_cache=False).logits[:, 24:])
    assert taken == {True: 3 * 16, False: 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_copied_cache_goes_on_with_the_same_bits(dtype):
    model, ids = hybrid("llama", WINDOWS).to(dtype), tokens(1, 60)
    whole, _ = read(model, ids, 24)
    first, cache = read(model, ids[:, :41], 24)
    last, _ = read(model, ids, 41, copy.deepcopy(cache))
    assert torch.equal(torch.cat([first, last], 1), whole)


@pytest.mark.parametrize("windows", [8, WINDOWS, 24], ids=str)
@pytest.mark.parametrize("other", [torch.enable_grad, torch.inference_mode])
def test_tokens_whose_gates_come_at_once_and_later_take_turns(windows, other):
    model, ids = hybrid("llama", windows).double().requires_grad_(False), tokens(2, 60)
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits[:, 30:]
        model(ids[:, :30], past_key_values=cache)
    for t in range(30, 60):
        with torch.no_grad() if t % 5 < 3 else other():
            found.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    assert_close_to(torch.cat(found, 1), wanted)


def test_tokens_keep_the_gates_of_the_adapter_that_read_them():
    from peft import LoraConfig, get_peft_model

    base, ids = hybrid("llama", WINDOWS), tokens(1, 50)
    adapted: Any = get_peft_model(base, LoraConfig(r=3, target_modules=["g_proj"], init_lora_weights=False))
    adapted.eval().double()
    found = []
    for steps in ([1] * 6, [6]):  # gates of a segment are computed at once
        cache = DynamicCache(config=base.config)
        with torch.no_grad():
            for part in ids[:, :30].split([24, *steps], 1):
                adapted(part, past_key_values=cache)
            with adapted.disable_adapter():
                found.append(read(base, ids, 30, cache)[0])
    assert_close_to(*found)
    with torch.no_grad():
        assert error(found[0], base(ids, use_cache=False).logits[:, 30:]) > 1e-3


def test_what_watches_a_projection_or_a_layer_is_called():
    model, ids, calls = hybrid("llama", WINDOWS), tokens(1, 30), []
    for module in (
        attention_layers(model)[0],
        attention_layers(model)[1].q_proj,
        attention_layers(model)[2].nha.g_proj,
    ):
        module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    read(model, ids, 24)
    assert calls.count("NHALlamaAttention") == 7 and calls.count("Linear") > 7
    for module in attention_layers(model):
        module.observer = calls.append
    read(model, ids, 24)
    assert len([call for call in calls if not isinstance(call, str)]) == 3 * 7


def test_a_device_that_has_neither_kernels_nor_a_step_reads_tokens_through_the_chunked_path(taken, monkeypatch):
    """Apple's GPUs, as far as a CPU can tell: no number is read, and no operation asks for float64."""
    for name in ("nha.ops.single_token", "nha.ops.rotary", "nha.ops.padding"):
        monkeypatch.setattr(sys.modules[name], "readable", lambda x: False)
    dtypes = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            dtypes.update(x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    model, ids = hybrid("llama", WINDOWS), tokens(1, 40)
    with Recorder():
        found, cache = read(model, ids, 24)
    assert not taken[True] and torch.float64 not in dtypes
    assert not any(isinstance(layer.state, FusedRing) for layer in nha_layers(cache))
    with torch.no_grad():
        wanted = model.double()(ids, use_cache=False).logits[:, 24:]
    assert error(found, wanted) < 1e-4 * wanted.abs().max()
