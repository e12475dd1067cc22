"""The kernels of full attention for one token compile without spilling, also where shared memory is 100 KB."""

import pytest

from tests.triton.compilation import SHARED_MEMORY, compiled

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
    kernels = compiled("compile_full_decode", *(shape | {"capability": capability} for shape in SHAPES))
    names = ["full_decode_kernel", "full_decode_combine_kernel"]
    assert [row["kernel"] for row in kernels] == names * (len(SHAPES) - 1) + names[:1]
    for row in kernels:
        assert row["stack"] == 0 and row["shared"] <= SHARED_MEMORY[capability], row
