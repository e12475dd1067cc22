"""Compile the decoding kernel for a GPU that is not present.

`python -m tests.triton.compile_decode '{"length": 16}' ...` prints a JSON line per shape, as `compile_chunk` does.
"""

from dataclasses import dataclass

import torch

from tests.triton import compile_chunk

compile_chunk.NAMES.setdefault(torch.int8, "i8")


@dataclass
class Shape:
    """A call of the decoding kernel: sizes, dtype and what is absent."""

    dtype: str = "bfloat16"
    length: int = 1
    heads: int = 8
    groups: int = 4
    dim: int = 128
    value_dim: int | None = None
    slots: int = 64
    window: int = 64
    sinks: int = 1
    batch: int = 64
    masked: bool = False
    separate: bool = True
    in_place: bool = True
    slots_active: bool = False
    max_rollback: int = 0


def call(s: Shape) -> None:
    """The launch of one shape, without running anything."""
    from nha.ops import NHAState, RingState
    from nha.ops.triton.decode import op

    q = torch.empty(s.batch, s.length, s.heads * s.groups, s.dim, dtype=getattr(torch, s.dtype))
    k = q.new_empty(s.batch, s.length, s.heads, s.dim)
    v = q.new_empty(s.batch, s.length, s.heads, s.value_dim or s.dim)
    gate = k.new_empty(s.batch, s.length, s.heads, s.slots)
    slot_qk = (q.clone(), k.clone()) if s.separate else (q, k)
    state = NHAState.empty(s.window, key=k, value=v, log_gate=gate, shared=not s.separate).padded()
    state.slots_active = s.slots_active
    sink = (q.new_empty(s.heads, s.sinks, s.dim), v.new_empty(s.heads, s.sinks, v.shape[3])) if s.sinks else None
    mask = torch.ones(s.batch, s.length, dtype=torch.bool) if s.masked else None
    options = {"scale": 0.1, "attention_mask": mask}
    if s.in_place:
        op.decode_in_place(q, k, v, gate, *slot_qk, sink, state=RingState.of(state, s.max_rollback), **options)
    else:
        op.decode(q, k, v, gate, *slot_qk, sink, state=state, keep=True, **options)


if __name__ == "__main__":
    compile_chunk.report(lambda options: compile_chunk.record(lambda: call(Shape(**options))))
