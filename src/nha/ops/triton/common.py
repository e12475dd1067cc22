"""Pieces that all kernels share: how tokens are found, how rows are loaded, how gates are factorised.

Positions. A sequence has `count` queries and `past + count` keys, where `past` is 0 (nothing came before) or W (the
tail of earlier segments). A query is named by `u`, the token that it commits to the slots: its own key is token
`u + W`, its window holds tokens u + 1 .. u + W and the slots hold tokens 0 .. u. Query `t` has u = t + past - W.

Tiles. Slots are kept at the borders of chunks of tokens. A query tile is 16 values of `u`, so that its slots begin in
one chunk and its gates are factorised around one point; its rows are (token, query head of the KV head), token first.

Gates. With L the running sum of log-gates from a chunk's border and L* its value at the middle of a tile, query i of the
tile sees the slots at the border with exp(L_i), and token j <= i with exp(L_i - L_j) (1 - exp(a_j)). These split into

    rise_i = exp(L_i - L*)     border = exp(L*)     fall_j = exp(L* - L_j) (1 - exp(a_j))

where no exponent exceeds 16 * 5 / 2 = 40. The sums are matrix products with 0, 1/2 and 1, exact for 16-bit gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(16)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(program, table, per_sequence, PACKED: tl.constexpr):
    """(sequence, index within it) of a program; the sequence is -1 for a program that has nothing to do."""
    if PACKED:
        sequence = tl.load(table + 2 * program)
        index = tl.load(table + 2 * program + 1)
    else:
        sequence = program // per_sequence
        index = program % per_sequence
    return sequence, index


@triton.jit
def bounds(sequence, cu, chunk_base, length, past, chunks, PACKED: tl.constexpr):
    """(batch row, first query, first key, number of queries, first chunk) of a sequence."""
    if PACKED:
        start = tl.load(cu + sequence).to(tl.int64)
        count = (tl.load(cu + sequence + 1) - start).to(tl.int32)
        base = tl.load(chunk_base + sequence).to(tl.int64)
        row = start * 0
        first_key = start + sequence.to(tl.int64) * past
    else:
        row = sequence.to(tl.int64)
        start = row * 0
        first_key = row * 0
        base = row * chunks
        count = length
    return row, start, first_key, count, base


@triton.jit
def locate_tile(first_block, table, blocks, offset, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """(sequence, first u of the tile) of a program of the grid [tiles, ...]; the sequence is -1 for nothing to do.

    A block is a chunk's worth of tiles; the blocks of a sequence begin far enough below u = 0 to hold all its queries.
    """
    program = tl.program_id(0)
    sequence, block = locate(first_block + program // (CHUNK // TILE), table, blocks, PACKED)
    return sequence, (block - (offset + CHUNK - 1) // CHUNK) * CHUNK + program % (CHUNK // TILE) * TILE


@triton.jit
def load_rows(base, offset, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows at `base + offset` as [len(offset), WIDTH]; zero where not `inside` and in columns beyond DIM."""
    column = tl.arange(0, WIDTH)
    mask = inside[:, None] & (column < DIM)[None, :] if DIM < WIDTH else inside[:, None]
    return tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, offset, inside, value, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write [len(offset), WIDTH] to rows at `base + offset`, only `inside` and columns below DIM."""
    column = tl.arange(0, WIDTH)
    mask = inside[:, None] & (column < DIM)[None, :] if DIM < WIDTH else inside[:, None]
    tl.store(base + offset[:, None] + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_slots(base, M: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[SLOTS, WIDTH] of contiguous slots [M, DIM], zero beyond them."""
    slot = tl.arange(0, SLOTS)
    return load_rows(base, slot * DIM, slot < M, DIM, WIDTH)


