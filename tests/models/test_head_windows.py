"""Windows per KV head: each head is as in a layer where all heads have its window, in every law of the models."""

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from nha import NHAConfig, NHAForCausalLM, load_cache, save_cache, set_windows
from nha.models.cache import HeadGroupsCacheLayer, allow_rollback, cache_nbytes, nha_layers
from nha.models.observe import ablate, observe_mass
from nha.models.windows import attention_layers, temporary_windows
from nha.ops.heads import head_groups, join_heads, take_heads
from tests.inputs import assert_close_to
from tests.models.families import hybrid, sliding, teacher, tokens

MIXED: list[Any] = [[4, 16], [0, 8], [-1, 4]]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
FAMILIES = ("llama", "qwen3", "olmo2", "gemma2", "phi3")


def scratch(windows=None):
    torch.manual_seed(0)
    config = NHAConfig.tiny(num_hidden_layers=3, window_sizes=MIXED if windows is None else windows, num_sinks=1)
    model = NHAForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.double()


def converted():
    return hybrid("llama", MIXED).double()


def each_model(function):
    return pytest.mark.parametrize("make", [converted, scratch], ids=["llama", "nha"])(function)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def layer_outputs(model, layer, ids):
    """The input of a layer's output projection, [B, T, HQ * Dv]."""
    found = []
    module = attention_layers(model)[layer]
    handle = module.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    logits(model, ids, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("heads", [(0,), (1, 2), (0, 2), (0, 1, 3), (3,)], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_heads_are_taken_apart_and_joined(heads, size):
    x = torch.randn(2, 3, 4 * size, 5)
    wanted = [head * size + i for head in heads for i in range(size)]
    assert torch.equal(take_heads(x, heads, 2, 4), x[:, :, wanted])
    groups = head_groups([1 if head in heads else 2 for head in range(4)])
    assert torch.equal(join_heads([take_heads(x, group.heads, 2, 4) for group in groups], groups, 2), x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pair", [(4, 16), (0, 8), (-1, 4), (24, 5)], ids=str)
def test_a_head_reads_as_in_a_layer_where_all_have_its_window(family, pair):
    ids = tokens(2, 40)
    mixed = layer_outputs(hybrid(family, [list(pair), -1, -1]), 0, ids).chunk(2, -1)
    for head, window in enumerate(pair):
        alone = layer_outputs(hybrid(family, [window, -1, -1]), 0, ids).chunk(2, -1)[head]
        torch.testing.assert_close(mixed[head], alone, rtol=1e-5, atol=1e-5)


@each_model
def test_equal_windows_of_all_heads_are_one_window_with_the_same_bits(make):
    model, ids = make(), tokens(2, 40)
    set_windows(model, [[8, 8], [-1, -1], 4])
    assert model.config.window_sizes == [8, -1, 4]
    found = logits(model, ids)
    set_windows(model, [8, -1, 4])
    assert torch.equal(found, logits(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 4])
def test_a_sequence_within_the_smallest_window_gives_the_bits_of_the_teacher(family, length):
    model, ids = hybrid(family, [[4, 16], [8, 8], [-1, 4]]), tokens(2, length)
    for use_cache in (False, True):
        found = logits(model, ids, use_cache=use_cache)
        assert torch.equal(found, logits(teacher(family), ids, use_cache=use_cache))


@each_model
def test_full_attention_in_all_heads_is_the_layer_before(make):
    model, ids = make(), tokens(1, 40)
    set_windows(model, [[-1, -1]] * 3)
    found = logits(model, ids)
    set_windows(model, -1)
    assert model.config.window_sizes == [-1, -1, -1]
    assert torch.equal(found, logits(model, ids))


@each_model
@pytest.mark.parametrize("cuts", [[1] * 40, [3, 1, 20, 16], [25, 15]], ids=len)
def test_any_split_into_segments_equals_one_call(make, cuts):
    model, ids = make(), tokens(2, 40)
    cache, parts = DynamicCache(config=model.config), []
    for part in ids.split(cuts, 1):
        parts.append(logits(model, part, past_key_values=cache, use_cache=True))
    assert_close_to(torch.cat(parts, 1), logits(model, ids, use_cache=False))
    assert cache.get_seq_length() == 40


@each_model
def test_a_padded_row_equals_the_row_alone(make):
    model, ids = make(), tokens(2, 30)
    alone = logits(model, ids[1:, 9:], use_cache=False)
    for left in (True, False):
        padding = torch.zeros(1, 9, dtype=torch.long)
        row = torch.cat([padding, ids[1:, 9:]] if left else [ids[1:, 9:], padding], 1)
        mask = torch.ones(2, 30, dtype=torch.long)
        mask[1] = (torch.arange(30) >= 9 if left else torch.arange(30) < 21).long()
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0), "use_cache": False}
        found = logits(model, torch.cat([ids[:1], row]), **options)
        assert_close_to(found[1:, 9:] if left else found[1:, :21], alone)


@each_model
def test_packed_sequences_equal_the_sequences_one_by_one(make):
    model, lengths = make(), [3, 17, 1, 30]
    rows = [tokens(1, length, seed=i) for i, length in enumerate(lengths)]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    options = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 30, "max_length_k": 30}
    packed = model(torch.cat(rows, 1), position_ids=positions, use_cache=False, **options).logits
    alone = [model(row, use_cache=False).logits for row in rows]
    assert_close_to(packed.detach(), torch.cat(alone, 1).detach())
    weights = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(packed.square().sum(), weights, allow_unused=True)
    theirs = torch.autograd.grad(torch.cat(alone, 1).square().sum(), weights, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine is not None and other is not None  # data-parallel training waits for every gradient
        assert_close_to(mine, other)


@each_model
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_generate_with_the_cache_equals_recomputing(make, options):
    model = make()
    ids = torch.cat([torch.zeros(2, 5, dtype=torch.long), tokens(2, 20)], 1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids[0, :5] = 7
    written = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        written.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **(GREEDY | options)))
    assert torch.equal(*written)


