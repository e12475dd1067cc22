"""The kernels of full attention for one token compile without spilling, also where shared memory is 100 KB."""

import pytest

from tests.triton.compilation import compiled

SMALL = 99 * 1024  # shared memory per block on consumer GPUs (sm_89, sm_120)
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
    assert_fits(capability, SHAPES)


@pytest.mark.parametrize("capability", [80, 100, 120])
def test_the_kernels_fit_other_gpus(capability):
    assert_fits(capability, [SHAPES[0], SHAPES[4], SHAPES[5], SHAPES[-1]])


def assert_fits(capability, shapes):
    """All kernels of shapes, of which only the last needs no second kernel."""
    kernels = compiled("compile_full_decode", *(shape | {"capability": capability} for shape in shapes))
    names = ["full_decode_kernel", "full_decode_combine_kernel"]
    assert [row["kernel"] for row in kernels] == names * (len(shapes) - 1) + names[:1]
    for row in kernels:
        assert row["stack"] == 0 and row["shared"] <= SMALL, row
