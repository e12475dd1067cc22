"""Hybrid models decode with the fused kernel as they do without it, in Triton's interpreter in float32."""

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import nha.models.full_attention
import nha.ops.backends
from nha import load_cache, save_cache
from nha.models.cache import nha_layers
from nha.models.decode_graph import make_static
from nha.ops import RingState
from tests.inputs import error, rounding
from tests.models.families import hybrid, tokens

WINDOWS = [8, -1, 0]
PAPER = {"slots_from_start": True, "sinks": 0, "slot_distance": 0}
CUTS = [0, 14, 15, 16, 20, 28]


@pytest.fixture
def fused(monkeypatch):
    """A switch that lets "auto" choose the kernels, as it does on a GPU."""
    return lambda: monkeypatch.setattr(nha.ops.backends, "resolve_impl", lambda impl, device="cpu": "triton")


def build(windows: Any = WINDOWS, dtype=torch.float32, **changes):
    return hybrid("llama", windows, **changes).to(dtype)


@torch.no_grad()
def read(model, ids, cache, **options):
    return model(ids, past_key_values=cache, use_cache=True, **options).logits


def in_steps(model, ids, cache, cuts=None, mask=None):
    parts = []
    for start, stop in itertools.pairwise(cuts or CUTS):
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        parts.append(read(model, ids[:, start:stop], cache, **options))
    return torch.cat(parts, 1)


def assert_as_exact(got, plain, exact):
    """Twice the error without the kernel and its rounding, judged by float64."""
    assert error(got, exact) <= 2 * (error(plain, exact) + rounding(exact, torch.float32))


def caches(model):
    return DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)


@pytest.mark.parametrize("windows, changes, static", [(WINDOWS, {}, True), (3, PAPER, False)])
def test_logits_of_prefill_steps_and_short_segments(windows, changes, static, fused):
    model, ids = build(windows, **changes), tokens(2, 28)
    exact = in_steps(build(windows, torch.float64, **changes), ids, None, [0, 28])
    plain = in_steps(model, ids, caches(model)[static])
    fused()
    cache = caches(model)[static]
    assert_as_exact(in_steps(model, ids, cache), plain, exact)
    assert all(isinstance(layer.state, RingState) for layer in nha_layers(cache))


def test_logits_of_a_left_padded_batch(fused):
    model, ids = build(), tokens(2, 28)
    mask = torch.ones(2, 28, dtype=torch.long)
    mask[1, :9] = 0
    exact = in_steps(model.double(), ids, DynamicCache(config=model.config), [0, 14, 28], mask)
    model = model.float()
    plain = in_steps(model, ids, DynamicCache(config=model.config), mask=mask)
    fused()
    got = in_steps(model, ids, DynamicCache(config=model.config), mask=mask)
    assert_as_exact(got[mask.bool()], plain[mask.bool()], exact[mask.bool()])


@pytest.mark.parametrize("static", [False, True])
def test_full_layers_generate_what_transformers_attention_does(static, fused, monkeypatch):
    from nha.ops.triton import full_decode as op

    model, ids = build([-1, 8, -1]), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :9] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "cache_implementation": "static" if static else None,
    }

    def generate():
        result: Any = model.generate(ids, disable_compile=True, **options)
        return result.sequences, torch.stack(result.logits)

    def before(query, key, value, mask, scale):
        return sdpa_attention_forward(model.model.layers[0].self_attn, query, key, value, mask, scaling=scale)[0]

    folded = generate()
    original, calls = op.full_decode_kernel, []

    class Counted:
        def __getitem__(self, grid):
            calls.append(grid)
            return original[grid]

    monkeypatch.setattr(op, "full_decode_kernel", Counted())
    fused()
    with_kernel = generate()
    assert len(calls) == 2 * 7  # two layers, seven steps after the prefill
    monkeypatch.setattr(nha.ops.backends, "resolve_impl", lambda impl, device="cpu": "chunked")
    monkeypatch.setattr(nha.models.full_attention, "full_decode", before)
    wanted = generate()
    model = model.double()
    exact = generate()
    for found in (folded, with_kernel):
        assert torch.equal(found[0], wanted[0])
        assert_as_exact(found[1], wanted[1], exact[1])


