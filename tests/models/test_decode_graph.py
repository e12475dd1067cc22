"""`generate` replays its decoding step: the same tokens come out, and where it cannot be recorded nothing changes.

A CPU has no graphs: here a replay makes the recorded call again, on the tensors that it was recorded with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from nha.models import decode_graph
from nha.models.observe import observe_mass
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


def test_a_cache_that_is_used_once_may_become_static(replays):
    model, ids = build(), tokens(1, 30)
    for single_use, expected in ((False, 0), (True, NEW - 2)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
        setattr(cache, decode_graph.SINGLE_USE, single_use)
        found = generate(model, ids, past_key_values=cache)
        assert count(replays) == expected
        assert torch.equal(found, generate(model, ids, disable_compile=True))


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
        {"return_dict_in_generate": True},
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


def test_a_cache_that_is_handed_in_is_left_alone(replays):
    model = build()
    generate(model, tokens(1, 20), past_key_values=DynamicCache(config=model.config))
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
