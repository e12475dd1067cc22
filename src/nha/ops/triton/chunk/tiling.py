"""How one call is cut into programs: block sizes by head size and dtype, tables that assign packed work to programs."""

# Triton's types give a launch the signature of the kernel, without the options of the compiler.
# pyright: reportCallIssue=false

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nha.ops.backends import H100_SHARED_MEMORY
from nha.ops.triton.primitives import num_chunks

# A serial pass over tokens waits for memory at every chunk, so that it takes many programs to fill a GPU. With fewer,
# chunks compute their contributions to the slots in parallel and a scan adds them up: more traffic, no waiting.
SERIAL_PROGRAMS = 128  # above so many state programs sequences are read serially
SERIAL_CHUNKS = 4  # as are sequences of no more chunks
TABLE_WIDTH = 1024  # sequences, or entries, that a program of the tables processes at a time
SPLIT_WINDOW = 256  # from this window on, most of its keys are seen by all queries of a block
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# What `nha_chunk_tables_kernel` counts: entries of the two tables, in their order, and chunks written to the slots.
BLOCKS = tl.constexpr(0)
KEY_BLOCKS = tl.constexpr(1)
CHUNKS = tl.constexpr(2)
COUNTED = 3


class BlockSizes(NamedTuple):
    """Sizes a kernel is compiled for; none of them depends on the number of tokens."""

    block_m: int
    block_d: int
    block_dv: int
    block_s: int
    chunk: int  # tokens between two stored slot states, keys of one program of the backward pass
    block_h: int  # query heads of one step
    split_inner_loop: bool  # whether keys that all queries of a block see are read without masks, and vice versa
    block_n: int  # window keys of one step of a block of queries
    bwd_block_n: int  # the same in the backward pass, and queries of one step of a chunk of keys
    window_in_tile: bool  # with block_h 1: whether a tile of a chunk's width has the scores of whole windows
    stages: int  # loads of window keys in flight
    dq_stages: int  # the same in the backward pass
    one_gate_sum: bool  # whether `nha_chunk_bwd_kernel_dq` sums gates once: more shared memory, fewer instructions
    warps: int
    dstate_warps: int
    dstate_stages: int  # loads in flight in the loops of `nha_chunk_bwd_kernel_dstate`
    scan_stages: int  # loads in flight in a scan, which does nothing but wait for them
    dkv_warps: int
    dkv_stages: int
    precision: str
    dtype: tl.dtype  # operands of matrix products
    gate_dtype: tl.dtype  # operands that carry gate factors of up to exp(40)


def padded_width(size: int, minimum: int = 16) -> int:
    """The power of two, at least `minimum`, to which an axis of `size` is padded."""
    return max(minimum, 1 << (size - 1).bit_length())


