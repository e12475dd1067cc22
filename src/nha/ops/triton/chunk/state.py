"""Slots at the boundaries of chunks: one pass over the tokens forwards, one over the gradients backwards.

Both process columns of the slots independently. Many sequences are read serially, each by programs that hold its slots
(`nha_chunk_state_kernel_serial`). Few would leave the GPU idle: there every chunk computes its own contribution
(`nha_chunk_state_kernel_local`) and a scan adds the contributions up (`nha_chunk_state_kernel_scan`), as the backward
pass always does (`nha_chunk_state_kernel_bwd`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.primitives import (
    LOG2_E,
    chunk_of_block,
    decay_to_end,
    load_gates,
    load_rows,
    locate_program,
    matmul,
    num_chunks,
    offset_i64,
    one_minus_exp,
    sequence_bounds,
    store_slots,
)


@triton.jit
def slot_pointers(p_slots, o_m, o_d, dim, M: tl.constexpr):
    """Pointers to, and mask of, some rows and columns of contiguous slots [M, dim]."""
    mask = (o_m < M)[:, None] & (o_d < dim)[None, :]
    return p_slots + o_m[:, None] * dim + o_d[None, :], mask


@triton.jit
def scan_tile(i_tile, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(slots, whether of keys, columns, index of the column block) of a scan's program.

    The tiles [ROWS, WIDTH] cover M slots of D columns of keys, then of DV columns of values.
    """
    TILES_DOWN: tl.constexpr = (M + ROWS - 1) // ROWS
    KEY_BLOCKS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    i_column = i_tile // TILES_DOWN
    is_key = i_column < KEY_BLOCKS
    o_d = (i_column - tl.where(is_key, 0, KEY_BLOCKS)) * WIDTH + tl.arange(0, WIDTH)
    return i_tile % TILES_DOWN * ROWS + tl.arange(0, ROWS), is_key, o_d, i_column


