"""Segments read into a ring with spare places, whose newest tokens can be taken back at no cost."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nha.models.segment import Reading, Segment, attend, decode, writes_in_place
from nha.ops import NHAState, RingState
from nha.ops.backends import needs_grad
from nha.ops.state import MAX_NEW


def supports_rollback(segment: Segment, state: NHAState | None) -> bool:
    """Whether a segment can be read into a ring: one sequence a row, and no gradient to go through the state."""
    before = () if state is None else state.tensors().values()
    return segment.cu_seqlens is None and not needs_grad([*segment.tensors, *before])


def attend_with_rollback(
    segment: Segment, reading: Reading, state: NHAState | None, max_rollback: int
) -> tuple[Tensor, RingState, int | None]:
    """Read a segment as `attend` does, into a ring of `max_rollback` spare places.

    Returns the output [B, T, HQ, Dv], the ring after the segment (the given one where it fits, overwritten), and how
    many of the segment's tokens can be taken back; None says that all tokens before it are in the slots as well.

    A segment longer than `max_rollback` is read in two parts, of which the second can be taken back.
    """
    length, whole = segment.length, segment.mask is None
    if length <= max_rollback and whole:
        ring = ring_of(state, segment, reading, max_rollback)
        short = length <= MAX_NEW and state is not None and reading.observe_mass is None
        if short and writes_in_place(segment, reading, ring):
            return decode(segment, reading, ring), ring, length
        before = ring.append(segment.key, segment.value, segment.log_gate, segment.slot_key)
        out, _ = attend(segment, reading, None if state is None else before)
        return out, ring, length
    before = state.aligned() if isinstance(state, RingState) else state
    first = state is None and length <= reading.window_size  # nothing is written, and the original attention reads it
    head, tail = segment.part(0, max(length - max_rollback, 0)), segment.part(max(length - max_rollback, 0), length)
    if first or not head.length or reading.observe_mass is not None or not has_real_tokens(tail):
        out, after = attend(segment, reading, before, keep=True)
        assert after is not None
        return out, RingState.of(after, max_rollback), tail.length if first and has_real_tokens(tail) else None
    reading, tail.mask = replace(reading, base=None), None
    out, after = attend(head, reading, before, keep=True)
    rest, ring, count = attend_with_rollback(tail, reading, after, max_rollback)
    return torch.cat([out, rest], 1), ring, count


def has_real_tokens(segment: Segment) -> bool:
    """Whether no token of a segment is padding."""
    return segment.mask is None or bool(segment.mask.all())


def ring_of(state: NHAState | None, segment: Segment, reading: Reading, max_rollback: int) -> RingState:
    """The ring to write a segment into: the given one where it has as many spare places."""
    if isinstance(state, RingState) and state.max_rollback == max_rollback:
        return state
    if state is None:
        state = NHAState.empty(
            reading.window_size,
            key=segment.key,
            value=segment.value,
            log_gate=segment.log_gate,
            shared=segment.slot_key is None,
        )
    return RingState.of(state, max_rollback)
