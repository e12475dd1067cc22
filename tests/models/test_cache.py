"""The cache of a hybrid: constant and counted bytes, the same bits from disk, refusals before anything is read."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

from nha import NHAConfig, NHAForCausalLM, NHAState, load_cache, save_cache, save_state, set_windows
from nha.io import read_tensors, write_tensors
from nha.models.cache import cache_nbytes, nha_layers
from nha.models.observe import ablate
from nha.models.windows import pack_states, set_state_dtype
from tests.inputs import assert_close_to
from tests.models.families import hybrid, sliding, teacher, tokens

LAYERS, HEADS, DIM, SLOTS = 3, 2, 8, 6
WINDOWS: list[Any] = [[8, 8, 8], [8, -1, 0]]
each_window = pytest.mark.parametrize("windows", WINDOWS, ids=str)


def read(model, ids, cache=None, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options)


def filled(model, length=20, batch=1):
    return read(model, tokens(batch, length)).past_key_values


def copied(cache):
    return copy.deepcopy(cache)


@pytest.mark.parametrize("window", [0, 1, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_are_those_of_slots_and_window_and_nothing_else(window, batch):
    slots = 4 * HEADS * SLOTS * 2 * DIM  # keys and values, float32
    tail = 4 * window * HEADS * (3 * DIM + SLOTS)  # keys, values, keys without positions, gates
    cache = filled(hybrid("llama", window), batch=batch)
    assert cache_nbytes(cache) == LAYERS * batch * (slots + tail + 8)
    held = [x.untyped_storage() for layer in nha_layers(cache) for x in layer.state.tensors().values()]
    assert cache_nbytes(cache) == sum({x.data_ptr(): x.nbytes() for x in held}.values())  # no view keeps more alive


@each_window
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_a_cache_that_is_packed_afterwards_equals_one_that_was_packed_from_the_start(windows, state_dtype):
    model, ids, later = hybrid("llama", windows), tokens(2, 30), tokens(2, 5)
    cache = filled(model, 30, 2)
    plain = cache_nbytes(cache)
    for _ in range(2):  # the second time it is packed already
        pack_states(cache, state_dtype)
    set_state_dtype(model, state_dtype)
    wanted = read(model, ids).past_key_values
    assert cache_nbytes(cache) == cache_nbytes(wanted) < plain
    assert torch.equal(read(model, later, cache).logits, read(model, later, wanted).logits)
    with pytest.raises(ValueError, match="int4"):
        pack_states(cache, "int4")


def test_bytes_do_not_grow_with_the_text():
    model, cache = hybrid("llama", 8), None
    sizes = []
    for length in (1, 2, 7, 1, 40, 300, 1):
        cache = read(model, tokens(2, length), cache).past_key_values
        sizes.append(cache_nbytes(cache))
    # Windows of 8 are full after 10 tokens. For single tokens there are copies of what the next ones need.
    assert sizes[0] < sizes[1] < sizes[2] == sizes[4] == sizes[5] < sizes[3] == sizes[6]
    assert cache.get_seq_length() == 352


def test_only_unconverted_layers_grow():
    model = hybrid("llama", [8, -1, 0])
    sizes = [cache_nbytes(filled(model, length)) for length in (30, 31, 60)]
    token = 4 * HEADS * 2 * DIM
    assert sizes[1] - sizes[0] == token
    assert sizes[2] - sizes[1] == 29 * token


def test_bytes_of_a_recording_are_counted():
    model = hybrid("llama", 8)
    cache = filled(model)
    plain = cache_nbytes(cache)
    cache.activate_past_recording()
    read(model, tokens(1, 5), cache)
    recorded = 5 * 4 * HEADS * (3 * DIM + SLOTS)
    assert cache_nbytes(cache) == 2 * plain + LAYERS * recorded
    cache.crop(0)
    assert cache_nbytes(cache) == plain


CONTINUE = """
import sys, torch
from nha import load_cache
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
cache = load_cache(sys.argv[2], model)
ids = torch.load(sys.argv[3])
with torch.no_grad():
    logits = model(ids, past_key_values=cache).logits
