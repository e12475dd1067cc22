"""The decoding kernel compiles without spilling, also where shared memory is 100 KB."""

import pytest

from tests.triton.compilation import compiled

SMALL = 99 * 1024  # shared memory per block on consumer GPUs (sm_89, sm_120)
SHAPES = [
    {},
    {"length": 16},
    {"masked": True},
    {"length": 16, "masked": True, "in_place": False},
    {"dim": 64, "heads": 3, "groups": 3},
    {"dim": 64, "length": 16},
    {"dim": 256},
    {"dim": 256, "length": 16},
    {"dim": 80, "slots": 128, "masked": True},
    {"dim": 96, "length": 16, "separate": False},
    {"dim": 32, "slots": 16, "heads": 1, "groups": 9},
    {"window": 0, "dtype": "float16"},
    {"window": 4096, "dtype": "float16", "batch": 1, "slots_active": True},
    {"dtype": "float32"},
    {"dtype": "float32", "dim": 64, "length": 16},
    {"length": 9, "max_rollback": 9},
    {"max_rollback": 9},
    {"length": 16, "dim": 64, "max_rollback": 21},
    {"length": 4, "window": 0, "max_rollback": 9},
    {"capability": 80},
    {"capability": 89},
    {"capability": 89, "dim": 256, "length": 16},
    {"capability": 100},
    {"capability": 100, "dim": 256, "length": 16},
    {"capability": 120, "dim": 64, "heads": 3, "groups": 3},
    {"capability": 120, "dtype": "float32", "length": 16},
]


@pytest.mark.parametrize("shapes", [SHAPES[::2], SHAPES[1::2]], ids=range(2))
def test_the_decoding_kernel_fits_and_does_not_spill(shapes):
    kernels = compiled("compile_decode", *shapes)
    assert [row["kernel"] for row in kernels] == ["nha_decode_kernel"] * len(shapes)
    for row in kernels:
        assert row["stack"] == 0 and row["shared"] <= SMALL, row
