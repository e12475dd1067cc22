"""Full attention's keys and values in 8 bits: the same numbers however a text is cut, in every kind of cache."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from nha.memory import MemoryStore
from nha.models.cache import cache_nbytes
from nha.models.cache_file import load_cache, save_cache
from nha.models.conversation import cache_keyword
from nha.models.decode_graph import make_static, static_bytes
from nha.models.int8_cache import Int8CacheLayer
from nha.models.windows import set_kv_cache_dtype
from nha.ops.int8_rows import Int8Rows
from tests.models.families import hybrid, tokens

WINDOWS = [8, -1, [4, -1]]


@pytest.fixture(scope="module")
def model() -> Any:
    found: Any = hybrid("llama", WINDOWS, slots=8).eval().requires_grad_(False)
    set_kv_cache_dtype(found, "int8")
    return found


def read(model, ids, cuts, cache):
    """Logits of a text that is read in segments of these lengths."""
    name = cache_keyword(model)
    return torch.cat([model(part, use_cache=True, **{name: cache}).logits for part in ids.split(cuts, 1)], 1)


def new_cache(model, length=None) -> Any:
    return DynamicCache(config=model.config) if length is None else StaticCache(model.config, max_cache_len=length)


@pytest.mark.parametrize("static", [None, 40])
def test_any_segments_read_the_same_rounded_keys_and_values(model, static):
    ids, model = tokens(2, 30), copy.deepcopy(model).double()  # where float32 rounds, a number may miss by a step
    wanted = read(model, ids, [30], new_cache(model))
    for cuts in ([1] * 30, [12, 1, 1, 16], [29, 1]):
        cache = new_cache(model, static)
        assert torch.allclose(read(model, ids, cuts, cache), wanted, atol=1e-6)
        assert isinstance(cache.layers[1], Int8CacheLayer) and isinstance(cache.layers[2].parts[1], Int8CacheLayer)
    set_kv_cache_dtype(model, "auto")
    plain = read(model, ids, [30], new_cache(model))
    assert 0 < (plain - wanted).abs().max() < 0.1 * plain.std()


def test_an_error_is_at_most_half_a_step_and_rounding_again_changes_nothing():
    x = torch.randn(2, 3, 40, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20)[:, None]
    rows = Int8Rows.of(x)
    found = rows.dequantize(torch.float32)
    assert ((found - x).abs() <= rows.scale / 2).all()
    assert (rows.scale / 2 <= x.abs().amax(-1, keepdim=True) / 127).all()
    assert torch.equal(rows.dequantize(torch.bfloat16).float(), found)
    assert all(map(torch.equal, rows, Int8Rows.of(found)))


@torch.no_grad()
def test_bytes_are_those_of_8_bits_and_scales(model):
    cache = new_cache(model)
    read(model, tokens(1, 30), [30], cache)
    full = [cache.layers[1], cache.layers[2].parts[1]]  # two heads and one
    assert [layer.nbytes for layer in full] == [2 * heads * 30 * (8 + 4) for heads in (2, 1)]
    assert sum(layer.nbytes for layer in full) < cache_nbytes(cache)
    assert static_bytes(model, 1, 30) == sum(layer.nbytes for layer in full)


def test_tokens_are_taken_back_and_rows_reordered(model):
    cache = new_cache(model)
    read(model, tokens(2, 12), [12], cache)
    layer: Any = cache.layers[1]
    kept = Int8Rows(*(x.clone() for x in layer.keys))
    layer.update(torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8))
    layer.crop(-3)
    assert layer.get_seq_length() == 12 and all(map(torch.equal, layer.keys, kept))
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3, 1]))
    assert all(map(torch.equal, layer.keys, kept))
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0
    with pytest.raises(ValueError, match="3"):
        layer.crop(3)


def test_a_cache_is_saved_loaded_and_made_static(model, tmp_path):
    ids, cache = tokens(1, 20), new_cache(model)
    read(model, ids[:, :16], [16], cache)
    save_cache(cache, tmp_path / "cache", model)
    set_kv_cache_dtype(model, "auto")  # the file's format counts
    loaded, fixed = (load_cache(tmp_path / "cache", model) for _ in range(2))
    set_kv_cache_dtype(model, "int8")
    make_static(fixed, 30)
    wanted = read(model, ids[:, 16:], [1] * 4, cache)
    assert torch.equal(read(model, ids[:, 16:], [1] * 4, loaded), wanted)
    assert torch.allclose(read(model, ids[:, 16:], [1] * 4, fixed), wanted, atol=1e-5)


def test_a_memory_of_it_is_found_again(model, tmp_path):
    ids = tokens(1, 40)
    store = MemoryStore(tmp_path, block_size=16)
    first: Any = store.read(model, ids)
    again: Any = MemoryStore(tmp_path, block_size=16).read(model, ids)
    assert again.num_found == 32
    one, other = (found.cache.layers[1].keys for found in (first, again))
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generate(model, options):
    ids = tokens(2, 12)
    found = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    assert found.shape == (2, 18)
    if not options:
        cache = new_cache(model)
        logits = read(model, found[:, :-1], [12, *[1] * 5], cache)
        assert torch.equal(logits[:, 11:].argmax(-1), found[:, 12:])


def test_gradients_and_unknown_names_are_refused(model):
    with pytest.raises(ValueError, match=r"auto, int8, got 'int4'"):
        set_kv_cache_dtype(model, "int4")
    layer = Int8CacheLayer()
    with pytest.raises(ValueError, match="'auto' where gradients"):
        layer.update(torch.ones(1, 1, 1, 8, requires_grad=True), torch.ones(1, 1, 1, 8))
