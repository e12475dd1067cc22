"""Scores of exact slots: what they are fitted to, how many tokens they keep, and who can have them."""

from __future__ import annotations

import pytest
import torch

from nha import hybridize
from nha.convert.write_scores import _Moments, far_attention, fit_write_scores, set_write_scores
from nha.models.config import FULL
from nha.models.windows import attention_layers
from tests.models.families import hybrid, teacher, tokens

TEXT = tokens(4, 64)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_target_is_the_largest_attention_from_beyond_the_window(softcap):
    torch.manual_seed(0)
    query, key, windows = torch.randn(300, 4, 8), torch.randn(300, 2, 8), [5, 0]
    found = far_attention(query, key, windows, 0.7, softcap)
    for head, window in enumerate(windows):
        score = query[:, 2 * head : 2 * head + 2].transpose(0, 1) @ key[:, head].T * 0.7
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        causal = torch.ones(300, 300, dtype=torch.bool).tril()
        attention = score.masked_fill(~causal, float("-inf")).softmax(-1)
        largest = attention.masked_fill(torch.ones(300, 300, dtype=torch.bool).triu(1 - window), 0).amax((0, 1))
        torch.testing.assert_close(found[:, head].exp(), largest)


def test_the_regression_finds_weights_in_parts_of_the_tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator, dtype=torch.float64) + 3
    weight = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    y = x @ weight - 1
    moments = _Moments.empty(6, 2, x.device)
    for part in torch.arange(4000).split(700):
        moments.add(x[part], y[part])
    found, correlation = moments.solve()
    torch.testing.assert_close(found, weight.T, rtol=0.1, atol=0.05)
    assert correlation.min() > 0.99


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("reach", [24, 100])
def test_a_head_keeps_as_many_tokens_as_its_slots_hold_for_the_reach(family, reach):
    model = hybridize(teacher(family), 6, [8, FULL, [8, 4]], calibration=TEXT, slot_write="exact")
    set_write_scores(model, fit_write_scores(model, [TEXT]), reach)
    assert model.config.slot_write == "exact"
    kept = []
    for layer, window in zip(attention_layers(model), model.config.window_sizes, strict=True):
        if window != FULL:
            weight, bias = layer.nha.g_proj.weight, layer.nha.g_proj.bias
            assert weight.shape == (2, model.config.hidden_size)
            handle = layer.register_forward_pre_hook(
                lambda _, __, kwargs, w=weight, b=bias: kept.append(kwargs["hidden_states"][:, 1:] @ w.T + b > 0),
                with_kwargs=True,
            )
            model.config.window_sizes = FULL
            model(TEXT)
            model.config.window_sizes = [8, FULL, [8, 4]]
            handle.remove()
    for choice in kept:
        assert (choice.float().mean((0, 1)) - 6 / reach).abs().max() < 0.02


def test_scores_are_a_function_of_the_texts_and_leave_the_model_alone():
    model = hybrid("llama", 8, slot_write="exact")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    one, other = (fit_write_scores(model, [tokens(1, 30, seed=5), TEXT]) for _ in range(2))
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert model.config.window_sizes == [8, 8, 8]
    for a, b in zip(one.weights, other.weights, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    set_write_scores(model, one, 30)
    assert not torch.equal(model.state_dict()["model.layers.0.self_attn.nha.g_proj.bias"], torch.zeros(2))


def test_texts_within_the_window_are_refused():
    with pytest.raises(ValueError, match="64 tokens"):
        fit_write_scores(hybrid("llama", 64, slot_write="exact"), [TEXT])


@pytest.mark.parametrize(("options", "words"), [({"slot_write": "hard"}, "hard"), ({"init": "paper"}, "paper")])
def test_ways_that_do_not_fit_together_are_refused_before_anything_changes(options, words):
    model = teacher()
    with pytest.raises(ValueError, match=words):
        hybridize(model, 6, 8, calibration=TEXT, **({"slot_write": "exact"} | options))
    assert type(model) is type(teacher())
