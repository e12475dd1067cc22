"""NHAForCausalLM, the model trained from scratch: its size, its training, its memory and its files."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from nha import NHAConfig, NHAForCausalLM, set_windows
from nha.models.adapter import to_hybrid
from nha.models.cache import nha_layers
from nha.models.observe import ablate
from nha.models.windows import attention_layers
from tests.inputs import assert_close_to
from tests.models.families import tokens

WINDOWS = [8, 0, -1, [8, -1], [0, 5]]
each_window = pytest.mark.parametrize("windows", WINDOWS, ids=str)


def build(windows=8, **changes):
    """A tiny model in float64, where rounding cannot turn one token into another."""
    torch.manual_seed(0)
    sizes = {"initializer_range": 0.2, "window_sizes": windows, "num_sinks": 1, "attention_dropout": 0.0}
    model = NHAForCausalLM(NHAConfig.tiny(**(sizes | changes))).double().eval()
    with torch.no_grad():
        for layer in attention_layers(model):
            layer.sink_key.normal_()
            layer.sink_value.normal_()
    return model


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def generate(model, ids, **options):
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, suppress_tokens=[0, 1, 2], **(settings | options))


@pytest.mark.parametrize("preset, low, high", [("paper_340m", 320e6, 360e6), ("paper_1_3b", 1.25e9, 1.45e9)])
def test_presets_have_the_parameters_that_their_names_promise(preset, low, high):
    config = getattr(NHAConfig, preset)()
    with torch.device("meta"):
        model = NHAForCausalLM(config)
    wide, heads, layers = config.hidden_size, config.num_key_value_heads, config.num_hidden_layers
    layer = 4 * wide**2 + wide * heads * 64 + 3 * wide * config.intermediate_size + 2 * wide
    embeddings = config.vocab_size * wide * (1 if config.tie_word_embeddings else 2)
    count = sum(x.numel() for x in model.parameters())
    assert count == layers * layer + wide + embeddings
    assert low < count < high
    assert config.window_sizes == [64] * layers and config.num_slots == 64 and config.num_sinks == 0


def test_windows_come_as_an_int_or_a_list():
    assert NHAConfig.tiny(window_sizes=8).window_sizes == [8, 8]
    assert NHAConfig.tiny(window_sizes=[8, -1]).window_sizes == [8, -1]
    ids = tokens(2, 40)
    assert torch.equal(logits(build(8), ids), logits(build([8, 8]), ids))


@pytest.mark.parametrize("windows", [[8], [8, 8, 8], -2, [8, -2], True, [8, False], [8, 2.0], "8"], ids=str)
def test_refuses_windows_that_cannot_be(windows):
    with pytest.raises(ValueError, match="window"):
        NHAConfig.tiny(window_sizes=windows)


@each_window
def test_every_weight_that_is_used_gets_a_gradient(windows):
    model, ids = build(windows).train(), tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    for layer, window in zip(attention_layers(model), model.config.window_sizes, strict=True):
        for name, weight in layer.named_parameters():
            slots = name.startswith(("g_proj", "sink"))
            used = weight.grad is not None and bool(weight.grad.abs().max() > 0)
            assert used == (window != -1 or not slots), name


def test_learns_a_text_by_heart():
    torch.manual_seed(0)
    model, ids = NHAForCausalLM(NHAConfig.tiny(window_sizes=[4, 0], num_sinks=1)).train(), tokens(2, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert all(not torch.equal(x, before[name]) for name, x in model.named_parameters())


@each_window
def test_any_split_into_segments_gives_the_same_logits(windows):
    model, ids, cache, found = build(windows), tokens(2, 40), None, []
    for piece in ids.split([3, 1, 20, 1, 1, 14], 1):
        with torch.no_grad():
            output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    assert_close_to(torch.cat(found, 1), logits(model, ids, use_cache=False))


@each_window
def test_generating_with_the_cache_equals_recomputing(windows):
    model, ids = build(windows), tokens(3, 20)
    mask = torch.tensor([[0] * 9 + [1] * 11, [1] * 20, [0] * 17 + [1] * 3])
    ids = ids * mask
    wanted = generate(model, ids, attention_mask=mask, use_cache=False)
    assert torch.equal(generate(model, ids, attention_mask=mask), wanted)
    assert torch.equal(generate(model, ids, attention_mask=mask, cache_implementation="static"), wanted)
    assert torch.equal(generate(model, ids[1:2], attention_mask=mask[1:2]), wanted[1:2])
    beams = {"attention_mask": mask, "num_beams": 3}
    assert torch.equal(generate(model, ids, **beams), generate(model, ids, use_cache=False, **beams))


@each_window
def test_assisted_generation_changes_nothing(windows):
    model, ids = build(windows), tokens(1, 20)
    wanted = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, assistant_model=build(3)), wanted)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=4), wanted)


@each_window
def test_padded_rows_equal_the_rows_alone(windows):
    model, long, short = build(windows), tokens(1, 30), tokens(1, 17, seed=1)
    for left in (True, False):
        pad = torch.zeros(1, 13, dtype=torch.long)
        ids = torch.cat([long, torch.cat([pad, short] if left else [short, pad], 1)])
        mask = (ids != 0).long()
        found = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
        assert_close_to(found[:1], logits(model, long))
        assert_close_to(found[1:, 13:] if left else found[1:, :17], logits(model, short))


@each_window
def test_packed_sequences_do_not_leak(windows):
    model, parts = build(windows), [tokens(1, n, seed=n) for n in (19, 1, 12)]
    position = torch.cat([torch.arange(x.shape[1]) for x in parts])[None]
    found = logits(model, torch.cat(parts, 1), position_ids=position)
    assert_close_to(found, torch.cat([logits(model, x) for x in parts], 1))


@each_window
def test_saved_and_loaded_with_the_same_bits(windows, tmp_path):
    model, ids = build(windows), tokens(2, 40)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is NHAConfig and config.window_sizes == model.config.window_sizes
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is NHAForCausalLM
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(generate(loaded, ids), generate(model, ids))
    other = NHAForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, window_sizes=[3, 2])
    assert other.config.window_sizes == [3, 2]
    assert [layer.window_size for layer in attention_layers(other)] == [3, 2]


def test_the_auto_class_builds_it_from_a_configuration():
    assert type(AutoModelForCausalLM.from_config(NHAConfig.tiny())) is NHAForCausalLM


@each_window
def test_changing_windows_equals_building_the_model_with_them(windows):
    model, ids = build(3), tokens(2, 40)
    set_windows(model, windows)
    assert torch.equal(logits(model, ids), logits(build(windows), ids))
    assert torch.equal(generate(model, ids), generate(build(windows), ids))


def test_a_window_of_minus_one_is_llama():
    model, ids = build(-1), tokens(2, 40)
    shared = LlamaForCausalLM(copy.deepcopy(model.config)).double().eval()
    shared.config._attn_implementation = "sdpa"
    missing = shared.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert torch.equal(logits(shared, ids), logits(model, ids))


def test_a_window_as_long_as_the_text_is_full_attention():
    ids = tokens(2, 40)
    assert_close_to(logits(build(40), ids), logits(build(-1), ids))


def test_cache_layers_follow_the_windows():
    model = build([8, -1])
    with torch.no_grad():
        cache = model(tokens(1, 20), use_cache=True).past_key_values
    assert [layer.window_size for layer in nha_layers(cache)] == [8]
    assert cache.get_seq_length() == 20


def test_sinks_start_at_zero_and_are_learned():
    torch.manual_seed(0)
    model, ids = NHAForCausalLM(NHAConfig.tiny(num_sinks=2)), tokens(2, 40)
    sinks = [x for name, x in model.named_parameters() if "sink" in name]
    assert [tuple(x.shape) for x in sinks] == [(2, 2, 16)] * 4
    assert all(not x.any() for x in sinks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(x.any() for x in sinks)


def test_ablations_change_what_is_read_and_only_within_their_context():
    model, ids = build(8), tokens(1, 40)
    whole = logits(model, ids)
    with ablate(model, "slots_off"):
        slots_off = logits(model, ids)
    with ablate(model, "window_off"):
        window_off = logits(model, ids)
    assert torch.equal(logits(model, ids), whole)
    assert torch.equal(window_off, logits(build(0), ids))
    assert not torch.allclose(slots_off, whole) and not torch.allclose(window_off, whole)


def test_is_not_hybridized():
    model = build(8)
    with pytest.raises(ValueError, match="not a hybrid yet"):
        to_hybrid(model, [8, 8])
    assert type(model) is NHAForCausalLM
