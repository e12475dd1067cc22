"""Compile the decoding kernel for a GPU that is not there: `python -m tests.triton.decode_only '{"length": 16}' ...`.

Prints a JSON line per shape, as `compile_only` does for the other kernels.
"""

import torch

from tests.triton import compile_only

compile_only.NAMES.setdefault(torch.int8, "i8")


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
    from nha.ops.triton.decode import op as step

    q = torch.empty(batch, length, heads * groups, dim, dtype=getattr(torch, dtype))
    k, v = q.new_empty(batch, length, heads, dim), q.new_empty(batch, length, heads, value_dim or dim)
    gate = k.new_empty(batch, length, heads, slots)
    own = (q.clone(), k.clone()) if separate else (q, k)
    state = NHAState.empty(window, key=k, value=v, log_gate=gate, shared=not separate)
    state.slots_active = slots_active
    sink = (q.new_empty(heads, sinks, dim), v.new_empty(heads, sinks, v.shape[3])) if sinks else None
    options = {"scale": 0.1, "attention_mask": torch.ones(batch, length, dtype=torch.bool) if masked else None}
    if in_place:
        step.decode_in_place(q, k, v, gate, *own, sink, state=RingState.of(state), **options)
    else:
        step.decode(q, k, v, gate, *own, sink, state=state, keep=True, **options)


if __name__ == "__main__":
    compile_only.report(lambda options: compile_only.record(lambda: call(**options)))
