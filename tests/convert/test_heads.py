"""The search for heads that copy: a model that copies through one head, plans of equal bytes, files and texts."""

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nha import hybridize
from nha.convert.head_counts import count_heads
from nha.convert.heads import (
    CopyRow,
    HeadPlan,
    Mixer,
    copy_rows,
    fit_weights,
    load_plan,
    make_plan,
    mixing,
    plan_heads,
    save_plan,
    search_heads,
    top_heads,
    windows_from_plan,
    windows_from_text,
)
from nha.convert.search import cache_bytes
from nha.convert.settings import HeadSearchSettings
from nha.ops.heads import per_head
from tests.convert.test_hybridize import byte_tokenizer
from tests.models.families import hybrid, sliding, teacher, tokens

QUICK = HeadSearchSettings(heads=1, wide_window=-1, window_size=8, train_window=8, steps=12, lr=0.2)


def copying_model():
    """Two layers that copy through KV head 0 of layer 0 alone: queries and keys of that head are the token itself."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.mul_(0.01)
        attention = model.model.layers[0].self_attn
        token, following = torch.eye(32).double(), torch.zeros(32, 32).double()
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[:32].zero_()
        # An embedding says which token it is and which it follows, in a text where each follows its predecessor.
        model.model.embed_tokens.weight.copy_(torch.cat([token, token.roll(1, 0)], 1))
        attention.q_proj.weight[:32, :32] = 30 * token
        attention.k_proj.weight[:32, 32:] = token
        attention.v_proj.weight[:32, :32] = token
        attention.o_proj.weight.zero_()
        attention.o_proj.weight[:32, :32] = token
        model.lm_head.weight.copy_(torch.cat([token, following], 1))
    return model.eval()


def copy_row(seed):
    """A row whose last token is the successor of the one before, and stood in it once, 20 tokens back."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(2, 30, (1,), generator=generator))
    filler = torch.randint(0, 32, (20,), generator=generator)
    filler = filler.where((filler != first) & (filler != first + 1), torch.tensor((first + 5) % 32))
    ids = torch.cat([torch.tensor([0, first, first + 1]), filler, torch.tensor([first, first + 1])])
    return CopyRow(ids, 1)


def test_the_head_that_copies_keeps_full_attention_and_no_weight_of_the_model_changes():
    model = copying_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    weights, losses = fit_weights(model, [copy_row(seed) for seed in range(24)], QUICK)
    assert top_heads(weights, 1) == [(0, 0)]
    rest = [w for layer, row in enumerate(weights) for head, w in enumerate(row or ()) if (layer, head) != (0, 0)]
    assert weights[0] is not None and weights[0][0] > 0.5 > 0.2 > max(rest)
    assert len(losses) == QUICK.steps
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa" and all(p.requires_grad for p in model.parameters())


def test_what_a_model_copies_is_kept_with_the_head_that_copies_alone():
    model, rows = copying_model(), [copy_row(seed) for seed in range(12)]
    weights: Any = [[1.0, 0.3], [0.2, 0.1]]
    assert count_heads(model, rows, weights, 8, 0.9) == {0: 0.0, 1: 1.0, 2: 1.0, 4: 1.0}
    swapped = count_heads(model, rows, [[0.1, 0.3], [0.2, 1.0]], 8, 0.9)
    assert min(count for count, kept in swapped.items() if kept >= 0.9) == 4
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="copies none"):
        count_heads(model, [CopyRow(torch.tensor([0, 5, 9]), 1)], weights, 8, 0.9)


@pytest.mark.parametrize("layers, heads, wide", [(30, 3, 15), (32, 8, 43), (8, 2, 3), (2, 1, 1)])
def test_a_sixth_of_the_heads_has_the_wide_window_unless_a_number_is_given(layers, heads, wide):
    weights: list[list[float] | None] = [
        [0.1 + 0.01 * head + 0.001 * layer for head in range(heads)] for layer in range(layers)
    ]
    windows = [window for layer in plan_heads(weights, wide_window=-1) for window in per_head(layer, heads)]
    assert windows.count(-1) == wide
    plan = make_plan({}, weights, [], HeadSearchSettings(wide_window=-1))
    assert (plan.heads, len(plan.chosen)) == (wide, wide)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3"])
def test_mixing_equals_full_attention_at_one_and_the_window_at_zero(family):
    model, ids = teacher(family, **(sliding(12) if family == "gemma3_text" else {})), tokens(1, 30)
    layers = [1] if family == "gemma3_text" else [0, 1, 2]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with mixing(model, Mixer(torch.ones(3, 2), 8, layers)):
            torch.testing.assert_close(model(ids, use_cache=False).logits, plain, rtol=1e-4, atol=1e-4)
        with mixing(model, Mixer(torch.zeros(3, 2), 8, layers)):
            narrow = model(ids, use_cache=False).logits
        with mixing(model, Mixer(torch.zeros(3, 2), 30, layers)):
            torch.testing.assert_close(model(ids, use_cache=False).logits, plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids, use_cache=False).logits, plain)
    torch.testing.assert_close(narrow[:, :8], plain[:, :8], rtol=1e-4, atol=1e-4)
    assert (narrow[:, 8:] - plain[:, 8:]).abs().max() > 1e-2