@each_model
def test_assisted_decoding_writes_the_same(make):
    model, ids = make(), tokens(1, 24)
    written = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), written)


@each_model
def test_a_crop_goes_back_in_all_heads_or_in_none(make):
    model, ids = make(), tokens(1, 40)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :20], past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"at most 0 recorded tokens, got 5"):
        cache.crop(-5)
    assert cache.get_seq_length() == 20
    cache.activate_past_recording()
    logits(model, ids[:, 20:33], past_key_values=cache)
    cache.crop(-5)
    found = logits(model, ids[:, 28:], past_key_values=cache)
    assert_close_to(found, logits(model, ids, use_cache=False)[:, 28:])


@each_model
def test_a_rollback_takes_tokens_back_in_all_heads(make):
    model, ids = make(), tokens(1, 40)
    cache = DynamicCache(config=model.config)
    allow_rollback(cache, 6)
    for part in ids[:, :33].split([25, 5, 3], 1):
        logits(model, part, past_key_values=cache)
    cache.crop(-5)
    found = logits(model, ids[:, 28:], past_key_values=cache)
    assert_close_to(found, logits(model, ids, use_cache=False)[:, 28:])


@each_model
def test_rows_of_a_cache_are_repeated_reordered_and_selected(make):
    model, ids = make(), tokens(2, 30)
    whole, cache = logits(model, ids, use_cache=False), DynamicCache(config=model.config)
    logits(model, ids[:, :20], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))  # type: ignore[arg-type]
    cache.batch_select_indices(torch.tensor([0, 1]))
    found = logits(model, ids[[1, 0], 20:], past_key_values=cache)
    assert_close_to(found, whole[[1, 0], 20:])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close_to(logits(model, ids, past_key_values=cache), whole)


@each_model
def test_a_cache_from_disk_goes_on_with_the_same_bits(make, tmp_path):
    model, ids = make(), tokens(2, 40)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :20], past_key_values=cache)
    save_cache(cache, tmp_path / "cache", model)
    loaded = load_cache(tmp_path / "cache", model)
    assert cache_nbytes(loaded) == cache_nbytes(cache) and loaded.get_seq_length() == 20
    assert torch.equal(
        logits(model, ids[:, 20:], past_key_values=loaded), logits(model, ids[:, 20:], past_key_values=cache)
    )


@each_model
def test_a_model_from_disk_has_its_windows_and_bits(make, tmp_path):
    model, ids = make(), tokens(1, 40)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.window_sizes == MIXED
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@each_model
def test_changed_windows_equal_a_model_built_with_them(make):
    model, ids = make(), tokens(1, 40)
    found = logits(model, ids)
    with temporary_windows(model, [8, [2, 3], -1]):
        other = logits(model, ids)
        assert not torch.equal(other, found)
    assert torch.equal(logits(model, ids), found)
    set_windows(model, 8)
    assert model.config.window_sizes == [8, 8, [-1, 8]]  # a head with full attention keeps it
    model.config.window_sizes = [8, [2, 3], -1]
    assert torch.equal(logits(model, ids), other)


