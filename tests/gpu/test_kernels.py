"""The kernels are sound PyTorch operators on a GPU."""

from __future__ import annotations

import pytest

from tests.gpu.kernel_checks import GPU_CHECKS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", GPU_CHECKS, ids=lambda check: check.__name__)
def test_kernels(check, setting):
    check(setting)
