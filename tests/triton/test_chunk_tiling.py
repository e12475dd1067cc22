"""How calls are cut into programs: the tables of packed sequences list all work once, in order, for any lengths."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.triton.compilation import SHARED_MEMORY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 64


def packed_plan(lengths, window, past):
    from nha.ops.triton.chunk.tiling import _make_packed_plan

    cu = torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=torch.int32, device=DEVICE)
    return _make_packed_plan(sum(lengths), past, window, SIZE, cu)


def expected(counts, size):
    """The entries of a table: (sequence, index), then spare programs."""
    entries = [(n, i) for n, count in enumerate(counts) for i in range(count)]
    assert len(entries) <= size
    return entries + [None] * (size - len(entries))


def entries_of(table):
    return [None if sequence < 0 else (sequence, index) for sequence, index in table.tolist()]


def assert_lists_all_work(plan, lengths, window, past):
    def cut(tokens, step=SIZE):
        return [-(-max(n, 0) // step) for n in tokens]

    lead = (past - window) % SIZE
    chunks = cut([n - (window - past) for n in lengths])
    blocks = [0 if n == 0 else c for n, c in zip(lengths, cut([n + lead for n in lengths]), strict=True)]
    assert entries_of(plan.block_table) == expected(blocks, plan.blocks)
    assert entries_of(plan.key_table) == expected(cut([n + past for n in lengths]), plan.key_blocks)
    assert plan.chunk_base.tolist() == [sum(chunks[:n]) for n in range(len(chunks))]
    assert sum(chunks) <= plan.chunks
    for table in (plan.block_table, plan.key_table):
        assert table.is_contiguous() and table.storage_offset() * 4 % 16 == 0


@pytest.mark.parametrize("lengths", [[150], [0], [0, 64, 65, 0, 1], [1] * 9, [300, 0, 0], [63, 128, 5]])
@pytest.mark.parametrize("window, past", [(0, 0), (64, 0), (64, 64), (5, 5), (512, 0)])
def test_tables_list_all_work_once_and_in_order(lengths, window, past):
    assert_lists_all_work(packed_plan(lengths, window, past), lengths, window, past)


@pytest.mark.parametrize("count, width", [(1, 16), (17, 16), (40, 16)])
@pytest.mark.parametrize("window, past", [(64, 0), (5, 5)])
def test_tables_of_random_lengths(count, width, window, past, monkeypatch):
    from nha.ops.triton.chunk import tiling

    monkeypatch.setattr(tiling, "TABLE_WIDTH", width)  # so that few sequences need several steps
    draw = random.Random(count)
    lengths = [draw.choice([0, 1, SIZE, draw.randrange(400), draw.randrange(3000)]) for _ in range(count)]
    assert_lists_all_work(packed_plan(lengths, window, past), lengths, window, past)


def test_tables_have_the_same_bits_on_every_run():
    first, second = (packed_plan([70, 0, 900, 3], 5, 0) for _ in range(2))
    for name in ("chunk_base", "block_table", "key_table"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_a_packed_plan_is_one_launch_for_any_lengths(monkeypatch):
    from nha.ops.triton.chunk import tiling

    launches, operators = [], set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operators.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    class Launches:
        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append(constants)

    monkeypatch.setattr(tiling, "nha_chunk_tables_kernel", Launches())
    boundaries = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 9], [0, 0, 5000])]
    with Recorder():
        for n, cu in enumerate(boundaries):
            tiling._make_packed_plan(9 if n == 0 else 5000, 0, 5, SIZE, cu)
    assert len(launches) == 2 and operators <= {"empty", "select", "slice"}
    assert launches[0] == launches[1]  # nothing is compiled again


@pytest.mark.parametrize(
    "batch, length, columns, scanned",
    [
        (1, 32768, 16, True),  # a long sequence
        (8, 4096, 16, True),
        (9, 4096, 16, False),  # enough programs without
        (1, 320, 16, True),
        (1, 256, 16, False),  # too short
    ],
)
def test_chunks_are_scanned_where_sequences_are_few(batch, length, columns, scanned):
    from nha.ops.triton.chunk.tiling import block_sizes, make_plan

    sizes = block_sizes(torch.bfloat16, dim=128, value_dim=128, slots=64, sinks=0)
    assert make_plan(batch, length, 0, 0, sizes, columns, None).scanned == scanned


@pytest.mark.parametrize(
    "capability, dtype, dim, chunk, block_h",
    [
        (90, torch.bfloat16, 128, 64, 1),
        (100, torch.bfloat16, 128, 64, 1),
        (80, torch.bfloat16, 128, 32, 2),  # which has room for more, but would spill
        (89, torch.bfloat16, 128, 32, 2),
        (120, torch.bfloat16, 64, 32, 2),
        (90, torch.bfloat16, 256, 64, 1),
        (89, torch.float16, 256, 16, 1),
        (90, torch.float32, 64, 32, 2),
        (120, torch.float32, 64, 32, 1),
        (89, torch.float32, 256, 16, 1),
    ],
)
def test_tiles_follow_the_shared_memory_of_the_device(capability, dtype, dim, chunk, block_h):
    from nha.ops.triton.chunk.tiling import block_sizes

    shared = SHARED_MEMORY[capability]
    sizes = block_sizes(dtype, dim=dim, value_dim=dim, slots=64, sinks=1, shared=shared)
    assert (sizes.chunk, sizes.block_h) == (chunk, block_h)
    assert shared == 227 << 10 or (sizes.dkv_stages, sizes.dstate_stages) == (1, 1)


def test_the_tiles_of_a_small_gpu_do_not_depend_on_the_window():
    from nha.ops.triton.chunk.tiling import block_sizes

    options = {"dim": 64, "value_dim": 64, "slots": 64, "sinks": 0, "shared": SHARED_MEMORY[120], "groups": 8}
    assert block_sizes(torch.bfloat16, window=64, **options) == block_sizes(torch.bfloat16, window=4096, **options)
