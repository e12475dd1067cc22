"""Law "cache": whatever generate() does with the cache equals recomputing everything without it.

Models run in float64, where rounding cannot turn one token into another.
"""

from typing import Any

import pytest
import torch

from nha.models.cache import cache_parts
from nha.models.windows import set_kv_cache_dtype
from tests.inputs import assert_close_to
from tests.models.families import hybrid, sliding, teacher, tokens

NEW = 14
WINDOWS = [8, [8, -1, 0], [-1, 3, 8]]
MODELS: list[tuple[str, Any, dict]] = [
    *[("llama", windows, {}) for windows in WINDOWS],
    ("llama", 8, {"slots_from_start": True, "sinks": 0, "slot_distance": 0}),
    ("qwen3_moe", [8, -1, 0], {}),
    ("smollm3", [8, 4, 8], {}),
    ("phi3", 8, {}),
    ("gemma2", [8, -1, 0], {}),
    ("gemma2", [-1, 8, -1], sliding(12)),
    ("gemma3_text", [-1, 8, -1], sliding(12)),
    ("gemma3_text", [5, 8, -1], sliding(12)),
    ("mistral", [-1, 8, 8], {"sliding_window": 12}),
]
each_model = pytest.mark.parametrize("family, windows, changes", MODELS, ids=str)
each_window = pytest.mark.parametrize("windows", WINDOWS, ids=str)
LEFT_PADDED = torch.tensor([[0] * 9 + [1] * 11, [1] * 20, [0] * 17 + [1] * 3])


def build(family="llama", windows: Any = 8, **changes):
    model = hybrid(family, windows, **changes).double()
    if family == "qwen3_moe":
        model.set_experts_implementation("eager")  # grouped matrix products know no float64
    return model


def generate(model, ids, **options):
    """Tokens [B, T + NEW]: nothing ends early, and no token is the padding's, from which generate() derives masks."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, suppress_tokens=[0, 1, 2], **(settings | options))


def assert_logits(model, found, wanted, what):
    """Equal up to rounding; Gemma 2's own code takes its softmax in float32, also beside float64 scores."""
    single = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
    assert_close_to(found, wanted, what, ulps=16 * single if "gemma2" in model.config.model_type else 1e5)


def assert_same(model, ids, **options):
    """With and without the cache: the same tokens, and (where they are returned) the same logits."""
    found = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        found.append(
            generate(model, ids, use_cache=use_cache, return_dict_in_generate=True, output_logits=True, **options)
        )
    cached, recomputed = found
    assert torch.equal(cached.sequences, recomputed.sequences)
    for step, (a, b) in enumerate(zip(cached.logits, recomputed.logits, strict=True)):
        assert_logits(model, a, b, f"logits of step {step}")


@each_model
def test_greedy(family, windows, changes):
    model = build(family, windows, **changes)
    for length in (3, 30):
        assert_same(model, tokens(2, length))


@each_model
def test_left_padded_batch(family, windows, changes):
    ids = tokens(3, 20) * LEFT_PADDED
    model = build(family, windows, **changes)
    assert_same(model, ids, attention_mask=LEFT_PADDED)
    batch = generate(model, ids, attention_mask=LEFT_PADDED)
    for row, mask in zip(range(3), LEFT_PADDED, strict=True):
        alone = generate(model, ids[row : row + 1, mask.bool()])
        assert torch.equal(batch[row, 20:], alone[0, -NEW:])


@each_window
def test_sampling_with_a_seed(windows):
    assert_same(build("llama", windows), tokens(2, 20), do_sample=True, temperature=1.3, top_k=20)


@each_model
def test_beam_search(family, windows, changes):
    assert_same(build(family, windows, **changes), tokens(2, 12), num_beams=3, num_return_sequences=2)


def test_beam_search_of_a_left_padded_batch():
    ids = tokens(3, 20) * LEFT_PADDED
    assert_same(build("llama", [8, -1, 0]), ids, attention_mask=LEFT_PADDED, num_beams=3)


