"""Slots at the borders of chunks: one pass over the tokens forwards, one over the gradients backwards.

Both run over columns of the slots independently. Many sequences are read one after the other, each by programs that
hold its slots (`states_kernel`). Few would leave the GPU idle: there every chunk finds by itself what it adds
(`shares_kernel`), and a scan adds that up (`scan_kernel`), as the pass backwards always does (`reverse_kernel`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import (
    LOG2_E,
    bounds,
    chunk_of,
    chunks_in,
    far,
    left_at_end,
    load_gates,
    load_rows,
    locate,
    matmul,
    store_slots,
    taken,
)


@triton.jit
def slots_at(base, slot, column, dim, M: tl.constexpr):
    """Addresses and mask of some rows and columns of contiguous slots [M, dim]."""
    inside = (slot < M)[:, None] & (column < dim)[None, :]
    return base + slot[:, None] * dim + column[None, :], inside


@triton.jit
def tile_of(program, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(slots, whether of keys, columns, number of the columns' block) of a scan's program, for slots of M and a key's D
    and then a value's DV columns in tiles of [ROWS, WIDTH]."""
    down: tl.constexpr = (M + ROWS - 1) // ROWS
    key_blocks: tl.constexpr = (D + WIDTH - 1) // WIDTH
    block = program // down
    is_key = block < key_blocks
    column = (block - tl.where(is_key, 0, key_blocks)) * WIDTH + tl.arange(0, WIDTH)
    return program % down * ROWS + tl.arange(0, ROWS), is_key, column, block


