"""The arguments of one call of the chunk kernels, and how they are cut into programs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nha.ops.backends import shared_memory
from nha.ops.triton.chunk.tiling import BlockSizes, Plan, block_sizes, make_plan, stored_chunks

STATE_WIDTH = 128  # columns of the slots that one program of the serial pass holds


class Inputs(NamedTuple):
    """Arguments of the operator; `q_slot`, `k_slot` None where they are `q`, `k`.

    The key side holds `past` + T tokens; the axis N is sequences.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_slot: Tensor | None
    k_slot: Tensor | None
    log_gate: Tensor
    slot_key: Tensor | None  # [N, H, M, D] float32
    slot_value: Tensor | None
    sink_key: Tensor | None  # [H, S, D]
    sink_value: Tensor | None
    first_key: Tensor | None  # [N] int64, index of the first key that is not empty
    cu_seqlens: Tensor | None
    window: int
    past: int
    scale: float
    slots_active: bool

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.k.shape[2]

    @property
    def groups(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    @property
    def slots(self) -> int:
        return self.log_gate.shape[3]

    @property
    def dims(self) -> tuple[int, int]:
        return self.q.shape[3], self.v.shape[3]

    @property
    def sinks(self) -> int:
        return 0 if self.sink_key is None else self.sink_key.shape[1]

    @property
    def slot_query(self) -> Tensor:
        return self.q if self.q_slot is None else self.q_slot

    @property
    def token_key(self) -> Tensor:
        return self.k if self.k_slot is None else self.k_slot

    def contiguous(self) -> Inputs:
        """The inputs with the last dimension contiguous; slots and sink contiguous in all."""
        named = self._asdict()
        for name in ("q", "k", "v", "q_slot", "k_slot", "log_gate"):
            x = named[name]
            if x is not None and x.stride(-1) != 1:
                named[name] = x.contiguous()
        for name in ("slot_key", "slot_value", "sink_key", "sink_value"):
            if named[name] is not None:
                named[name] = named[name].contiguous()
        return Inputs(**named)

    def block_sizes(self) -> BlockSizes:
        shared = shared_memory(self.q.device)
        return block_sizes(
            self.q.dtype, *self.dims, self.slots, self.sinks, shared, self.window, self.groups, self.log_gate.dtype
        )


class ChunkStates(NamedTuple):
    """Slots before every chunk, in the dtype of `v` [chunks, H, M, ...], and its log decay, float32 [chunks, H, M]."""

    key: Tensor
    value: Tensor
    decay: Tensor

    @classmethod
    def empty(cls, inputs: Inputs, chunk: int) -> ChunkStates:
        """Uninitialised states of a call whose chunks hold `chunk` tokens."""
        packed = None if inputs.cu_seqlens is None else inputs.sequences
        total = stored_chunks(inputs.q.shape[1], inputs.past, inputs.window, chunk, packed)
        shape = (total * inputs.q.shape[0] if packed is None else total, inputs.heads, inputs.slots)
        key, value = (inputs.v.new_empty(*shape, dim) for dim in inputs.dims)
        return cls(key, value, inputs.v.new_empty(shape, dtype=torch.float32))


class Call(NamedTuple):
    """One call, and how it is cut into programs."""

    inputs: Inputs
    plan: Plan
    sizes: BlockSizes

    @classmethod
    def of(cls, inputs: Inputs) -> Call:
        inputs = inputs.contiguous()
        sizes = inputs.block_sizes()
        columns = inputs.heads * count_columns(inputs.dims, STATE_WIDTH)
        batch, length = inputs.q.shape[:2]
        plan = make_plan(batch, length, inputs.past, inputs.window, sizes, columns, inputs.cu_seqlens)
        return cls(inputs, plan, sizes)

    @property
    def tokens(self) -> tuple[int, int, int, int]:
        """The token counts that every kernel takes: length, past, window, chunks."""
        return self.plan.length, self.plan.past, self.plan.window, self.plan.chunks

    @property
    def shapes(self) -> dict[str, int]:
        """Constants of kernels that process slots."""
        dim, value_dim = self.inputs.dims
        return {"M": self.inputs.slots, "D": dim, "DV": value_dim, "CHUNK": self.sizes.chunk}

    @property
    def tiles(self) -> dict[str, object]:
        """Constants of kernels that multiply tiles."""
        sizes = self.sizes
        return {
            "BLOCK_M": sizes.block_m,
            "BLOCK_D": sizes.block_d,
            "BLOCK_DV": sizes.block_dv,
            "DTYPE": sizes.dtype,
            "PRECISION": sizes.precision,
        }

    @property
    def sink_tiles(self) -> dict[str, object]:
        """Constants of kernels that also see the sink, and gate factors."""
        return {"S": self.inputs.sinks, "BLOCK_S": self.sizes.block_s, "GATE_DTYPE": self.sizes.gate_dtype}

    @property
    def options(self) -> dict[str, bool]:
        """Constants of kernels that see the window."""
        return {
            "PACKED": self.plan.packed,
            "HAS_PREFIX_MASK": self.inputs.first_key is not None,
            "HAS_WINDOW": self.plan.window > 0,
            "SPLIT_INNER_LOOP": self.sizes.split_inner_loop,
        }


def strides(*tensors: Tensor) -> list[int]:
    """(batch, token, head) strides of tensors [B, T, heads, dim]."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def count_columns(dims: tuple[int, int], width: int) -> int:
    """Programs for the columns of a slot's key and value."""
    return sum(-(-dim // width) for dim in dims)