def test_cropped_saved_and_reordered_rings(fused, tmp_path):
    model, ids = build(), tokens(2, 28)
    exact = in_steps(build(dtype=torch.float64), ids, None, [0, 28])
    order = torch.tensor([1, 0])

    def run():
        cache = DynamicCache(config=model.config)
        first = in_steps(model, ids, cache, [0, 14, 15])
        cache.activate_past_recording()
        read(model, tokens(2, 5, seed=3), cache)  # a draft of five tokens, all rejected
        cache.crop(-5)
        second = in_steps(model, ids, cache, [15, 20, 21])
        save_cache(cache, tmp_path / "cache", model)
        cache = load_cache(tmp_path / "cache", model)
        cache.reorder_cache(order)
        third = in_steps(model, ids[order], cache, [21, 22, 28])
        return torch.cat([first, second, third[order]], 1)

    plain = run()
    fused()
    assert_as_exact(run(), plain, exact)


def test_drafts_are_taken_back_by_the_kernel(fused):
    model, ids = build([8, 3, -1]), tokens(1, 5).repeat(1, 3)
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    fused()
    cache: Any = DynamicCache(config=model.config)
    options: dict[str, Any] = {"past_key_values": cache, "prompt_lookup_num_tokens": 3, "disable_compile": True}
    found = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(found, wanted)
    assert {layer.state.max_rollback for layer in nha_layers(cache)} == {4}  # type: ignore[union-attr]


def test_initial_slots_are_not_written_into(fused):
    model, ids = build(3), tokens(1, 10)
    start = [torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for layer in model.model.layers:
        layer.self_attn.nha.initial = tuple(start)
    before = [x.clone() for x in start]
    fused()
    in_steps(model, ids, DynamicCache(config=model.config), [0, 2, 3, 10])
    for x, y in zip(start, before, strict=True):
        assert torch.equal(x, y)


def test_a_compiled_decoding_step_is_compiled_once_and_writes_in_place(fused):
    torch._dynamo.reset()
    model, ids = build(), tokens(2, 22)
    fused()
    plain, cache = caches(model)
    wanted = in_steps(model, ids, plain, [0, 14, *range(15, 23)])
    read(model, ids[:, :14], cache)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    held = [x.data_ptr() for layer in nha_layers(cache) for x in layer.state.tensors().values()]
    try:
        for at in range(14, 22):
            if at == 16:
                torch.compiler.set_stance("fail_on_recompile")
            found = read(compiled, ids[:, at : at + 1], cache, position_ids=torch.full((2, 1), at))
            assert error(found[:, 0], wanted[:, at]) <= 4 * rounding(wanted, torch.float32)
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
    assert held == [x.data_ptr() for layer in nha_layers(cache) for x in layer.state.tensors().values()]


def test_a_growing_cache_that_is_made_static_decodes_on(fused):
    model, ids, cuts = build(), tokens(2, 17), [0, 14, 15, 16, 17]
    exact = in_steps(build(dtype=torch.float64), ids, None, [0, 17])
    plain = in_steps(model, ids, caches(model)[1], cuts)
    fused()
    growing = DynamicCache(config=model.config)
    parts = [read(model, ids[:, :14], growing)]
    make_static(growing, 40)
    held = [layer.state.key.data_ptr() for layer in nha_layers(growing)]
    parts += [read(model, ids[:, i : i + 1], growing) for i in range(14, 17)]
    assert_as_exact(torch.cat(parts, 1), plain, exact)
    assert all(isinstance(layer.state, RingState) for layer in nha_layers(growing))
    assert [layer.state.key.data_ptr() for layer in nha_layers(growing)] == held
