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
from nha.models.windows import set_kv_cache_dtype
from tests.models.families import hybrid, tokens

OPTIONS: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def reads(monkeypatch):
    """Lets prompts be recorded on the CPU, padded to multiples of 16; the list gets an entry for every one.

    Those of up to 16 tokens are recorded with the first. Recording computes nothing: a replay overwrites the output of
    the last call.
    """
    found: list[str] = []
    last: list[Any] = []

    def capture(run, pool=None):
        output, cache = last[0]

        def replay():
            with torch.inference_mode(False), torch.no_grad():  # as where it was recorded
                again, other = run()
            output.logits.copy_(again.logits)
            cache.layers[:] = other.layers
            found[-1] = "replayed"

        return (output, cache), replay

    def run(self, model, name, compute=prompt_graph.PromptGraph.run):
        found.append("called")
        last[:] = [compute(self, model, name)]
        return last[0]

    monkeypatch.setattr(nha.ops.backends, "resolve_impl", lambda impl, device="cpu": "triton")
    monkeypatch.setattr(prompt_graph, "STEP", 16)
    monkeypatch.setattr(prompt_graph, "PREPARED", 16)
    monkeypatch.setattr(prompt_graph.PromptGraph, "run", run)
    monkeypatch.setattr(decode_graph, "can_capture", lambda device: True)
    monkeypatch.setattr(decode_graph, "capture", capture)
    monkeypatch.setattr(decode_graph, "MIN_TOKENS", 100)  # steps are not recorded here
    return found


def build(family="llama", windows: Any = (8, -1, 0), **changes) -> Any:
    return hybrid(family, list(windows), slots=8, **changes).requires_grad_(False).eval()


def plain(model, ids, **options):
    return model.generate(ids, disable_compile=True, **OPTIONS | options)


FIRST = ["called", "replayed"]  # which records


@pytest.mark.parametrize(
    ("family", "windows", "turns"),
    [
        ("llama", (8, -1, 0), [(12, FIRST), (20, ["called"]), (31, ["replayed"])]),
        ("qwen3", ([8, 2], -1, 4), [(5, FIRST), (9, ["replayed"])]),  # the first within a window
    ],
    ids=["llama", "qwen3"],
)
def test_the_same_tokens_at_the_first_and_later_prompts(family, windows, turns, reads):
    model = build(family, windows)
    for turn, (length, expected) in enumerate(turns):
        ids = tokens(1, length, seed=turn)
        reads.clear()
        assert torch.equal(model.generate(ids, **OPTIONS), plain(model, ids))
        assert reads == expected


def test_keys_and_values_in_8_bits(reads):
    model, ids = build(windows=(8, -1, -1)), tokens(1, 13)
    set_kv_cache_dtype(model, "int8")
    options = OPTIONS | {"max_new_tokens": 8}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, disable_compile=True, **options))
    assert reads == FIRST


def test_a_cache_as_after_a_prompt_that_is_called(reads):
    model, ids = build(), tokens(1, 13)
    found, expected = (
        model.generate(ids, return_dict_in_generate=True, disable_compile=off, **OPTIONS) for off in (False, True)
    )
    name = "cache" if "cache" in found else "past_key_values"
    caches = found[name], expected[name]
    assert reads == FIRST and caches[0].get_seq_length() == caches[1].get_seq_length()
    for one, other in zip(*map(nha_layers, caches), strict=True):
        assert one.length == other.length
        for ours, theirs in zip(one.state.tensors().values(), other.state.tensors().values(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("other", [{"num_beams": 2}, {"attention_mask": torch.tensor([[0] * 3 + [1] * 9])}], ids=str)
def test_other_prompts_are_called(other, reads):
    model = build(windows=(8, -1, 9))
    model.generate(tokens(1, 12), **OPTIONS | {"max_new_tokens": 1}, **other)
    model.generate(tokens(1, 8), **OPTIONS | {"max_new_tokens": 1})  # which all windows hold
    assert not reads


def test_a_model_whose_scores_are_capped_is_called(reads):
    model, ids = build("gemma2"), tokens(1, 12)
    found = ids
    for _ in range(2):
        found = model.generate(ids, **OPTIONS | {"max_new_tokens": 1})
        assert reads == ["called"]  # which found out
    assert torch.equal(found, plain(model, ids, max_new_tokens=1))


def test_other_windows_are_recorded_length_by_length(reads):
    model, ids = build(), tokens(1, 12)
    with torch.inference_mode():
        model.generate(ids, **OPTIONS | {"max_new_tokens": 1})
    for windows in ((8, -1, 0), (4, 4, 0), (4, 4, 0)):
        set_windows(model, list(windows))
        found = model.generate(ids, **OPTIONS | {"max_new_tokens": 1})
        assert torch.equal(found, plain(model, ids, max_new_tokens=1))
    assert reads == [*FIRST, "replayed", "called", "replayed"]


class Adapted(torch.nn.Linear):
    """A module of another library."""


def test_modules_of_other_libraries_are_called(reads):
    model = build()
    model.model.layers[0].mlp.up_proj.__class__ = Adapted
    model.generate(tokens(1, 12), **OPTIONS | {"max_new_tokens": 1})
    assert not reads


def test_a_server_reads_a_prompt_before_the_first_request(reads, monkeypatch):
    model = build(windows=(4, -1, 0))
    monkeypatch.setattr(decode_graph, "MIN_TOKENS", 1)
    monkeypatch.setattr("nha.models.adapter.plan", lambda *given, **options: None)  # steps are not recorded here
    prompt_graph.warm_up(model)
    assert reads == FIRST
    monkeypatch.setattr(decode_graph, "can_capture", lambda device: False)
    prompt_graph.warm_up(model)  # as on a CPU
    assert reads == FIRST


def test_other_lengths_are_recorded_behind_answers(reads, monkeypatch):
    monkeypatch.setattr(prompt_graph, "PREPARED", 64)
    model, order = build(), []
    sample, record = type(model)._sample, prompt_graph.PromptGraphs._record

    def noted_record(self, graph, model):
        order.append(graph.ids.shape[1])
        return record(self, graph, model)

    def noted_sample(self, *args, **kwargs):
        found = sample(self, *args, **kwargs)
        order.append("answer")  # behind what was recorded for it
        return found

    monkeypatch.setattr(prompt_graph.PromptGraphs, "_record", noted_record)
    monkeypatch.setattr(type(model), "_sample", noted_sample)
    monkeypatch.setattr("nha.models.adapter.record_lengths", lambda model: prompt_graph.record_lengths(model, 1))
    prompts = [tokens(1, length, seed=length) for length in (20, 12, 40)]
    expected = [plain(model, ids) for ids in prompts]
    order.clear()
    assert all(
        torch.equal(model.generate(ids, **OPTIONS), wanted) for ids, wanted in zip(prompts, expected, strict=True)
    )
    assert order == [32, 64, "answer", 16, 48, "answer", "answer"]


def test_recorded_lengths_share_the_tensors_of_their_caches(reads):
    model = build()
    for length in (12, 20, 12, 20):
        model.generate(tokens(1, length), **OPTIONS)
    graphs = prompt_graph._graphs[model]
    addresses = [
        [x.data_ptr() for layer in nha_layers(graph.cache) if layer.state for x in layer.state.tensors().values()]
        for graph in graphs.graphs.values()
    ]
    assert len(addresses) == 2 and addresses[0] == addresses[1] != []
