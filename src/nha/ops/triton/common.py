"""Pieces that all kernels share: how tokens are found, how rows are loaded, how gates are factorised.

Positions. A sequence has `count` queries and `past + count` keys, where `past` is 0 (nothing came before) or W (the
tail of earlier segments). A query is named by `u`, the token that it commits to the slots: its own key is token
`u + W`, its window holds tokens u + 1 .. u + W and the slots hold tokens 0 .. u. Query `t` has u = t + past - W.

Tiles. Slots are kept at the borders of chunks of tokens. A query tile is 16 values of `u`, so that its slots begin in
one chunk and its gates are factorised around one point; its rows are (token, query head of the KV head), token first.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(16)  # tokens whose gates are factorised together; 16 * 5 / 2 = 40 bounds the exponents


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
def load_tokens(base, stride, token, low, high, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[len(token), WIDTH] rows of `base`; zero for tokens outside low .. high and columns beyond DIM."""
    column = tl.arange(0, WIDTH)
    inside = ((token >= low) & (token < high))[:, None] & (column < DIM)[None, :]
    return tl.load(base + token.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_tokens(base, stride, token, low, high, value, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write [len(token), WIDTH] rows, only tokens in low .. high and columns below DIM."""
    column = tl.arange(0, WIDTH)
    inside = ((token >= low) & (token < high))[:, None] & (column < DIM)[None, :]
    where = base + token.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(where, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_queries(base, stride_t, stride_h, token, head, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] of a tensor [T, heads, DIM], one token and head per row."""
    column = tl.arange(0, WIDTH)
    where = base + token.to(tl.int64)[:, None] * stride_t + head.to(tl.int64)[:, None] * stride_h + column[None, :]
    return tl.load(where, mask=inside[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def load_slots(base, M: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[SLOTS, WIDTH] of contiguous slots [M, DIM], zero beyond them."""
    slot = tl.arange(0, SLOTS)
    column = tl.arange(0, WIDTH)
    inside = (slot < M)[:, None] & (column < DIM)[None, :]
    return tl.load(base + slot[:, None] * DIM + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_slots(base, value, M: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write [SLOTS, WIDTH] to contiguous slots [M, DIM]."""
    slot = tl.arange(0, SLOTS)
    column = tl.arange(0, WIDTH)
    inside = (slot < M)[:, None] & (column < DIM)[None, :]
    tl.store(base + slot[:, None] * DIM + column[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def clamp_gate(raw):
    """Log-gates as the definition wants them: float32 in [-5, 0]."""
    return tl.minimum(tl.maximum(raw.to(tl.float32), -5.0), 0.0)


@triton.jit
def taken(gate):
    """1 - exp(gate) for gates in [-5, 0], without cancellation near 0."""
    series = gate * (1 + gate * (1 / 2 + gate * (1 / 6 + gate * (1 / 24 + gate * (1 / 120 + gate * (1 / 720))))))
    return tl.where(gate > -0.25, -series, 1 - tl.exp(gate))


@triton.jit
def after_token(gate):
    """Sum of the log-gates of later tokens of a chunk: how much of a token's share is left at its end."""
    return tl.cumsum(gate, 0, reverse=True) - gate


@triton.jit
def to_rows(x, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """[TILE, WIDTH] repeated for every query head: [TILE * HEADS, WIDTH]."""
    wide = tl.broadcast_to(tl.expand_dims(x, 1), [TILE, HEADS, WIDTH])
    return tl.reshape(wide, [TILE * HEADS, WIDTH])


@triton.jit
def factors(gate, tile_gate, first, CHUNK: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The gates between the tokens of a chunk and the queries of one of its tiles, split at the tile's middle.

    `gate` [CHUNK, M] and `tile_gate` [TILE, M] are clamped, `first` is the tile's first token in the chunk. Query i
    sees token j <= i with the share rise_i * share_j * taken_j, and the slots at the chunk's border with
    rise_i * border. Returns rise [TILE * HEADS, M], share [CHUNK, M] (0 for tokens after the tile), border [M].
    """
    token = tl.arange(0, CHUNK)[:, None]
    before = tl.where(token < first, gate, 0.0)
    within = tl.where((token >= first) & (token < first + TILE), gate, 0.0)
    middle = tl.sum(tile_gate, 0) / 2
    share = tl.exp(middle[None, :] - tl.cumsum(within, 0) + after_token(before))
    share = tl.where(token < first + TILE, share, 0.0)
    rise = tl.exp(tl.cumsum(tile_gate, 0) - middle[None, :])
    return to_rows(rise, HEADS, WIDTH), share, tl.exp(middle + tl.sum(before, 0))


@triton.jit
def matmul(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b in float32 with operands rounded to DTYPE."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), input_precision=PRECISION)
