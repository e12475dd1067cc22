"""Every kernel compiles for an H100 that is not there, within its shared memory."""

import json
import os
import subprocess
import sys

import pytest

SHARED = 227 * 1024
SPILLING = ("slots_kernel", "finish_kernel")  # their accumulators exceed the registers; the rest must hardly spill
SHAPES = [
    {},
    {"dim": 64},
    {"dtype": "float16"},
    {"dtype": "float32"},
    {"state": True, "dim": 64, "length": 140},
    {"slots": 16, "window": 5, "groups": 9, "heads": 1, "length": 150},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_fits_an_h100(shape):
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton.compile_only", json.dumps(shape)]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    kernels = [json.loads(line) for line in lines]
    assert {"states_kernel", "forward_kernel", "slots_kernel", "reverse_kernel"} <= {row["kernel"] for row in kernels}
    for row in kernels:
        assert "error" not in row, row
        assert row["shared"] <= SHARED, row
        assert row["kernel"] in SPILLING or row["stack"] <= 64, row
