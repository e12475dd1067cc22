"""How one call is cut into programs: block sizes by head size and dtype, tables that name the work of packed rows."""

from __future__ import annotations

from functools import cache as memoize
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nha.ops.triton.chunk.tables import KINDS, tables_kernel
from nha.ops.triton.launcher import launch

# A pass over tokens waits for memory at every chunk, so that it takes many programs to fill a GPU. Where there are
# fewer, chunks find what they add to the slots side by side, and a scan adds that up: more traffic, no waiting.
FULL_PROGRAMS = 128  # more state programs than this take whole sequences, one chunk after the other
FEW_CHUNKS = 4  # as do sequences of no more chunks
TABLE_WIDTH = 1024  # sequences, or entries, that a program of the tables takes at a time
WIDE_WINDOW = 256  # from here on most keys of a window are keys of all queries of a block
SHARED = 227 << 10  # bytes of shared memory that a block may have on an H100
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Blocks(NamedTuple):
    """Sizes a kernel is compiled for; none of them depends on the number of tokens."""

    slots: int
    key: int
    value: int
    sinks: int
    chunk: int  # tokens between two kept slot states, keys of one program of the backward pass
    heads: int  # query heads of one step
    wide: bool  # whether keys that all queries of a block see are read without masks, and queries of keys alike
    block: int  # window keys of one step of a block of queries
    back_block: int  # the same in the backward pass, and queries of one step of a chunk of keys
    stages: int  # loads of window keys under way, in both passes
    warps: int
    slot_warps: int
    slot_stages: int  # loads under way in the loop of `slots_kernel`
    scan_stages: int  # loads under way in a scan, which does nothing but wait for them
    key_warps: int
    key_stages: int
    precision: str
    dtype: tl.dtype  # operands of matrix products
    gated: tl.dtype  # operands that carry gate factors of up to exp(40)


def width(size: int, least: int = 16) -> int:
    """The power of two, at least `least`, that an axis of `size` is padded to."""
    return max(least, triton.next_power_of_2(size))


