"""The kernels of one token under full attention compile for GPUs that are not there, without spilling."""

import pytest

from tests.triton.elsewhere import SHARED, compiled

SHAPES = [
    {},
    {"masked": False},
    {"dtype": "float16", "dim": 64, "heads": 3, "groups": 3},
    {"dim": 80, "value_dim": 96},
    {"dim": 256, "heads": 4, "groups": 2},
    {"dtype": "float32"},
    {"dtype": "float32", "dim": 32, "masked": False},
    {"batch": 90},
]


@pytest.mark.parametrize("capability", [90, 89])
def test_the_kernels_fit_and_do_not_spill(capability):
    kernels = compiled("full_only", *(shape | {"capability": capability} for shape in SHAPES))
    assert [row["kernel"] for row in kernels] == ["full_kernel", "merge_kernel"] * (len(SHAPES) - 1) + ["full_kernel"]
    for row in kernels:
        assert row["stack"] == 0 and row["shared"] <= SHARED[capability], row
