"""Recall scores are those of the whole logits and of greedy decoding, whatever is read together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nha.data.recall import RecallSet
from nha.evaluate.recall import measure_recall, recall_distances, recall_sets
from tests.data.tokenizers import small_tokenizer
from tests.models.families import hybrid, teacher, tokens

MODELS = {"full": teacher, "hybrid": lambda: hybrid("llama", [8, -1, 4])}


def rows_of(model, length, count, right):
    """A set whose first `right` rows end as the model itself goes on; in the next one only the first token does."""
    ids = tokens(6, length)
    with torch.no_grad():
        for at in range(length - count, length):
            ids[:, at] = model(ids[:, :at], use_cache=False).logits[:, -1].argmax(-1)
    wrong = (ids[right:, -1] + 1) % 97
    ids[right:, -1] = wrong
    answers = torch.zeros(6, length, dtype=torch.bool)
    answers[:, -count:] = True
    return RecallSet("one_fact", 20, ids.numpy(), answers.numpy())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("most", [1, 100, 10_000])
def test_scores_are_those_of_greedy_decoding_whatever_is_read_together(name, most):
    model = MODELS[name]()
    sets = [rows_of(model, 40, 3, 4), rows_of(model, 40, 2, 6), rows_of(model, 56, 3, 1)]
    found = measure_recall(model, sets, max_batch_tokens=most)
    for score, recall_set, count, right in zip(found, sets, (3, 2, 3), (4, 6, 1), strict=True):
        wanted = np.arange(6) < right
        assert score.seq_len == recall_set.ids.shape[1]
        assert (score.exact == wanted).all() and score.generated is not None and (score.generated == wanted).all()
        assert np.allclose(score.digits, np.where(wanted, 1.0, (count - 1) / count))


def test_generation_can_be_left_out():
    model = teacher()
    (score,) = measure_recall(model, [rows_of(model, 30, 2, 3)], generate=False)
    data = score.to_dict()
    assert score.generated is None and data["generated"] is None and data["generated_interval"] is None
    assert data["exact"] == 0.5 and data["digits"] == 0.75 and data["count"] == 6
    assert data["exact_interval"][0] < 0.5 < data["exact_interval"][1]


def test_progress_ends_at_the_number_of_rows():
    model, seen = teacher(), []
    measure_recall(model, [rows_of(model, 30, 2, 3)] * 2, max_batch_tokens=90, progress=lambda *x: seen.append(x))
    assert seen[-1] == (12, 12) and len(seen) == 4


@pytest.mark.parametrize("length", [512, 2048, 4096, 8192, 32768])
def test_distances_rise_from_twice_the_window_to_the_farthest(length):
    found = recall_distances(length)
    assert found == sorted(set(found)) and found[0] >= 128 and found[-1] == length - 148


def test_sets_are_made_for_every_task_that_fits_and_every_distance():
    filler, tokenizer = np.full(3000, 2), small_tokenizer("digits")
    found = recall_sets(tokenizer, filler, seq_len=1500, count=2)
    assert {s.distance for s in found} == set(recall_distances(1500))
    assert {s.task for s in found} >= {"one_fact", "four_facts", "mqar", "copy", "passkey"}
    beyond = recall_sets(tokenizer, filler, seq_len=1500, count=2, min_distance=600)
    assert {s.distance for s in beyond} == {d for d in recall_distances(1500) if d > 600}
    asked = recall_sets(tokenizer, filler, tasks=["copy"], distances=[300, 400], seq_len=1500, count=2)
    assert [(s.task, s.distance) for s in asked] == [("copy", 300), ("copy", 400)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": ["riddle"]}, "expected a recall task in"),
        ({"distances": [3]}, "a value too near, for 'one_fact'"),
        ({"count": 0}, "expected at least one sequence"),
        ({"seq_len": 3001}, "expected text of at least 3001 tokens as filler, got 3000"),
        ({"seq_len": 160}, "expected sequences long enough for a question, got 160 tokens"),
    ],
)
def test_sets_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recall_sets(small_tokenizer("digits"), np.full(3000, 2), **({"seq_len": 1500, "count": 2} | options))
