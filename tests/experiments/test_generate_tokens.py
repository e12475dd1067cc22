"""Turns of a conversation and prompts of given lengths are timed, and the tokens of all ways to converse are equal."""

from __future__ import annotations

import json
import sys

from experiments import generate_tokens


def test_turns_and_lengths_give_rows(tmp_path, monkeypatch):
    given = ["generate_tokens", str(tmp_path), "--tiny", "--parts", "lengths,turns", "--lengths", "30"]
    monkeypatch.setattr(sys, "argv", given)
    generate_tokens.main()
    found = json.loads((tmp_path / "generate.json").read_text())
    assert found["lengths_30_ms"].keys() == {"hybrid-1", "original"}
    assert all(len(halves) == 2 for halves in found["lengths_30_ms"].values())
    assert {row["equal_tokens"] for row in found["turns"] if row["variant"] != "original"} == {67}
    assert all(len(row["turns"]) == 3 and min(turn["median_ms"] for turn in row["turns"]) > 0 for row in found["turns"])
