"""Recall tasks of random tokens: each answer follows from its example, and a seed gives the same examples again."""

from __future__ import annotations

import pytest
import torch

from nha.data.synthetic import IGNORED, TASKS, TaskSize, in_context_recall, mqar, selective_copying

SIZES = [
    TaskSize("mqar", 64, 4),
    TaskSize("mqar", 256, 64),
    TaskSize("selective_copying", 64, 16, 16),
    TaskSize("in_context_recall", 64, vocab_size=16),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.label)
def test_a_seed_gives_the_same_examples_and_another_seed_others(size):
    first, again, other = (size.draw(8, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.ids, other.ids)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.label)
def test_tokens_are_of_the_vocabulary_and_no_example_has_more_answers_than_it_says(size):
    ids, targets = size.draw(32, generator())
    asked = targets != IGNORED
    assert ids.shape == targets.shape == (32, size.seq_len)
    assert ids.min() >= 0 and ids.max() < size.vocab_size
    assert targets[asked].min() >= 0 and targets[asked].max() < size.vocab_size
    assert asked.sum(1).min() >= 1 and asked.sum(1).max() <= size.max_answers


def test_mqar_asks_for_each_key_once_after_all_pairs_and_its_value_is_the_answer():
    pairs = 16
    ids, targets = mqar(20, seq_len=128, num_pairs=pairs, vocab_size=200, generator=generator())
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        value_of = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(value_of) == len(set(value_of.values())) == pairs
        assert all(key < 100 <= value for key, value in value_of.items())
        asked = {t: answer for t, answer in enumerate(wanted) if answer != IGNORED}
        assert min(asked) >= 2 * pairs
        assert sorted(row[t] for t in asked) == sorted(value_of)
        assert all(value_of[row[t]] == answer for t, answer in asked.items())


def test_mqar_gaps_follow_the_power_law():
    """The fraction of queries in the first place is that of drawing one place by the law: 1 / sum of x^(p - 1)."""
    power, places = 0.01, 31
    _, targets = mqar(20000, seq_len=64, num_pairs=1, power=power, generator=generator())
    first = (targets[:, 2] != IGNORED).double().mean().item()
    weights = torch.arange(1, places + 1, dtype=torch.float64) ** (power - 1)
    expected = (weights[0] / weights.sum()).item()
    error = (expected * (1 - expected) / 20000) ** 0.5
    assert abs(first - expected) < 5 * error


def test_mqar_fills_other_places_with_token_0_where_asked_to():
    ids, targets = mqar(4, seq_len=64, num_pairs=2, filler="zero", generator=generator())
    assert (ids[:, 4:][targets[:, 4:] == IGNORED] == 0).all()


def test_selective_copying_asks_for_the_tokens_between_blanks_in_their_order():
    ids, targets = selective_copying(20, seq_len=64, num_tokens=8, vocab_size=16, generator=generator())
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        end = row.index(15)
        assert [token for token in row[:end] if token != 14] == wanted[end + 1 :]
        assert set(row[end + 1 :]) == {14} and set(wanted[: end + 1]) == {IGNORED}


def test_in_context_recall_asks_whenever_a_key_occurs_again():
    ids, targets = in_context_recall(20, seq_len=32, vocab_size=16, generator=generator())
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        known: dict[int, int] = {}
        for key, value, answer, after in zip(row[::2], row[1::2], wanted[::2], wanted[1::2], strict=True):
            assert answer == known.get(key, IGNORED) and after == IGNORED
            known[key] = value
        assert wanted[-2] != IGNORED


@pytest.mark.parametrize(
    "draw, names",
    [
        (lambda g: mqar(1, seq_len=30, num_pairs=8, generator=g), ("32", "30")),
        (lambda g: mqar(1, seq_len=32, num_pairs=8, vocab_size=16, generator=g), ("vocab_size", "18", "16")),
        (lambda g: mqar(1, seq_len=32, num_pairs=8, filler="noise", generator=g), ("random", "zero", "noise")),
        (lambda g: selective_copying(1, seq_len=17, num_tokens=8, generator=g), ("17",)),
        (lambda g: in_context_recall(1, seq_len=7, generator=g), ("seq_len", "7")),
        (lambda g: TaskSize("copy", 8).draw(1, g), (*TASKS, "copy")),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(draw, names):
    with pytest.raises(ValueError) as error:
        draw(generator())
    assert all(name in str(error.value) for name in names)
