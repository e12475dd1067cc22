"""The kernels of full attention for one token compile without spilling, also where shared memory is 100 KB."""

import pytest

from tests.triton.compilation import SHARED_MEMORY, compiled

SMALL = 99 * 1024  # shared memory per block on consumer GPUs (sm_89, sm_120)
SHAPES = [
    {},
    {"masked": False},
    {"dtype": "float16", "dim": 64, "heads": 3, "groups": 3},
    {"dim": 80, "value_dim": 96},
    {"dim": 256, "heads": 4, "groups": 2},
    {"dtype": "float32"},
    {"dtype": "float32", "dim": 32, "masked": False},
    {"batch": 90, "length": 1024},
]


FEW = [SHAPES[0], SHAPES[4], SHAPES[5], SHAPES[-1]]


@pytest.mark.parametrize(
    "shapes_of", [{90: SHAPES, 80: FEW}, {89: SHAPES, 100: FEW, 120: FEW}], ids=lambda found: "-".join(map(str, found))
)
def test_the_kernels_fit_and_do_not_spill(shapes_of):
    """All kernels of shapes, of which only the last of each list needs no second kernel."""
    shapes = [shape | {"capability": gpu} for gpu, found in shapes_of.items() for shape in found]
    names = ["full_decode_kernel", "full_decode_combine_kernel"]
    wanted = [name for found in shapes_of.values() for name in names * (len(found) - 1) + names[:1]]
    kernels = compiled("compile_full_decode", *shapes)
    assert [row["kernel"] for row in kernels] == wanted
    for row in kernels:
        assert row["stack"] == 0 and row["shared"] <= SMALL, row


def test_the_kernels_of_a_cache_in_8_bits_fit_and_do_not_spill():
    shapes: list[dict] = [{}, {"capability": 100}, {"dtype": "float16", "dim": 64}, {"dtype": "float32"}]
    shapes += [{"capability": gpu, "shared": SMALL} for gpu in (80, 89, 120)]
    shapes += [{"dim": 256, "capability": 120, "shared": SMALL}]
    kernels = compiled("compile_full_decode", *({"int8": True} | shape for shape in shapes))
    assert len({row["kernel"] for row in kernels}) == 3
    for row in kernels:
        limit = SMALL if "shared" in row["shape"] else SHARED_MEMORY[90] // 2  # for two programs
        assert row["stack"] == 0 and row["shared"] <= limit, row
