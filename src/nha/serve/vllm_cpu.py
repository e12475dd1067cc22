"""Copies of states between blocks, for prefix caching beside drafts on a CPU, where vLLM has no code for them.

A sequence with drafts leaves a state after each of its tokens, in blocks side by side. Before a step, the state after
the last token that stood moves to the block that is written next; after a step, the state at a block's end moves to
the block that prefix caching keeps. vLLM calls both by the names of its Triton kernels, with their arguments.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from torch import Tensor
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.v1.worker import mamba_utils


class StateTable(NamedTuple):
    """Where the states of all layers are, as vLLM's kernels get it: addresses, and sizes in bytes or elements.

    Attributes:
        tables: addresses of block tables, int64 [groups]; one has rows of `row_stride` int32.
        bases: addresses of the states' tensors, int64 [N].
        strides: bytes from one block of them to the next, int64 [N].
        element_sizes: bytes of an element, int32 [N].
        sizes: elements of a state, int64 [N].
        conv_widths: 0 for states that are copied whole, int32 [N].
        groups: whose block table they have, int32 [N].
    """

    tables: Tensor
    row_stride: int
    bases: Tensor
    strides: Tensor
    element_sizes: Tensor
    sizes: Tensor
    conv_widths: Tensor
    groups: Tensor
    row_counts: Tensor
    row_strides: Tensor

    def copy(self, row: int, source: int, target: int) -> None:
        """Copy all states of a sequence from the block in one column of its table to that in another."""
        if self.conv_widths.any():
            raise ValueError("expected states that are copied whole, got a convolution's")
        tables = self.tables.tolist()
        sizes = (self.sizes * self.element_sizes).tolist()
        states = zip(self.bases.tolist(), self.strides.tolist(), sizes, self.groups.tolist(), strict=True)
        for base, stride, size, group in states:
            before, after = (self.block(tables[group], row, column) for column in (source, target))
            ctypes.memmove(base + after * stride, base + before * stride, size)

    def block(self, table: int, row: int, column: int) -> int:
        """The block in a column of a sequence's table."""
        return ctypes.c_int32.from_address(table + 4 * (row * self.row_stride + column)).value


def copy_before_step(*args: Any, **options: Any) -> None:
    """Move states to the blocks that are written next: `precopy_mamba_align_fused_kernel`."""
    targets, sources, biases = (x.tolist() for x in args[:3])
    table, (mapping, count) = StateTable(*args[3:13]), args[13:15]
    for row in range(count) if mapping is None else mapping[:count].tolist():
        if row >= 0 and 0 <= sources[row] != targets[row]:
            table.copy(row, sources[row] + biases[row], targets[row])


def copy_after_step(*args: Any, block_size: int, **options: Any) -> None:
    """Move states at the ends of blocks to where they are kept: `postprocess_mamba_fused_kernel`."""
    if args[16] is not None:
        raise ValueError("expected sequences in the order of the batch, as vLLM's runner on a CPU has them")
    accepted, sources, scheduled, computed, drafted = (x.tolist() for x in args[:5])
    table, counts, count = StateTable(*args[5:15]), args[15], args[17]
    for row in range(count):
        first = computed[row] + scheduled[row] - drafted[row]  # tokens in the state of the first column
        end = (first + accepted[row] - 1) // block_size * block_size
        if end < first:
            continue
        target = end // block_size - 1
        if sources[row] == target:
            counts[row] = 1
        if sources[row] != target or end != first:
            table.copy(row, sources[row] + end - first, target)


KERNELS = {
    "precopy_mamba_align_fused_kernel": copy_before_step,
    "postprocess_mamba_fused_kernel": copy_after_step,
}


def register_copies() -> None:
    """Let vLLM's runner in this process call these in the place of its kernels.

    Its own `register_kernels` looks at every module, and fails where the library that drafts is loaded.
    """
    for name, function in KERNELS.items():
        kernel = getattr(mamba_utils, name)
        if not isinstance(kernel, KernelOverride):
            setattr(mamba_utils, name, KernelOverride(kernel, function))