@pytest.mark.parametrize("heads, wide", [(0, 256), (2, 256), (3, 100), (6, 64)], ids=str)
def test_windows_of_equal_bytes_are_as_wide_as_the_budget_allows(heads, wide):
    weights = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).tolist()
    plan = plan_heads(weights, heads=heads, wide_window=wide, window_size=64)
    flat = [w for row in plan for w in ([row] * 4 if isinstance(row, int) else row)]
    assert flat.count(wide) == heads or heads == 0 or wide == 64
    assert 0 <= 12 * 64 - sum(flat) < 12 - heads + (heads == 12)
    assert {(i // 4, i % 4) for i, w in enumerate(flat) if w == wide} == set(top_heads(weights, heads)) or wide in (64,)


def test_a_plan_takes_the_bytes_of_the_window_and_converts_a_model():
    model = teacher()
    plan = plan_heads([[0.9, 0.1], [0.2, 0.8], [0.3, 0.3]], heads=2, wide_window=20, window_size=8)
    assert plan == [[20, 2], [2, 20], 2]
    made = hybridize(model, num_slots=4, window_size=plan, calibration=tokens(2, 60))
    assert made.config.window_sizes == plan
    assert cache_bytes(made, plan, 1000) == cache_bytes(made, [8, 8, 8], 1000) + 2 * 8  # a counter for every group more
    full = plan_heads([[0.9, 0.1], None, [0.3, 0.3]], heads=1, wide_window=-1, window_size=8)
    assert full == [[-1, 8], -1, 8]


def test_plans_that_cannot_be_are_refused():
    weights = [[0.5, 0.5]] * 3
    with pytest.raises(ValueError, match="0 to 6 heads.*got 7"):
        plan_heads(weights, heads=7)
    with pytest.raises(ValueError, match="2 windows of 256.*room for 4 others.*-128 tokens"):
        plan_heads(weights, heads=2, wide_window=256, window_size=64)
    with pytest.raises(ValueError, match="not converted yet.*NHALlama"):
        fit_weights(hybrid(), [copy_row(0)], QUICK)


def test_a_plan_goes_to_a_file_and_back(tmp_path):
    plan = HeadPlan({"seed": 0}, [[0.9, 0.1], None], 1, 20, [[20, 8], -1], [2.5])
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json", {"seed": 0}) == plan
    assert windows_from_plan(tmp_path / "plan.json") == [[20, 8], -1]
    with pytest.raises(ValueError, match=r"seed 1 at .*got 0"):
        load_plan(tmp_path / "plan.json", {"seed": 1})
    (tmp_path / "bare.json").write_text("[8, [4, -1]]")
    assert windows_from_plan(tmp_path / "bare.json") == [8, [4, -1]]
    for text, words in (("{", "no JSON"), ('{"format": "x"}', "'x'"), ('{"format": "nha-heads-v1"}', "whole plan")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            windows_from_plan(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no file at"):
        windows_from_plan(tmp_path / "none.json")


@pytest.mark.parametrize(
    "text, words",
    [
        ("1.2=4", "heads below 2 in layer 1, got 2"),
        ("3=4", "layers below 3, got 3"),
        ("1.0", "got '1.0'"),
        ("", "''"),
        ("1.0=4,1.0=5", "'1.0=5'"),
        ("1=4,0=4,01=4", "'01=4'"),
    ],
)
def test_a_text_of_windows_that_cannot_be_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        windows_from_text(text, [8, 8, 8], 2)


def test_a_heads_own_window_counts_before_or_after_that_of_its_layer():
    for text in ("1.0=4,1=5", "1=5,1.0=4"):
        assert windows_from_text(text, [8, (8, 9), -1], 2) == [8, [4, 5], -1]


def test_clozes_of_real_text_end_in_their_answer(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    names = ("Anna", "Berlin", "Cyrus", "Delphi", "Edward", "Florence", "Greta", "Havana")
    text = " ".join(
        f"The {i} traveller whom old letter {i} praises so often was {n}."
        for i, n in zip("abcdefgh", names, strict=True)
    )
    rows = copy_rows(tokenizer, [text], 3, min_distance=72, max_distance=256)
    for row in rows:
        answer = tokenizer.decode(row.ids[-row.answer_tokens :]).strip()
        assert answer in names and text.count(answer) == 1
    with pytest.raises(ValueError, match="text for 30 clozes"):
        copy_rows(tokenizer, [text], 30, min_distance=72, max_distance=256)
    plan = search_heads(
        teacher(vocab_size=300), tokenizer, [text], HeadSearchSettings(heads=1, wide_window=-1, steps=1)
    )
    assert len(plan.chosen) == 1 and plan.settings["steps"] == 1 and json.dumps(plan.to_dict())
