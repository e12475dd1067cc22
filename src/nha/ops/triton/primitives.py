"""Shared by all kernels: index arithmetic, loads and stores of rows, and the factorised gates.

Positions. A sequence has T queries and `past + T` keys, where `past` is 0 (nothing came before) or W (the window cache
of earlier segments). A query is named by `u`, the token that leaves its window and is written to the slots: its own key
is token `u + W`, its window holds tokens u + 1 .. u + W and the slots hold tokens 0 .. u. Query `t` has
u = t - offset with offset = W - past, so that the first `offset` queries write nothing.

Chunks. Slots are stored at the boundaries of chunks of tokens. A block is the queries that write the tokens of one
chunk; a program takes one block of one KV head and loops over its query heads, BLOCK_H at a time, stacked as rows.

Gates. With L the running sum of log-gates from the start of a chunk and L* a reference near its middle, query i of the
block sees the slots at the boundary with exp(L_i), and token j <= i with exp(L_i - L_j) (1 - exp(a_j)). These factor
into

    q_decay_i = exp(L_i - L*)     chunk_decay = exp(L*)     k_decay_j = exp(L* - L_j) (1 - exp(a_j))

In most chunks the log-gates sum to at least -MAX_DECAY in every slot: L* is half of that sum and no exponent exceeds
MAX_DECAY / 2. Any other chunk needs one pass per subchunk of 16 queries, each with its own L* and exponents up to
16 * 5 / 2 = 40. The sums are matrix products with 0, 1/2 and 1, exact for 16-bit gates.

Passes. The body of a loop over passes is one condition, always true: Triton moves whatever is the same in all passes to
before the loop, where it fills registers that chunks of one pass need, but it moves nothing out of a condition.

Names. As in flash-linear-attention: `p_` pointer, `b_` block of values, `m_` mask, `o_` offsets, `i_` index. BLOCK_M,
BLOCK_D, BLOCK_DV and BLOCK_S are M, D, DV and S rounded up to what a tile may have.
"""

from __future__ import annotations

import triton
import triton.language as tl

