"""The next tokens of running texts in one launch: commit what leaves the window, read, and write the window.

Tokens. Of the `before` tokens seen so far the window holds the last W by age: age 0 is token before - W, if there is
one. A segment has `count` new tokens. New token i commits the token of age i (from age W on: new token i - W) to the
slots and then reads the slots and the tokens of ages i + 1 .. i + W. In a ring, token t lies at place t mod W.

Programs. What the queries of a KV head see is cut into parts: blocks of slots, and shares of the window. A program
takes one part, so that many are under way on every multiprocessor; it leaves a softmax over its part alone. The last
program of a head to be through, whichever it is, puts the parts together in their order, and only then, when all have
read, do new tokens take the places of those that left. The last head of a row counts the row's tokens. No result
depends on which program was the last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nha.ops.state import MAX_NEW
from nha.ops.triton.primitives import LOG2_E, clamp_gate, load_rows, matmul, store_rows, taken

NEW = tl.constexpr(MAX_NEW)  # the most tokens of a segment
LINES = tl.constexpr(16)  # queries that read a block of slots at a time
PARTS = tl.constexpr(8)  # parts that are put together at a time


@triton.jit
def load_line(at, there, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH] numbers at `at` in float32, zero from DIM on and where not `there`."""
    column = tl.arange(0, WIDTH)
    return tl.load(at + column, mask=(column < DIM) & there, other=0.0).to(tl.float32)


@triton.jit
def slots_at(base, slot, M: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(addresses, mask) of some slots of [M, DIM], as [WIDTH, slots].

    Turned like this, Triton gives them a layout for float32, not one that it chose for a 16-bit tile of equal shape.
    """
    column = tl.arange(0, WIDTH)
    return base + slot[None, :] * DIM + column[:, None], (slot < M)[None, :] & (column < DIM)[:, None]


@triton.jit
def turn_of(before, window, RING: tl.constexpr):
    """The place of age 0 in the window."""
    return (before % window).to(tl.int32) if RING else 0


@triton.jit
def softmax_of(score, top):
    """(weights, what earlier weights shrink by, new maximum) of scores [rows, n], base 2, after a maximum [rows]."""
    higher = tl.maximum(top, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    return tl.exp2(score - safe[:, None]), tl.exp2(top - safe), higher


@triton.jit
def commit(
    keys,
    values,
    i,
    new_key,
    new_value,
    new_gate,
    old_key,
    old_value,
    old_gate,
    nk_t,
    nv_t,
    ng_t,
    ok_t,
    ov_t,
    og_t,
    slot,
    before,
    count,
    window,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    WINDOWED: tl.constexpr,
    RING: tl.constexpr,
    STEP: tl.constexpr,
):
    """A block of slots, keys [KEY, slots] and values [VALUE, slots], after the token that query i commits."""
    there, late = slot < M, i - window
    # Where nothing is committed the gate is 0, which leaves the slots as they are.
    if WINDOWED:
        held, turn = (before + late >= 0) & (late < 0) & (i < count), turn_of(before, window, RING)
        place = tl.where(turn + late < 0, turn + i, turn + late)
        gate = clamp_gate(tl.load(old_gate + place * og_t + slot, mask=there & held, other=0.0))
        key = load_line(old_key + place * ok_t, held, D, KEY)
        value = load_line(old_value + place * ov_t, held, DV, VALUE)
    else:
        gate = tl.zeros_like(slot).to(tl.float32)
        key, value = tl.zeros([KEY], tl.float32), tl.zeros([VALUE], tl.float32)
    if not (WINDOWED and STEP):
        fresh = (late >= 0) & (i < count)
        gate += clamp_gate(tl.load(new_gate + late * ng_t + slot, mask=there & fresh, other=0.0))
        key += load_line(new_key + late * nk_t, fresh, D, KEY)
        value += load_line(new_value + late * nv_t, fresh, DV, VALUE)
    kept, added = tl.exp2(gate * LOG2_E)[None, :], taken(gate, tl.float32)[None, :]
    return keys * kept + key[:, None] * added, values * kept + value[:, None] * added


@triton.jit
def read_block(
    keys,
    values,
    shown,
    query,
    q_h,
    sink_key,
    sink_value,
    shown_sink,
    partial,
    peaks,
    norms,
    groups,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SINKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the queries of one token read in a block of slots, and in the sink."""
    for group in tl.range(0, groups, LINES, num_stages=1):
        line = group + tl.arange(0, LINES)
        inside = line < groups
        queries = load_rows(query, line * q_h, inside, D, KEY)
        score = matmul(queries, keys, DTYPE, PRECISION) * scale
        nothing = tl.full([LINES], float("-inf"), tl.float32)
        weight, _, top = softmax_of(tl.where(shown[None, :], score, float("-inf")), nothing)
        norm = tl.sum(weight, 1)
        acc = matmul(weight, tl.trans(values), DTYPE, PRECISION)
        if S > 0:
            at = tl.arange(0, SINKS)
            seen_sink = (at < S) & shown_sink
            sink = load_rows(sink_key, at * D, seen_sink, D, KEY)
            score = matmul(queries, tl.trans(sink), DTYPE, PRECISION) * scale
            weight, shrink, top = softmax_of(tl.where(seen_sink[None, :], score, float("-inf")), top)
            sink = load_rows(sink_value, at * DV, seen_sink, DV, VALUE)
            norm = norm * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None] + matmul(weight, sink, DTYPE, PRECISION)
        store_rows(partial, line * DV, inside, acc, DV, VALUE)
        tl.store(peaks + line, top, mask=inside)
        tl.store(norms + line, norm, mask=inside)


