"""Every sentence follows from its numbers, at the borders too."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nha.report import Check, Cost, Results
from nha.report.results import Distilled
from nha.report.sentences import (
    change,
    conversion_text,
    key_numbers,
    layers_text,
    limits_text,
    longer_window_text,
    memory_text,
    next_steps,
    quality_text,
    recall_text,
    slots_text,
    speed_text,
    trend,
    verdict,
    window_text,
)
from tests.report.fixtures import distilled_results, results


def with_perplexity(**values: float) -> Results:
    """Results in which some variants have other perplexities, at every position as well."""
    found = results()
    for name, value in values.items():
        variant = found.variant(name)
        assert variant is not None
        variant.by_position = [p * value / variant.perplexity for p in variant.by_position]
        variant.perplexity = value
    return found


def with_times(teacher: list[float], hybrid: list[float]) -> Results:
    found = results()
    found.costs = [
        Cost(512 * 2**i, 1000 * 2**i, 100, t, h) for i, (t, h) in enumerate(zip(teacher, hybrid, strict=True))
    ]
    return found


@pytest.mark.parametrize(
    "ratio, level, words",
    [
        (0.90, "good", "lower than the original's"),
        (1.00, "good", "perplexity is the original's"),
        (1.0049, "good", "perplexity is the original's"),
        (1.006, "good", "lost a little"),
        (1.10, "good", "lost a little"),
        (1.11, "fair", "lost some"),
        (1.35, "fair", "lost some"),
        (1.36, "poor", "lost much"),
        (float("inf"), "poor", "lost much"),
    ],
)
def test_verdict_follows_the_ratio(ratio, level, words):
    found = verdict(with_perplexity(teacher=20.0, hybrid=20.0 * ratio))
    assert found.level == level and words in found.opening


def test_verdict_names_a_failed_check():
    found = results()
    found.checks.append(Check("saving [it]", False, "disk full"))
    assert verdict(found).level == "failed" and "saving [it]" in verdict(found).opening


@pytest.mark.parametrize(
    "ratio, words",
    [
        (0.97, "3 % lower"),
        (0.9951, "the same"),
        (1.0049, "the same"),
        (1.0051, "0.5 % higher"),
        (1.012, "1.2 % higher"),
        (1.99, "99 % higher"),
        (2.0, "2.0 times as high"),
        (4.1, "4.1 times as high"),
        (float("inf"), "more than 10,000 times as high"),
        (float("nan"), "not comparable"),
    ],
)
def test_a_change_is_named_with_its_size(ratio, words):
    assert change(ratio) == words


@pytest.mark.parametrize(
    "start, end, word", [(40, 43.9, "stays"), (40, 36.1, "stays"), (40, 44.1, "grows"), (40, 35.9, "falls")]
)
def test_a_time_is_called_steady_only_within_a_tenth(start, end, word):
    assert trend([start, end]).startswith(word)


def test_a_time_that_goes_up_and_down_is_given_by_its_extremes():
    assert trend([75, 77, 49, 48, 78]) == "varies between 48 and 78 ms"
    assert trend([65, 79, 82, 66, 93]) == "grows from 65 to 93 ms"


def test_a_time_that_triples_is_said_to_grow():
    text = " ".join(speed_text(with_times([40, 80, 120], [50, 90, 150])))
    assert "grows from 50 to 150 ms" in text and "hardly" not in text
    assert "slower at 2,048 tokens" in text


def test_which_is_faster_and_from_where_on():
    assert "at every length" in " ".join(speed_text(with_times([40, 50], [40, 50])))
    assert "from 1,024 tokens on" in " ".join(speed_text(with_times([40, 50, 60], [41, 50, 60])))
    assert "slower at 1,024 tokens" in " ".join(speed_text(with_times([40, 50], [30, 51])))
    assert speed_text(with_times([40], [30])) == []


def test_speed_is_a_limit_only_where_the_hybrid_is_slower():
    titles = [title for title, _ in limits_text(with_times([40, 50], [40, 50]))]
    assert "Speed" not in titles
    found = dict(limits_text(with_times([40, 50], [50, 50])))
    assert "At 1 of 2 lengths" in found["Speed"] and "1.25 times" in found["Speed"]


def test_memory_is_said_to_be_constant_only_if_it_is():
    constant = results()
    constant.costs = [Cost(512, 51_200, 10_000), Cost(1024, 102_400, 10_000)]
    assert "does not grow" in " ".join(memory_text(constant)) and "10 times less" in " ".join(memory_text(constant))
    growing = results()
    growing.costs = [Cost(512, 51_200, 10_000), Cost(1024, 102_400, 20_240), Cost(2048, 204_800, 20_240)]
    assert "the same from 1,024 tokens on" in " ".join(memory_text(growing))
    growing.costs = [Cost(512, 51_200, 10_000), Cost(1024, 102_400, 20_240)]
    text = " ".join(memory_text(growing))
    assert "does not grow" not in text and "20 %" in text
    larger = results()
    larger.costs = [Cost(512, 51_200, 60_000)]
    assert "nothing is saved" in " ".join(memory_text(larger))


@pytest.mark.parametrize(
    "off, hybrid, words",
    [
        (20.0, 21.0, "do not help"),
        (20.05, 20.0, "do not help"),
        (25.0, 20.05, "win back all"),
        (25.0, 19.0, "win back all"),
        (25.0, 22.36, "win back 50 %"),
        (20.01, 19.0, "lose nothing"),
    ],
)
def test_share_of_the_slots_is_between_nothing_and_all(off, hybrid, words):
    text = slots_text(with_perplexity(teacher=20.0 if hybrid != 20.05 else 20.05, slots_off=off, hybrid=hybrid))
    assert words in text
    assert all(0 <= int(share) <= 100 for share in re.findall(r"(\d+) %", text))


@pytest.mark.parametrize("longer, words", [(19.8, "the window is"), (20.0, "the same"), (20.2, "the slots are")])
def test_the_better_use_of_the_memory_is_the_lower_perplexity(longer, words):
    assert words in longer_window_text(with_perplexity(hybrid=20.0), longer)


def test_just_past_the_window_is_the_first_stretch_after_it():
    found = results()
    teacher, hybrid = found.variant("teacher"), found.variant("hybrid")
    assert teacher is not None and hybrid is not None
    teacher.by_position, hybrid.by_position = [20.0] * 6, [20.0, 30.0, 20.0, 20.0, 20.0, 24.0]
    text = window_text(found)
    assert "(tokens 64 to 128) its perplexity is 50 % higher" in text
    assert "(1,024 to 2,048) it is 20 % higher" in text
    found.window_sizes = [100] * 30
    assert "(tokens 128 to 256) its perplexity is the same" in window_text(found)
    found.window_sizes = [0] * 30
    assert "No token is read exactly" in window_text(found) and "(tokens 0 to 64)" in window_text(found)
    found.window_sizes = [4096] * 30
    assert window_text(found) == "Up to 4096 tokens the two are the same model."
    found.distilled = Distilled(bytes=1)
    assert "same model" not in window_text(found) and "4096" in window_text(found)


def test_layers_that_are_not_hybrid_are_named():
    found = results()
    assert "26 of 30 layers" in layers_text(found) and "4 keep full attention (8, 18, 20, 23)" in layers_text(found)
    found.sliding_layers = 3
    assert "1 keep full" in layers_text(found) and "3 keep the sliding window" in layers_text(found)
    found.sliding_layers, found.window_sizes = 0, [64] * 30
    assert "All 30 layers" in layers_text(found)


def test_without_training_none_is_mentioned():
    found = results()
    assert "20 steps" in " ".join(conversion_text(found))
    found.tuning = None
    assert "steps" not in " ".join(conversion_text(found))
    assert "without any training" in verdict(found).text


def test_without_costs_nothing_is_said_of_them():
    found = results()
    found.costs = []
    assert memory_text(found) == [] and speed_text(found) == [] and len(key_numbers(found)) == 1
    assert "MB" not in " ".join(quality_text(found)).replace("4.4 MB", "")


def test_next_steps_quote_names_for_the_shell():
    found = results()
    found.source, found.saved_to = "my model", None
    lines = [line for _, line in next_steps(found)]
    assert lines[0] == "nha hybridize 'my model' my-hybrid --full-layers 8,18,20,23"
    assert any(line.startswith("nha distill 'my model'") for line in lines)
    assert any(line.startswith("nha search 'my model'") for line in lines)


def test_a_distilled_hybrid_is_shown_beside_the_fair_control_and_with_the_facts_it_recalled():
    found = distilled_results()
    text, recall = verdict(found).text, " ".join(recall_text(found))
    assert "after distillation" in text and "8 % higher" in text
    assert "8,192 tokens" in text and "6 of 12 digits" in text and "0 of 2 numbers exactly" in text
    assert "12 of 12 after 256 tokens, 6 of 12 after 8,192" in recall and "2 of 6 answers" in recall
    assert not recall_text(results())
    warning, last = "exact numbers from long before", found.distilled.recall[-1]
    last.recalled, last.continued = 1, 1
    assert warning in text and warning not in verdict(found).text
    assert "may write further digits" in verdict(found).text
    last.recalled, last.continued = last.facts, 0
    assert warning not in verdict(found).text and "further digits" not in verdict(found).text
    last.recalled, last.facts = 0, 1
    assert "Asked for 1 number that" in verdict(found).text and "0 of 1 number exactly" in verdict(found).text
    last.facts = 2
    assert "takes 5.9 MB, 1.6 % of the original's, and it wrote 5 of 12 digits" in text
    assert "5.9 MB in place of 21.0 MB: 24 of 36 digits at all distances, 27 without" in recall
    assert "93 % as often" in recall and "50 % as often 500 to 4,000" in recall
    assert ("5 of 12 digits", "recalled after 8K tokens, from 5.9 MB with states in 8 bits") in key_numbers(found)
    older = replace(found, distilled=replace(found.distilled, recall_int8=[], relative={}))
    assert "8 bits" not in verdict(older).text + " ".join(recall_text(older)) + str(key_numbers(older))
    noted = replace(found, notes=["2 KV heads have longer windows."])
    assert "10.3 MB" in " ".join(conversion_text(found))
    assert "exactly. 2 KV heads have longer windows. The slots" in " ".join(conversion_text(noted))
    assert Results.from_dict(found.to_dict()) == found
