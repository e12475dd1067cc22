"""One adapter serves every family: what it adds, and what it leaves alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import sliding_window_causal_mask_function

from nha import set_windows
from nha.models.full_attention import base_attention
from nha.models.masks import HybridMask, hybrid_mask
from nha.models.observe import ablate, observe
from nha.models.windows import attention_layers
from tests.models.families import ALL_FAMILIES, FAMILIES, hybrid, teacher, tokens

WINDOW = 8
UNPACKABLE = ("nemotron", "stablelm")  # their layers do not hand on where packed sequences begin


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def in_pieces(model, ids, sizes):
    cache, found = None, []
    with torch.no_grad():
        for piece in ids.split(sizes, 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    return torch.cat(found, 1)


def close(a, b):
    """Equal up to rounding in float32 that three random layers amplify."""
    assert (a - b).abs().max() <= 2e-4 * b.abs().max()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_predicts_bit_for_bit_what_its_teacher_does_within_the_window(family):
    ids = tokens(2, WINDOW)
    assert torch.equal(logits(hybrid(family, WINDOW), ids), logits(teacher(family), ids))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_windows_of_minus_one_give_the_teacher_back(family):
    ids = tokens(2, 40)
    model = hybrid(family, WINDOW)
    assert not torch.allclose(logits(model, ids), logits(teacher(family), ids), atol=1e-3)
    set_windows(model, -1)
    assert torch.equal(logits(model, ids), logits(teacher(family), ids))


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        *((family, [WINDOW, -1, 0]) for family in ALL_FAMILIES),
        *((family, windows) for family in FAMILIES for windows in (WINDOW, [-1, 3, WINDOW])),
    ],
    ids=str,
)
def test_any_split_into_segments_gives_the_same_logits(family, windows):
    model, ids = hybrid(family, windows), tokens(2, 40)
    whole = logits(model, ids, use_cache=False)
    close(in_pieces(model, ids, [3, 1, 20, 1, 1, 14]), whole)


def test_only_padding_spare_room_and_sliding_windows_give_a_later_segment_a_mask():
    """A mask of T x Tk, and the copies that come with it, is most of the memory of a long prompt's last segments."""
    config = hybrid("llama", [WINDOW, -1, 0]).config
    seen, padded = torch.ones(2, 10, dtype=torch.bool), torch.ones(2, 10, dtype=torch.bool)
    padded[1, :2] = False
    sliding = sliding_window_causal_mask_function(4)
    assert hybrid_mask(2, 4, 10, 6, config=config) == HybridMask(appended=True)
    assert hybrid_mask(2, 4, 10, 6, attention_mask=seen, config=config) == HybridMask(appended=True)
    assert hybrid_mask(2, 4, 10, 6, attention_mask=padded, config=config).base.shape == (2, 1, 4, 10)
    assert hybrid_mask(2, 4, 20, 6, config=config).base.shape == (2, 1, 4, 20)
    assert hybrid_mask(2, 4, 10, 6, mask_function=sliding, local_size=4, config=config).base.shape == (2, 1, 4, 10)