def test_a_cache_made_with_other_windows_is_refused():
    model, ids = hybrid("llama", MIXED), tokens(1, 20)
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    set_windows(model, [[4, 8], [0, 8], [-1, 4]])
    with pytest.raises(ValueError, match=r"layer 0.*\(4, 8\)"):
        logits(model, ids, past_key_values=cache)


def test_bytes_are_those_of_slots_and_windows_of_each_head():
    model = hybrid("llama", MIXED)
    cache = DynamicCache(config=model.config)
    logits(model, tokens(1, 40), past_key_values=cache)
    dim, slots = 8, 6
    token, slot = 4 * (3 * dim + slots), 4 * slots * 2 * dim  # of one head
    constant = (4 + 16 + 0 + 8 + 4) * token + 5 * slot + 5 * 8
    assert cache_nbytes(cache) == constant + 40 * 4 * 2 * dim
    assert sum(layer.nbytes for layer in nha_layers(cache)) == constant
    assert [type(layer) for layer in cache.layers] == [HeadGroupsCacheLayer] * 3


@each_model
def test_a_static_cache_decodes_the_same(make):
    model, ids = make(), tokens(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=64)
    parts = [logits(model, part, past_key_values=cache) for part in ids.split([20, 1, 1, 18], 1)]
    assert_close_to(torch.cat(parts, 1), logits(model, ids, use_cache=False))


@each_model
def test_checkpointing_gives_the_same_gradients(make):
    model, ids = make(), tokens(1, 40)
    grads = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@each_model
def test_ablations_and_observers_see_all_heads(make):
    model, ids = make(), tokens(1, 40)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with observe_mass(model, lambda layer, slots, sink: found.update({layer: (slots, sink)})):
        logits(model, ids)
    assert sorted(found) == [0, 1, 2]
    assert all(slots.shape == (1, 40, 4) == sink.shape for slots, sink in found.values())
    assert found[2][0][..., :2].abs().max() == 0  # of the head with full attention
    plain = logits(model, ids)
    for ablation in ("slots_off", "window_off"):
        with ablate(model, ablation if ablation == "window_off" else None):
            other = logits(model, ids)
        assert other.isfinite().all() and (ablation == "slots_off" or not torch.equal(other, plain))
    set_windows(model, [[4, 16], [6, 8], [-1, 4]])
    with ablate(model, "slots_off"):
        assert logits(model, ids).isfinite().all()


def test_layers_that_slide_keep_their_own_window_in_full_heads():
    model, ids = hybrid("mistral", [[-1, 4], [8, -1], 8], sliding_window=12).double(), tokens(1, 40)
    parts, cache = [], DynamicCache(config=model.config)
    for part in ids.split([15, 1, 24], 1):
        parts.append(logits(model, part, past_key_values=cache))
    assert_close_to(torch.cat(parts, 1), logits(model, ids, use_cache=False))
    with pytest.raises(ValueError, match="at most 12 for layer 1, head 0"):
        set_windows(model, [8, [16, 8], 8])
    gemma = hybrid("gemma3_text", [[-1, 8], [4, 8], -1], **sliding(12))
    assert torch.equal(gemma.generate(ids, **GREEDY), gemma.generate(ids, use_cache=False, **GREEDY))


@pytest.mark.parametrize(
    "windows, words",
    [
        ([8, [8, 8, 8], 8], "2 window sizes for layer 1, one per KV head, got 3"),
        ([8, [8, -2], 8], "-2 for layer 1, head 1"),
        ([8, [8, "8"], 8], "'8' for layer 1, head 1"),
        ([8, [True, 8], 8], "True for layer 1, head 0"),
        ([8, [], 8], "got 0"),
    ],
    ids=str,
)
def test_windows_that_cannot_be_are_named_with_layer_and_head(windows, words):
    model = hybrid("llama", MIXED)
    with pytest.raises(ValueError, match=words):
        set_windows(model, windows)
    assert model.config.window_sizes == MIXED


def test_one_graph_holds_a_compiled_forward_pass():
    model, ids = hybrid("llama", [[-1, 4], -1, -1]).double(), tokens(1, 24)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close_to(compiled(ids, use_cache=False).logits, logits(model, ids, use_cache=False))
    torch._dynamo.reset()
