"""Under compute-sanitizer no kernel accesses memory out of bounds or has a race."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool, setting):
    assert SANITIZER is not None
    program = [sys.executable, "-m", "tests.gpu.one_pass", str(setting.seed)]
    subprocess.run(program, cwd=ROOT, check=True)  # compiles, so that nothing does below
    # The caching allocator would hide accesses beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # PyTorch asks the driver for functions that it can do without; memcheck would report the driver's answer.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", *options, *program]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
