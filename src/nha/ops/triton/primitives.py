"""Pieces that all kernels share: how tokens are found, how rows are loaded, how gates are factorised.

Positions. A sequence has `count` queries and `past + count` keys, where `past` is 0 (nothing came before) or W (the
tail of earlier segments). A query is named by `u`, the token that it commits to the slots: its own key is token
`u + W`, its window holds tokens u + 1 .. u + W and the slots hold tokens 0 .. u. Query `t` has u = t + past - W.

Chunks. Slots are kept at the borders of chunks of tokens. A block is the queries that commit the tokens of one chunk;
a program takes one block of one KV head and walks its query heads, HEADS at a time, whose rows follow one another.

Gates. With L the running sum of log-gates from a chunk's border and L* some value near its middle, query i of the block
sees the slots at the border with exp(L_i), and token j <= i with exp(L_i - L_j) (1 - exp(a_j)). These split into

    rise_i = exp(L_i - L*)     border = exp(L*)     fall_j = exp(L* - L_j) (1 - exp(a_j))

In a mild chunk, whose log-gates sum to no less than -MILD in any slot, L* is half of that sum and no exponent exceeds
MILD / 2. Any other chunk is read in several passes, one for the queries of each part of 16 tokens, with an L* of its
own and exponents up to 16 * 5 / 2 = 40. The sums are matrix products with 0, 1/2 and 1, exact for 16-bit gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

PART = tl.constexpr(16)
MILD = tl.constexpr(140.0)
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
def chunk_of(block, offset, CHUNK: tl.constexpr):
    """The chunk of tokens that a block of queries commits; below 0 for one whose queries commit none."""
    return block - (offset + CHUNK - 1) // CHUNK


@triton.jit
def chunks_in(count, offset, CHUNK: tl.constexpr):
    """Chunks of tokens that enter the slots, of a sequence with `count` queries whose first `offset` commit none."""
    return (tl.maximum(count - offset, 0) + CHUNK - 1) // CHUNK


@triton.jit
def far(index, stride):
    """Where the `index`-th of what lies `stride` elements apart begins, in 64 bits."""
    return tl.cast(index, tl.int64) * stride


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
def load_rows(base, offset, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows at `base + offset` as [len(offset), WIDTH]; zero where not `inside` and in columns beyond DIM.

    `inside` is None where all rows are.

    Offsets are relative to a base of the program's own, so 32 bits suffice for them, not for the base.
    """
    column = tl.arange(0, WIDTH)
    if inside is not None:
        mask = inside[:, None] & (column < DIM)[None, :] if DIM < WIDTH else inside[:, None]
        return tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0)
    elif DIM < WIDTH:
        return tl.load(base + offset[:, None] + column[None, :], mask=(column < DIM)[None, :], other=0.0)
    else:
        return tl.load(base + offset[:, None] + column[None, :])