@triton.jit(do_not_specialize=["length", "past", "window", "chunks"])
def states_kernel(
    k_slot,
    v,
    log_gate,
    start_key,
    start_value,
    out_key,
    out_value,
    out_decay,
    last_key,
    last_value,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    g_b,
    g_t,
    g_h,
    length,
    past,
    window,
    chunks,
    heads,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Slots before every chunk -> out [N, chunks, H, M, ...] and the chunk's summed log-gates -> out_decay [N, chunks,
    H, M]; slots after the sequence -> last [N, H, M, ...]. Programs: (sequence, head, columns of keys and then values).
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    block = tl.program_id(2)
    row, _, _, count, base = bounds(sequence, None, None, length, past, chunks, False)
    total = tl.maximum(count + past - window, 0)
    key_blocks: tl.constexpr = (D + WIDTH - 1) // WIDTH
    is_key = block < key_blocks
    dim = tl.where(is_key, D, DV)
    if is_key:
        tokens = k_slot + row * k_b + far(head, k_h)
        stride = k_t
        start, out, last, first_column = start_key, out_key, last_key, block * WIDTH
    else:
        tokens = v + row * v_b + far(head, v_h)
        stride = v_t
        start, out, last, first_column = start_value, out_value, last_value, (block - key_blocks) * WIDTH
    gate_at = log_gate + row * g_b + far(head, g_h)
    column = first_column + tl.arange(0, WIDTH)
    slot = tl.arange(0, SLOTS)
    line = tl.arange(0, CHUNK)
    size = M * dim
    slots = tl.zeros([SLOTS, WIDTH], tl.float32)
    # Addresses have a name per tensor: a name that a loop reassigns must keep its type, and dtypes may differ.
    if STARTED:
        start_at, inside = slots_at(start + (row * heads + head) * size, slot, column, dim, M)
        slots = tl.load(start_at, mask=inside, other=0.0).to(tl.float32)
    for chunk in range(0, (total + CHUNK - 1) // CHUNK):
        first = tl.cast(chunk * CHUNK, tl.int64)
        there = chunk * CHUNK + line < total
        gate = load_gates(gate_at + first * g_t, line * g_t, there, M, SLOTS)
        at = tokens + first * stride + line[:, None] * stride + column[None, :]
        x = tl.load(at, mask=there[:, None] & (column < dim)[None, :], other=0.0)
        decays = tl.sum(gate.to(tl.float32), 0)
        place = (base + chunk) * heads + head
        out_at, inside = slots_at(out + place * size, slot, column, dim, M)
        tl.store(out_at, slots.to(out.dtype.element_ty), mask=inside)
        if block == 0:
            tl.store(out_decay + place * M + slot, decays, mask=slot < M)
        weight = taken(gate, DTYPE) * left_at_end(gate, CHUNK)
        slots = slots * tl.exp2(decays * LOG2_E)[:, None] + matmul(tl.trans(weight), x, DTYPE, PRECISION)
    to, inside = slots_at(last + (row * heads + head) * size, slot, column, dim, M)
    tl.store(to, slots, mask=inside)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks"])
def shares_kernel(
    k_slot,
    v,
    log_gate,
    out_key,
    out_value,
    out_decay,
    cu,
    chunk_base,
    table,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    g_b,
    g_t,
    g_h,
    length,
    past,
    window,
    chunks,
    blocks,
    heads,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SLOTS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What every chunk adds to the slots -> out, its summed log-gates -> out_decay. Programs: (block of queries, which
    commits the tokens of one chunk; head)."""
    sequence, block = locate(tl.program_id(0), table, blocks, PACKED)
    if sequence < 0:
        return
    head = tl.program_id(1)
    row, _, key_start, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    offset = window - past
    chunk = chunk_of(block, offset, CHUNK)
    u0 = chunk * CHUNK
    committed = count - offset - u0
    if (chunk < 0) | (committed <= 0):
        return
    line, slot = tl.arange(0, CHUNK), tl.arange(0, SLOTS)
    there = line < committed
    token0, place = key_start + u0, (base + chunk) * heads + head
    gate = load_gates(log_gate + row * g_b + token0 * g_t + far(head, g_h), line * g_t, there, M, SLOTS)
    decays = tl.sum(gate.to(tl.float32), 0)
    tl.store(out_decay + place * M + slot, decays, mask=slot < M)
    weight = tl.trans((taken(gate, DTYPE) * left_at_end(gate, CHUNK)).to(DTYPE))
    keys = load_rows(k_slot + row * k_b + token0 * k_t + far(head, k_h), line * k_t, there, D, KEY)
    store_slots(out_key + place * M * D, matmul(weight, keys, DTYPE, PRECISION), M, SLOTS, D, KEY)
    values = load_rows(v + row * v_b + token0 * v_t + far(head, v_h), line * v_t, there, DV, VALUE)
    store_slots(out_value + place * M * DV, matmul(weight, values, DTYPE, PRECISION), M, SLOTS, DV, VALUE)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks"])
def scan_kernel(
    out_key,
    out_value,
    decay,
    start_key,
    start_value,
    last_key,
    last_value,
    cu,
    chunk_base,
    length,
    past,
    window,
    chunks,
    heads,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PACKED: tl.constexpr,
    STARTED: tl.constexpr,
):
    """Replaces what every chunk adds to the slots (out) by the slots before it; those after the sequence -> last.
    Zeros fill chunks that no packed sequence has. Programs: (sequence, head, tile)."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    _, _, _, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    offset = window - past
    slot, is_key, column, block = tile_of(tl.program_id(2), M, D, DV, ROWS, WIDTH)
    dim = tl.where(is_key, D, DV)
    if is_key:
        start, out, last = start_key, out_key, last_key
    else:
        start, out, last = start_value, out_value, last_value
    size = M * dim
    whole = (sequence.to(tl.int64) * heads + head) * size
    slots = tl.zeros([ROWS, WIDTH], tl.float32)
    if STARTED:
        start_at, inside = slots_at(start + whole, slot, column, dim, M)
        slots = tl.load(start_at, mask=inside, other=0.0).to(tl.float32)
    for chunk in tl.range(0, chunks_in(count, offset, CHUNK), num_stages=STAGES):
        place = (base + chunk) * heads + head
        at, inside = slots_at(out + place * size, slot, column, dim, M)
        added = tl.load(at, mask=inside, other=0.0)
        decays = tl.load(decay + place * M + slot, mask=slot < M, other=0.0)
        before = slots
        slots = slots * tl.exp2(decays * LOG2_E)[:, None] + added.to(tl.float32)
        tl.store(at, before.to(out.dtype.element_ty), mask=inside)  # after the load of this place, which is ahead
    last_at, inside = slots_at(last + whole, slot, column, dim, M)
    tl.store(last_at, slots, mask=inside)
    if PACKED:
        sequences = tl.num_programs(0)
        _, _, _, count, base = bounds(sequences - 1, cu, chunk_base, length, past, chunks, PACKED)
        for spare in range(base + chunks_in(count, offset, CHUNK) + sequence, chunks, sequences):
            at, inside = slots_at(out + (spare * heads + head) * size, slot, column, dim, M)
            tl.store(at, tl.zeros([ROWS, WIDTH], out.dtype.element_ty), mask=inside)
            to = decay + (spare * heads + head) * M + slot
            tl.store(to, tl.zeros([ROWS], tl.float32), mask=(slot < M) & (block == 0))


@triton.jit(do_not_specialize=["length", "past", "window", "chunks"])
def reverse_kernel(
    decay,
    slot_key,
    slot_value,
    last_key,
    last_value,
    read_key,
    read_value,
    first_key,
    first_value,
    dend,
    cu,
    chunk_base,
    length,
    past,
    window,
    chunks,
    heads,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gradients of the slots, from the end: `read` [chunks, H, M, ...] holds what reading the slots before a chunk
    gives and is replaced by the gradient of the slots after it; that before the sequence goes to `first`.

    `last` is the gradient of the slots after the sequence. dend [chunks, H, blocks of columns, M] is the inner product
    of the slots before a chunk, decayed to its end, with the gradient there. Programs as in `scan_kernel`.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    _, _, _, count, base = bounds(sequence, cu, chunk_base, length, past, chunks, PACKED)
    slot, is_key, column, block = tile_of(tl.program_id(2), M, D, DV, ROWS, WIDTH)
    blocks: tl.constexpr = (D + WIDTH - 1) // WIDTH + (DV + WIDTH - 1) // WIDTH
    dim = tl.where(is_key, D, DV)
    if is_key:
        last, read, first, held = last_key, read_key, first_key, slot_key
    else:
        last, read, first, held = last_value, read_value, first_value, slot_value
    size = M * dim
    whole = (sequence.to(tl.int64) * heads + head) * size
    last_at, inside = slots_at(last + whole, slot, column, dim, M)
    slots = tl.load(last_at, mask=inside, other=0.0).to(tl.float32)
    all_chunks = chunks_in(count, window - past, CHUNK)
    for back in tl.range(0, all_chunks, num_stages=STAGES):
        place = (base + all_chunks - 1 - back) * heads + head
        at, inside = slots_at(read + place * size, slot, column, dim, M)
        held_at, inside = slots_at(held + place * size, slot, column, dim, M)
        given = tl.load(at, mask=inside, other=0.0)
        before = tl.load(held_at, mask=inside, other=0.0).to(tl.float32)
        kept = tl.exp2(tl.load(decay + place * M + slot, mask=slot < M, other=0.0) * LOG2_E)
        after = slots
        slots = slots * kept[:, None] + given.to(tl.float32)
        tl.store(at, after.to(read.dtype.element_ty), mask=inside)  # after the load of this place, which is ahead
        tl.store(dend + (place * blocks + block) * M + slot, tl.sum(before * after, 1) * kept, mask=slot < M)
    first_at, inside = slots_at(first + whole, slot, column, dim, M)
    tl.store(first_at, slots, mask=inside)