save_file({"logits": logits}, sys.argv[4])
"""


def test_a_new_process_goes_on_with_the_same_bits(tmp_path):
    model = hybrid("llama", [8, -1, 0])
    cache = filled(model, batch=2)
    more = tokens(2, 11, seed=1)
    model.save_pretrained(tmp_path / "model")
    save_cache(cache, tmp_path / "cache", model)
    torch.save(more, tmp_path / "ids")
    files = [str(tmp_path / name) for name in ("model", "cache", "ids", "logits")]
    subprocess.run([sys.executable, "-c", CONTINUE, *files], check=True, timeout=120)
    assert torch.equal(load_file(files[3])["logits"], read(model, more, cache).logits)


@pytest.mark.parametrize(
    "family, windows, changes",
    [
        ("llama", [8, 8, 8], {}),
        ("llama", [8, 8, 8], {"slots_from_start": True, "sinks": 0, "slot_distance": 0}),
        ("smollm3", [8, 8, 8], {}),
        ("mistral", [-1, 8, -1], {"sliding_window": 12}),
        ("gemma3_text", [-1, 8, -1], sliding(12)),
        ("llama", [-1, -1, -1], {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [5, 20])
def test_a_loaded_cache_goes_on_with_the_same_bits(family, windows, changes, length, tmp_path):
    model = hybrid(family, windows, **changes)
    cache = filled(model, length, batch=2)
    save_cache(cache, tmp_path / "cache", model)
    loaded = load_cache(tmp_path / "cache", model)
    assert loaded.get_seq_length() == length
    assert cache_nbytes(loaded) == cache_nbytes(cache)
    for seed in (1, 2):
        more = tokens(2, 7, seed=seed)
        assert torch.equal(read(model, more, loaded).logits, read(model, more, cache).logits)


def test_an_empty_cache_is_saved_and_loaded(tmp_path):
    model = hybrid("llama", 8)
    save_cache(DynamicCache(config=model.config), tmp_path / "cache", model)
    loaded = load_cache(tmp_path / "cache", model)
    assert torch.equal(read(model, tokens(), loaded).logits, read(model, tokens()).logits)


def test_a_loaded_cache_serves_generate(tmp_path):
    model, ids = hybrid("llama", [8, -1, 0]), tokens(1, 30)
    save_cache(filled(model, 20), tmp_path / "cache", model)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    ids[:, :20] = tokens(1, 20)
    found = model.generate(ids, past_key_values=load_cache(tmp_path / "cache", model), **options)
    assert torch.equal(found, model.generate(ids, **options))


def assert_refused(call, *words):
    """ValueError in one line that contains all these words."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("expected ")
    for word in words:
        assert word in message, message


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    model = hybrid("llama", 8)
    path = tmp_path / "cache"
    save_cache(filled(model), path, model)
    whole = path.read_bytes()
    for kept in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert_refused(lambda: load_cache(path, model), str(path), "whole safetensors file")
    path.write_bytes(b"not a cache at all, but long enough to have a header" * 9)
    assert_refused(lambda: load_cache(path, model), str(path))
    save_file({"x": torch.zeros(1)}, path)
    assert_refused(lambda: load_cache(path, model), "format", "None")
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "pt"})
    assert_refused(lambda: load_cache(path, model), "format", "pt")
    state = NHAState.from_slots(torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8), 8)
    save_state(state, path)
    assert_refused(lambda: load_cache(path, model), "nha-cache", "nha-state")


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_cache(tmp_path / "nowhere", hybrid("llama", 8))


def test_a_cache_whose_tensors_do_not_fit_its_description_is_refused(tmp_path):
    model, path = hybrid("llama", 8), tmp_path / "cache"
    save_cache(filled(model), path, model)
    tensors, meta = read_tensors(path)
    del meta["sha256"]
    for name in ("0.slot_value", "2.num_tokens"):
        write_tensors(path, {n: x for n, x in tensors.items() if n != name}, meta)
        assert_refused(lambda: load_cache(path, model), *name.split("."))
    write_tensors(path, tensors | {"0.more": torch.zeros(1)}, meta)
    assert_refused(lambda: load_cache(path, model), "more", "layer 0")
    write_tensors(path, tensors | {"1.key": tensors["1.key"][:, 1:]}, meta)
    assert_refused(lambda: load_cache(path, model), "layer 1", "7", "8")
    write_tensors(path, tensors, meta | {"layers": "[]"})
    assert_refused(lambda: load_cache(path, model), "layers")
    for layers in ("{}", "[1]", '[{"kind": "nha", "length": 1}]', "[" * 10**5):
        write_tensors(path, tensors, meta | {"layers": layers})
        assert_refused(lambda: load_cache(path, model), "every layer", "cache")
    save_file(tensors, path, metadata=meta | {"format": "nha-cache-v1"})
    assert_refused(lambda: load_cache(path, model), "nha-cache-v2", "nha-cache-v1")


