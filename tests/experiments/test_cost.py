"""The cost of a distillation is measured by its own loop, and a row that is there is not made again."""

from __future__ import annotations

import json

import pytest

from experiments import cost


def test_a_shape_is_measured_once_and_stamped(tmp_path, capsys):
    arguments = [
        "--output",
        str(tmp_path / "out"),
        "--work",
        str(tmp_path / "work"),
        "--shapes",
        "tiny",
        "--steps",
        "3",
    ]
    assert cost.main([*arguments, "--seq-len", "512"]) == 0
    (row,) = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert row["steps"] == 3 and row["tokens_per_s"] > 0 and row["versions"]["torch"] and row["date"]
    assert "| tiny |" in (tmp_path / "out" / "cost.md").read_text()
    capsys.readouterr()
    assert cost.main(arguments) == 0 and capsys.readouterr().out == ""


def test_the_shapes_have_the_parameters_that_their_names_say():
    from nha.distill.estimate import empty_model

    for name, billions in (("1B", 1.24), ("3B", 3.21), ("8B", 8.03)):
        counted = sum(p.numel() for p in empty_model(cost.shape_config(name)).parameters())
        assert counted / 1e9 == pytest.approx(billions, rel=0.01)
