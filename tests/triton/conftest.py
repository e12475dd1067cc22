"""Kernels run in Triton's interpreter on the CPU; the switch has to be set before they are first imported."""

import importlib.util
import sys

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    import os

    if "nha.ops.triton.primitives" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton", reason="Triton is not installed")
