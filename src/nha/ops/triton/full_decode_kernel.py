"""The next token of every text under full attention: keys and values are read once, where they lie.

The query heads of a KV head are the rows of one matrix. Where there are few KV heads the keys are cut into parts, one
program each, and a second kernel puts the parts together. Part p takes blocks p, p + parts, p + 2 parts, ...: a mask
that hides the end of a cache, or the padding at its start, then takes as much from each. What is masked is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.triton.decode.kernel import softmax_of
from nha.ops.triton.primitives import load_rows, matmul, store_rows


@triton.jit(do_not_specialize=["m_b", "length", "parts", "heads", "groups"])
def full_kernel(
    q,
    k,
    v,
    mask,
    partial,
    peaks,
    norms,
    out,
    q_b,
    q_h,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    m_b,
    m_t,
    scale,
    length,
    parts,
    heads,
    groups,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """What the query heads of a KV head read in a part of its keys; programs (row, KV head, part).

    q [B, HQ, D], k [B, H, Tk, D], v [B, H, Tk, DV], mask [B, Tk]; `scale` includes log2(e). WHOLE, if parts is 1: out
    [B, HQ, DV]. Else partial [B * H, parts, HQ / H, DV], peaks and norms [B * H, parts, HQ / H] hold a softmax each.
    """
    pair, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    row, head = pair // heads, pair % heads
    line, offset = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    real = line < groups
    query = load_rows(q + row * q_b + head * groups * q_h, line * q_h, real, D, KEY)
    keys, values = k + row * k_b + head * k_h, v + row * v_b + head * v_h
    top, norm = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE], tl.float32)
    for block in tl.range(part, tl.cdiv(length, BLOCK), parts):
        first = tl.cast(block, tl.int64) * BLOCK
        seen = first + offset < length
        if MASKED:
            seen = seen & (tl.load(mask + row * m_b + first * m_t + offset * m_t, mask=seen, other=0) != 0)
        near = load_rows(keys + first * k_t, offset * k_t, seen, D, KEY)
        read = load_rows(values + first * v_t, offset * v_t, seen, DV, VALUE)
        score = matmul(query, tl.trans(near), DTYPE, PRECISION) * scale
        weight, shrink, top = softmax_of(tl.where(seen[None, :], score, float("-inf")), top)
        norm = norm * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None] + matmul(weight, read, DTYPE, PRECISION)
    if WHOLE:
        acc /= tl.where(norm > 0, norm, 1.0)[:, None]
        store_rows(out + pair * groups * DV, line * DV, real, acc, DV, VALUE)
    else:
        at = (pair * parts + part) * groups
        store_rows(partial + at * DV, line * DV, real, acc, DV, VALUE)
        tl.store(peaks + at + line, top, mask=real)
        tl.store(norms + at + line, norm, mask=real)


@triton.jit(do_not_specialize=["parts", "groups"])
def merge_kernel(
    partial, peaks, norms, out, parts, groups, DV: tl.constexpr, VALUE: tl.constexpr, TOGETHER: tl.constexpr
):
    """out [B, HQ, DV] from what the parts of a KV head left; programs (row, query head). Nothing seen gives zeros."""
    head = tl.program_id(0).to(tl.int64)
    at = head // groups * parts * groups + head % groups
    column = tl.arange(0, VALUE)
    top, norm = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    acc = tl.zeros([VALUE], tl.float32)
    for start in range(0, parts, TOGETHER):
        part = start + tl.arange(0, TOGETHER)
        inside = part < parts
        peak = tl.load(peaks + at + part * groups, mask=inside, other=float("-inf"))
        weight, shrink, top = softmax_of(peak[None, :], top)
        sums = tl.load(norms + at + part * groups, mask=inside, other=0.0)
        norm = norm * shrink + tl.sum(weight * sums[None, :], 1)
        read = load_rows(partial + at * DV, part * groups * DV, inside, DV, VALUE)
        acc = acc * shrink + tl.sum(read * tl.trans(weight), 0)
    acc /= tl.where(norm > 0, norm, 1.0)
    tl.store(out + head * DV + column, acc.to(out.dtype.element_ty), mask=column < DV)
