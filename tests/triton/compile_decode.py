"""Compile the decoding kernel for a GPU that is not present.

`python -m tests.triton.compile_decode '{"length": 16}' ...` prints a JSON line per shape, as `compile_chunk` does.
"""

import torch

from tests.triton import compile_chunk

compile_chunk.NAMES.setdefault(torch.int8, "i8")


def call(
    dtype="bfloat16",
    length=1,
    heads=8,
    groups=4,
    dim=128,
    value_dim=None,
    slots=64,
    window=64,
    sinks=1,
    batch=64,
    masked=False,
    separate=True,
    in_place=True,
    slots_active=False,
):
    """The launch of one shape, without running anything."""
    from nha.ops import NHAState, RingState
    from nha.ops.triton.decode import op

    q = torch.empty(batch, length, heads * groups, dim, dtype=getattr(torch, dtype))
    k, v = q.new_empty(batch, length, heads, dim), q.new_empty(batch, length, heads, value_dim or dim)
    gate = k.new_empty(batch, length, heads, slots)
    slot_qk = (q.clone(), k.clone()) if separate else (q, k)
    state = NHAState.empty(window, key=k, value=v, log_gate=gate, shared=not separate).padded()
    state.slots_active = slots_active
    sink = (q.new_empty(heads, sinks, dim), v.new_empty(heads, sinks, v.shape[3])) if sinks else None
    options = {"scale": 0.1, "attention_mask": torch.ones(batch, length, dtype=torch.bool) if masked else None}
    if in_place:
        op.decode_in_place(q, k, v, gate, *slot_qk, sink, state=RingState.of(state), **options)
    else:
        op.decode(q, k, v, gate, *slot_qk, sink, state=state, keep=True, **options)


if __name__ == "__main__":
    compile_chunk.report(lambda options: compile_chunk.record(lambda: call(**options)))
