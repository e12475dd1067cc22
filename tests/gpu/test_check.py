"""The check and the benchmark in Triton's interpreter: lines as they are known, an honest exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nha.bench import op as bench
from nha.bench.timing import read_table

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton", reason="Triton is not installed")


def run(tmp_path, *more):
    command = [sys.executable, "-m", "tests.gpu.check", "--tiny", "--out", str(tmp_path), "--seed", "5", *more]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)


def test_problems_are_told_with_their_shares_and_the_seed(tmp_path):
    done = run(tmp_path, "--only", "gates=needs_subchunks")
    assert done.returncode == 0, done.stdout
    lines = (tmp_path / "checks.txt").read_text().splitlines()
    assert lines[0].startswith("seed 5, ")
    assert len(lines) == 4 and all(line.startswith("pass ") for line in lines[1:])
    assert "checks: 3 pass" in done.stdout


def test_processes_side_by_side_tell_the_same(tmp_path):
    done = run(tmp_path, "--only", "W0 B1 T26 H2 G2 s", "--workers", "2")
    assert done.returncode == 0, done.stdout
    assert len((tmp_path / "checks.txt").read_text().splitlines()) == 3


def test_what_did_not_run_fails(tmp_path):
    done = run(tmp_path, "--only", "far-apart", "--budget-s", "-1")
    assert done.returncode == 1
    assert (tmp_path / "checks.txt").read_text().splitlines()[1] == "UNRUN no time left | proof: far-apart"


PROVED = ("refusals", "far-apart", "many-keys", "full-decoding", "full-segments", "slot-views", "packed", "losses")


def test_proofs_hold(tmp_path):
    done = run(tmp_path, "--only", f"proof: ({'|'.join(PROVED)})$")
    assert done.returncode == 0, done.stdout
    assert f"checks: {len(PROVED)} pass" in done.stdout


def test_one_pass_launches_every_kernel(tmp_path):
    done = run(tmp_path, "--one-pass")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("pass ")


def test_an_unknown_part_is_named(tmp_path):
    done = run(tmp_path, "--only", "nothing")
    assert done.returncode == 1 and "got 'nothing'" in done.stderr


def test_the_tiny_benchmark_runs(tmp_path):
    command = [sys.executable, "-m", "nha.bench.op", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_table(tmp_path / "ops.csv")
    assert tuple(found[0]) == bench.COLUMNS
    assert {"triton", "triton-graph", "sdpa-cudnn", "sdpa-flash", "chunked"} == {r["impl"] for r in found}
    assert "gsa: flash-linear-attention is not installed" in done.stdout
    assert set(json.loads((tmp_path / "ceilings.json").read_text())) >= {"bytes_per_s", "operations_per_s"}
