"""The standard evaluation: one call, plain data, the same for the same arguments."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from nha.evaluate.mass import slot_mass
from nha.evaluate.measure import Suite, cut, measure_all, standard_suite
from nha.evaluate.perplexity import long_range_repeats, perplexity
from nha.evaluate.variants import VARIANTS
from nha.report.results import to_json
from tests.data.tokenizers import small_tokenizer
from tests.models.families import hybrid, teacher

LENGTHS = (256, 512)


def documents():
    generator = np.random.default_rng(0)
    return [generator.integers(3, 900, size).tolist() for size in (1400, 600, 300, 200)]


@pytest.fixture(scope="module")
def suite():
    tokenizer = small_tokenizer("digits")
    return standard_suite(
        tokenizer, documents(), lengths=LENGTHS, max_documents=3, num_questions=2, tasks=["one_fact", "mqar"]
    )


def test_a_suite_reads_every_length_and_each_distance_once(suite):
    assert {n: tuple(ids.shape) for n, ids in suite.texts.items()} == {256: (3, 256), 512: (3, 512)}
    asked = [(s.task, s.distance) for s in suite.recall]
    assert len(set(asked)) == len(asked)
    assert {s.ids.shape[1] for s in suite.recall} == set(LENGTHS)
    assert all(s.distance > 256 for s in suite.recall if s.ids.shape[1] == 512)
    again = standard_suite(
        small_tokenizer("digits"),
        documents(),
        lengths=LENGTHS,
        max_documents=3,
        num_questions=2,
        tasks=["one_fact", "mqar"],
    )
    assert all((a.ids == b.ids).all() for a, b in zip(suite.recall, again.recall, strict=True))


def test_texts_never_run_over_the_end_of_a_document():
    found = cut([list(range(25)), list(range(100, 109)), list(range(200, 220))], 10, 9)
    assert [row[0].item() for row in found] == [0, 200, 10, 210]
    begun = cut([list(range(25))], 10, 9, [99])
    assert begun[:, 0].tolist() == [99, 99] and begun[:, 1].tolist() == [0, 9]
    with pytest.raises(ValueError, match="expected a document of at least 30 tokens, got 25 in the longest"):
        cut([list(range(25))], 30, 4)
    with pytest.raises(ValueError, match="got 0 in the longest"):
        cut([], 30, 4)


def test_a_tokenizers_first_token_begins_every_text_and_is_nowhere_else():
    tokenizer = small_tokenizer("digits")
    marked = [[1, *ids, 2] for ids in documents()]
    suite = standard_suite(tokenizer, marked, lengths=(256,), num_questions=2, tasks=["one_fact"])
    for ids in [*suite.texts[256].numpy(), *(row for s in suite.recall for row in s.ids)]:
        assert np.flatnonzero(np.isin(ids, [0, 1, 2])).tolist() == [0] and ids[0] == 1


def test_every_variant_is_measured_and_the_data_are_plain(suite):
    model, seen = hybrid("llama", [8, -1, 4], vocab_size=900), []
    found = measure_all(model, suite, variants=list(VARIANTS), progress=lambda *x: seen.append(x))
    assert set(found) == set(VARIANTS)
    assert json.loads(to_json(found))["hybrid"]["recall"]["one_fact"]
    for name, data in found.items():
        assert set(data["recall"]) == {"one_fact", "mqar"}
        for distances in data["recall"].values():
            for score in distances.values():
                assert score["generated"] == score["exact"]  # greedy decoding is right where every argmax is
        low, high = data["ppl_256_interval"]
        assert low <= data["ppl_256"] <= high
        assert (data["slot_mass"]["mean"] > 0) == (name in ("hybrid", "window_off"))
    whole = perplexity(model, suite.texts[512])
    assert found["hybrid"]["ppl_512"] == pytest.approx(whole.value)
    assert found["hybrid"]["repeats_512"] == pytest.approx(
        whole.where(long_range_repeats(suite.texts[512].numpy())), nan_ok=True
    )
    assert found["hybrid"]["slot_mass"]["slots"] == pytest.approx(slot_mass(model, suite.texts[256]).slots)
    teachers = measure_all(teacher(vocab_size=900), suite, variants=list(VARIANTS))
    assert set(teachers) == {"model"} and "slot_mass" not in teachers["model"]
    assert teachers["model"]["ppl_512"] == pytest.approx(found["full_attention"]["ppl_512"])
    assert seen[-1][0] == "recall" and seen[-1][1] == seen[-1][2]


def test_recall_can_be_left_out_and_so_can_generation(suite):
    model = hybrid("llama", 8, vocab_size=900)
    assert "recall" not in measure_all(model, Suite(suite.texts, []))["hybrid"]
    data = measure_all(model, Suite({256: suite.texts[256]}, suite.recall[:1]), generate=False)["hybrid"]
    (score,) = data["recall"]["one_fact"].values()
    assert score["generated"] is None


def test_long_range_repeats_are_pairs_whose_last_occurrence_is_far():
    generator = np.random.default_rng(3)
    ids = generator.integers(0, 6, (2, 120))
    found = long_range_repeats(ids, distance=20, start=30)
    for row, text in enumerate(ids):
        last = {}
        for t in range(1, len(text)):
            pair = (text[t - 1], text[t])
            wanted = t >= 30 and pair in last and t - last[pair] > 20
            assert found[row, t] == wanted
            last[pair] = t


def test_losses_are_means_over_what_was_asked_for():
    measured = perplexity(teacher(), torch.arange(3, 23)[None])
    mask = np.zeros((1, 20), dtype=bool)
    assert math.isnan(measured.where(mask))
    mask[0, [4, 9]] = True
    assert measured.where(mask) == pytest.approx(measured.losses[0, [3, 8]].mean().item())
