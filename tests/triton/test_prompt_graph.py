"""Prompts that `generate` pads and replays: the same tokens and caches, in Triton's interpreter.

A CPU has no graphs: here a replay makes the recorded call again, on the tensors that it was recorded with.
"""

from typing import Any

import pytest
import torch

import nha.ops.backends
from nha import set_windows
from nha.models import decode_graph, prompt_graph
from nha.models.cache import nha_layers
from tests.models.families import hybrid, tokens

OPTIONS: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def reads(monkeypatch):
    """Lets prompts be recorded on the CPU, padded to multiples of 32; the list gets an entry for every one."""
    found: list[str] = []

    def capture(run, pool=None):
        output, cache = run()

        def replay():
            again, other = run()
            output.logits.copy_(again.logits)
            cache.layers[:] = other.layers
            found.append("replayed")

        return (output, cache), replay

    def run(self, model, name, compute=prompt_graph.PromptGraph.run):
        found.append("called")
        return compute(self, model, name)

    monkeypatch.setattr(nha.ops.backends, "resolve_impl", lambda impl, device="cpu": "triton")
    monkeypatch.setattr(prompt_graph, "STEP", 32)
    monkeypatch.setattr(prompt_graph.PromptGraph, "run", run)
    monkeypatch.setattr(decode_graph, "can_capture", lambda device: True)
    monkeypatch.setattr(decode_graph, "capture", capture)
    monkeypatch.setattr(decode_graph, "MIN_TOKENS", 100)  # steps are not recorded here
    return found


def build(family="llama", windows: Any = (8, -1, 0), **changes) -> Any:
    return hybrid(family, list(windows), slots=8, **changes).requires_grad_(False).eval()


def plain(model, ids, **options):
    return model.generate(ids, disable_compile=True, **OPTIONS | options)


@pytest.mark.parametrize(("family", "windows"), [("llama", (8, -1, 0)), ("qwen3", ([8, 2], -1, 4))], ids=str)
def test_the_same_tokens_at_the_first_and_later_prompts(family, windows, reads):
    model = build(family, windows)
    for turn, (length, expected) in enumerate([(20, "called"), (31, "replayed"), (9, "replayed")]):
        ids = tokens(1, length, seed=turn)
        assert torch.equal(model.generate(ids, **OPTIONS), plain(model, ids))
        assert reads[-1] == expected


def test_a_cache_as_after_a_prompt_that_is_called(reads):
    model, ids = build(), tokens(1, 21)
    found, expected = (
        model.generate(ids, return_dict_in_generate=True, disable_compile=off, **OPTIONS) for off in (False, True)
    )
    name = "cache" if "cache" in found else "past_key_values"
    caches = found[name], expected[name]
    assert reads == ["called"] and caches[0].get_seq_length() == caches[1].get_seq_length()
    for one, other in zip(*map(nha_layers, caches), strict=True):
        assert one.length == other.length
        for ours, theirs in zip(one.state.tensors().values(), other.state.tensors().values(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("other", [{"num_beams": 2}, {"attention_mask": torch.tensor([[0] * 5 + [1] * 15])}], ids=str)
def test_other_prompts_are_called(other, reads):
    model, ids = build(), tokens(1, 20)
    model.generate(ids, **OPTIONS | {"max_new_tokens": 1}, **other)
    model.generate(tokens(1, 8), **OPTIONS | {"max_new_tokens": 1})  # which the window holds
    assert not reads


def test_a_model_whose_scores_are_capped_is_called(reads):
    model, ids = build("gemma2"), tokens(1, 20)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **OPTIONS), plain(model, ids))
    assert reads == ["called"]  # which found out


def test_other_windows_are_recorded_anew(reads):
    model, ids = build(), tokens(1, 20)
    for windows in ((8, -1, 0), (4, 4, 0)):
        set_windows(model, list(windows))
        with torch.inference_mode():
            model.generate(ids, **OPTIONS | {"max_new_tokens": 1})
        found = model.generate(ids, **OPTIONS | {"max_new_tokens": 1})
        assert torch.equal(found, plain(model, ids, max_new_tokens=1))
    assert reads.count("replayed") == 2


class Adapted(torch.nn.Linear):
    """A module of another library."""


def test_modules_of_other_libraries_are_called(reads):
    model, ids = build(), tokens(1, 20)
    model.model.layers[0].mlp.up_proj.__class__ = Adapted
    for _ in range(2):
        model.generate(ids, **OPTIONS | {"max_new_tokens": 1})
    assert not reads
