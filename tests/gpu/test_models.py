"""Hybrids train, compile and decode on the kernels."""

from __future__ import annotations

import pytest

from tests.gpu.model_checks import GPU_CHECKS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("check", GPU_CHECKS, ids=lambda check: check.__name__)
def test_models(check, setting):
    check(setting)
