"""Spikes are found where they are, and the cases have the rates that their names say."""

from __future__ import annotations

import json

import pytest

from experiments import wide_rates
from nha.distill.settings import GATE_LR, LR


def losses(spike: bool) -> dict[str, list[float]]:
    calm = [6.0 - 0.01 * i + 0.02 * (i % 3) for i in range(120)]
    return {
        "teacher": [7.0, 6.5],
        "hybrid": calm,
        "kl": calm,
        "total": [*calm[:100], 9.0 if spike else 5.0, *calm[101:]],
    }


def test_a_falling_loss_has_no_spikes_and_a_jump_is_one():
    assert wide_rates.judge(losses(False))["total"]["spikes"] == []
    assert wide_rates.judge(losses(True))["total"]["spikes"] == [100]
    assert wide_rates.find_spikes([5.0, 5.1] * 40 + [float("nan")]) == [80]


def test_rates_shrink_with_the_width_unless_asked():
    for case, shown in (("1B-x1", LR * 576 / 2048), ("1B-unscaled", LR), ("0.4B-x1", LR * 576 / 960)):
        options = wide_rates.parse_options(["--data", "."])
        settings = wide_rates.settings_of(case, options)
        lr, gate_lr, _ = settings.learning_rates(wide_rates.SHAPES[case.rpartition("-")[0]][0])
        assert lr == pytest.approx(shown) and gate_lr == pytest.approx(shown * GATE_LR / LR)


def test_the_report_has_a_row_and_a_panel_a_case(tmp_path):
    (tmp_path / "rates").mkdir()
    for case in ("1B-x1", "0.4B-x1"):
        row = {
            "case": case,
            "parameters": 10**9,
            "learning_rates": [1e-3, 4e-3, 1e-3],
            "steps": 120,
            "teacher_steps": 2,
        }
        row |= wide_rates.judge(losses(True))
        (tmp_path / "rates" / f"{case}.json").write_text(json.dumps({"row": row, "losses": losses(True)}))
    lines = wide_rates.write_report(tmp_path).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["0.4B-x1", "1B-x1"]
    assert lines[2].endswith("| 1 |") and (tmp_path / "rates.png").stat().st_size > 1000


def test_a_case_that_was_cut_is_made_again(tmp_path):
    file = tmp_path / "1B-x1.json"
    assert not wide_rates.is_finished(file)
    for row, finished in (({"finished": False}, False), ({"finished": True}, True), ({}, True)):
        file.write_text(json.dumps({"row": row}))
        assert wide_rates.is_finished(file) is finished
