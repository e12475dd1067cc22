"""`generate` replays its decoding step: the same tokens come out, and where it cannot be recorded nothing changes.

A CPU has no graphs: here a replay makes the recorded call again, on the tensors that it was recorded with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nha.models import decode_graph
from nha.models.cache import NHACacheLayer, allow_rollback, cache_parts
from nha.models.int8_cache import Int8CacheLayer
from nha.models.observe import observe_mass
from nha.ops.packed_state import PackedState
from tests.models.families import hybrid, tokens

NEW = 12
LEFT_PADDED = torch.tensor([[0] * 9 + [1] * 11, [1] * 20])
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def replays(monkeypatch):
    """Lets steps be recorded on the CPU; the list gets an entry for every replay."""
    found: list[bool] = []

    def capture(run):
        output = run()  # which, unlike a recording, computes the first replay

        def replay():
            if found and found[-1] is not None:
                output.logits.copy_(run().logits)
            found.append(True)

        found.append(None)  # type: ignore[arg-type]
        return output, replay

    monkeypatch.setattr(decode_graph, "can_capture", lambda device: True)
    monkeypatch.setattr(decode_graph, "capture", capture)
    return found


def count(replays) -> int:
    return sum(entry is True for entry in replays)


def generate(model, ids, **options):
    return model.generate(ids, suppress_tokens=[0], **(OPTIONS | options))


def build(family="llama", windows: Any = (8, -1, 0)):
    return hybrid(family, list(windows)).double().eval()


def assert_same(model, ids, replays, **options):
    torch.manual_seed(3)
    found = generate(model, ids, **options)
    assert count(replays) == NEW - 2  # of NEW tokens the prompt gives one, and the first step is not recorded
    torch.manual_seed(3)
    assert torch.equal(found, generate(model, ids, disable_compile=True, **options))
    assert count(replays) == NEW - 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "smollm3"])
@pytest.mark.parametrize("windows", [(8, -1, 0), (8, 8, 8), (-1, -1, -1), ([8, 2], [-1, 4], [0, -1])], ids=str)
def test_replayed_steps_write_the_same_tokens(family, windows, replays):
    assert_same(build(family, windows), tokens(1, 30), replays)


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_after_prompts_about_as_long_as_the_window(length, replays):
    assert_same(build(), tokens(2, length), replays)


def test_left_padded_batch(replays):
    assert_same(build(), tokens(2, 20), replays, attention_mask=LEFT_PADDED)


def contents(cache: Any) -> dict[str, torch.Tensor]:
    """All tensors of a cache that grows, windows oldest first; a window that is not full yet has its tokens alone."""
    found = {}
    for index, part in enumerate(cache_parts(cache)):
        assert not part.is_compileable and part.get_seq_length() == cache.get_seq_length() and cache.layers
        if isinstance(part, NHACacheLayer):
            state: Any = part.state
            held = state.in_order() if isinstance(state, PackedState) else state.aligned().padded()
            found |= {f"{index}.{name}": x for name, x in held.tensors().items()}
        elif isinstance(part, Int8CacheLayer):
            found |= {f"{index}.{i}": x for i, x in enumerate((*part.keys, *part.values))}
        else:
            assert type(part) is DynamicLayer
            found |= {f"{index}.keys": part.keys, f"{index}.values": part.values}
    return found


def assert_same_conversation(model, replays, turns=(20, 5, 1), batch=1):
    """Several calls go on from one cache: with graphs they write the same tokens and leave the same cache."""
    caches, ids = [], []
    for options in ({}, {"disable_compile": True}):
        cache, text, before = DynamicCache(config=model.config), tokens(batch, 0), count(replays)
        for turn, length in enumerate(turns):
            text = torch.cat([text, tokens(batch, length, seed=turn)], 1)
            text = generate(model, text, attention_mask=torch.ones_like(text), past_key_values=cache, **options)
            assert cache.get_seq_length() == text.shape[1] - 1 and decode_graph.graph_of({"cache": cache}) is None
        assert count(replays) - before == (0 if options else len(turns) * (NEW - 2))
        caches.append(contents(cache))
        ids.append(text)
    assert torch.equal(*ids)
    assert caches[0].keys() == caches[1].keys()
    for name, found in caches[0].items():
        torch.testing.assert_close(found, caches[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("windows", [(8, -1, 0), (60, 8, 0), ([8, 2], [-1, 4], [0, -1])], ids=str)
def test_a_conversation_is_replayed_and_its_cache_grows_as_ever(windows, replays):
    assert_same_conversation(build("llama", windows), replays)


def test_a_conversation_of_a_batch(replays):
    assert_same_conversation(build(), replays, batch=2)


@pytest.mark.parametrize("setting", ["kv_cache_dtype", "state_dtype"])
def test_a_conversation_in_8_bits(setting, replays):
    model = hybrid("llama", [8, [-1, 4], -1]).double()
    setattr(model.config, setting, "int8")
    assert_same_conversation(model, replays)


def test_new_tokens_alone_after_a_filled_cache(replays):
    model, ids = build(), tokens(1, 30)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    found = generate(model, ids[:, 20:], attention_mask=torch.ones_like(ids), past_key_values=cache)
    assert count(replays) == NEW - 2
    assert torch.equal(found[:, 10:], generate(model, ids, disable_compile=True)[:, 30:])


def test_what_a_call_returns_besides_tokens(replays):
    """Logits are copies, and the cache grows."""
    model, ids = build(), tokens(1, 20)
    kinds = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    found, eager = (generate(model, ids, disable_compile=off, **kinds) for off in (False, True))
    assert count(replays) == NEW - 2
    assert torch.equal(found.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(eager.logits), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(eager.scores), rtol=1e-9, atol=1e-9)
    contents(found.past_key_values)


@pytest.mark.parametrize("fails_at", [1, 4])
def test_a_call_that_fails_leaves_a_cache_that_grows(fails_at, replays):
    class Streamer:
        left = fails_at + 1  # the first is the prompt

        def put(self, value):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    model, ids = build(), tokens(1, 20)
    cache = DynamicCache(config=model.config)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, past_key_values=cache, streamer=Streamer())
    read = cache.get_seq_length()
    assert read == 20 + fails_at - 1 and contents(cache)
    text = generate(model, ids, disable_compile=True)
    rest = generate(model, text[:, : read + 1], past_key_values=cache, max_new_tokens=text.shape[1] - read - 1)
    assert torch.equal(rest, text)


def test_a_call_that_fails_early_leaves_no_graph_to_the_next(replays):
    def refuse(*args):
        raise ValueError("no token")

    model, ids = build(), tokens(1, 20)
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="no token"):
        generate(model, ids, past_key_values=cache, prefix_allowed_tokens_fn=refuse)
    generate(model, ids, past_key_values=DynamicCache(config=model.config), disable_compile=True)
    assert not replays and decode_graph.graph_of({"cache": cache}) is None


@pytest.mark.parametrize("prepare", [lambda cache: allow_rollback(cache, 4), DynamicCache.activate_past_recording])
def test_a_cache_whose_tokens_may_be_taken_back_is_left_alone(prepare, replays):
    model, ids = build(), tokens(1, 20)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
    prepare(cache)
    generate(model, ids, past_key_values=cache)
    assert not replays


def test_packed_states_are_replayed(replays):
    model = hybrid("llama", [8, -1, 0])
    model.config.state_dtype = "int8"
    found = generate(model, tokens(1, 30))
    assert count(replays) == NEW - 2
    assert torch.equal(found, generate(model, tokens(1, 30), disable_compile=True))


@pytest.mark.parametrize("windows", [(8, -1, 0), ([8, 2], [-1, 4], 8)], ids=str)
def test_kept_tokens_are_counted_in_a_replayed_step(windows, replays):
    assert_same(hybrid("llama", list(windows), slot_write="exact").double(), tokens(2, 20), replays)


def test_sampling_with_a_seed(replays):
    assert_same(build(), tokens(2, 20), replays, do_sample=True)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"max_new_tokens": decode_graph.MIN_TOKENS - 1},
        {"disable_compile": True},
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 8},
        {"use_cache": False},
    ],
    ids=str,
)
def test_other_ways_of_generating_are_left_alone(options, replays):
    generate(build(), tokens(1, 20), **options)
    assert not replays


def test_what_watches_in_python_is_called_at_every_step(replays):
    model, seen = build(), []
    handle = model.lm_head.register_forward_hook(lambda *_: seen.append("hook"))
    generate(model, tokens(1, 20))
    assert not replays and len(seen) == NEW
    handle.remove()
    with observe_mass(model, lambda *_: seen.append("mass")):
        generate(model, tokens(1, 20))
    assert not replays and seen.count("mass") >= NEW


def test_a_step_that_cannot_be_recorded_goes_on_without(monkeypatch):
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, ids = build(), tokens(1, 20)
    plain = generate(model, ids)
    monkeypatch.setattr(decode_graph, "can_capture", lambda device: True)
    monkeypatch.setattr(decode_graph, "capture", refuse)
    with pytest.warns(UserWarning, match="not permitted"):
        assert torch.equal(generate(model, ids), plain)