@each_window
def test_several_samples_of_one_prompt(windows):
    assert_same(build("llama", windows), tokens(2, 12), do_sample=True, num_return_sequences=3)


@each_model
def test_many_turns_reuse_one_cache(family, windows, changes):
    model = build(family, windows, **changes)
    ids, cache = tokens(1, 5), None
    for turn in range(3):
        result = generate(model, ids, past_key_values=cache, return_dict_in_generate=True, max_new_tokens=6)
        assert torch.equal(result.sequences, generate(model, ids, use_cache=False, max_new_tokens=6))
        cache = result.past_key_values
        ids = torch.cat([result.sequences, tokens(1, 7, seed=turn)], 1)


@each_model
def test_a_prompt_of_embeddings(family, windows, changes):
    model, ids = build(family, windows, **changes), tokens(2, 20)
    embeds = model.get_input_embeddings()(ids).detach()
    assert torch.equal(generate(model, None, inputs_embeds=embeds), generate(model, ids)[:, 20:])


def test_many_turns_of_a_left_padded_batch():
    model = build("llama", [8, -1, 0])
    ids, mask, cache = tokens(3, 20) * LEFT_PADDED, LEFT_PADDED, None
    for turn in range(3):
        options = {"attention_mask": mask, "max_new_tokens": 5}
        result = generate(model, ids, past_key_values=cache, return_dict_in_generate=True, **options)
        assert torch.equal(result.sequences, generate(model, ids, use_cache=False, **options))
        cache = result.past_key_values
        ids = torch.cat([result.sequences, tokens(3, 6, seed=turn)], 1)
        mask = torch.cat([mask, torch.ones(3, 11, dtype=torch.long)], 1)


@each_model
@pytest.mark.parametrize("size", [1, 7, 64])
def test_prefill_in_chunks(family, windows, changes, size):
    model, ids = build(family, windows, **changes), tokens(2, 30)
    found = generate(model, ids, prefill_chunk_size=size, max_new_tokens=6)
    assert torch.equal(found, generate(model, ids, use_cache=False, max_new_tokens=6))


@each_window
def test_prefill_of_a_left_padded_batch_in_chunks(windows):
    model, ids = build("llama", windows), tokens(3, 20) * LEFT_PADDED
    options = {"attention_mask": LEFT_PADDED, "max_new_tokens": 6}
    found = generate(model, ids, prefill_chunk_size=7, **options)
    assert torch.equal(found, generate(model, ids, use_cache=False, **options))


@each_model
def test_static_cache(family, windows, changes):
    model = build(family, windows, **changes)
    for length in (3, 30):
        ids = tokens(2, length)
        assert torch.equal(generate(model, ids, cache_implementation="static"), generate(model, ids, use_cache=False))


@each_window
def test_static_cache_of_a_left_padded_batch(windows):
    model, ids = build("llama", windows), tokens(3, 20) * LEFT_PADDED
    found = generate(model, ids, attention_mask=LEFT_PADDED, cache_implementation="static")
    assert torch.equal(found, generate(model, ids, attention_mask=LEFT_PADDED, use_cache=False))


@pytest.mark.parametrize("windows", [*WINDOWS, [[3, 8], -1, [-1, 0]]], ids=str)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_static_cache_and_a_prompt_in_chunks(windows, kv_cache_dtype):
    model, ids = build("llama", windows), tokens(3, 20) * LEFT_PADDED
    set_kv_cache_dtype(model, kv_cache_dtype)
    options = {"attention_mask": LEFT_PADDED, "prefill_chunk_size": 7, "return_dict_in_generate": True}
    found = generate(model, ids, cache_implementation="static", **options)
    assert torch.equal(found.sequences, generate(model, ids, **options).sequences)
    kinds = {type(part).__name__ for part in cache_parts(found.past_key_values)}
    assert kinds <= {"NHACacheLayer", "StaticLayer" if kv_cache_dtype == "auto" else "Int8CacheLayer"}


