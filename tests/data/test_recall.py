"""Recall text: exact distances, answers that stand in the text, and an evaluation that training has never seen."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha.data.recall import (
    EVALUATION_TASKS,
    TASKS,
    RecallSettings,
    evaluation_set,
    filler_tokens,
    pieces_of,
    training_sequence,
)
from nha.data.recall.words import EVALUATION, TRAINING
from tests.data.tokenizers import KINDS, small_tokenizer

MARK = 2  # filler of one special token, which no piece holds
FILLER = np.full(5000, MARK)
LENGTH = 2500  # enough for 16 facts as bytes


def runs(mask):
    """(start, end) of every run of true values."""
    edges = np.flatnonzero(np.diff(np.r_[0, mask.astype(int), 0]))
    return list(zip(edges[::2], edges[1::2], strict=True))


def occurs(part, whole):
    return any((whole[i : i + len(part)] == part).all() for i in range(len(whole) - len(part) + 1))


def folded(words):
    """Every word of one side, without case."""
    return {word.lower() for word in (*words.first, *words.last, *words.nouns)}


def test_training_and_evaluation_share_no_name_no_word_and_no_wording():
    assert not folded(TRAINING) & folded(EVALUATION)
    for side in (TRAINING, EVALUATION):
        for name in ("first", "last", "nouns"):
            assert len(set(getattr(side, name))) == len(getattr(side, name))
    for part in ("statement", "question"):
        trained = {getattr(wording, part) for wording in TRAINING.wordings}
        assert not trained & {getattr(wording, part) for wording in EVALUATION.wordings}
    assert {wording.task for wording in TRAINING.wordings} == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_long_sequence_has_as_many_facts_as_there_are_names_and_words(task):
    many = RecallSettings(tasks=(task,), facts=(2000, 2000))
    filler = np.full(200_000, MARK)
    ids, answers = training_sequence(np.random.default_rng(0), small_tokenizer("bytes"), filler, len(filler), many)
    assert len(ids) == len(filler) and len(runs(answers)) > 0


def test_no_training_sequence_holds_a_word_of_the_evaluation():
    tokenizer, generator = small_tokenizer("bytes"), np.random.default_rng(0)
    text = " ".join(tokenizer.decode(training_sequence(generator, tokenizer, FILLER, LENGTH)[0]) for _ in range(300))
    names = {word for word in (*EVALUATION.first, *EVALUATION.last)}
    assert not names & set(text.replace(":", " ").replace(",", " ").replace(".", " ").split())
    common = {part for w in EVALUATION.wordings for part in w.statement.replace("{value}", "{key}").split("{key}")}
    assert not [part for part in common if len(part) > 12 and part in text]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", EVALUATION_TASKS)
@given(distance=st.integers(600, 1200), seed=st.integers(0, 1000))
@settings(max_examples=3, deadline=None)
def test_the_distance_is_exact_and_the_answer_stands_in_the_text(kind, task, distance, seed):
    found = evaluation_set(
        task, distance, seq_len=2500, count=2, seed=seed, tokenizer=small_tokenizer(kind), filler=FILLER
    )
    assert found.ids.shape == found.answers.shape == (2, 2500)
    for ids, answers in zip(found.ids, found.answers, strict=True):
        ((start, end),) = runs(answers)
        assert end == 2500
        assert (ids[start:end] == ids[start - distance : end - distance]).all()
        if EVALUATION_TASKS[task].value == "digits":  # nothing else in the text is the answer
            assert not occurs(ids[start:end], np.delete(ids[:start], start - distance))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", EVALUATION_TASKS)
def test_the_text_reads_as_its_wording_says(kind, task):
    tokenizer, spec = small_tokenizer(kind), EVALUATION_TASKS[task]
    found = evaluation_set(task, 700, seq_len=1800, count=3, seed=1, tokenizer=tokenizer, filler=FILLER)
    wording = next(w for w in EVALUATION.wordings if (w.task, w.value) == (spec.task, spec.value))
    for ids, answers in zip(found.ids, found.answers, strict=True):
        text = tokenizer.decode(ids[ids != MARK], skip_special_tokens=True)
        answer = tokenizer.decode(ids[answers]).strip()
        key = next(
            (k for k in keys(wording, text) if text.endswith(wording.question.format(key=k, value=answer))), None
        )
        assert key is not None, text[-300:]
        assert text.count(wording.statement.format(key=key, value=answer).strip()) >= 1
        assert text.count(wording.statement.split("{")[0].strip()) >= spec.facts


def keys(wording, text):
    """Every key that may stand in a text."""
    words = [word.strip(":,.?") for word in text.split()]
    return (
        [""]
        if not wording.key
        else words
        if wording.key == "word"
        else [f"{a} {b}" for a in EVALUATION.first for b in EVALUATION.last]
    )


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), scattered=st.sampled_from([0.0, 1.0]), far=st.sampled_from([0.0, 1.0]))
@settings(max_examples=30, deadline=None)
def test_every_answer_in_a_training_sequence_was_stated_at_least_the_least_distance_before(kind, seed, scattered, far):
    options = RecallSettings(distances=(100, 10_000), long_range_fraction=far, scattered_fraction=scattered)
    ids, answers = training_sequence(np.random.default_rng(seed), small_tokenizer(kind), FILLER, LENGTH, options)
    assert ids.shape == answers.shape == (LENGTH,)
    assert answers.any()
    for start, end in runs(answers):  # the last token of an answer follows its value
        assert end - start > 1 and occurs(ids[start : end - 1], ids[: end - 101])


@given(seed=st.integers(0, 10_000), extra=st.integers(0, 40), far=st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_row_that_has_room_for_one_fact_has_an_answer(seed, extra, far):
    tokenizer, options = (
        small_tokenizer("merges"),
        RecallSettings(facts=(1, 3), tasks=("pairs",), long_range_fraction=far),
    )
    least = 72 + 60
    ids, answers = training_sequence(np.random.default_rng(seed), tokenizer, FILLER, least + extra, options)
    assert len(ids) == least + extra and answers.any()


def test_rows_are_a_function_of_the_generator():
    tokenizer = small_tokenizer("merges")
    first, second = (
        [training_sequence(np.random.default_rng(seed), tokenizer, FILLER, 900) for seed in (1, 2)] for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
    assert (first[0][0] != first[1][0]).any()
    sets = [
        evaluation_set("four_facts", 600, seq_len=900, count=2, seed=s, tokenizer=tokenizer, filler=FILLER).ids
        for s in (0, 0, 1)
    ]
    assert (sets[0] == sets[1]).all() and (sets[0] != sets[2]).any()


def test_the_same_facts_are_asked_for_at_every_distance_and_length():
    tokenizer = small_tokenizer("merges")
    answers = [
        evaluation_set("one_fact", d, seq_len=n, count=4, seed=0, tokenizer=tokenizer, filler=FILLER)
        for d, n in ((200, 900), (600, 900), (600, 2000))
    ]
    texts = [[tokenizer.decode(ids[mask]) for ids, mask in zip(s.ids, s.answers, strict=True)] for s in answers]
    assert texts[0] == texts[1] == texts[2]


def test_a_tokenizers_first_token_comes_first_and_only_there():
    tokenizer = small_tokenizer("digits")
    bos = tokenizer.bos_token_id
    row, _ = training_sequence(np.random.default_rng(0), tokenizer, FILLER, 900)
    asked = evaluation_set("one_fact", 300, seq_len=900, count=1, seed=0, tokenizer=tokenizer, filler=FILLER).ids[0]
    for ids in (row, asked):
        assert np.flatnonzero(ids == bos).tolist() == [0]
    row, _ = training_sequence(np.random.default_rng(0), small_tokenizer("merges"), FILLER, 900)
    assert bos not in row


def test_pieces_are_read_once_and_forgotten_with_their_tokenizer():
    import copy
    import gc
    import weakref

    tokenizer = copy.copy(small_tokenizer("merges"))
    generator = np.random.default_rng(0)
    for _ in range(200):
        training_sequence(generator, tokenizer, FILLER, 900)
    known = dict(pieces_of(tokenizer).known)
    for _ in range(50):
        training_sequence(generator, tokenizer, FILLER, 900)
    assert len(pieces_of(tokenizer).known) <= 1.2 * len(known)
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("scattered", [0.0, 1.0])
def test_rows_that_ask_from_far_do_so_from_the_whole_row_away(scattered):
    tokenizer, generator = small_tokenizer("merges"), np.random.default_rng(0)

    def distances(far):
        """Of answers to one fact whose digits stand nowhere else."""
        options = RecallSettings(
            tasks=("passkey",), facts=(1, 1), digits=(7, 7), long_range_fraction=far, scattered_fraction=scattered
        )
        found = []
        for _ in range(100):
            ids, answers = training_sequence(generator, tokenizer, np.zeros(5000, np.int64), 4000, options)
            [(start, end)] = runs(answers)
            end -= 1  # the token after the value
            windows = np.lib.stride_tricks.sliding_window_view(ids, end - start)
            found.append(start - np.flatnonzero((windows == ids[start:end]).all(1))[0])
        return np.array(found)

    near, far = distances(0.0), distances(1.0)
    assert np.mean(near > 2000) < 0.2 and np.mean(far > 2000) > 0.6
    assert np.mean(far > 3600) > 0.15 and far.min() < 1000


@pytest.mark.parametrize("low, high", [(1, 2), (9, 16)])
def test_the_number_of_facts_is_drawn_from_its_range(low, high):
    tokenizer, generator = small_tokenizer("merges"), np.random.default_rng(0)
    settings = RecallSettings(tasks=("phone_book",), facts=(low, high), distances=(1, 2000))
    counts = [len(runs(training_sequence(generator, tokenizer, FILLER, 4000, settings)[1])) for _ in range(60)]
    assert min(counts) == low and max(counts) == high


def test_filler_is_drawn_from_ids_or_asked_of_a_function():
    generator = np.random.default_rng(0)
    drawn = filler_tokens(generator, np.arange(50), 10)
    assert drawn == list(range(drawn[0], drawn[0] + 10))
    assert filler_tokens(generator, lambda n: [7] * n, 3) == [7, 7, 7]
    with pytest.raises(ValueError, match="expected 3 tokens from the filler, got 2"):
        filler_tokens(generator, lambda n: [7] * 2, 3)
    with pytest.raises(ValueError, match=r"expected at least 9 filler tokens in one dimension, got \[5\]"):
        filler_tokens(generator, np.arange(5), 9)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ("fact", "riddle")}, "expected tasks out of"),
        ({"tasks": ()}, "expected tasks out of"),
        ({"facts": (0, 3)}, "expected facts as two integers"),
        ({"distances": (9, 3)}, "expected distances as two integers"),
        ({"long_range_fraction": -0.5}, "expected long_range_fraction from 0 to 1"),
        ({"scattered_fraction": 1.5}, "expected scattered_fraction from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RecallSettings(**changes)
    assert {f.name for f in fields(RecallSettings)} >= set(changes)


@pytest.mark.parametrize(
    "task, distance, length, rows, message",
    [
        ("riddle", 100, 900, 1, "expected a recall task in"),
        ("one_fact", 100, 900, 0, "expected at least one sequence, got 0"),
        ("one_fact", 5, 900, 1, "a value too near, for 'one_fact' at a distance of 5"),
        ("one_fact", 899, 900, 1, "a value too far back, for 'one_fact' at a distance of 899 in 900 tokens"),
        ("phone_book", 100, 120, 1, "expected room for the facts"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(task, distance, length, rows, message):
    with pytest.raises(ValueError, match=message):
        evaluation_set(
            task, distance, seq_len=length, count=rows, seed=0, tokenizer=small_tokenizer("merges"), filler=FILLER
        )


def test_rows_too_short_for_a_fact_are_refused():
    with pytest.raises(ValueError, match=r"expected recall sequences of at least \d+ tokens, got 40"):
        training_sequence(np.random.default_rng(0), small_tokenizer("merges"), FILLER, 40)