@triton.jit
def read_slots(
    slot_key,
    slot_value,
    after_key,
    after_value,
    new_key,
    new_value,
    new_gate,
    old_key,
    old_value,
    old_gate,
    query,
    sink_key,
    sink_value,
    partial,
    peaks,
    norms,
    nk_t,
    nv_t,
    ng_t,
    ok_t,
    ov_t,
    og_t,
    q_t,
    q_h,
    before,
    count,
    window,
    scale,
    task,
    groups,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SINKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOWED: tl.constexpr,
    RING: tl.constexpr,
    KEPT: tl.constexpr,
    LIVE: tl.constexpr,
    STEP: tl.constexpr,
):
    """A block of slots: commit token by token, and what the queries of each read in them (in block 0 with the sink)."""
    slot = task * SLOTS + tl.arange(0, SLOTS)
    there = slot < M
    key_at, key_there = slots_at(slot_key, slot, M, D, KEY)
    value_at, value_there = slots_at(slot_value, slot, M, DV, VALUE)
    keys = tl.load(key_at, mask=key_there, other=0.0)
    values = tl.load(value_at, mask=value_there, other=0.0)
    to_key, _ = slots_at(after_key, slot, M, D, KEY)
    to_value, _ = slots_at(after_value, slot, M, DV, VALUE)
    if STEP:
        keys, values = commit(
            keys,
            values,
            0,
            new_key,
            new_value,
            new_gate,
            old_key,
            old_value,
            old_gate,
            nk_t,
            nv_t,
            ng_t,
            ok_t,
            ov_t,
            og_t,
            slot,
            before,
            count,
            window,
            M,
            D,
            DV,
            KEY,
            VALUE,
            WINDOWED,
            RING,
            STEP,
        )
        if KEPT:
            tl.store(to_key, keys, mask=key_there)
            tl.store(to_value, values, mask=value_there)
        live = LIVE or before >= window
        read_block(
            keys,
            values,
            there & live,
            query,
            q_h,
            sink_key,
            sink_value,
            live & (task == 0),
            partial,
            peaks,
            norms,
            groups,
            scale,
            D,
            DV,
            S,
            KEY,
            VALUE,
            SINKS,
            DTYPE,
            PRECISION,
        )
    else:
        for i in tl.range(0, count, num_stages=1):
            keys, values = commit(
                keys,
                values,
                i,
                new_key,
                new_value,
                new_gate,
                old_key,
                old_value,
                old_gate,
                nk_t,
                nv_t,
                ng_t,
                ok_t,
                ov_t,
                og_t,
                slot,
                before,
                count,
                window,
                M,
                D,
                DV,
                KEY,
                VALUE,
                WINDOWED,
                RING,
                STEP,
            )
            live = LIVE or before + i >= window
            read_block(
                keys,
                values,
                there & live,
                query + i * q_t,
                q_h,
                sink_key,
                sink_value,
                live & (task == 0),
                partial + i * groups * DV,
                peaks + i * groups,
                norms + i * groups,
                groups,
                scale,
                D,
                DV,
                S,
                KEY,
                VALUE,
                SINKS,
                DTYPE,
                PRECISION,
            )
        if KEPT:
            tl.store(to_key, keys, mask=key_there)
            tl.store(to_value, values, mask=value_there)