SUBCHUNK = tl.constexpr(16)
MAX_DECAY = tl.constexpr(140.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate_program(i_program, p_table, per_sequence, PACKED: tl.constexpr):
    """(sequence, index within it) of a program; the sequence is -1 for a spare program with no work."""
    if PACKED:
        i_n = tl.load(p_table + 2 * i_program)
        index = tl.load(p_table + 2 * i_program + 1)
    else:
        i_n = i_program // per_sequence
        index = i_program % per_sequence
    return i_n, index


@triton.jit
def chunk_of_block(i_block, offset, CHUNK: tl.constexpr):
    """The chunk of tokens that a block of queries writes; negative if its queries write none."""
    return i_block - (offset + CHUNK - 1) // CHUNK


@triton.jit
def num_chunks(seqlen, offset, CHUNK: tl.constexpr):
    """Chunks of tokens written to the slots by `seqlen` queries, the first `offset` of which write none."""
    return (tl.maximum(seqlen - offset, 0) + CHUNK - 1) // CHUNK


@triton.jit
def offset_i64(index, stride):
    """`index * stride` as int64: head offsets exceed 2^31 elements."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def sequence_bounds(i_n, p_cu, p_chunk_base, length, past, chunks, PACKED: tl.constexpr):
    """(batch row, first query, first key, number of queries, first chunk) of a sequence."""
    if PACKED:
        q_start = tl.load(p_cu + i_n).to(tl.int64)
        seqlen = (tl.load(p_cu + i_n + 1) - q_start).to(tl.int32)
        chunk_base = tl.load(p_chunk_base + i_n).to(tl.int64)
        i_b = q_start * 0
        k_start = q_start + i_n.to(tl.int64) * past
    else:
        i_b = i_n.to(tl.int64)
        q_start = i_b * 0
        k_start = i_b * 0
        chunk_base = i_b * chunks
        seqlen = length
    return i_b, q_start, k_start, seqlen, chunk_base


@triton.jit
def first_tokens(p_first, i_n, HAS_PREFIX_MASK: tl.constexpr, SLOTS_ACTIVE: tl.constexpr):
    """(first key that is not empty, first query that may see slots) of a sequence."""
    if HAS_PREFIX_MASK:
        first_key = tl.load(p_first + i_n).to(tl.int32)
        return first_key, 0 if SLOTS_ACTIVE else first_key
    else:
        return 0, 0


@triton.jit
def load_rows(p_base, o_row, m_row, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows at `p_base + o_row` as [len(o_row), WIDTH]; zero where `m_row` is False and in columns beyond DIM.

    `m_row` None means all rows. Offsets are relative to a base of the program's own: 32 bits suffice for them, not for
    the base.
    """
    o_column = tl.arange(0, WIDTH)
    if m_row is not None:
        mask = m_row[:, None] & (o_column < DIM)[None, :] if DIM < WIDTH else m_row[:, None]
        return tl.load(p_base + o_row[:, None] + o_column[None, :], mask=mask, other=0.0)
    elif DIM < WIDTH:
        return tl.load(p_base + o_row[:, None] + o_column[None, :], mask=(o_column < DIM)[None, :], other=0.0)
    else:
        return tl.load(p_base + o_row[:, None] + o_column[None, :])


@triton.jit
def store_rows(p_base, o_row, m_row, b_x, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store [len(o_row), WIDTH] to rows at `p_base + o_row` where `m_row` is True, columns below DIM."""
    o_column = tl.arange(0, WIDTH)
    mask = m_row[:, None] & (o_column < DIM)[None, :] if DIM < WIDTH else m_row[:, None]
    tl.store(p_base + o_row[:, None] + o_column[None, :], b_x.to(p_base.dtype.element_ty), mask=mask)


@triton.jit
def round_down(first, stop, BLOCK: tl.constexpr):
    """Tokens from `first` on that fill whole blocks before `stop`."""
    return tl.maximum(stop - first, 0) // BLOCK * BLOCK


@triton.jit
def skip_inner(i_token, first, inner):
    """The `i_token`-th token where `inner` tokens from `first` on are skipped."""
    return i_token + tl.where(i_token < first, 0, inner)


@triton.jit
def load_slots(p_slots, m, M: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Contiguous slots [M, DIM] as [BLOCK_M, WIDTH]; zero beyond them and where the scalar `m` is False."""
    o_m = tl.arange(0, BLOCK_M)
    return load_rows(p_slots, o_m * DIM, (o_m < M) & m, DIM, WIDTH)


@triton.jit
def load_decayed_slots(
    p_slots, b_chunk_decay, m, M: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """The slots at the start of a chunk times `chunk_decay`, float32 [BLOCK_M, WIDTH]."""
    return load_slots(p_slots, m, M, BLOCK_M, DIM, WIDTH).to(tl.float32) * b_chunk_decay[:, None]


@triton.jit
def store_slots(p_slots, b_x, M: tl.constexpr, BLOCK_M: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store [BLOCK_M, WIDTH] to contiguous slots [M, DIM]."""
    o_m = tl.arange(0, BLOCK_M)
    store_rows(p_slots, o_m * DIM, o_m < M, b_x, DIM, WIDTH)


@triton.jit
def load_gates(p_gate, o_row, m_row, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """Log-gates [len(o_row), BLOCK_M], clamped to [-5, 0]; zero where `m_row` is False."""
    b_raw = load_rows(p_gate, o_row, m_row, M, BLOCK_M)
    return clamp_gate(b_raw).to(b_raw.dtype)


@triton.jit
def clamp_gate(b_raw):
    """Log-gates as the definition wants them: float32 in [-5, 0]."""
    return tl.minimum(tl.maximum(b_raw.to(tl.float32), -5.0), 0.0)


@triton.jit
def one_minus_exp(b_gate, DTYPE: tl.constexpr):
    """1 - exp(gate) in float32, without cancellation near 0; exact to DTYPE."""
    g = b_gate.to(tl.float32)
    if tl.float32 == DTYPE:
        series = g * (1 + g * (1 / 2 + g * (1 / 6 + g * (1 / 24 + g * (1 / 120 + g * (1 / 720))))))
        return tl.where(g > -0.25, -series, 1 - tl.exp2(g * LOG2_E))
    return tl.where(g > -0.0625, -(g * (1 + g * (1 / 2 + g * (1 / 6)))), 1 - tl.exp2(g * LOG2_E))


@triton.jit
def sum_gates(b_weight, b_gate):
    """b_weight @ b_gate in float32; the weights are 0, 1/2 or 1 up to sign."""
    return tl.dot(b_weight.to(b_gate.dtype), b_gate, input_precision="tf32x3")


@triton.jit
def load_decay(p_decay, m, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """(a chunk's summed log-gates [BLOCK_M], 1 if one of them is below -MAX_DECAY, else 0); 0 where `m` is False."""
    o_m = tl.arange(0, BLOCK_M)
    b_decay = tl.load(p_decay + o_m, mask=(o_m < M) & m, other=0.0)
    return b_decay, tl.max((b_decay < -MAX_DECAY).to(tl.int32), 0)


@triton.jit
def in_subchunk(o_t, i_sub, needs_subchunks):
    """Whether the pass `i_sub` computes the queries of some tokens of a chunk; a chunk's only pass computes all."""
    return (o_t // SUBCHUNK - i_sub) * needs_subchunks == 0


@triton.jit
def reference_weights(i_sub, needs_subchunks, CHUNK: tl.constexpr):
    """[CHUNK]: the weights with which a chunk's log-gates sum to L* of a pass."""
    o_t = tl.arange(0, CHUNK)
    b_own = tl.where(o_t < i_sub * SUBCHUNK, 1.0, tl.where(o_t < i_sub * SUBCHUNK + SUBCHUNK, 0.5, 0.0))
    return tl.where(o_t * 0 + needs_subchunks == 0, 0.5, b_own)


@triton.jit
def q_decay(b_gate, i_sub, needs_subchunks, CHUNK: tl.constexpr, BLOCK_H: tl.constexpr):
    """exp(L_i - L*) [BLOCK_H * CHUNK, BLOCK_M] for the queries of a pass, 1 for others."""
    o_row, o_t = (tl.arange(0, BLOCK_H * CHUNK) % CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    b_reference = reference_weights(i_sub, needs_subchunks, CHUNK)[None, :]
    b_weight = tl.where(o_t <= o_row, 1 - b_reference, -b_reference)
    return tl.exp2(sum_gates(tl.where(in_subchunk(o_row, i_sub, needs_subchunks), b_weight, 0.0), b_gate) * LOG2_E)


@triton.jit
def chunk_decay(b_gate, i_sub, needs_subchunks, CHUNK: tl.constexpr):
    """exp(L*) [BLOCK_M] of a pass."""
    b_reference = reference_weights(i_sub, needs_subchunks, CHUNK)
    return tl.exp2(tl.sum(b_gate.to(tl.float32) * b_reference[:, None], 0) * LOG2_E)


@triton.jit
def token_decay(b_gate, i_sub, needs_subchunks, CHUNK: tl.constexpr):
    """exp(L* - L_j) [CHUNK, BLOCK_M] for the tokens that queries of a pass can have written, 0 for later ones.

    Times 1 - exp(a_j) it is `k_decay`.
    """
    o_t = tl.arange(0, CHUNK)
    b_reference = reference_weights(i_sub, needs_subchunks, CHUNK)[None, :]
    exponent = sum_gates(tl.where(o_t[None, :] <= o_t[:, None], b_reference - 1, b_reference), b_gate) * LOG2_E
    beyond = (o_t - i_sub * SUBCHUNK - SUBCHUNK) * needs_subchunks
    return tl.exp2(tl.where((beyond < 1 - needs_subchunks)[:, None], exponent, float("-inf")))


@triton.jit
def gate_factors(b_gate, b_decay, i_sub, needs_subchunks, CHUNK: tl.constexpr):
    """(q_decay, chunk_decay, token_decay) of a pass, for one query head a step, from one sum for all three.

    b_decay: the sum of the chunk's log-gates.
    """
    o_t = tl.arange(0, CHUNK)
    b_reference = reference_weights(i_sub, needs_subchunks, CHUNK)
    b_weight = tl.where(o_t[None, :] <= o_t[:, None], 1 - b_reference[None, :], -b_reference[None, :])
    b_sums = sum_gates(b_weight, b_gate) * LOG2_E
    b_q_decay = tl.exp2(tl.where(in_subchunk(o_t, i_sub, needs_subchunks)[:, None], b_sums, 0.0))
    beyond = (o_t - i_sub * SUBCHUNK - SUBCHUNK) * needs_subchunks
    b_token_decay = tl.exp2(tl.where((beyond < 1 - needs_subchunks)[:, None], -b_sums, float("-inf")))
    b_sum = b_decay * 0.5
    if needs_subchunks:
        b_sum = tl.sum(b_gate.to(tl.float32) * b_reference[:, None], 0)
    return b_q_decay, tl.exp2(b_sum * LOG2_E), b_token_decay


@triton.jit
def decay_to_end(b_gate, CHUNK: tl.constexpr):
    """exp of the sum of later log-gates of a chunk [CHUNK, BLOCK_M]: what remains of each token at its end."""
    o_t = tl.arange(0, CHUNK)
    return tl.exp2(sum_gates(tl.where(o_t[None, :] > o_t[:, None], 1.0, 0.0), b_gate) * LOG2_E)


@triton.jit
def exclusive_cumsum(b_x, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of the rows before each row of b_x [CHUNK, BLOCK_M], float32, as matrix products."""
    o_row, o_t = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    return _cumsum_dot(tl.where(o_t < o_row, 1.0, 0.0), b_x, DTYPE)


@triton.jit
def reverse_cumsum(b_x, CHUNK: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of each row of b_x [CHUNK, BLOCK_M] and the rows after it, float32, as matrix products."""
    o_row, o_t = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    return _cumsum_dot(tl.where(o_t >= o_row, 1.0, 0.0), b_x, DTYPE)


@triton.jit
def _cumsum_dot(b_weight, b_x, DTYPE: tl.constexpr):
    if tl.float32 == DTYPE:
        return tl.dot(b_weight, b_x, input_precision="tf32x3")
    else:
        # Two bfloat16 numbers hold 16 bits of b_x, twice as many as its other factors have.
        b_high = b_x.to(tl.bfloat16)
        b_low = (b_x - b_high.to(tl.float32)).to(tl.bfloat16)
        b_weight = b_weight.to(tl.bfloat16)
        return tl.dot(b_weight, b_high) + tl.dot(b_weight, b_low)


@triton.jit
def matmul(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b in float32 with operands rounded to DTYPE."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision=PRECISION)


@triton.jit
def window_tile(
    b_own,
    b_next,
    m_causal,
    u_start,
    u,
    o_seen,
    first_key,
    window,
    m_chunk,
    CHUNK: tl.constexpr,
    HAS_PREFIX_MASK: tl.constexpr,
    COVERS_CHUNK: tl.constexpr,
):
    """Scores [rows, CHUNK] of the tokens in each query's window, -inf for others.

    b_own: those of the chunk from token `u_start` on, of which there are none where the scalar `m_chunk` is False;
    o_seen: its tokens, those that nobody sees moved below every window. b_next, or None: those of the next chunk, where
    the window is no longer than a chunk. It holds at most one of the two chunks' j-th tokens, so that one tile has room
    for both. m_causal: whether the query writes the token or a later one. COVERS_CHUNK: a query's window holds all
    later tokens of its chunk.
    """
    o_own = u_start + tl.arange(0, CHUNK)
    b_s = b_own
    o_key = o_seen[None, :]
    if b_next is not None:
        b_s = tl.where(m_causal, b_next, b_own)
        o_next = tl.where(o_own + CHUNK < first_key, -window - CHUNK, o_own + CHUNK)
        o_key = tl.where(m_causal, o_next[None, :], o_key)
    if HAS_PREFIX_MASK or not COVERS_CHUNK:
        m_window = (o_key - (u + 1)[:, None]).to(tl.uint32) < window.to(tl.uint32)
        b_s = tl.where(m_window, b_s, float("-inf"))
    elif b_next is None:
        b_s = tl.where(m_causal, float("-inf"), b_s)
    elif not m_chunk:
        b_s = tl.where(m_causal, b_s, float("-inf"))
    return b_s


@triton.jit
def online_softmax(b_s, m_i):
    """(weights, alpha, new maximum) of scores [rows, n], base 2, after a maximum m_i [rows]."""
    m_new = tl.maximum(m_i, tl.max(b_s, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return tl.exp2(b_s - m_safe[:, None]), tl.exp2(m_i - m_safe), m_new