def test_a_later_segment_without_a_mask_of_its_own_sees_all_that_came_before():
    module, generator = attention_layers(hybrid("llama", -1))[0], torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=generator)
    k, v = (torch.randn(2, 2, 12, 8, generator=generator) for _ in range(2))
    mask = torch.ones(5, 12, dtype=torch.bool).tril(7)[None, None]
    masked = base_attention(module, q, k, v, mask, softcap=None, scaling=0.3)[0]
    free = base_attention(module, q, k, v, None, softcap=None, scaling=0.3, appended=True)[0]
    close(free, masked)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_padded_rows_equal_the_rows_alone(family):
    model = hybrid(family, [WINDOW, -1, 4])
    long, short = tokens(1, 30), tokens(1, 17, seed=1)
    for left in (True, False):
        pad = torch.zeros(1, 13, dtype=torch.long)
        ids = torch.cat([long, torch.cat([pad, short] if left else [short, pad], 1)])
        mask = (ids != 0).long()
        position = (mask.cumsum(1) - 1).clamp_min(0)
        found = logits(model, ids, attention_mask=mask, position_ids=position)
        close(found[:1], logits(model, long))
        close(found[1:, 13:] if left else found[1:, :17], logits(model, short))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_packed_sequences_do_not_leak(family):
    model = hybrid(family, [WINDOW, -1, 4])
    parts = [tokens(1, n, seed=n) for n in (19, 1, 12)]
    position = torch.cat([torch.arange(x.shape[1]) for x in parts])[None]
    if family in UNPACKABLE:
        with pytest.raises(ValueError, match="cu_seq_lens_q"):
            logits(model, torch.cat(parts, 1), position_ids=position)
        return
    found = logits(model, torch.cat(parts, 1), position_ids=position)
    close(found, torch.cat([logits(model, x) for x in parts], 1))
    cu = torch.tensor([0, 19, 20, 32], dtype=torch.int32)
    named = logits(model, torch.cat(parts, 1), position_ids=position, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    close(named, found)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_saved_and_loaded_with_the_same_bits(family, tmp_path):
    model, ids = hybrid(family, [WINDOW, 4, -1]), tokens(1, 40)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for weight in loaded.parameters():  # a product of weights at the odd addresses of a mapped file may round otherwise
        weight.data = weight.data.clone()
    assert type(loaded) is type(model)
    assert loaded.config.model_type == f"nha-{family}"
    assert loaded.config.window_sizes == [WINDOW, 4, -1]
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_slot_keys_carry_no_position(family):
    """Attention sees distances alone, so the same tokens further on have the same slot keys in every layer."""
    model, ids = hybrid(family), tokens(1, 6)
    found = {0: [], 500: []}
    for start, keys in found.items():
        with observe(model, lambda layer, seen, keys=keys: keys.append(seen.slot_key)), torch.no_grad():
            model(ids, position_ids=torch.arange(start, start + 6)[None], use_cache=False)
    for first, later in zip(*found.values(), strict=True):
        assert (first - later).abs().max() <= 1e-4 * first.abs().max()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_parameter_of_the_slots_gets_a_gradient(family):
    model, ids = hybrid(family), tokens(2, 40)
    model.train()
    model(ids, labels=ids).loss.backward()
    for layer in attention_layers(model):
        for name, weight in layer.nha.named_parameters():
            assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_slots_off_equals_a_model_whose_slots_hold_nothing_but_the_sink_stays():
    model, ids = hybrid(), tokens(1, 40)
    with ablate(model, "slots_off"):
        off = logits(model, ids)
    assert not torch.allclose(off, logits(model, ids), atol=1e-3)
    with torch.no_grad():
        for layer in attention_layers(model):
            layer.nha.sink_value += 1
    with ablate(model, "slots_off"):
        assert not torch.allclose(off, logits(model, ids), atol=1e-3)


def test_window_off_equals_a_window_of_zero():
    model, ids = hybrid(), tokens(1, 40)
    with ablate(model, "window_off"):
        off = logits(model, ids)
    set_windows(model, 0)
    assert torch.equal(off, logits(model, ids))


def test_changing_windows_equals_building_the_model_with_them():
    ids = tokens(2, 40)
    model = hybrid("llama", WINDOW)
    set_windows(model, [3, -1, 5])
    assert torch.equal(logits(model, ids), logits(hybrid("llama", [3, -1, 5]), ids))


def test_the_papers_form_lets_zero_slots_take_part_from_the_start():
    plain = hybrid("llama", WINDOW, sinks=0, slot_distance=0)
    paper = hybrid("llama", WINDOW, sinks=0, slot_distance=0, slots_from_start=True)
    ids = tokens(1, 40)
    assert not torch.allclose(logits(plain, ids), logits(paper, ids), atol=1e-3)
    close(in_pieces(paper, ids, [3, 1, 20, 1, 1, 14]), logits(paper, ids))


def test_the_first_token_is_the_sinks_and_never_reaches_the_slots():
    """Slots alone (window 0, slots off beyond the sink) do not change when only the first token's value does."""
    model, ids = hybrid("llama", [0, 0, 0]), tokens(1, 12)
    states = []
    for first in (5, 6):
        changed = ids.clone()
        changed[0, 0] = first
        with torch.no_grad():
            cache = model(changed[:, :1], use_cache=True).past_key_values
        states.append(cache.layers[0].state.slot_value)
    assert torch.equal(states[0], torch.zeros_like(states[0]))
    assert torch.equal(states[1], torch.zeros_like(states[1]))
