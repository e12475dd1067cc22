"""The tables of packed rows: which piece of which sequence every program takes, found on the device in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import chunks_in

# What is counted: the programs that the two tables name, in their order, and chunks of tokens that enter the slots.
BLOCKS = tl.constexpr(0)
KEY_BLOCKS = tl.constexpr(1)
CHUNKS = tl.constexpr(2)
KINDS = 3


@triton.jit
def pieces(count, kind, past, offset, lead, CHUNK: tl.constexpr):
    """Pieces of sequences with `count` tokens; an empty one has no block, and no key but the past."""
    chunks = chunks_in(count, offset, CHUNK)
    blocks = tl.where(count > 0, count + lead + CHUNK - 1, 0) // CHUNK
    key_blocks = (count + past + CHUNK - 1) // CHUNK
    return tl.where(kind == CHUNKS, chunks, tl.where(kind == BLOCKS, blocks, key_blocks))


@triton.jit(do_not_specialize=["sequences", "size", "past", "offset", "lead"])
def tables_kernel(
    cu,
    chunk_base,
    tables,
    sequences,
    size,
    past,
    offset,
    lead,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(sequence, index) of every program -> tables [2, size, 2], with sequence -1 for spare ones at the end; the
    number of chunks before every sequence -> chunk_base [sequences].

    A sequence's first `offset` tokens do not enter the slots; `lead` is what its first block lacks of a chunk.
    Programs: (sequence, kind of pieces), and one more per kind for what is spare.
    """
    sequence = tl.program_id(0)
    kind = tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    # Every program counts all pieces before its own: reading the boundaries again is cheaper than a second launch.
    before = tl.zeros([WIDTH], tl.int32)
    for first in range(0, sequence, WIDTH):
        other = first + lane
        inside = other < sequence
        begin = tl.load(cu + other, mask=inside, other=0)
        count = tl.load(cu + other + 1, mask=inside, other=0) - begin
        before += tl.where(inside, pieces(count, kind, past, offset, lead, CHUNK), 0)
    start = tl.sum(before, 0)
    if kind == CHUNKS:
        tl.store(chunk_base + sequence, start.to(tl.int64), mask=sequence < sequences)
        return
    here = sequence < sequences
    begin = tl.load(cu + sequence)
    count = tl.load(cu + sequence + 1, mask=here, other=0) - begin
    own = tl.where(here, pieces(count, kind, past, offset, lead, CHUNK), size - start)
    named = tl.where(here, sequence, -1)
    for first in range(0, own, WIDTH):
        index = first + lane
        place = start + index
        inside = (index < own) & (place < size)
        pair = tables + (kind * size + place) * 2
        tl.store(pair, named, mask=inside)
        tl.store(pair + 1, index, mask=inside)
