"""Programs that compile kernels, run in a process of their own, outside the interpreter."""

import json
import os
import subprocess
import sys

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 86: 99 << 10, 89: 99 << 10, 120: 99 << 10}  # of a block


def compiled(program, *shapes):
    """What `tests.triton.<program>` says of every kernel of these shapes, none of which failed to compile."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.triton.{program}", *map(json.dumps, shapes)]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert "error" not in row, row
    return rows
