"""Settings are read, refused and shown; the files in examples/ are runs that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nha import NHAForCausalLM
from nha.settings import check_value, read_settings, settings_table
from nha.train.estimate import check_memory, estimate
from nha.train.presets import model_config
from nha.train.settings import TrainSettings

ROOT = Path(__file__).parents[2]
FILES = {"20m": 1, "60m": 1, "random-windows": 1, "340m-15b": 8, "1.3b-100b": 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "7b"},
        {"lr": 0.0},
        {"tokens": float("nan")},
        {"random_windows": (-2,)},
        {"random_windows": (0, 8), "windows_per_step": 3},
        {"windows_per_step": 2},
        {"num_slots": 0},
        {"packing": "rows"},
        {"max_spike": 0},
        {"optimizer": "muon", "parallel": "fsdp"},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainSettings(**changes)


@pytest.mark.parametrize("name, gpus", FILES.items())
def test_a_settings_file_of_the_examples_is_a_run_that_fits_80_gb(name, gpus):
    settings = TrainSettings(**read_settings(TrainSettings, ROOT / "examples" / "settings" / f"{name}.yaml"))
    with torch.device("meta"):
        model = NHAForCausalLM(model_config(settings, 32000))
    found = estimate(model, settings, world=gpus, device="H100")
    assert found.total_bytes < 0.9 * 80e9 and found.seconds is not None and found.seconds < 86400
    assert found.tokens == pytest.approx(settings.tokens, rel=1e-3)


def test_all_example_files_are_tested():
    assert {path.stem for path in (ROOT / "examples" / "settings").glob("*.yaml")} >= set(FILES)


def test_a_run_that_cannot_fit_is_refused_and_one_that_may_fit_is_not():
    settings = TrainSettings(preset="340m", batch_size=64, seq_len=8192)
    with torch.device("meta"):
        model = NHAForCausalLM(model_config(settings, 32000))
    found = estimate(model, settings, device="H100")
    with pytest.raises(ValueError, match="micro_batch_size"):
        check_memory(found, int(80e9))
    check_memory(found, int(found.total_bytes))


def test_settings_are_read_from_yaml_as_the_dataclass_has_them(tmp_path):
    (tmp_path / "a.yaml").write_text("tokens: 15e9\nwindow_size: [8, -1]\nqk_norm: true\nbudget: null\n")
    settings = TrainSettings(**read_settings(TrainSettings, tmp_path / "a.yaml"))
    assert (settings.tokens, settings.window_size, settings.qk_norm, settings.budget) == (15e9, (8, -1), True, None)
    (tmp_path / "b.yaml").write_text("tokens: many\n")
    with pytest.raises(ValueError, match="tokens.*many.*b.yaml"):
        read_settings(TrainSettings, tmp_path / "b.yaml")
    with pytest.raises(ValueError, match="c.yaml"):
        read_settings(TrainSettings, tmp_path / "c.yaml")


def test_learning_rates_of_both_schedules_rise_and_fall_to_the_floor():
    for schedule in ("cosine", "wsd"):
        settings = TrainSettings(schedule=schedule, warmup_fraction=0.1, final_lr_fraction=0.1)
        factors = [settings.lr_factor(step, 100) for step in range(100)]
        assert max(factors) <= 1 and factors[9] > 0.9 and factors[0] == pytest.approx(0.1, rel=0.01)
        assert factors[-1] < 0.2 and factors[10:] == sorted(factors[10:], reverse=True)


def test_the_table_in_the_docs_is_that_of_the_settings():
    assert settings_table(TrainSettings) in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"random_windows": 8}, "random_windows to be a list of ints, got 8"),
        ({"full_layers": True}, "full_layers to be a list of ints, got True"),
        ({"full_layers": "1"}, "full_layers to be a list of ints, got '1'"),
        ({"random_windows": [[8]]}, "random_windows to be an int, got [8]"),
        ({"window_size": 16.5}, "window_size to be an int or a list of them, got 16.5"),
        ({"window_size": None}, "window_size to be an int or a list of them, got None"),
        ({"window_size": {"a": 1}}, "window_size to be an int or a list of them, got {'a': 1}"),
        ({"window_size": [8, [4, "8"]]}, "window_size to be an int, got '8'"),
        ({"seed": 10**400}, "seed of at least 0 and at most 4294967295, got 1000"),
        ({"tokens": 10**400}, "tokens of at least 1 and at most 1e+15, got 1000"),
        ({"budget": 10**400}, "budget of at least 0 and at most 1000000000, got 1000"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_the_kind_that_is_expected(given, words):
    with pytest.raises(ValueError) as error:
        TrainSettings(**given)
    assert str(error.value).startswith(f"expected {words}")


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ("a", "tuple[str, ...]", "x to be a list of texts, got 'a'"),
        (["a", 3], "tuple[str, ...]", "x to be a text, got 3"),
        ([1, "2"], "tuple[float, ...]", "x to be a number, got '2'"),
        ([5], "tuple[int, ...] | None", "x at most 4, got 5"),
        ([1], "dict[str, Any]", "x to be a mapping, got [1]"),
    ],
)
def test_lists_and_mappings_are_checked_entry_by_entry(value, kind, words):
    with pytest.raises(ValueError) as error:
        check_value("x", value, kind, {"at_most": 4})
    assert str(error.value) == f"expected {words}"
    check_value("x", None, "tuple[int, ...] | None", {})
    check_value("x", {"a": 1}, "dict[str, Any]", {})
