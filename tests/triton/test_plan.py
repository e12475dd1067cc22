"""The tables of packed rows name every piece of work once, in order, whatever the lengths."""

import pytest
import torch


def pieces(counts, size):
    """What a table has to hold: (sequence, index), then spare programs."""
    named = [(n, i) for n, count in enumerate(counts) for i in range(count)]
    assert len(named) <= size
    return named + [None] * (size - len(named))


def listed(table):
    return [None if sequence < 0 else (sequence, index) for sequence, index in table.tolist()]


@pytest.mark.parametrize("lengths", [[150], [0, 64, 65, 0, 1], [1] * 9, [300, 0, 0], [63, 128, 5]])
@pytest.mark.parametrize("window, past", [(0, 0), (64, 0), (64, 64), (5, 5), (512, 0)])
def test_tables_name_all_work_once_and_in_order(lengths, window, past):
    from nha.ops.triton.plan import _make_packed_plan

    size, columns = 64, 6
    cu = torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=torch.int32)
    plan = _make_packed_plan(sum(lengths), past, window, size, columns, cu)

    def cut(tokens, step=size):
        return [-(-max(n, 0) // step) for n in tokens]

    lead = (past - window) % size
    chunks = cut([n - (window - past) for n in lengths])
    blocks = [0 if n == 0 else c for n, c in zip(lengths, cut([n + lead for n in lengths]), strict=True)]
    segments = [max(c, 1) for c in cut(chunks, plan.segment_chunks)]
    assert listed(plan.block_table) == pieces(blocks, plan.blocks)
    assert listed(plan.segment_table) == pieces(segments, plan.segments)
    assert listed(plan.key_table) == pieces(cut([n + past for n in lengths]), plan.key_blocks)
    assert plan.chunk_base.tolist() == [sum(chunks[:n]) for n in range(len(chunks))]
    assert sum(chunks) <= plan.chunks
    for table in (plan.block_table, plan.segment_table, plan.key_table):
        assert table.is_contiguous() and table.storage_offset() * 4 % 16 == 0
