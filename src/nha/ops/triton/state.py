"""Slots at the borders of chunks: one pass over the tokens forwards, one over the gradients backwards.

Both run over columns of the slots independently. A long sequence is cut into segments: a first launch finds what
each segment adds and lets decay, a second one starts every segment from the sum of those before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import (
    LOG2_E,
    bounds,
    far,
    left_at_end,
    load_gates,
    locate,
    matmul,
    taken,
)


@triton.jit
def slots_at(base, column, dim, M: tl.constexpr, SLOTS: tl.constexpr):
    """Addresses and mask of some columns of contiguous slots [M, dim]."""
    slot = tl.arange(0, SLOTS)
    inside = (slot < M)[:, None] & (column < dim)[None, :]
    return base + slot[:, None] * dim + column[None, :], inside


@triton.jit
def fold(slots, added, decay, first, count, step, head, heads, size, column, dim, M: tl.constexpr, SLOTS: tl.constexpr):
    """Slots after `count` segments, from number `first` on in steps of `step`, each decaying and adding its share."""
    slot = tl.arange(0, SLOTS)
    for index in range(0, count):
        place = (first.to(tl.int64) + index * step) * heads + head
        kept = tl.exp2(tl.load(decay + place * M + slot, mask=slot < M, other=0.0) * LOG2_E)
        where, inside = slots_at(added + place * size, column, dim, M, SLOTS)
        slots = slots * kept[:, None] + tl.load(where, mask=inside, other=0.0)
    return slots


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "segments", "segment_chunks"])
def states_kernel(
    k_slot, v, log_gate, start_key, start_value, added_key, added_value, added_decay, out_key, out_value, out_decay,
    last_key, last_value, cu, chunk_base, table,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    length, past, window, chunks, segments, segment_chunks, heads,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, STARTED: tl.constexpr, ADDING: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Slots before every chunk -> out [chunks, H, M, ...] and the chunk's summed log-gates -> out_decay [chunks, H, M];
    slots after the sequence -> last [N, H, M, ...].

    ADDING: only find what the segment adds to slots of zero (`added`) and its log decay. FOLDED: fold those of
    earlier segments into the start. Programs: (segment, head, columns of the key and then of the value).
    """
    program = tl.program_id(0)
    head = tl.program_id(1)
    block = tl.program_id(2)
    sequence, index = locate(program, table, segments, PACKED)
    if sequence < 0:
        return
    row, _, first_key, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    total = tl.maximum(count + past - window, 0)
    key_blocks: tl.constexpr = (D + WIDTH - 1) // WIDTH
    is_key = block < key_blocks
    dim = tl.where(is_key, D, DV)
    if is_key:
        tokens = k_slot + row * k_b + far(head, k_h)
        stride = k_t
        start, added, out, last, first_column = start_key, added_key, out_key, last_key, block * WIDTH
    else:
        tokens = v + row * v_b + far(head, v_h)
        stride = v_t
        start, added, out, last = start_value, added_value, out_value, last_value
        first_column = (block - key_blocks) * WIDTH
    gate_at = log_gate + row * g_b + far(head, g_h)
    column = first_column + tl.arange(0, WIDTH)
    slot = tl.arange(0, SLOTS)
    line = tl.arange(0, CHUNK)
    size = M * dim
    slots = tl.zeros([SLOTS, WIDTH], tl.float32)
    # Addresses have a name per tensor: a name that a loop reassigns must keep its type, and dtypes may differ.
    if STARTED and not ADDING:
        start_at, inside = slots_at(start + (sequence.to(tl.int64) * heads + head) * size, column, dim, M, SLOTS)
        slots = tl.load(start_at, mask=inside, other=0.0).to(tl.float32)
    if FOLDED:
        slots = fold(
            slots, added, added_decay, program - index, index, 1, head, heads, size, column, dim, M, SLOTS
        )  # fmt: skip
    log_decay = tl.zeros([SLOTS], tl.float32)
    all_chunks = (total + CHUNK - 1) // CHUNK
    stop = tl.minimum((index + 1) * segment_chunks, all_chunks)
    for chunk in range(index * segment_chunks, stop):
        token = chunk * CHUNK + line
        gate = load_gates(gate_at + (first_key + chunk * CHUNK) * g_t, line * g_t, token < total, M, SLOTS)
        there = (token < total)[:, None] & (column < dim)[None, :]
        here = tokens + (first_key + chunk * CHUNK) * stride
        x = tl.load(here + line[:, None] * stride + column[None, :], mask=there, other=0.0)
        decays = tl.sum(gate.to(tl.float32), 0)
        if not ADDING:
            place = (base + chunk) * heads + head
            out_at, inside = slots_at(out + place * size, column, dim, M, SLOTS)
            tl.store(out_at, slots.to(out.dtype.element_ty), mask=inside)
            if block == 0:
                tl.store(out_decay + place * M + slot, decays, mask=slot < M)
        weight = taken(gate, DTYPE) * left_at_end(gate, CHUNK)
        slots = slots * tl.exp2(decays * LOG2_E)[:, None] + matmul(tl.trans(weight), x, DTYPE, PRECISION)
        log_decay += decays
    if ADDING:
        place = program.to(tl.int64) * heads + head
        to, inside = slots_at(added + place * size, column, dim, M, SLOTS)
        tl.store(to, slots, mask=inside)
        if block == 0:
            tl.store(added_decay + place * M + slot, log_decay, mask=slot < M)
    elif (index + 1) * segment_chunks >= all_chunks:
        to, inside = slots_at(last + (sequence.to(tl.int64) * heads + head) * size, column, dim, M, SLOTS)
        tl.store(to, slots, mask=inside)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "segments", "segment_chunks"])