@memoize
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may have on a device; those of an H100 where there is no GPU."""
    if device.type != "cuda":
        return SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def blocks(
    dtype: torch.dtype,
    dim: int,
    value_dim: int,
    slots: int,
    sinks: int,
    shared: int = SHARED,
    window: int = 0,
    groups: int = 1,
    gate_dtype: torch.dtype | None = None,
) -> Blocks:
    """Block sizes for a window, query heads per KV head and a GPU whose blocks may have so much shared memory.

    `dtype` is that of queries, keys and values, and of the log-gates if they have none of their own.
    """
    exact = dtype == torch.float32
    gated = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    # 16-bit operands are padded to rows of 128 bytes: bfloat16 gate factors in narrower rows compile, but gave wrong
    # results and an illegal access on an H200 (Triton 3.6).
    row = 16 if exact else 64
    widest = max(width(dim), width(value_dim))
    crowded = widest > 128 or width(slots) > 64
    large = width(slots, row) * max(widest, row) * gated.primitive_bitwidth > 256 << 10  # bits of a head's slots
    compact = shared < SHARED // 2
    if exact and crowded:
        chunk = rows = 16
    elif exact:
        chunk, rows = 16 if widest > 64 else 32, 32 if compact else 64
    elif compact:
        chunk, rows = (16, 16) if large else (32, 64)
    else:
        chunk = rows = 32 if large else 64
    wide = window >= WIDE_WINDOW and not (exact or crowded or compact)
    roomy = wide and gated == tl.bfloat16 and shared >= SHARED  # larger steps leave no room for float32 gate factors
    # Two heads read a window's keys together, unless too often one of two would be missing.
    if roomy and (groups % 2 == 0 or groups > 4):
        rows = 2 * chunk
    # Loads ahead where there is shared memory for them beside another block: not for one head of 128.
    small = widest <= 64 and gated == tl.bfloat16 and shared >= SHARED and not crowded
    staged = small or (roomy and rows > chunk)
    full = gate_dtype == torch.float32 and widest > 64  # such gates of a chunk take what a third load would
    return Blocks(
        slots=width(slots, row),
        key=width(dim, row),
        value=width(value_dim, row),
        sinks=width(sinks),
        chunk=chunk,
        heads=rows // chunk,
        wide=wide,
        block=16 if exact else 64 if roomy else 32,
        back_block=16 if exact else 32,
        stages=(2 if full else 3) if staged else 1,
        warps=4 if exact and crowded else 8 if crowded else rows // 16,
        slot_warps=4 if compact or small else 8,
        slot_stages=1 if compact else 3,
        scan_stages=8 if exact or compact else 16,
        key_warps=8 if (exact and widest > 64) or (crowded and chunk > 16) else 4,
        key_stages=1 if exact or crowded or compact else 3,
        precision=("ieee" if widest > 128 else "tf32x3") if exact else "tf32",
        dtype=DTYPES[dtype],
        gated=gated,
    )


class Plan(NamedTuple):
    """The work of one call. For packed rows the tables name the (sequence, index) of every program."""

    sequences: int
    length: int  # tokens per row, or of all packed sequences
    past: int
    window: int
    chunks: int  # kept slot states per sequence, or of all packed sequences
    blocks: int  # chunks' worth of queries; those of a sequence begin below the first token that enters the slots
    key_blocks: int  # chunks' worth of keys
    scanned: bool  # whether chunks find what they add to the slots side by side
    cu: Tensor | None = None
    chunk_base: Tensor | None = None
    block_table: Tensor | None = None
    key_table: Tensor | None = None

    def programs(self, per_sequence: int) -> int:
        """Programs of a launch that has this many per sequence (batched) or in all (packed)."""
        return per_sequence if self.cu is not None else per_sequence * self.sequences


def chunks_of(length: int, past: int, window: int, size: int, packed: int | None) -> int:
    """Slot states kept for one sequence of a batch, or for all of so many packed ones, whatever their lengths."""
    if packed is None:
        return max(-(-(length + past - window) // size), 0)
    return -(-length // size) + packed


def make_plan(batch: int, length: int, past: int, window: int, sizes: Blocks, columns: int, cu: Tensor | None) -> Plan:
    """The plan of a call; `columns` is the number of state programs of one sequence (KV heads times column blocks)."""
    size, offset = sizes.chunk, window - past
    if cu is None:
        chunks = chunks_of(length, past, window, size, None)
        blocks, key_blocks = -(-(length + -offset % size) // size), -(-(length + past) // size)
        scanned = batch * columns <= FULL_PROGRAMS and chunks > FEW_CHUNKS
        return Plan(batch, length, past, window, chunks, blocks, key_blocks, scanned)
    return _packed_plan(length, past, window, size, cu)


_latest: tuple[tuple, Tensor, Plan] | None = None


def _packed_plan(length: int, past: int, window: int, size: int, cu: Tensor) -> Plan:
    """The plan of packed rows; the latest one is kept, since all layers of a model ask for the same.

    It is kept with its boundaries, whose memory therefore cannot come to hold others unnoticed. A CUDA graph gets a
    plan of its own: its boundaries may change from replay to replay.
    """
    global _latest
    if cu.is_inference() or (cu.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _make_packed_plan(length, past, window, size, cu)
    stream = torch.cuda.current_stream(cu.device).cuda_stream if cu.is_cuda else 0
    key = (cu.data_ptr(), cu._version, cu.shape, cu.device, stream, length, past, window, size)
    latest = _latest
    if latest is None or latest[0] != key:
        _latest = latest = (key, cu, _make_packed_plan(length, past, window, size, cu))
    return latest[2]


def _make_packed_plan(length: int, past: int, window: int, size: int, cu: Tensor) -> Plan:
    """The plan of packed rows, from bounds on what their lengths may be: those are never asked for."""
    offset, count = window - past, cu.shape[0] - 1
    chunks = chunks_of(length, past, window, size, count)
    blocks = -(-length // size) + 2 * count
    key_blocks = -(-length // size) + (1 + -(-past // size)) * count
    entries = -(-max(blocks, key_blocks) // 2) * 2  # so that every table begins at a multiple of 16 bytes
    chunk_base = torch.empty(count, dtype=torch.int64, device=cu.device)
    tables = torch.empty(2, entries, 2, dtype=torch.int32, device=cu.device)
    launch(
        tables_kernel,
        (count + 1, KINDS),
        (cu.device, cu.dtype),
        cu,
        chunk_base,
        tables,
        count,
        entries,
        past,
        offset,
        -offset % size,
        CHUNK=size,
        WIDTH=TABLE_WIDTH,
        num_warps=4,
    )
    return Plan(
        count,
        length,
        past,
        window,
        chunks,
        blocks,
        key_blocks,
        True,
        cu,
        chunk_base,
        tables[0, :blocks],
        tables[1, :key_blocks],
    )