@triton.jit
def read_window(
    query0,
    new_key,
    new_value,
    old_key,
    old_value,
    partial,
    peaks,
    norms,
    q_t,
    q_h,
    nk_t,
    nv_t,
    ok_t,
    ov_t,
    before,
    count,
    window,
    scale,
    share,
    block,
    slot_parts,
    tiles,
    lines,
    groups,
    D: tl.constexpr,
    DV: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    RING: tl.constexpr,
):
    """What a block of queries reads in a share of the window; the first share begins with the new tokens."""
    line = block * ROWS + tl.arange(0, ROWS)
    i, group = line // groups, line % groups
    real = i < count
    query = load_rows(query0, i * q_t + group * q_h, real, D, KEY)
    new = tl.arange(0, NEW)
    inside = (new < count) & (share == 0)
    keys = load_rows(new_key, new * nk_t, inside, D, KEY)
    values = load_rows(new_value, new * nv_t, inside, DV, VALUE)
    score = matmul(query, tl.trans(keys), DTYPE, PRECISION) * scale
    distance = i[:, None] - new[None, :]
    score = tl.where(inside[None, :] & (distance >= 0) & (distance < window), score, float("-inf"))
    weight, _, top = softmax_of(score, tl.full([ROWS], float("-inf"), tl.float32))
    norm = tl.sum(weight, 1)
    acc = matmul(weight, values, DTYPE, PRECISION)
    turn, fill = turn_of(before, window, RING), tl.minimum(before, window).to(tl.int32)
    for start in range(share * tiles * BLOCK, tl.minimum((share + 1) * tiles * BLOCK, window), BLOCK):
        place = start + tl.arange(0, BLOCK)
        age = tl.where(place < turn, place - turn + window, place - turn)
        held = (place < window) & (age >= window - fill)
        near = load_rows(old_key, place * ok_t, place < window, D, KEY)
        read = load_rows(old_value, place * ov_t, held, DV, VALUE)
        dots = matmul(query, tl.trans(near), DTYPE, PRECISION) * scale
        dots = tl.where(held[None, :] & (age[None, :] > i[:, None]), dots, float("-inf"))
        spread, shrink, top = softmax_of(dots, top)
        norm = norm * shrink + tl.sum(spread, 1)
        acc = acc * shrink[:, None] + matmul(spread, read, DTYPE, PRECISION)
    to = (slot_parts + share) * lines + line
    store_rows(partial, to * DV, real, acc, DV, VALUE)
    tl.store(peaks + to, top, mask=real)
    tl.store(norms + to, norm, mask=real)