@triton.jit
def store_slots(base, value, M: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write [SLOTS, WIDTH] to contiguous slots [M, DIM]."""
    slot = tl.arange(0, SLOTS)
    store_rows(base, slot * DIM, slot < M, value, DIM, WIDTH)


@triton.jit
def load_gates(base, token, stride, committed, M: tl.constexpr, SLOTS: tl.constexpr):
    """[len(token), SLOTS] log-gates, clamped to [-5, 0]; zero for tokens that no slot takes in."""
    raw = load_rows(base, token.to(tl.int64) * stride, token < committed, M, SLOTS)
    return clamp_gate(raw).to(raw.dtype)


@triton.jit
def clamp_gate(raw):
    """Log-gates as the definition wants them: float32 in [-5, 0]."""
    return tl.minimum(tl.maximum(raw.to(tl.float32), -5.0), 0.0)


@triton.jit
def taken(gate, EXACT: tl.constexpr):
    """1 - exp(gate) in float32, without cancellation near 0; EXACT to float32's last bits, else to bfloat16's."""
    g = gate.to(tl.float32)
    if EXACT:
        series = g * (1 + g * (1 / 2 + g * (1 / 6 + g * (1 / 24 + g * (1 / 120 + g * (1 / 720))))))
        return tl.where(g > -0.25, -series, 1 - tl.exp2(g * LOG2_E))
    return tl.where(g > -0.0625, -(g * (1 + g * (1 / 2 + g * (1 / 6)))), 1 - tl.exp2(g * LOG2_E))


@triton.jit
def sums(weights, gate):
    """weights @ gate in float32; the weights are 0, 1/2 or 1 up to sign."""
    return tl.dot(weights.to(gate.dtype), gate, input_precision="tf32x3")


@triton.jit
def rise_of(gate_at, u0, stride, committed, HEADS: tl.constexpr, M: tl.constexpr, SLOTS: tl.constexpr):
    """exp(L_i - L*) of the rows of the tile whose first token is u0, [TILE * HEADS, SLOTS]."""
    gate = load_gates(gate_at, u0 + tl.arange(0, TILE), stride, committed, M, SLOTS)
    token = (tl.arange(0, TILE * HEADS) // HEADS)[:, None]
    return tl.exp2(sums(tl.where(tl.arange(0, TILE)[None, :] <= token, 0.5, -0.5), gate) * LOG2_E)


@triton.jit
def border_of(gate, first, CHUNK: tl.constexpr):
    """exp(L*) [SLOTS] of the tile whose first token is number `first` of the chunk."""
    return tl.exp2(tl.sum(gate.to(tl.float32) * middle_weights(first, CHUNK)[:, None], 0) * LOG2_E)


@triton.jit
def middle_weights(first, CHUNK: tl.constexpr):
    """[CHUNK]: the log-gates of a chunk up to the middle of the tile whose token `first` of the chunk is the first."""
    token = tl.arange(0, CHUNK)
    return tl.where(token < first, 1.0, tl.where(token < first + TILE, 0.5, 0.0))


@triton.jit
def share_of(gate, first, CHUNK: tl.constexpr):
    """exp(L* - L_j) [CHUNK, SLOTS] for the tokens of a chunk up to the end of one tile, 0 for later ones."""
    token = tl.arange(0, CHUNK)
    middle = middle_weights(first, CHUNK)[None, :]
    weights = tl.where(token[None, :] <= token[:, None], middle - 1, middle)
    exponent = sums(weights, gate) * LOG2_E
    return tl.exp2(tl.where((token < first + TILE)[:, None], exponent, float("-inf")))


@triton.jit
def left_at_end(gate, CHUNK: tl.constexpr):
    """exp of the sum of the log-gates of later tokens of a chunk [CHUNK, SLOTS]: what is left of a token at its end."""
    token = tl.arange(0, CHUNK)
    return tl.exp2(sums(tl.where(token[None, :] > token[:, None], 1.0, 0.0), gate) * LOG2_E)


@triton.jit
def matmul(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b in float32 with operands rounded to DTYPE."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision=PRECISION)