def device_guard(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of `x` the current one: Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def block_sizes(
    dtype: torch.dtype,
    dim: int,
    value_dim: int,
    slots: int,
    sinks: int,
    shared: int = H100_SHARED_MEMORY,
    window: int = 0,
    groups: int = 1,
    gate_dtype: torch.dtype | None = None,
) -> BlockSizes:
    """Block sizes for a window, `groups` query heads per KV head and `shared` bytes of shared memory per block.

    `dtype` is that of queries, keys and values, and of the log-gates where `gate_dtype` is None.
    """
    is_fp32 = dtype == torch.float32
    gate_operand = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    # 16-bit operands are padded to rows of 128 bytes: bfloat16 gate factors in narrower rows compile, but gave wrong
    # results and an illegal access on an H200 (Triton 3.6).
    row = 16 if is_fp32 else 64
    max_width = max(padded_width(dim), padded_width(value_dim))
    low_occupancy = max_width > 128 or padded_width(slots) > 64
    state_bits = padded_width(slots, row) * max(max_width, row) * gate_operand.primitive_bitwidth
    large_state = state_bits > 256 << 10
    # An A100 has room for large tiles, but without asynchronous products their operands spill 10 KB a thread.
    small_memory = shared < H100_SHARED_MEMORY
    if is_fp32 and low_occupancy:
        chunk = rows = 16
    elif is_fp32:
        chunk, rows = 16 if max_width > 64 else 32, 32 if small_memory else 64
    elif small_memory:
        chunk, rows = (16, 16) if large_state else (32, 64)
    else:
        chunk = rows = 32 if large_state else 64
    split = window >= SPLIT_WINDOW and not (is_fp32 or low_occupancy or small_memory)
    # Larger steps leave no room for float32 gate factors.
    large_steps = split and gate_operand == tl.bfloat16 and shared >= H100_SHARED_MEMORY
    # Two heads read a window's keys together, unless too often one of two would be missing.
    if large_steps and (groups % 2 == 0 or groups > 4):
        rows = 2 * chunk
    # Prefetch where shared memory has room for it beside another block: not for one head of 128.
    small_heads = max_width <= 64 and gate_operand == tl.bfloat16 and shared >= H100_SHARED_MEMORY and not low_occupancy
    prefetch = small_heads or (large_steps and rows > chunk)
    large_tiles = gate_operand == tl.bfloat16 and not (low_occupancy or small_memory)
    # Not for one query head a KV head: there the registers that the tile takes cost more than it saves.
    in_tile = large_tiles and 0 < window <= chunk and groups > 1
    few_warps = large_tiles and sinks == 0 and groups == 1  # more heads, or a sink, make four warps spill
    # A second load of window keys takes the room of the chunk's own keys, which are not needed any more.
    dq_prefetch = large_tiles and not split and sinks == 0 and gate_dtype != torch.float32
    wide_gates = gate_dtype == torch.float32 and max_width > 64  # a chunk of them takes the room of a third load
    return BlockSizes(
        block_m=padded_width(slots, row),
        block_d=padded_width(dim, row),
        block_dv=padded_width(value_dim, row),
        block_s=padded_width(sinks),
        chunk=chunk,
        block_h=rows // chunk,
        split_inner_loop=split,
        block_n=16 if is_fp32 else 64 if large_steps else 32,
        bwd_block_n=16 if is_fp32 else 32,
        window_in_tile=in_tile,
        stages=(2 if wide_gates else 3) if prefetch else 1,
        dq_stages=(2 if wide_gates else 3) if prefetch else 2 if dq_prefetch else 1,
        one_gate_sum=large_tiles and rows == chunk,
        warps=4 if is_fp32 and low_occupancy else 8 if low_occupancy else rows // 16,
        dstate_warps=4 if small_memory or small_heads or few_warps else 8,
        dstate_stages=1 if small_memory else 2 if few_warps and not small_heads else 3,
        scan_stages=8 if is_fp32 or small_memory else 16,
        dkv_warps=8 if (is_fp32 and max_width > 64) or (low_occupancy and chunk > 16) else 4,
        dkv_stages=1 if is_fp32 or low_occupancy or small_memory else 3,
        precision=("ieee" if max_width > 128 else "tf32x3") if is_fp32 else "tf32",
        dtype=DTYPES[dtype],
        gate_dtype=gate_operand,
    )


class Plan(NamedTuple):
    """The work of one call. For packed sequences the tables give the (sequence, index) of every program."""

    sequences: int
    length: int  # tokens per row, or of all packed sequences
    past: int
    window: int
    chunks: int  # stored slot states per sequence, or of all packed sequences
    blocks: int  # chunks' worth of queries; a sequence's blocks are aligned with the chunks that its queries write
    key_blocks: int  # chunks' worth of keys
    scanned: bool  # whether chunks compute their contributions to the slots in parallel
    cu_seqlens: Tensor | None = None
    chunk_base: Tensor | None = None
    block_table: Tensor | None = None
    key_table: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def programs(self, per_sequence: int) -> int:
        """Programs of a launch that has this many per sequence (batched) or in all (packed)."""
        return per_sequence if self.packed else per_sequence * self.sequences


def stored_chunks(length: int, past: int, window: int, chunk: int, packed: int | None) -> int:
    """Slot states stored for one sequence of a batch, or for `packed` sequences, whatever their lengths."""
    if packed is None:
        return max(-(-(length + past - window) // chunk), 0)
    return -(-length // chunk) + packed


def make_plan(
    batch: int, length: int, past: int, window: int, sizes: BlockSizes, columns: int, cu_seqlens: Tensor | None
) -> Plan:
    """The plan of a call; `columns` is the number of state programs of one sequence (KV heads times column blocks)."""
    chunk, offset = sizes.chunk, window - past
    if cu_seqlens is None:
        chunks = stored_chunks(length, past, window, chunk, None)
        blocks, key_blocks = -(-(length + -offset % chunk) // chunk), -(-(length + past) // chunk)
        scanned = batch * columns <= SERIAL_PROGRAMS and chunks > SERIAL_CHUNKS
        return Plan(batch, length, past, window, chunks, blocks, key_blocks, scanned)
    return _packed_plan(length, past, window, chunk, cu_seqlens)


_last_plan: tuple[tuple, Tensor, Plan] | None = None


def _packed_plan(length: int, past: int, window: int, chunk: int, cu_seqlens: Tensor) -> Plan:
    """The plan of packed sequences; the last one is cached, since all layers of a model ask for the same.

    The cache holds the boundaries, so that their memory cannot be reused for others. A CUDA graph gets a plan of its
    own: its boundaries may change from replay to replay.
    """
    global _last_plan
    if cu_seqlens.is_inference() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _make_packed_plan(length, past, window, chunk, cu_seqlens)
    stream = torch.cuda.current_stream(cu_seqlens.device).cuda_stream if cu_seqlens.is_cuda else 0
    shape, device = cu_seqlens.shape, cu_seqlens.device
    key = (cu_seqlens.data_ptr(), cu_seqlens._version, shape, device, stream, length, past, window, chunk)
    last = _last_plan
    if last is None or last[0] != key:
        _last_plan = last = (key, cu_seqlens, _make_packed_plan(length, past, window, chunk, cu_seqlens))
    return last[2]


def _make_packed_plan(length: int, past: int, window: int, chunk: int, cu_seqlens: Tensor) -> Plan:
    """The plan of packed sequences, from upper bounds: reading the lengths would wait for the device."""
    offset, sequences = window - past, cu_seqlens.shape[0] - 1
    chunks = stored_chunks(length, past, window, chunk, sequences)
    blocks = -(-length // chunk) + 2 * sequences
    key_blocks = -(-length // chunk) + (1 + -(-past // chunk)) * sequences
    entries = -(-max(blocks, key_blocks) // 2) * 2  # so that every table begins at a multiple of 16 bytes
    chunk_base = torch.empty(sequences, dtype=torch.int64, device=cu_seqlens.device)
    tables = torch.empty(2, entries, 2, dtype=torch.int32, device=cu_seqlens.device)
    nha_chunk_tables_kernel[(sequences + 1, COUNTED)](
        cu_seqlens,
        chunk_base,
        tables,
        sequences,
        entries,
        past,
        offset,
        -offset % chunk,
        CHUNK=chunk,
        WIDTH=TABLE_WIDTH,
        num_warps=4,
    )
    return Plan(
        sequences,
        length,
        past,
        window,
        chunks,
        blocks,
        key_blocks,
        True,
        cu_seqlens,
        chunk_base,
        tables[0, :blocks],
        tables[1, :key_blocks],
    )


@triton.jit
def count_entries(seqlen, i_table, past, offset, lead, CHUNK: tl.constexpr):
    """Entries of sequences with `seqlen` tokens; an empty one has no block, and no key but the past."""
    chunks = num_chunks(seqlen, offset, CHUNK)
    blocks = tl.where(seqlen > 0, seqlen + lead + CHUNK - 1, 0) // CHUNK
    key_blocks = (seqlen + past + CHUNK - 1) // CHUNK
    return tl.where(i_table == CHUNKS, chunks, tl.where(i_table == BLOCKS, blocks, key_blocks))


@triton.jit(do_not_specialize=["sequences", "entries", "past", "offset", "lead"])
def nha_chunk_tables_kernel(
    p_cu,
    p_chunk_base,
    p_tables,
    sequences,
    entries,
    past,
    offset,
    lead,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(sequence, index) of every program -> tables [2, entries, 2], with sequence -1 for spare ones at the end; the
    number of chunks before every sequence -> chunk_base [sequences].

    A sequence's first `offset` tokens are not written to the slots; its first block lacks `lead` tokens of a chunk.
    Programs: (sequence, table), and one more sequence per table for the spare entries.
    """
    i_n = tl.program_id(0)
    i_table = tl.program_id(1)
    o_w = tl.arange(0, WIDTH)
    # Every program counts all entries before its own: reading the boundaries again is cheaper than a second launch.
    b_before = tl.zeros([WIDTH], tl.int32)
    for first in range(0, i_n, WIDTH):
        i_other = first + o_w
        mask = i_other < i_n
        b_begin = tl.load(p_cu + i_other, mask=mask, other=0)
        b_seqlen = tl.load(p_cu + i_other + 1, mask=mask, other=0) - b_begin
        b_before += tl.where(mask, count_entries(b_seqlen, i_table, past, offset, lead, CHUNK), 0)
    start = tl.sum(b_before, 0)
    if i_table == CHUNKS:
        tl.store(p_chunk_base + i_n, start.to(tl.int64), mask=i_n < sequences)
        return
    is_sequence = i_n < sequences
    begin = tl.load(p_cu + i_n)
    seqlen = tl.load(p_cu + i_n + 1, mask=is_sequence, other=0) - begin
    own = tl.where(is_sequence, count_entries(seqlen, i_table, past, offset, lead, CHUNK), entries - start)
    i_stored = tl.where(is_sequence, i_n, -1)
    for first in range(0, own, WIDTH):
        index = first + o_w
        i_entry = start + index
        mask = (index < own) & (i_entry < entries)
        p_entry = p_tables + (i_table * entries + i_entry) * 2
        tl.store(p_entry, i_stored, mask=mask)
        tl.store(p_entry + 1, index, mask=mask)
