"""Windows no longer than a chunk, all scores of which one tile holds (WINDOW_IN_TILE).

The kernels do so for 16-bit dtypes, where the interpreter computes bfloat16 wrong: here they do in float32.
"""

import pytest
import torch

from tests.builders import Case
from tests.triton.test_chunk import DEVICE, inputs
from tests.triton.test_chunk_split_loop import assert_within_twice_the_error_of_the_reference, changed  # noqa: F401

CHUNK = 32  # of these sizes in float32
WHOLE = Case(batch=1, length=101, query_heads=2, heads=1, window=CHUNK, sinks=1, separate=False)
APART = Case(batch=2, length=75, query_heads=2, heads=1, window=CHUNK)
SHORT = Case(batch=2, length=70, query_heads=2, heads=1, window=9, separate=False)
# Wide heads leave less shared memory: of the next chunk only keys are kept for all query heads, or nothing.
KEYS = Case(batch=1, length=38, query_heads=2, heads=1, dim=66, value_dim=66, window=16, separate=False)
NOTHING = Case(batch=1, length=38, query_heads=2, heads=1, dim=66, value_dim=66, window=16, sinks=1)


@pytest.fixture(autouse=True)
def _one_tile(changed):  # noqa: F811
    changed(window_in_tile=True, one_gate_sum=True, block_h=1, warps=2)


@pytest.mark.parametrize(
    "case",
    [WHOLE, APART, SHORT, KEYS, NOTHING],
    ids=["a whole chunk", "slots apart", "shorter", "keys kept", "nothing kept"],
)
def test_the_error_is_at_most_twice_that_of_the_reference(case):
    assert_within_twice_the_error_of_the_reference(inputs(case), case)


@pytest.mark.parametrize("case", [APART, SHORT], ids=["slots apart", "shorter"])
def test_padded_rows(case):
    mask = torch.ones(2, case.length, dtype=torch.bool, device=DEVICE)
    mask[0, :41] = False
    mask[1, 50:] = False
    got = assert_within_twice_the_error_of_the_reference(inputs(case), case, attention_mask=mask)
    assert not got["out"][~mask].any()


def test_packed_sequences():
    cu = torch.tensor([0, 3, 3, 80, 101], dtype=torch.int32, device=DEVICE)
    assert_within_twice_the_error_of_the_reference(inputs(WHOLE), WHOLE, cu_seqlens=cu)
