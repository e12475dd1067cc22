"""The integration checks of tests/gpu run in Triton's interpreter, and its tests are collected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.setting import Setting

pytest.importorskip("triton", reason="Triton is not installed")

from tests.gpu import kernel_checks, memory_checks, model_checks

ROOT = Path(__file__).parents[2]
TINY = Setting("cpu", seed=5, tiny=True)


@pytest.mark.parametrize(
    "check", [*kernel_checks.CHECKS, *model_checks.CHECKS, *memory_checks.CHECKS], ids=lambda check: check.__name__
)
def test_checks_in_the_interpreter(check):
    check(TINY)


def test_one_pass_launches_every_kernel():
    from tests.gpu.one_pass import one_pass

    one_pass(TINY)


def test_the_checks_on_a_gpu_are_collected():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "tests/gpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sum("::" in line for line in run.stdout.splitlines()) > 250
