"""The profile of prompts writes a row for every variant and way, and where the host spends its time."""

import json
import sys

from experiments import prefill_profile


def test_tiny_shapes_are_profiled(tmp_path, monkeypatch, capsys):
    arguments = ["prefill_profile.py", str(tmp_path), "--tiny", "--layers", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    prefill_profile.main()
    found = json.loads((tmp_path / "prefill.json").read_text())
    assert {(row["variant"], row["way"], row["T"]) for row in found["rows"]} == {
        (*variant, length) for variant in prefill_profile.WAYS for length in (20, 40)
    }
    assert all(row["ms"] > 0 and row["kernels_per_layer"] > 0 for row in found["rows"])
    assert "function calls" in (tmp_path / "host-hybrid-0.txt").read_text()
