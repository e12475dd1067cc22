"""Slots at the borders of chunks: one pass over the tokens forwards, one over the gradients backwards.

Both run over columns of the slots independently. A long sequence is cut into segments: a first launch finds what
each segment adds and lets decay, a second one starts every segment from the sum of those before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.common import after_token, bounds, clamp_gate, load_tokens, locate, matmul, taken


@triton.jit
def _slots_at(base, column, dim, M: tl.constexpr, SLOTS: tl.constexpr):
    """Addresses and mask of some columns of contiguous slots [M, dim]."""
    slot = tl.arange(0, SLOTS)
    inside = (slot < M)[:, None] & (column < dim)[None, :]
    return base + slot[:, None] * dim + column[None, :], inside


@triton.jit(do_not_specialize=["length", "past", "chunks", "segments", "segment_chunks"])
def states_kernel(
    k_slot, v, log_gate, start_key, start_value, added_key, added_value, decay, out_key, out_value,
    last_key, last_value, cu, chunk_base, table,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    length, past, window, chunks, segments, segment_chunks, heads,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, STARTED: tl.constexpr, ADDING: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Slots before every chunk -> out [chunks, H, M, ...]; slots after the sequence -> last [N, H, M, ...].

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
        tokens = k_slot + row * k_b + first_key * k_t + head * k_h
        stride = k_t
        start, added, out, last, first_column = start_key, added_key, out_key, last_key, block * WIDTH
    else:
        tokens = v + row * v_b + first_key * v_t + head * v_h
        stride = v_t
        start, added, out, last = start_value, added_value, out_value, last_value
        first_column = (block - key_blocks) * WIDTH
    gates = log_gate + row * g_b + first_key * g_t + head * g_h
    column = first_column + tl.arange(0, WIDTH)
    slot = tl.arange(0, SLOTS)
    size = M * dim
    slots = tl.zeros([SLOTS, WIDTH], tl.float32)
    # Addresses have a name per tensor: a name that a loop reassigns must keep its type, and dtypes may differ.
    if STARTED and not ADDING:
        start_at, inside = _slots_at(start + (sequence.to(tl.int64) * heads + head) * size, column, dim, M, SLOTS)
        slots = tl.load(start_at, mask=inside, other=0.0).to(tl.float32)
    if FOLDED:
        for earlier in range(program - index, program):
            place = earlier * heads + head.to(tl.int64)
            kept = tl.exp(tl.load(decay + place * M + slot, mask=slot < M, other=0.0))
            added_at, inside = _slots_at(added + place * size, column, dim, M, SLOTS)
            slots = slots * kept[:, None] + tl.load(added_at, mask=inside, other=0.0)
    log_decay = tl.zeros([SLOTS], tl.float32)
    all_chunks = (total + CHUNK - 1) // CHUNK
    stop = tl.minimum((index + 1) * segment_chunks, all_chunks)
    for chunk in range(index * segment_chunks, stop):
        if not ADDING:
            out_at, inside = _slots_at(out + ((base + chunk) * heads + head) * size, column, dim, M, SLOTS)
            tl.store(out_at, slots.to(out.dtype.element_ty), mask=inside)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        gate = clamp_gate(load_tokens(gates, g_t, token, 0, total, M, SLOTS))
        weight = taken(gate) * tl.exp(after_token(gate))
        decays = tl.sum(gate, 0)
        there = (token < total)[:, None] & (column < dim)[None, :]
        x = tl.load(tokens + token.to(tl.int64)[:, None] * stride + column[None, :], mask=there, other=0.0)
        slots = slots * tl.exp(decays)[:, None] + matmul(tl.trans(weight), x, DTYPE, PRECISION)
        log_decay += decays
    if ADDING:
        place = program.to(tl.int64) * heads + head
        to, inside = _slots_at(added + place * size, column, dim, M, SLOTS)
        tl.store(to, slots, mask=inside)
        if block == 0:
            tl.store(decay + place * M + slot, log_decay, mask=slot < M)
    elif (index + 1) * segment_chunks >= all_chunks:
        to, inside = _slots_at(last + (sequence.to(tl.int64) * heads + head) * size, column, dim, M, SLOTS)
        tl.store(to, slots, mask=inside)


@triton.jit(do_not_specialize=["length", "past", "chunks", "segments", "segment_chunks"])
def reverse_kernel(
    log_gate, last_key, last_value, added_key, added_value, decay, read_key, read_value, first_key, first_value,
    cu, chunk_base, table, g_b, g_t, g_h,
    length, past, window, chunks, segments, segment_chunks, heads,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr, PACKED: tl.constexpr, ADDING: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Gradients of the slots, from the end: `read` [chunks, H, M, ...] holds what reading the slots before a chunk
    gives and is replaced by the gradient of the slots after it; that before the sequence goes to `first`.

    `last` is the gradient of the slots after the sequence. Programs and segments as in `states_kernel`.
    """
    program = tl.program_id(0)
    head = tl.program_id(1)
    block = tl.program_id(2)
    sequence, index = locate(program, table, segments, PACKED)
    if sequence < 0:
        return
    row, _, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    total = tl.maximum(count + past - window, 0)
    key_blocks: tl.constexpr = (D + WIDTH - 1) // WIDTH
    is_key = block < key_blocks
    dim = tl.where(is_key, D, DV)
    if is_key:
        last, added, read, first, first_column = last_key, added_key, read_key, first_key, block * WIDTH
    else:
        last, added, read, first = last_value, added_value, read_value, first_value
        first_column = (block - key_blocks) * WIDTH
    gates = log_gate + row * g_b + key_start * g_t + head * g_h
    column = first_column + tl.arange(0, WIDTH)
    slot = tl.arange(0, SLOTS)
    size = M * dim
    all_chunks = (total + CHUNK - 1) // CHUNK
    count_segments = tl.maximum((all_chunks + segment_chunks - 1) // segment_chunks, 1)
    if index >= count_segments:
        return
    slots = tl.zeros([SLOTS, WIDTH], tl.float32)
    if not ADDING:
        last_at, inside = _slots_at(last + (sequence.to(tl.int64) * heads + head) * size, column, dim, M, SLOTS)
        slots = tl.load(last_at, mask=inside, other=0.0).to(tl.float32)
    if FOLDED:
        final = program - index + count_segments - 1
        for back in range(0, count_segments - 1 - index):
            place = (final - back) * heads + head.to(tl.int64)
            kept = tl.exp(tl.load(decay + place * M + slot, mask=slot < M, other=0.0))
            added_at, inside = _slots_at(added + place * size, column, dim, M, SLOTS)
            slots = slots * kept[:, None] + tl.load(added_at, mask=inside, other=0.0)
    begin = index * segment_chunks
    stop = tl.minimum(begin + segment_chunks, all_chunks)
    log_decay = tl.zeros([SLOTS], tl.float32)
    for back in range(0, stop - begin):
        chunk = stop - 1 - back
        here_at, inside = _slots_at(read + ((base + chunk) * heads + head) * size, column, dim, M, SLOTS)
        here = tl.load(here_at, mask=inside, other=0.0).to(tl.float32)
        if not ADDING:
            tl.store(here_at, slots.to(read.dtype.element_ty), mask=inside)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        decays = tl.sum(clamp_gate(load_tokens(gates, g_t, token, 0, total, M, SLOTS)), 0)
        slots = slots * tl.exp(decays)[:, None] + here
        log_decay += decays
    if ADDING:
        place = program.to(tl.int64) * heads + head
        to, inside = _slots_at(added + place * size, column, dim, M, SLOTS)
        tl.store(to, slots, mask=inside)
        if block == 0:
            tl.store(decay + place * M + slot, log_decay, mask=slot < M)
    elif index == 0:
        to, inside = _slots_at(first + (sequence.to(tl.int64) * heads + head) * size, column, dim, M, SLOTS)
        tl.store(to, slots, mask=inside)
