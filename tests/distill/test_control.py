"""The fair control: the original trained with full attention on the hybrid's batches, and numbers relative to it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nha.data.stream import Stream
from nha.distill.results import measure_run, read_control, relative_table, relative_to_control, save_distilled
from nha.distill.run import control_identity, distill, make_mixture
from tests.distill.material import material, settings, tiny


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def trained(given, tmp_path_factory):
    """A control and its hybrid, three steps each."""
    corpus, tokenizer = given
    run, chosen = tmp_path_factory.mktemp("runs") / "run", settings(tokens=3 * 640)
    control = distill(tiny(), tokenizer, corpus, run / "control", chosen, control=True)
    return control, distill(tiny(), tokenizer, corpus, run, chosen)


def changed(model):
    before = tiny().state_dict()
    return {name for name, value in before.items() if not torch.equal(value, model.state_dict()[name])}


def test_a_control_trains_the_base_weights_that_the_hybrid_trains_and_no_others(trained):
    control, hybrid = trained
    assert control.finished and control.steps == hybrid.steps == 3
    assert changed(control.model) == changed(hybrid.model) != set()
    assert set(control.model.config.window_sizes) == {-1}


def test_a_control_reads_the_batches_of_its_hybrid_and_learns_the_next_token_with_the_same_weight(given):
    corpus, tokenizer = given
    chosen = settings(kl_weight=1.0, ce_weight=0.5)
    own, other = (Stream(corpus, tokenizer, make_mixture(chosen, control=control)) for control in (False, True))
    assert len(own) == len(other)
    for (_, one), (_, two) in zip(own[3], other[3], strict=True):
        for name in ("ids", "target", "follows", "answers", "position_ids"):
            assert torch.equal(one[name], two[name]), name
        assert not two["kl_weight"].any()
        assert torch.allclose(one["kl_weight"] + one["ce_weight"], two["ce_weight"])


def test_a_control_starts_from_the_next_token_loss_of_the_original(given, trained):
    corpus, tokenizer = given
    model, total, counted = tiny(), 0.0, 0.0
    for _, batch in Stream(corpus, tokenizer, make_mixture(settings(tokens=3 * 640), control=True))[0]:
        text = batch["follows"] * (1 - batch["answers"])
        for start, end in pairwise(batch["cu_seqlens"].tolist()):
            if end > start:
                with torch.no_grad():
                    logits = model(batch["ids"][:, start:end]).logits[0]
                losses = torch.nn.functional.cross_entropy(logits, batch["target"][start:end], reduction="none")
                total += float((losses * text[start:end]).sum())
        counted += float(text.sum())
    first = trained[0].log[0]
    assert first["kl"] == 0 and first["cross_entropy"] == pytest.approx(total / counted, rel=1e-5)


def test_hybrids_that_differ_in_windows_alone_share_a_control(given):
    corpus, _ = given
    base = control_identity(tiny(), corpus, settings())
    assert base == control_identity(tiny(), corpus, settings(window_size=8, num_slots=12, full_layers=(1,), gate_lr=1))
    for change in ({"seed": 1}, {"tokens": 1280}, {"lr": 1e-4}, {"trainable": "layers"}, {"recall_fraction": 0.25}):
        assert base != control_identity(tiny(), corpus, settings(**change)), change


def test_where_nothing_of_the_original_is_trained_there_is_no_control(given, tmp_path):
    corpus, tokenizer = given
    with pytest.raises(ValueError, match="trainable 'slots'"):
        distill(tiny(), tokenizer, corpus, tmp_path / "run", settings(trainable="slots"), control=True)
    assert not (tmp_path / "run").exists()


def test_numbers_are_relative_to_the_control_that_was_saved(given, trained, tmp_path):
    corpus, tokenizer = given
    chosen = settings(tokens=3 * 640)
    identity = control_identity(tiny(), corpus, chosen)
    numbers = [measure_run(found.model, corpus, tokenizer, chosen) for found in trained]
    (tmp_path / "control").mkdir()
    extra = {"control": identity, "measured": numbers[0]}
    save_distilled(trained[0], tokenizer, tmp_path / "control", "tiny", corpus, chosen, extra=extra)
    control = read_control(tmp_path / "control", identity)
    rows = relative_to_control(numbers[1], control)
    assert rows[0]["control"] > 1 and rows[0]["ratio"] == pytest.approx(rows[0]["value"] / rows[0]["control"])
    low, high = rows[0]["interval"]
    assert low * (1 - 1e-12) <= rows[0]["ratio"] <= high * (1 + 1e-12)  # of one text, an interval is a point
    same = relative_to_control(control, control)
    assert [row["ratio"] for row in same] == [1.0] * len(same)
    (tmp_path / "hybrid").mkdir()
    save_distilled(trained[1], tokenizer, tmp_path / "hybrid", "tiny", corpus, chosen, relative=rows)
    assert relative_table(rows) in (tmp_path / "hybrid" / "README.md").read_text()
    assert json.loads((tmp_path / "hybrid" / "distillation.json").read_text())["relative_to_control"] == rows
    with pytest.raises(ValueError, match="seed"):
        read_control(tmp_path / "control", control_identity(tiny(), corpus, replace(chosen, lr=1e-3)) | {"seed": 1})
    with pytest.raises(ValueError, match="hybrid"):
        read_control(tmp_path / "hybrid", identity)