def reverse_kernel(
    chunk_decay, slot_key, slot_value, last_key, last_value, added_key, added_value, added_decay,
    read_key, read_value, first_key, first_value, dend, cu, chunk_base, table,
    length, past, window, chunks, segments, segment_chunks, heads,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr, PACKED: tl.constexpr, ADDING: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Gradients of the slots, from the end: `read` [chunks, H, M, ...] holds what reading the slots before a chunk
    gives and is replaced by the gradient of the slots after it; that before the sequence goes to `first`.

    `last` is the gradient of the slots after the sequence. dend [chunks, H, blocks of columns, M] is the inner product
    of the slots before a chunk, decayed to its end, with the gradient there. Programs and segments as in
    `states_kernel`.
    """
    program = tl.program_id(0)
    head = tl.program_id(1)
    block = tl.program_id(2)
    sequence, index = locate(program, table, segments, PACKED)
    if sequence < 0:
        return
    _, _, _, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    total = tl.maximum(count + past - window, 0)
    key_blocks: tl.constexpr = (D + WIDTH - 1) // WIDTH
    is_key = block < key_blocks
    dim = tl.where(is_key, D, DV)
    if is_key:
        last, added, read, first, first_column = last_key, added_key, read_key, first_key, block * WIDTH
        held = slot_key
    else:
        last, added, read, first, held = last_value, added_value, read_value, first_value, slot_value
        first_column = (block - key_blocks) * WIDTH
    column = first_column + tl.arange(0, WIDTH)
    slot = tl.arange(0, SLOTS)
    size = M * dim
    all_chunks = (total + CHUNK - 1) // CHUNK
    count_segments = tl.maximum((all_chunks + segment_chunks - 1) // segment_chunks, 1)
    if index >= count_segments:
        return
    slots = tl.zeros([SLOTS, WIDTH], tl.float32)
    if not ADDING:
        last_at, inside = slots_at(last + (sequence.to(tl.int64) * heads + head) * size, column, dim, M, SLOTS)
        slots = tl.load(last_at, mask=inside, other=0.0).to(tl.float32)
    if FOLDED:
        final = program - index + count_segments - 1
        slots = fold(
            slots, added, added_decay, final, count_segments - 1 - index, -1, head, heads, size, column, dim, M, SLOTS
        )  # fmt: skip
    begin = index * segment_chunks
    stop = tl.minimum(begin + segment_chunks, all_chunks)
    log_decay = tl.zeros([SLOTS], tl.float32)
    for back in range(0, stop - begin):
        place = (base + stop - 1 - back) * heads + head
        here_at, inside = slots_at(read + place * size, column, dim, M, SLOTS)
        here = tl.load(here_at, mask=inside, other=0.0).to(tl.float32)
        decays = tl.load(chunk_decay + place * M + slot, mask=slot < M, other=0.0)
        if not ADDING:
            tl.store(here_at, slots.to(read.dtype.element_ty), mask=inside)
            held_at, inside = slots_at(held + place * size, column, dim, M, SLOTS)
            before = tl.load(held_at, mask=inside, other=0.0).to(tl.float32)
            end = tl.sum(before * slots, 1) * tl.exp2(decays * LOG2_E)
            tl.store(dend + (place * tl.num_programs(2) + block) * M + slot, end, mask=slot < M)
        slots = slots * tl.exp2(decays * LOG2_E)[:, None] + here
        log_decay += decays
    if ADDING:
        place = program.to(tl.int64) * heads + head
        to, inside = slots_at(added + place * size, column, dim, M, SLOTS)
        tl.store(to, slots, mask=inside)
        if block == 0:
            tl.store(added_decay + place * M + slot, log_decay, mask=slot < M)
    elif index == 0:
        to, inside = slots_at(first + (sequence.to(tl.int64) * heads + head) * size, column, dim, M, SLOTS)
        tl.store(to, slots, mask=inside)