@each_window
def test_static_cache_with_beams(windows):
    model, ids = build("llama", windows), tokens(2, 12)
    options = {"num_beams": 3, "num_return_sequences": 2}
    found = generate(model, ids, cache_implementation="static", **options)
    assert torch.equal(found, generate(model, ids, use_cache=False, **options))


@pytest.mark.parametrize("family, windows, changes, length", [(*m, 30) for m in MODELS] + [(*MODELS[1], 3)], ids=str)
def test_assisted_by_another_model(family, windows, changes, length):
    """An assistant that is often wrong: rejected tokens leave no trace in slots or window."""
    model, ids = build(family, windows, **changes), tokens(1, length)
    assistant = teacher("llama").double()
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    found = generate(model, ids, assistant_model=assistant, max_new_tokens=24)
    assert torch.equal(found, generate(model, ids, use_cache=False, max_new_tokens=24))


@each_window
def test_assisted_by_a_hybrid_that_is_mostly_right(windows):
    model, ids = build("llama", windows), tokens(1, 30)
    assistant = build("llama", 5)
    found = generate(model, ids, assistant_model=assistant, max_new_tokens=24)
    assert torch.equal(found, generate(model, ids, use_cache=False, max_new_tokens=24))


@each_window
def test_a_hybrid_drafts_for_its_teacher(windows):
    model, ids = teacher().double(), tokens(1, 30)
    assert torch.equal(generate(model, ids, assistant_model=build("llama", windows)), generate(model, ids))


@each_model
def test_assisted_by_looking_up_the_prompt(family, windows, changes):
    model, ids = build(family, windows, **changes), tokens(1, 6).repeat(1, 5)
    found = generate(model, ids, prompt_lookup_num_tokens=4, max_new_tokens=24)
    assert torch.equal(found, generate(model, ids, use_cache=False, max_new_tokens=24))


@each_model
def test_a_cropped_cache_equals_one_that_never_read_further(family, windows, changes):
    model, ids = build(family, windows, **changes), tokens(2, 30)

    def read(cache, start, stop):
        with torch.no_grad():
            return model(ids[:, start:stop], past_key_values=cache, use_cache=True)

    whole = read(None, 0, 30)
    # Sliding layers of transformers 5.17 take one segment between crops, with or without nha.
    pieces = (8,) if "sliding_window" in changes else (3, 8)
    for start in (4, 12):
        for back in (0, 1, 5, 8):
            cache = read(None, 0, start).past_key_values
            cache.activate_past_recording()
            for begin, end in zip((0, *pieces), pieces, strict=False):
                read(cache, start + begin, start + end)
            cache.crop(-back)
            kept = start + 8 - back
            assert cache.get_seq_length() == kept
            assert_logits(model, read(cache, kept, 30).logits, whole.logits[:, kept:], f"{start} + 8 - {back}")


@each_window
@pytest.mark.parametrize("layers", [1, 2])
def test_assisted_by_its_own_first_layers(windows, layers):
    model, ids = build("llama", windows), tokens(1, 30)
    found = generate(model, ids, assistant_early_exit=layers)
    assert torch.equal(found, generate(model, ids, use_cache=False))
    assert model.config.num_hidden_layers == 3


@each_window
def test_a_pad_token_inside_a_prompt_is_text_and_at_its_ends_padding(windows):
    model, ids = build("llama", windows), tokens(2, 30)
    ids[0, 10], ids[1, :4], ids[1, 20] = 0, 0, 0
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    assert torch.equal(generate(model, ids), generate(model, ids, attention_mask=mask))
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))
    mask[0, 10] = 0
    with pytest.raises(ValueError, match="holes"):
        generate(model, ids, attention_mask=mask)