@triton.jit
def store_rows(base, offset, inside, value, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write [len(offset), WIDTH] to rows at `base + offset`, only `inside` and columns below DIM."""
    column = tl.arange(0, WIDTH)
    mask = inside[:, None] & (column < DIM)[None, :] if DIM < WIDTH else inside[:, None]
    tl.store(base + offset[:, None] + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def whole_blocks(first, stop, BLOCK: tl.constexpr):
    """How many tokens from `first` on are in whole blocks before `stop`."""
    return tl.maximum(stop - first, 0) // BLOCK * BLOCK


@triton.jit
def around(at, first, inner):
    """The token that `at` counts where `inner` tokens from `first` on are left out."""
    return at + tl.where(at < first, 0, inner)


@triton.jit
def load_slots(base, here, M: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[SLOTS, WIDTH] of contiguous slots [M, DIM], zero beyond them and where they are not `here`."""
    slot = tl.arange(0, SLOTS)
    return load_rows(base, slot * DIM, (slot < M) & here, DIM, WIDTH)


@triton.jit
def load_held(base, border, here, M: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[SLOTS, WIDTH] of the slots at a chunk's border times `border`, float32."""
    return load_slots(base, here, M, SLOTS, DIM, WIDTH).to(tl.float32) * border[:, None]


@triton.jit
def store_slots(base, value, M: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write [SLOTS, WIDTH] to contiguous slots [M, DIM]."""
    slot = tl.arange(0, SLOTS)
    store_rows(base, slot * DIM, slot < M, value, DIM, WIDTH)


@triton.jit
def load_gates(base, offset, there, M: tl.constexpr, SLOTS: tl.constexpr):
    """[len(offset), SLOTS] log-gates at `base + offset`, clamped to [-5, 0]; zero for tokens that are not `there`."""
    raw = load_rows(base, offset, there, M, SLOTS)
    return clamp_gate(raw).to(raw.dtype)


@triton.jit
def clamp_gate(raw):
    """Log-gates as the definition wants them: float32 in [-5, 0]."""
    return tl.minimum(tl.maximum(raw.to(tl.float32), -5.0), 0.0)


@triton.jit
def taken(gate, DTYPE: tl.constexpr):
    """1 - exp(gate) in float32, without cancellation near 0; exact to DTYPE."""
    g = gate.to(tl.float32)
    if tl.float32 == DTYPE:
        series = g * (1 + g * (1 / 2 + g * (1 / 6 + g * (1 / 24 + g * (1 / 120 + g * (1 / 720))))))
        return tl.where(g > -0.25, -series, 1 - tl.exp2(g * LOG2_E))
    return tl.where(g > -0.0625, -(g * (1 + g * (1 / 2 + g * (1 / 6)))), 1 - tl.exp2(g * LOG2_E))


@triton.jit
def sums(weights, gate):
    """weights @ gate in float32; the weights are 0, 1/2 or 1 up to sign."""
    return tl.dot(weights.to(gate.dtype), gate, input_precision="tf32x3")


@triton.jit
def is_harsh(decay_at, here, M: tl.constexpr, SLOTS: tl.constexpr):
    """1 if one of a chunk's summed log-gates [M] at `decay_at` is below -MILD, else 0; 0 where there is no chunk."""
    slot = tl.arange(0, SLOTS)
    sums_of_slots = tl.load(decay_at + slot, mask=(slot < M) & here, other=0.0)
    return tl.max((sums_of_slots < -MILD).to(tl.int32), 0)


@triton.jit
def in_pass(token, part, needs_subchunks):
    """Whether the queries of some tokens of a chunk are read in a pass; all are in the only pass of a mild chunk."""
    return (token // PART - part) * needs_subchunks == 0


@triton.jit
def middle_of(part, needs_subchunks, CHUNK: tl.constexpr):
    """[CHUNK]: the weights with which a chunk's log-gates sum to L* of a pass."""
    token = tl.arange(0, CHUNK)
    own = tl.where(token < part * PART, 1.0, tl.where(token < part * PART + PART, 0.5, 0.0))
    return tl.where(token * 0 + needs_subchunks == 0, 0.5, own)


@triton.jit
def rise_of(gate, part, needs_subchunks, CHUNK: tl.constexpr, HEADS: tl.constexpr):
    """exp(L_i - L*) [HEADS * CHUNK, SLOTS] for the queries of a pass, 1 for others."""
    row, token = (tl.arange(0, HEADS * CHUNK) % CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    middle = middle_of(part, needs_subchunks, CHUNK)[None, :]
    weights = tl.where(token <= row, 1 - middle, -middle)
    return tl.exp2(sums(tl.where(in_pass(row, part, needs_subchunks), weights, 0.0), gate) * LOG2_E)


@triton.jit
def border_of(gate, part, needs_subchunks, CHUNK: tl.constexpr):
    """exp(L*) [SLOTS] of a pass."""
    return tl.exp2(tl.sum(gate.to(tl.float32) * middle_of(part, needs_subchunks, CHUNK)[:, None], 0) * LOG2_E)


@triton.jit
def share_of(gate, part, needs_subchunks, CHUNK: tl.constexpr):
    """exp(L* - L_j) [CHUNK, SLOTS] for the tokens that queries of a pass can have committed, 0 for later ones."""
    token = tl.arange(0, CHUNK)
    middle = middle_of(part, needs_subchunks, CHUNK)[None, :]
    exponent = sums(tl.where(token[None, :] <= token[:, None], middle - 1, middle), gate) * LOG2_E
    earlier = (token - part * PART - PART) * needs_subchunks
    return tl.exp2(tl.where((earlier < 1 - needs_subchunks)[:, None], exponent, float("-inf")))


@triton.jit
def left_at_end(gate, CHUNK: tl.constexpr):
    """exp of the sum of the log-gates of later tokens of a chunk [CHUNK, SLOTS]: what is left of a token at its end."""
    token = tl.arange(0, CHUNK)
    return tl.exp2(sums(tl.where(token[None, :] > token[:, None], 1.0, 0.0), gate) * LOG2_E)


@triton.jit
def sum_earlier(x, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of the rows before each row of x [CHUNK, SLOTS], float32, as matrix products."""
    row, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    return _summed(tl.where(other < row, 1.0, 0.0), x, DTYPE)


@triton.jit
def sum_from(x, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of each row of x [CHUNK, SLOTS] and the rows after it, float32, as matrix products."""
    row, other = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    return _summed(tl.where(other >= row, 1.0, 0.0), x, DTYPE)


@triton.jit
def _summed(weights, x, DTYPE: tl.constexpr):
    if tl.float32 == DTYPE:
        return tl.dot(weights, x, input_precision="tf32x3")
    else:
        # Two bfloat16 numbers hold 16 bits of x, twice as many as what is multiplied with it elsewhere.
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        weights = weights.to(tl.bfloat16)
        return tl.dot(weights, high) + tl.dot(weights, low)


@triton.jit
def matmul(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b in float32 with operands rounded to DTYPE."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision=PRECISION)
