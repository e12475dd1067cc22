"""Forward and backward pass as one CUDA graph: launching its thousands of kernels takes longer than they run."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nha.models.decode_graph import without_collection

Batch = dict[str, Tensor]
Pass = tuple[Tensor, Tensor, list[Tensor | None]]  # loss, sums and gradients

WARMUP_PASSES = 2  # before one is captured: they compile
MAX_GRAPHS = 8  # each has gradients of its own


def forward_backward(model: Any, parameters: list[nn.Parameter], batch: Batch, max_seq_len: int) -> Pass:
    """The loss of a `Distillation`, detached, its sums, and the gradients, which the parameters do not keep."""
    for p in parameters:
        p.grad = None
    loss, sums = model(**batch, max_seq_len=max_seq_len)
    loss.backward()
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return loss.detach(), sums, grads


class Capture(Protocol):
    """Captures passes; `CUDAGraphs` does it on a GPU."""

    def __call__(self, name: str, run: Callable[[], Pass]) -> tuple[Pass, Callable[[], None]]:
        """Return the tensors that a replay fills, and a function that starts a replay."""
        ...

    def join(self) -> None:
        """Let the current stream wait for all replays that have started."""


class CUDAGraphs:
    """Captures CUDA graphs.

    Graphs of one name run one after another and share the memory of what none of them returns; graphs of different
    names run concurrently, small ones where large ones leave multiprocessors idle.
    """

    def __init__(self) -> None:
        self.pools: dict[str, Any] = {}
        self.streams: dict[str, torch.cuda.Stream] = {}

    def __call__(self, name: str, run: Callable[[], Pass]) -> tuple[Pass, Callable[[], None]]:
        """As `Capture` specifies."""
        torch.cuda.empty_cache()  # the graph gets the memory that earlier passes held
        stream = self.streams.setdefault(name, torch.cuda.Stream())
        graph = torch.cuda.CUDAGraph()
        # On the stream of its name: cuBLAS has one workspace a stream, with counters that two concurrent products
        # would spoil. Another thread may pin memory meanwhile.
        recording = torch.cuda.graph(graph, self.pools.get(name), stream, capture_error_mode="thread_local")
        with without_collection(), recording:
            outputs = run()
        self.pools[name] = graph.pool()

        def replay() -> None:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()

        return outputs, replay

    def join(self) -> None:
        """As `Capture` specifies."""
        for stream in self.streams.values():
            torch.cuda.current_stream().wait_stream(stream)


@dataclass
class CapturedPass:
    """The tensors that a replay reads and fills."""

    inputs: Batch
    outputs: Pass
    replay: Callable[[], None]


@dataclass
class CUDAGraphRunner:
    """Runs forward and backward passes of a `Distillation`; passes of a shape that comes often are CUDA graphs.

    A graph belongs to a name, shapes and the windows of the layers. The gradients it returns are overwritten by the
    next pass of that name and by no other.
    """

    model: Any
    parameters: list[nn.Parameter]
    capture: Capture | None = field(default_factory=CUDAGraphs)
    counts: Counter = field(default_factory=Counter)
    captured: dict[tuple, CapturedPass] = field(default_factory=dict)

    def __call__(self, batches: Sequence[tuple[str, Batch]], max_seq_len: int) -> list[Pass]:
        """For batches of different names: the loss, detached, the sums and the gradients of the parameters.

        A tensor of a batch may be on the CPU.
        """
        passes = [self._start(name, batch, max_seq_len) for name, batch in batches]
        if self.capture is not None:
            self.capture.join()
        return [(loss, sums.clone(), grads) for loss, sums, grads in passes]

    def _start(self, name: str, batch: Batch, max_seq_len: int) -> Pass:
        """Run one pass, or start its replay and return the tensors that it fills."""
        key = (name, max_seq_len, self.model.current_windows, *(x.shape for x in batch.values()))
        self.counts[key] += 1
        device = self.parameters[0].device
        if key not in self.captured:
            batch = {n: x.to(device, non_blocking=True) for n, x in batch.items()}
            if self.capture is None or self.counts[key] <= WARMUP_PASSES or len(self.captured) == MAX_GRAPHS:
                return forward_backward(self.model, self.parameters, batch, max_seq_len)
            inputs = {n: x.clone() for n, x in batch.items()}
            self.capture.join()
            try:
                outputs, replay = self.capture(
                    name, lambda: forward_backward(self.model, self.parameters, inputs, max_seq_len)
                )
            except torch.OutOfMemoryError:
                warnings.warn("no memory for another CUDA graph, running passes without", stacklevel=3)
                self.capture = None
                return forward_backward(self.model, self.parameters, batch, max_seq_len)
            self.captured[key] = CapturedPass(inputs, outputs, replay)
        captured = self.captured[key]
        for n, x in captured.inputs.items():
            x.copy_(batch[n], non_blocking=True)
        captured.replay()
        return captured.outputs
