"""The kernels on a GPU equal the reference, for every path, shape, layout and extreme gate."""

from __future__ import annotations

import pytest

from tests.gpu.cases import KernelCase, check
from tests.gpu.grid import gpu_cases
from tests.gpu.setting import Setting, expect_none, poisoned_memory

pytestmark = pytest.mark.gpu


def _parameter(group: str, case: KernelCase):
    together = [pytest.mark.xdist_group(group)] if group.startswith("extremes") else []
    return pytest.param(case, id=f"{group}: {case}", marks=together)


@pytest.mark.parametrize("case", [_parameter(group, case) for group, cases in gpu_cases().items() for case in cases])
def test_the_kernels_equal_the_reference(case: KernelCase, setting: Setting, record_property):
    try:
        with poisoned_memory():
            wrong, largest = check(case, setting.seed, setting.device)
    except NotImplementedError as refusal:
        pytest.skip(f"the kernels refuse it: {refusal}")
    record_property("error / bound", largest)
    expect_none(wrong)
