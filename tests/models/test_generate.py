"""generate() with the cache says what recomputing everything at every step says."""

import pytest
import torch

from tests.models.families import hybrid, teacher, tokens

WINDOWS = [[8, 8, 8], [8, -1, 0]]
SOME = ["llama", "gemma2", "gemma3_text", "qwen3_moe", "smollm3", "phi3"]
NEW = 24


def generate(model, ids, **options):
    """Tokens [B, T + NEW]; nothing stops early, so that rows stay comparable."""
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **options)


def padded(long, short):
    """Two rows, the second padded on the left, and their mask."""
    ids = torch.cat([long, torch.cat([torch.zeros(1, long.shape[1] - short.shape[1], dtype=torch.long), short], 1)])
    return ids, (ids != 0).long()


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_greedy(family, windows):
    model, ids = hybrid(family, windows), tokens(2, 19)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_a_left_padded_batch(family, windows):
    model = hybrid(family, windows)
    long, short = tokens(1, 19), tokens(1, 5, seed=1)
    ids, mask = padded(long, short)
    found = generate(model, ids, attention_mask=mask)
    assert torch.equal(found, generate(model, ids, attention_mask=mask, use_cache=False))
    assert torch.equal(found[:1], generate(model, long))
    assert torch.equal(found[1:, 14:], generate(model, short))


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_a_static_cache(family, windows):
    model = hybrid(family, windows)
    ids, mask = padded(tokens(1, 19), tokens(1, 5, seed=1))
    options = {"attention_mask": mask, "disable_compile": True}
    assert torch.equal(
        generate(model, ids, cache_implementation="static", **options), generate(model, ids, use_cache=False, **options)
    )


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_sampling_with_a_seed(windows):
    model, ids = hybrid("llama", windows), tokens(2, 19)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    found = generate(model, ids, **options)
    assert torch.equal(found, generate(model, ids, use_cache=False, **options))
    assert not torch.equal(found, generate(model, ids))


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_beam_search(windows, static):
    model = hybrid("llama", windows)
    ids, mask = padded(tokens(1, 19), tokens(1, 5, seed=1))
    options = {"num_beams": 4, "num_return_sequences": 2, "attention_mask": mask, "disable_compile": True}
    cached = {"cache_implementation": "static"} if static else {}
    found = generate(model, ids, **options, **cached)
    assert found.shape[0] == 4
    assert torch.equal(found, generate(model, ids, use_cache=False, **options))


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_several_samples_of_one_prompt(windows):
    model, ids = hybrid("llama", windows), tokens(2, 19)
    options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3}
    found = generate(model, ids, **options)
    assert found.shape[0] == 6
    assert torch.equal(found, generate(model, ids, use_cache=False, **options))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_several_turns_that_share_a_cache(family, windows):
    model, ids, cache = hybrid(family, windows), tokens(1, 19), None
    for turn in range(3):
        output = generate(model, ids, past_key_values=cache, return_dict_in_generate=True)
        cache = output.past_key_values
        assert torch.equal(output.sequences, generate(model, ids, use_cache=False))
        ids = torch.cat([output.sequences, tokens(1, 7 + turn, seed=turn + 1)], 1)


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 8, 64])
def test_prefill_in_chunks(windows, chunk):
    model = hybrid("llama", windows)
    ids, mask = padded(tokens(1, 19), tokens(1, 5, seed=1))
    found = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    assert torch.equal(found, generate(model, ids, attention_mask=mask, use_cache=False))


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_an_assistant_changes_nothing(family, windows):
    """Neither a full-attention draft, nor the model itself, nor a hybrid draft with smaller windows."""
    model, ids = hybrid(family, windows), tokens(1, 19)
    plain = generate(model, ids, use_cache=False)
    for draft in (teacher(family), hybrid(family, windows), hybrid(family, [2, 0, 3])):
        assert torch.equal(generate(model, ids, assistant_model=draft), plain)


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_prompt_lookup_changes_nothing(windows):
    model, ids = hybrid("llama", windows), tokens(1, 6).repeat(1, 4)
    found = generate(model, ids, prompt_lookup_num_tokens=5)
    assert torch.equal(found, generate(model, ids, use_cache=False))


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_a_hybrid_drafts_for_its_teacher(windows):
    model, ids = teacher(), tokens(1, 19)
    assert torch.equal(generate(model, ids, assistant_model=hybrid("llama", windows)), generate(model, ids))


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("kept", [1, 4, 20])
def test_going_on_after_a_crop_forgets_the_cropped_tokens(windows, kept):
    model, ids, other = hybrid("llama", windows), tokens(1, 40), tokens(1, 15, seed=1)
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        cache.activate_past_recording()
        for piece in ids[:, 20:].split([1, 12, 7], 1):
            model(piece, past_key_values=cache)
        cache.crop(20 + kept)
        found = model(other, past_key_values=cache).logits
        straight = model(ids[:, : 20 + kept], use_cache=True).past_key_values
        wanted = model(other, past_key_values=straight).logits
    assert cache.get_seq_length() == 35 + kept
    assert (found - wanted).abs().max() <= 2e-4 * wanted.abs().max()