def test_the_cache_of_another_model_is_refused(tmp_path):
    model, path = hybrid("llama", 8), tmp_path / "cache"
    save_cache(filled(model), path, model)
    trained = hybrid("llama", 8)
    with torch.no_grad():
        trained.model.layers[1].self_attn.nha.g_proj.bias[0] += 1
    rewound = hybrid("llama", 8)
    set_windows(rewound, 7)
    others = [trained, rewound, hybrid("llama", [8, 8, -1]), hybrid("qwen2", 8), hybrid("llama", 8, slots=5), teacher()]
    for other in others:
        assert_refused(lambda other=other: load_cache(path, other), str(path), "another model")


def test_what_cannot_be_saved_is_refused_before_a_file_is_written(tmp_path):
    model = hybrid("llama", [8, -1, 0])
    static = StaticCache(config=model.config, max_cache_len=32)
    read(model, tokens(1, 20), static)
    assert_refused(lambda: save_cache(static, tmp_path / "cache", model), "dynamic cache")
    assert not list(tmp_path.iterdir())


def test_saving_replaces_a_file_only_by_a_whole_one(tmp_path, monkeypatch):
    model, path = hybrid("llama", 8), tmp_path / "cache"
    save_cache(filled(model), path, model)
    whole = path.read_bytes()

    def fail(target, tensors, metadata):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("nha.tensor_file.write_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_cache(filled(model, 30), path, model)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("windows", [4, [8, 8, -1], [8, 8, 0]], ids=str)
def test_a_cache_made_with_other_windows_is_refused(windows):
    model = hybrid("llama", 8)
    cache = filled(model)
    before = copied(cache)
    set_windows(model, windows)
    assert_refused(lambda: read(model, tokens(1, 3), cache), "windows", "layer")
    set_windows(model, [8, 8, 8])
    assert torch.equal(read(model, tokens(1, 3), cache).logits, read(model, tokens(1, 3), before).logits)


def test_a_cache_filled_before_the_conversion_is_refused():
    cache = filled(teacher())
    assert_refused(lambda: read(hybrid("llama", 8), tokens(1, 3), cache), "windows", "layer 0")


def test_a_cache_filled_by_a_hybrid_is_refused_by_a_layer_that_is_none():
    cache = filled(hybrid("llama", 8))
    assert_refused(lambda: read(hybrid("llama", -1), tokens(1, 3), cache), "layer 0")


def test_a_cache_of_a_model_with_other_sizes_is_refused():
    cache = filled(hybrid("llama", 8))
    assert_refused(lambda: read(hybrid("llama", 8, slots=5), tokens(1, 3), cache), "slot")
    assert_refused(lambda: read(hybrid("llama", 8, num_hidden_layers=2), tokens(1, 3), cache), "2 layers")


def test_an_ablation_does_not_go_on_with_another_ones_cache():
    model = hybrid("llama", 8)
    cache = filled(model)
    for what in ("slots_off", "window_off"):
        with ablate(model, what), pytest.raises(ValueError, match="expected"):
            read(model, tokens(1, 3), cache)


@each_window
def test_a_static_cache_keeps_its_tensors_addresses(windows):
    model = hybrid("llama", windows)
    cache = StaticCache(config=model.config, max_cache_len=64)
    read(model, tokens(2, 20), cache)

    def addresses():
        tensors = [x for layer in nha_layers(cache) for x in (*layer.state.tensors().values(), layer.length)]
        return [x.data_ptr() for x in tensors]

    before = addresses()
    for length in (1, 1, 5, 1):
        read(model, tokens(2, length), cache)
        assert addresses() == before
    cache.reorder_cache(torch.tensor([1, 0]))
    assert addresses() == before
    cache.activate_past_recording()
    read(model, tokens(2, 3), cache)
    for layer in nha_layers(cache):
        layer.crop(-2)
    assert addresses() == before
    cache.reset()
    assert addresses() == before


@each_window
def test_a_reset_cache_equals_a_new_one(windows):
    model, ids = hybrid("llama", windows).double(), tokens(2, 30)
    caches = [StaticCache(config=model.config, max_cache_len=64)]
    if -1 not in windows:  # transformers' own dynamic layers keep their length when they are reset
        caches.append(DynamicCache(config=model.config))
    for cache in caches:
        read(model, tokens(2, 25, seed=3), cache)
        cache.reset()
        assert_close_to(read(model, ids, cache).logits, read(model, ids).logits, type(cache).__name__)


def test_nothing_is_forgotten_that_was_not_recorded():
    model = hybrid("llama", 8)
    cache = filled(model)
    for tokens_to_remove in (-1, -20):
        with pytest.raises(RuntimeError, match="slots cannot forget"):
            cache.crop(tokens_to_remove)
    cache.activate_past_recording()
    read(model, tokens(1, 4), cache)
    before = copied(cache)
    with pytest.raises(RuntimeError, match="expected to remove at most 4 recorded tokens, got 5"):
        cache.crop(-5)
    assert torch.equal(read(model, tokens(1, 3), cache).logits, read(model, tokens(1, 3), before).logits)


@each_window
def test_a_crop_that_is_refused_changes_no_layer(windows):
    model = hybrid("llama", windows).double()
    ids, more = tokens(1, 20), tokens(1, 6, seed=1)
    cache = read(model, ids).past_key_values
    with pytest.raises(RuntimeError, match="slots cannot forget"):
        cache.crop(-4)
    assert {layer.get_seq_length() for layer in cache.layers} == {20}
    wanted = read(model, torch.cat([ids, more], 1)).logits[:, 20:]
    assert_close_to(read(model, more, copied(cache)).logits, wanted)
    cache.activate_past_recording()
    read(model, more, cache)
    cache.crop(-6)
    assert {layer.get_seq_length() for layer in cache.layers} == {20}
    assert_close_to(read(model, more, cache).logits, wanted)


def test_crop_takes_no_positive_number():
    cache = filled(hybrid("llama", 8))
    for layer in nha_layers(cache):
        with pytest.raises(ValueError, match="got 5"):
            layer.crop(5)


@pytest.mark.parametrize("recording", [False, True])
@each_window
def test_rows_are_selected_repeated_and_reordered(windows, recording):
    model = hybrid("llama", windows).double()
    ids, more = tokens(3, 20), tokens(4, 6, seed=1)
    rows = torch.tensor([2, 0, 0, 1])

    def cache():
        made = filled(model, 12, batch=3)
        if recording:
            made.activate_past_recording()
        return read(model, ids[:, 12:], made).past_key_values

    ids[:, :12] = tokens(3, 12)
    wanted = read(model, torch.cat([ids[rows], more], 1)).logits[:, 20:]
    selected = cache()
    selected.batch_select_indices(rows)
    assert_close_to(read(model, more, selected).logits, wanted, "select")
    repeated = cache()
    repeated.batch_repeat_interleave(2)
    rows = torch.arange(3).repeat_interleave(2)
    more = tokens(6, 6, seed=1)
    wanted = read(model, torch.cat([ids[rows], more], 1)).logits[:, 20:]
    assert_close_to(read(model, more, repeated).logits, wanted, "repeat")
    reordered, order = cache(), torch.tensor([1, 1, 0])
    reordered.reorder_cache(order)
    wanted = read(model, torch.cat([ids[order], more[:3]], 1)).logits[:, 20:]
    assert_close_to(read(model, more[:3], reordered).logits, wanted, "reorder")


def test_nha_for_causal_lm_has_the_same_cache(tmp_path):
    torch.manual_seed(0)
    model = NHAForCausalLM(NHAConfig.tiny(window_sizes=[8, 0])).eval()
    cache = filled(model)
    size = cache_nbytes(cache)
    save_cache(cache, tmp_path / "cache", model)
    more = tokens(1, 9, seed=1)
    loaded = read(model, more, load_cache(tmp_path / "cache", model))
    assert torch.equal(loaded.logits, read(model, more, cache).logits)
    assert cache_nbytes(cache) == size
