"""Run the compile_*.py programs, each in a process of its own, outside Triton's interpreter."""

import json
import os
import subprocess
import sys

SHARED_MEMORY = {
    80: 163 << 10,
    90: 227 << 10,
    100: 227 << 10,
    86: 99 << 10,
    89: 99 << 10,
    120: 99 << 10,
}  # bytes per block, by capability


def compiled(program, *shapes):
    """The rows that `tests.triton.<program>` prints for every kernel of these shapes; asserts that all compiled."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.triton.{program}", *map(json.dumps, shapes)]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert "error" not in row, row
    return rows
