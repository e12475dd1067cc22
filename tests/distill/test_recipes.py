"""Recipes: measured settings that every option overrides; estimates of their cost from shapes alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from experiments.cost import shape_config
from experiments.quality_runs import make_runs
from nha.convert.head_ranks import HeadRanks, searched_heads, spread_heads
from nha.convert.heads import load_plan, top_heads, windows_from_plan
from nha.data.prepare import prepare
from nha.distill import heads, run
from nha.distill.estimate import empty_model, estimate, trained_parameters
from nha.distill.recipes import RECIPES, choose_full_layers, recipe_settings, recipes_table
from nha.distill.settings import DistillSettings
from nha.distill.student import Distillation
from nha.models.adapter import to_hybrid
from nha.models.config import FULL
from nha.ops.heads import per_head
from tests.data.tokenizers import small_tokenizer
from tests.models.families import teacher

ROOT = Path(__file__).parents[2]
COSTS = json.loads((ROOT / "results/cost/cost.json").read_text())
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHAPE = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def test_recipes_keep_some_few_and_no_full_layers():
    full = {name: recipe_settings(name, 30, SMOLLM2).full_layers for name in RECIPES}
    assert full == {"quality": (8, 18, 20, 23), "balanced": (18,), "constant": ()}
    assert len(recipe_settings("quality", 32, "other").full_layers) == 4
    assert recipe_settings("balanced", 12, "other").full_layers == (6,)


def test_recipes_of_the_embedded_model_have_the_windows_that_were_measured():
    plan = load_plan(ROOT / "results/plans/smollm2-heads20.json")
    ranks = searched_heads(SMOLLM2, [3] * 30)
    assert ranks is not None and list(ranks.ranked) == top_heads(plan.weights, len(ranks.ranked))
    for name, recipe in (("quality", "4full_half"), ("balanced", "1full_half"), ("constant", "constant_slow")):
        settings = recipe_settings(name, 30, ranks=ranks)
        _, measured = make_runs([recipe], [0], {recipe: settings.tokens})
        assert per_layer(settings.window_size, 3) == per_layer(measured.settings.window_size, 3)
        assert dataclasses.replace(settings, window_size=64, save_every=400) == dataclasses.replace(
            measured.settings, window_size=64
        )


def test_exact_slots_take_a_recipe_without_its_shift_of_gates():
    assert recipe_settings("constant", 12).gate_shift == 2.1
    assert recipe_settings("constant", 12, given={"slot_write": "exact"}).gate_shift == 0
    with pytest.raises(ValueError, match="'soft'.*'exact'"):
        recipe_settings("constant", 12, given={"slot_write": "exact", "gate_shift": 1.0})


def test_windows_of_heads_are_in_proportion_and_what_is_given_overrides_them():
    ranks = spread_heads([8, 0, 8, 8])
    windows = per_layer(recipe_settings("balanced", 4, ranks=ranks).window_size, 8)
    assert windows.pop(1) == [FULL] * 8
    assert [sum(own.count(w) for own in windows) for w in (FULL, 2144, 896, 64)] == [1, 3, 2, 18]
    for given in ({"full_layers": (1,)}, {"window_size": 32}, {"window_size": (64, -1, 64, 64)}):
        assert recipe_settings("balanced", 4, given=given, ranks=ranks) == recipe_settings("balanced", 4, given=given)
    with pytest.raises(ValueError, match="20"):
        HeadRanks((30,), ((0, 1),)).windows([(20, -1)], 64)


def per_layer(windows, heads):
    return [per_head(window, heads) for window in windows]


def test_heads_of_an_unknown_model_are_ranked_on_the_text_of_the_run_once(tmp_path, monkeypatch):
    tokenizer = small_tokenizer("digits")
    model = teacher(vocab_size=len(tokenizer))
    (tmp_path / "text.txt").write_text(
        " ".join(f"The town of Number{i} was founded in {i}00 by a man." for i in range(9))
    )
    corpus = prepare([str(tmp_path / "text.txt")], tmp_path / "corpus", tokenizer, held_out_fraction=0.0)
    monkeypatch.setattr(heads, "SEARCHES", tuple(dataclasses.replace(one, steps=2) for one in heads.SEARCHES))
    place, steps = tmp_path / "heads.json", []
    plan = heads.find_heads("balanced", model, tokenizer, corpus, place, progress=lambda *at: steps.append(at))
    assert steps == [(n, 4) for n in range(1, 5)] and windows_from_plan(place) == plan.windows
    kinds = [w for layer in per_layer(plan.windows, model.config.num_key_value_heads) for w in layer]
    assert kinds.count(FULL) == kinds.count(2144) == kinds.count(896) == 1
    again = heads.find_heads("quality", model, tokenizer, corpus, place, progress=lambda *_: pytest.fail("searched"))
    assert again.weights == plan.weights and again.windows != plan.windows
    with pytest.raises(ValueError, match="weights"):
        heads.find_heads("quality", teacher(vocab_size=len(tokenizer), seed=1), tokenizer, corpus, place)


def test_full_layers_are_inside_the_model_whatever_its_size():
    for layers in (1, 2, 5, 30, 80):
        for recipe in RECIPES.values():
            chosen = choose_full_layers(SMOLLM2, layers, recipe.full_fraction)
            assert len(set(chosen)) == len(chosen) and all(0 <= layer < layers for layer in chosen)


def test_what_is_given_overrides_a_recipe():
    assert recipe_settings("quality", 30, given={"full_layers": (1,)}).full_layers == (1,)
    assert recipe_settings("constant", 30, given={"long_tokens": 0.0}).long_tokens == 0
    assert recipe_settings("constant", 30, given={"tokens": 1e6}).long_tokens == 6e5
    assert recipe_settings("quality", 3, given={"window_size": (64, -1, 64)}).full_layers == ()
    with pytest.raises(ValueError, match="quality, balanced, constant"):
        recipe_settings("best", 30)


def test_recipes_train_the_teacher_first_where_whole_matrices_are_trained():
    for name in RECIPES:
        settings = recipe_settings(name, 30, SMOLLM2)
        assert settings.teacher_tokens == RECIPES[name].teacher_fraction * settings.tokens > 0
        assert settings.long_tokens == RECIPES[name].long_fraction * settings.tokens > 0
        for trainable in ("lora", "slots"):
            assert recipe_settings(name, 30, given={"trainable": trainable}).teacher_tokens == 0
        assert recipe_settings(name, 30, given={"teacher_tokens": 0.0}).teacher_tokens == 0
    assert recipe_settings("quality", 30, given={"tokens": 1e6, "long_tokens": 9e5}).teacher_tokens == 1e5


@pytest.mark.parametrize("context, lengths", [(8192, (2048, 8192)), (4096, (2048, 4096)), (1024, (1024, 1024))])
def test_no_sequence_of_a_recipe_is_longer_than_the_context_of_the_model(context, lengths):
    for name in RECIPES:
        settings = recipe_settings(name, 30, context=context)
        assert (settings.seq_len, settings.long_seq_len) == lengths
        assert (settings.long_tokens > 0) == (lengths[1] > lengths[0])
    assert recipe_settings("constant", 30, given={"seq_len": 4096}, context=1024).seq_len == 4096
    assert recipe_settings("constant", 30) == recipe_settings("constant", 30, context=1 << 17)


def test_the_docs_show_all_recipes():
    assert recipes_table() in (ROOT / "docs" / "distilling.md").read_text()


@pytest.mark.parametrize("trainable", ["attention", "layers", "lora", "slots"])
def test_an_estimate_counts_the_parameters_that_are_trained(trainable):
    settings = DistillSettings(trainable=trainable, num_slots=6, window_size=16, lora_rank=2, full_layers=(1,))
    model = teacher()
    counted = sum(trained_parameters(empty_model(model.config), settings, [16, -1, 16]))
    to_hybrid(model, [16, -1, 16], num_slots=6)
    student = Distillation(model, trainable=trainable, lora_rank=2)
    assert counted == sum(p.numel() for p in student.parameters() if p.requires_grad)


def test_an_estimate_is_near_what_one_h100_measured():
    """254,000 tokens/s and 19 GiB for SmolLM2-135M with the defaults."""
    found = estimate(SHAPE, DistillSettings(tokens=12e6), device="NVIDIA H100 80GB HBM3")
    assert found.parameters == pytest.approx(138e6, rel=0.02)
    assert found.tokens / found.seconds == pytest.approx(254_000, rel=0.05)
    assert found.memory_bytes / 2**30 == pytest.approx(19, rel=0.05)


@pytest.mark.parametrize(
    "row", json.loads((ROOT / "results/cost/cost.json").read_text()), ids=lambda row: f"{row['shape']}-{row['gpus']}"
)
def test_an_estimate_is_near_what_was_measured_with_wider_shapes(row):
    given = {n: row[n] for n in ("batch_size", "seq_len", "gradient_checkpointing", "compile")}
    given |= {"full_layers": tuple(row["full_layers"]), "long_tokens": 0.0, "teacher_tokens": 0.0}
    settings = recipe_settings("quality", 32, given=given)
    found = estimate(shape_config(row["shape"]), settings, world=row["gpus"], device=row["gpu"])
    assert (found.parameters, found.trainable) == (row["parameters"], row["trainable"])
    assert found.tokens / found.seconds == pytest.approx(row["tokens_per_s"], rel=0.05)
    assert found.memory_bytes / 2**30 == pytest.approx(row["memory_gib"], rel=0.05)


def test_long_sequences_full_layers_and_more_devices_change_an_estimate():
    base = estimate(SHAPE, DistillSettings(), device="H100")
    assert estimate(SHAPE, DistillSettings(long_tokens=1e7), device="H100").flops_per_token > base.flops_per_token
    assert estimate(SHAPE, DistillSettings(full_layers=(1,)), device="H100").flops_per_token > base.flops_per_token
    two = estimate(SHAPE, DistillSettings(), device="H100", world=2)
    assert two.steps == pytest.approx(base.steps / 2, abs=1) and two.device == "2 x H100"
    small = estimate(SHAPE, DistillSettings(gradient_checkpointing=True), device="H100")
    assert small.memory_bytes < base.memory_bytes


def test_rates_of_wide_models_shrink_in_both_stages(monkeypatch):
    """Gates read hidden states: a step of Adam moves their logits in proportion to the width."""
    seen: list[float] = []
    monkeypatch.setattr(run, "align", lambda *_, gate_lr, **__: seen.append(gate_lr))
    settings = DistillSettings()
    for width in (256, 576, 2304):
        config = SimpleNamespace(get_text_config=lambda width=width: SimpleNamespace(hidden_size=width))
        student: Any = SimpleNamespace(windows=[64], config=config, causal=None)
        stream: Any = None
        run.align_student(student, torch.zeros(4, 8), stream, settings, run.Reports(), run.Stop())
    rates = [settings.learning_rates(width)[1] for width in (256, 576, 2304)]
    assert [rate / seen[0] for rate in seen] == [rate / rates[0] for rate in rates] == [1.0, 1.0, 0.25]
