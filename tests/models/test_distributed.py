"""Two processes compute what one does: in tensor parallelism, DDP with every parameter's gradient, and FSDP2."""

import json
import os
import subprocess
import sys

import pytest

from nha.models.parallel import SUPPORTED

ROUNDING = 2e-5  # float32 sums of another order, amplified by three random layers


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = [*command, "-m", "tests.models.distributed", str(folder)]
    run = subprocess.run(script, capture_output=True, text=True, timeout=400, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("kind", ["tensor", "data", "sharded"])
def test_two_processes_compute_what_one_does(found, kind):
    if kind == "tensor" and not SUPPORTED:
        pytest.skip("this version of transformers cannot split parameters by heads")
    assert len(found[kind]) >= 6
    wrong = {case: error for case, error in found[kind].items() if not error <= ROUNDING}
    assert not wrong
