"""Tensors may have more than 2^31 elements. These tests need most of a GPU's memory and run in one process."""

from __future__ import annotations

import pytest

from tests.gpu.memory_checks import CHECKS

pytestmark = pytest.mark.gpu


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_large_tensors(check, setting):
    check(setting)
