"""Settings have bounds, one place, and a table in the docs that is generated from them."""

import dataclasses
import json
from pathlib import Path

import pytest

from nha.distill.run import make_mixture
from nha.distill.settings import DistillSettings
from nha.settings import settings_table

FIELDS = dataclasses.fields(DistillSettings)
NUMBERS = [f for f in FIELDS if "at_least" in f.metadata or "above" in f.metadata]


def test_settings_are_json_and_their_defaults_are_within_bounds():
    assert json.loads(json.dumps(dataclasses.asdict(DistillSettings())))["batch_size"] == 16
    assert set(DistillSettings(teacher_tokens=1e6).identity()) == {f.name for f in FIELDS} - {
        "compile",
        "gate_shift",
        "save_every",
        "log_every",
        "budget",
    }


def test_every_number_has_bounds_on_both_sides():
    bounded = {f.name for f in NUMBERS if "at_most" in f.metadata}
    assert bounded == {f.name for f in FIELDS if "choices" not in f.metadata and f.type != "bool"}


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda f: f.name)
def test_numbers_outside_their_bounds_are_refused_by_name(setting):
    low = setting.metadata.get("at_least", setting.metadata.get("above"))
    wrong = [float("nan"), float("inf"), float("-inf"), low - 1, setting.metadata["at_most"] + 1, "7", True]
    wrong += [1.5] if "float" not in setting.type else []
    for value in wrong:
        for given in [value, (4, value)] if "tuple" in setting.type else [value]:
            with pytest.raises(ValueError, match=f"expected {setting.name} ") as error:
                DistillSettings(**{setting.name: given})
            assert str(value) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [f for f in FIELDS if "choices" in f.metadata], ids=lambda f: f.name)
def test_other_choices_are_refused_with_those_there_are(setting):
    with pytest.raises(ValueError, match=f"expected {setting.name} ") as error:
        DistillSettings(**{setting.name: "everything"})
    assert all(choice in str(error.value) for choice in (*setting.metadata["choices"], "'everything'"))


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_weight": 0.0, "ce_weight": 0.0, "recall_fraction": 0.0},
        {"tokens": 1e6, "long_tokens": 1e9},
        {"window_size": ()},
        {"slots_off": 1},
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        DistillSettings(**changes)


def test_batches_follow_from_settings():
    settings = DistillSettings(tokens=1e6, batch_size=8, seq_len=1024, long_tokens=1e5, long_seq_len=4096)
    mixture = make_mixture(settings, world=2)
    assert mixture.steps == round(9e5 / 16384) + round(1e5 / 16384) and mixture.shape(mixture.steps - 1) == (2, 4096)
    assert make_mixture(DistillSettings(window_size=256)) == make_mixture(DistillSettings())  # one control for both
    assert make_mixture(DistillSettings(max_facts=1)).recall.facts == (1, 1)


def test_the_table_in_the_docs_is_that_of_the_settings():
    page = (Path(__file__).parents[2] / "docs" / "distilling.md").read_text(encoding="utf-8")
    assert settings_table(DistillSettings) in page