@triton.jit(do_not_specialize=["length", "past", "window", "chunks"])
def nha_chunk_state_kernel_serial(
    p_k_slot,
    p_v,
    p_gate,
    p_initial_k,
    p_initial_v,
    p_slot_k,
    p_slot_v,
    p_decay,
    p_final_k,
    p_final_v,
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
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
):
    """Slots before every chunk -> slot_* [N, chunks, H, M, ...]; each chunk's summed log-gates -> decay [N, chunks, H,
    M]; slots after the sequence -> final_* [N, H, M, ...]. Programs: (sequence, head, columns of keys, then of values).
    """
    i_n = tl.program_id(0)
    i_h = tl.program_id(1)
    i_column = tl.program_id(2)
    i_b, _, _, seqlen, chunk_base = sequence_bounds(i_n, None, None, length, past, chunks, False)
    written = tl.maximum(seqlen + past - window, 0)
    KEY_BLOCKS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    is_key = i_column < KEY_BLOCKS
    dim = tl.where(is_key, D, DV)
    if is_key:
        p_x = p_k_slot + i_b * k_b + offset_i64(i_h, k_h)
        x_t = k_t
        p_initial, p_slots, p_final, column0 = p_initial_k, p_slot_k, p_final_k, i_column * WIDTH
    else:
        p_x = p_v + i_b * v_b + offset_i64(i_h, v_h)
        x_t = v_t
        p_initial, p_slots, p_final, column0 = p_initial_v, p_slot_v, p_final_v, (i_column - KEY_BLOCKS) * WIDTH
    p_gate = p_gate + i_b * g_b + offset_i64(i_h, g_h)
    o_d = column0 + tl.arange(0, WIDTH)
    o_m = tl.arange(0, BLOCK_M)
    o_t = tl.arange(0, CHUNK)
    size = M * dim
    b_slots = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    # Pointers have a name per tensor: a name that a loop reassigns must keep its type, and dtypes may differ.
    if HAS_INITIAL_STATE:
        p_start, mask = slot_pointers(p_initial + (i_b * heads + i_h) * size, o_m, o_d, dim, M)
        b_slots = tl.load(p_start, mask=mask, other=0.0).to(tl.float32)
    for i_chunk in range(0, (written + CHUNK - 1) // CHUNK):
        token0 = tl.cast(i_chunk * CHUNK, tl.int64)
        m_t = i_chunk * CHUNK + o_t < written
        b_gate = load_gates(p_gate + token0 * g_t, o_t * g_t, m_t, M, BLOCK_M)
        p_row = p_x + token0 * x_t + o_t[:, None] * x_t + o_d[None, :]
        b_x = tl.load(p_row, mask=m_t[:, None] & (o_d < dim)[None, :], other=0.0)
        b_decay = tl.sum(b_gate.to(tl.float32), 0)
        i_state = (chunk_base + i_chunk) * heads + i_h
        p_chunk, mask = slot_pointers(p_slots + i_state * size, o_m, o_d, dim, M)
        tl.store(p_chunk, b_slots.to(p_slots.dtype.element_ty), mask=mask)
        if i_column == 0:
            tl.store(p_decay + i_state * M + o_m, b_decay, mask=o_m < M)
        b_weight = one_minus_exp(b_gate, DTYPE) * decay_to_end(b_gate, CHUNK)
        b_slots = b_slots * tl.exp2(b_decay * LOG2_E)[:, None] + matmul(tl.trans(b_weight), b_x, DTYPE, PRECISION)
    p_end, mask = slot_pointers(p_final + (i_b * heads + i_h) * size, o_m, o_d, dim, M)
    tl.store(p_end, b_slots, mask=mask)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks", "blocks"])
def nha_chunk_state_kernel_local(
    p_k_slot,
    p_v,
    p_gate,
    p_slot_k,
    p_slot_v,
    p_decay,
    p_cu,
    p_chunk_base,
    p_table,
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
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Each chunk's own contribution to the slots -> slot_*, its summed log-gates -> decay.

    Programs: (block of queries, which write the tokens of one chunk; head).
    """
    i_n, i_block = locate_program(tl.program_id(0), p_table, blocks, PACKED)
    if i_n < 0:
        return
    i_h = tl.program_id(1)
    i_b, _, k_start, seqlen, chunk_base = sequence_bounds(i_n, p_cu, p_chunk_base, length, past, chunks, PACKED)
    offset = window - past
    i_chunk = chunk_of_block(i_block, offset, CHUNK)
    u_start = i_chunk * CHUNK
    written = seqlen - offset - u_start
    if (i_chunk < 0) | (written <= 0):
        return
    o_t, o_m = tl.arange(0, CHUNK), tl.arange(0, BLOCK_M)
    m_t = o_t < written
    token0, i_state = k_start + u_start, (chunk_base + i_chunk) * heads + i_h
    b_gate = load_gates(p_gate + i_b * g_b + token0 * g_t + offset_i64(i_h, g_h), o_t * g_t, m_t, M, BLOCK_M)
    b_decay = tl.sum(b_gate.to(tl.float32), 0)
    tl.store(p_decay + i_state * M + o_m, b_decay, mask=o_m < M)
    b_weight = tl.trans((one_minus_exp(b_gate, DTYPE) * decay_to_end(b_gate, CHUNK)).to(DTYPE))
    b_k = load_rows(p_k_slot + i_b * k_b + token0 * k_t + offset_i64(i_h, k_h), o_t * k_t, m_t, D, BLOCK_D)
    store_slots(p_slot_k + i_state * M * D, matmul(b_weight, b_k, DTYPE, PRECISION), M, BLOCK_M, D, BLOCK_D)
    b_v = load_rows(p_v + i_b * v_b + token0 * v_t + offset_i64(i_h, v_h), o_t * v_t, m_t, DV, BLOCK_DV)
    store_slots(p_slot_v + i_state * M * DV, matmul(b_weight, b_v, DTYPE, PRECISION), M, BLOCK_M, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["length", "past", "window", "chunks"])
def nha_chunk_state_kernel_scan(
    p_slot_k,
    p_slot_v,
    p_decay,
    p_initial_k,
    p_initial_v,
    p_final_k,
    p_final_v,
    p_cu,
    p_chunk_base,
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
    HAS_INITIAL_STATE: tl.constexpr,
):
    """Replaces each chunk's contribution in slot_* by the slots before the chunk; slots after the sequence -> final_*.

    Zeros fill the chunks that belong to no packed sequence. Programs: (sequence, head, tile).
    """
    i_n = tl.program_id(0)
    i_h = tl.program_id(1)
    _, _, _, seqlen, chunk_base = sequence_bounds(i_n, p_cu, p_chunk_base, length, past, chunks, PACKED)
    offset = window - past
    o_m, is_key, o_d, i_column = scan_tile(tl.program_id(2), M, D, DV, ROWS, WIDTH)
    dim = tl.where(is_key, D, DV)
    if is_key:
        p_initial, p_slots, p_final = p_initial_k, p_slot_k, p_final_k
    else:
        p_initial, p_slots, p_final = p_initial_v, p_slot_v, p_final_v
    size = M * dim
    o_sequence = (i_n.to(tl.int64) * heads + i_h) * size
    b_slots = tl.zeros([ROWS, WIDTH], tl.float32)
    if HAS_INITIAL_STATE:
        p_start, mask = slot_pointers(p_initial + o_sequence, o_m, o_d, dim, M)
        b_slots = tl.load(p_start, mask=mask, other=0.0).to(tl.float32)
    for i_chunk in tl.range(0, num_chunks(seqlen, offset, CHUNK), num_stages=STAGES):
        i_state = (chunk_base + i_chunk) * heads + i_h
        p_chunk, mask = slot_pointers(p_slots + i_state * size, o_m, o_d, dim, M)
        b_local = tl.load(p_chunk, mask=mask, other=0.0)
        b_decay = tl.load(p_decay + i_state * M + o_m, mask=o_m < M, other=0.0)
        b_before = b_slots
        b_slots = b_slots * tl.exp2(b_decay * LOG2_E)[:, None] + b_local.to(tl.float32)
        tl.store(p_chunk, b_before.to(p_slots.dtype.element_ty), mask=mask)  # its pipelined load has been issued
    p_end, mask = slot_pointers(p_final + o_sequence, o_m, o_d, dim, M)
    tl.store(p_end, b_slots, mask=mask)
    if PACKED:
        sequences = tl.num_programs(0)
        _, _, _, seqlen, chunk_base = sequence_bounds(sequences - 1, p_cu, p_chunk_base, length, past, chunks, PACKED)
        for i_spare in range(chunk_base + num_chunks(seqlen, offset, CHUNK) + i_n, chunks, sequences):
            p_chunk, mask = slot_pointers(p_slots + (i_spare * heads + i_h) * size, o_m, o_d, dim, M)
            tl.store(p_chunk, tl.zeros([ROWS, WIDTH], p_slots.dtype.element_ty), mask=mask)
            p_sum = p_decay + (i_spare * heads + i_h) * M + o_m
            tl.store(p_sum, tl.zeros([ROWS], tl.float32), mask=(o_m < M) & (i_column == 0))


@triton.jit(do_not_specialize=["length", "past", "window", "chunks"])
def nha_chunk_state_kernel_bwd(
    p_decay,
    p_slot_k,
    p_slot_v,
    p_dfinal_k,
    p_dfinal_v,
    p_dslot_k,
    p_dslot_v,
    p_dinitial_k,
    p_dinitial_v,
    p_dend,
    p_cu,
    p_chunk_base,
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
    """Gradients of the slots, from the end: replaces in dslot_* [chunks, H, M, ...] the gradient that reading the slots
    before a chunk gives by the gradient of the slots after it; that of the initial slots -> dinitial_*.

    dfinal_* is the gradient of the slots after the sequence. dend [chunks, H, column blocks, M] is the inner product
    of the slots before a chunk, decayed to its end, with the gradient there. Programs as in the scan.
    """
    i_n = tl.program_id(0)
    i_h = tl.program_id(1)
    _, _, _, seqlen, chunk_base = sequence_bounds(i_n, p_cu, p_chunk_base, length, past, chunks, PACKED)
    o_m, is_key, o_d, i_column = scan_tile(tl.program_id(2), M, D, DV, ROWS, WIDTH)
    COLUMN_BLOCKS: tl.constexpr = (D + WIDTH - 1) // WIDTH + (DV + WIDTH - 1) // WIDTH
    dim = tl.where(is_key, D, DV)
    if is_key:
        p_dfinal, p_dslots, p_dinitial, p_slots = p_dfinal_k, p_dslot_k, p_dinitial_k, p_slot_k
    else:
        p_dfinal, p_dslots, p_dinitial, p_slots = p_dfinal_v, p_dslot_v, p_dinitial_v, p_slot_v
    size = M * dim
    o_sequence = (i_n.to(tl.int64) * heads + i_h) * size
    p_end, mask = slot_pointers(p_dfinal + o_sequence, o_m, o_d, dim, M)
    b_dslots = tl.load(p_end, mask=mask, other=0.0).to(tl.float32)
    seq_chunks = num_chunks(seqlen, window - past, CHUNK)
    for step in tl.range(0, seq_chunks, num_stages=STAGES):
        i_state = (chunk_base + seq_chunks - 1 - step) * heads + i_h
        p_chunk, mask = slot_pointers(p_dslots + i_state * size, o_m, o_d, dim, M)
        p_before, mask = slot_pointers(p_slots + i_state * size, o_m, o_d, dim, M)
        b_dread = tl.load(p_chunk, mask=mask, other=0.0)
        b_before = tl.load(p_before, mask=mask, other=0.0).to(tl.float32)
        b_decay = tl.exp2(tl.load(p_decay + i_state * M + o_m, mask=o_m < M, other=0.0) * LOG2_E)
        b_dafter = b_dslots
        b_dslots = b_dslots * b_decay[:, None] + b_dread.to(tl.float32)
        tl.store(p_chunk, b_dafter.to(p_dslots.dtype.element_ty), mask=mask)  # its pipelined load has been issued
        b_dend = tl.sum(b_before * b_dafter, 1) * b_decay
        tl.store(p_dend + (i_state * COLUMN_BLOCKS + i_column) * M + o_m, b_dend, mask=o_m < M)
    p_start, mask = slot_pointers(p_dinitial + o_sequence, o_m, o_d, dim, M)
    tl.store(p_start, b_dslots, mask=mask)