@triton.jit
def combine_splits(
    partial,
    peaks,
    norms,
    out,
    mass,
    o_t,
    begin,
    count,
    length,
    slot_parts,
    parts,
    lines,
    groups,
    DV: tl.constexpr,
    VALUE: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The outputs of a head from what its parts left; what is padding comes after the real tokens and gets zeros."""
    column = tl.arange(0, VALUE)
    for start in range(0, lines, TOGETHER):
        line = start + tl.arange(0, TOGETHER)
        i, group = line // groups, line % groups
        top = tl.full([TOGETHER], float("-inf"), tl.float32)
        norm, old = tl.zeros([TOGETHER], tl.float32), tl.zeros([TOGETHER], tl.float32)
        acc = tl.zeros([TOGETHER, VALUE], tl.float32)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            inside = (part < parts)[:, None] & (i < count)[None, :]
            at = part[:, None] * lines + line[None, :]
            # What other programs wrote is not looked for in this multiprocessor's own cache.
            peak = tl.load(peaks + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
            sums = tl.load(norms + at, mask=inside, other=0.0, cache_modifier=".cg")
            whole = inside[:, :, None] & (column < DV)[None, None, :]
            place = at[:, :, None] * DV + column[None, None, :]
            read = tl.load(partial + place, mask=whole, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(top, tl.max(peak, 0))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weight, shrink = tl.exp2(peak - safe[None, :]), tl.exp2(top - safe)
            sums *= weight
            norm = norm * shrink + tl.sum(sums, 0)
            old = old * shrink + tl.sum(tl.where((part < slot_parts)[:, None], sums, 0.0), 0)
            acc = acc * shrink[:, None] + tl.sum(read * weight[:, :, None], 0)
            top = higher
        to = (begin + i) % length * o_t + group
        norm = tl.where(norm > 0, norm, 1.0)
        store_rows(out, to * DV, line < lines, acc / norm[:, None], DV, VALUE)
        tl.store(mass + to, old / norm, mask=line < lines)


@triton.jit(do_not_specialize=["length", "window", "shares", "tiles", "heads", "groups"])
def decode_kernel(
    q,
    k,
    v,
    q_slot,
    k_slot,
    log_gate,
    slot_key,
    slot_value,
    after_key,
    after_value,
    near_key,
    near_value,
    near_slot_key,
    near_gate,
    seen,
    arrival_counter,
    mask,
    sink_key,
    sink_value,
    partial,
    peaks,
    norms,
    out,
    mass,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    qs_b,
    qs_t,
    qs_h,
    ks_b,
    ks_t,
    ks_h,
    g_b,
    g_t,
    g_h,
    nk_b,
    nk_t,
    nk_h,
    nv_b,
    nv_t,
    nv_h,
    ns_b,
    ns_t,
    ns_h,
    ng_b,
    ng_t,
    ng_h,
    scale,
    length,
    window,
    shares,
    tiles,
    heads,
    groups,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    SLOTS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SINKS: tl.constexpr,
    GATES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOWED: tl.constexpr,
    RING: tl.constexpr,
    KEPT: tl.constexpr,
    LIVE: tl.constexpr,
    MASKED: tl.constexpr,
    SEPARATE: tl.constexpr,
    STEP: tl.constexpr,
):
    """out [B, T, HQ, DV] and mass [B, T, HQ] of T <= NEW tokens, and the state after them; programs (row, head, part).

    Slots go from slot_* to after_*, which may be the same, if KEPT. RING: the window near_* [B, W, H, ...] is a ring,
    gets the new tokens, and `seen` counts them; else it is oldest first and stays as it is. SEPARATE: slots have keys
    of their own. The window is cut into `shares` of `tiles` blocks of tokens; `scale` includes log2(e). STEP: T is 1.
    partial [B * H, parts, T * HQ / H, DV], peaks and norms [B * H, parts, T * HQ / H] hold what the parts give.
    """
    slot_parts: tl.constexpr = (M + SLOTS - 1) // SLOTS
    lines = length * groups
    blocks = (lines + ROWS - 1) // ROWS
    programs, parts = slot_parts + shares * blocks, slot_parts + shares
    pair = (tl.program_id(0) // programs).to(tl.int64)
    task = tl.program_id(0) % programs
    row, head = pair // heads, (pair % heads).to(tl.int32)
    new = tl.arange(0, NEW)
    begin, count = 0, length
    if MASKED and STEP:
        count = (tl.load(mask + row) != 0).to(tl.int32)
    elif MASKED:
        real = (new < length) & (tl.load(mask + row * length + new, mask=new < length, other=0) != 0)
        begin, count = tl.min(tl.where(real, new, NEW), 0), tl.sum(real.to(tl.int32), 0)
    before = tl.load(seen + row)
    new_key = k + row * k_b + head * k_h + begin * k_t
    new_value = v + row * v_b + head * v_h + begin * v_t
    new_slot_key = k_slot + row * ks_b + head * ks_h + begin * ks_t
    new_gate = log_gate + row * g_b + head * g_h + begin * g_t
    old_key, old_value = near_key + row * nk_b + head * nk_h, near_value + row * nv_b + head * nv_h
    old_slot_key, old_gate = near_slot_key + row * ns_b + head * ns_h, near_gate + row * ng_b + head * ng_h
    size = parts * lines
    partial_at, peak_at, norm_at = partial + pair * size * DV, peaks + pair * size, norms + pair * size

    if task < slot_parts:
        read_slots(
            slot_key + pair * M * D,
            slot_value + pair * M * DV,
            after_key + pair * M * D,
            after_value + pair * M * DV,
            new_slot_key,
            new_value,
            new_gate,
            old_slot_key,
            old_value,
            old_gate,
            q_slot + row * qs_b + begin * qs_t + head * groups * qs_h,
            sink_key + head * S * D if S > 0 else None,
            sink_value + head * S * DV if S > 0 else None,
            partial_at + task * lines * DV,
            peak_at + task * lines,
            norm_at + task * lines,
            ks_t,
            v_t,
            g_t,
            ns_t,
            nv_t,
            ng_t,
            qs_t,
            qs_h,
            before,
            count,
            window,
            scale,
            task,
            groups,
            M,
            D,
            DV,
            S,
            SLOTS,
            KEY,
            VALUE,
            SINKS,
            DTYPE,
            PRECISION,
            WINDOWED,
            RING,
            KEPT,
            LIVE,
            STEP,
        )
    elif WINDOWED:
        index = task - slot_parts
        read_window(
            q + row * q_b + begin * q_t + head * groups * q_h,
            new_key,
            new_value,
            old_key,
            old_value,
            partial_at,
            peak_at,
            norm_at,
            q_t,
            q_h,
            k_t,
            v_t,
            nk_t,
            nv_t,
            before,
            count,
            window,
            scale,
            index // blocks,
            index % blocks,
            slot_parts,
            tiles,
            lines,
            groups,
            D,
            DV,
            KEY,
            VALUE,
            ROWS,
            BLOCK,
            DTYPE,
            PRECISION,
            RING,
        )

    # All threads of a program have written before one of them says so.
    tl.debug_barrier()
    ticket = arrival_counter + row * (heads + 1)
    if tl.atomic_add(ticket + head, 1, sem="acq_rel", scope="gpu") == programs - 1:
        at = row * length * heads * groups + head * groups
        combine_splits(
            partial_at,
            peak_at,
            norm_at,
            out + at * DV,
            mass + at,
            heads * groups,
            begin,
            count,
            length,
            slot_parts,
            parts,
            lines,
            groups,
            DV,
            VALUE,
            TOGETHER,
        )
        tl.store(ticket + head, 0)
        if RING:
            if WINDOWED:
                inside = (new < count) & (new >= count - window)
                place = (turn_of(before, window, RING) + new) % window
                keys = load_rows(new_key, new * k_t, inside, D, KEY)
                store_rows(old_key, place * nk_t, inside, keys, D, KEY)
                values = load_rows(new_value, new * v_t, inside, DV, VALUE)
                store_rows(old_value, place * nv_t, inside, values, DV, VALUE)
                gates = load_rows(new_gate, new * g_t, inside, M, GATES)
                store_rows(old_gate, place * ng_t, inside, gates, M, GATES)
                if SEPARATE:
                    keys = load_rows(new_slot_key, new * ks_t, inside, D, KEY)
                    store_rows(old_slot_key, place * ns_t, inside, keys, D, KEY)
            if tl.atomic_add(ticket + heads, 1, sem="acq_rel", scope="gpu") == heads - 1:
                tl.store(seen + row, before + count)
                tl.store(ticket + heads, 0)
