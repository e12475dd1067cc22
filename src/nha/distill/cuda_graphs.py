"""A training pass as one CUDA graph: launching its thousands of kernels takes longer than they run."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Pass = tuple[Tensor, Tensor, list[Tensor | None]]

WARM = 2  # passes before one is recorded: they compile
MOST = 8  # recordings, each with gradients of its own


def forward_backward(model: Any, parameters: list[nn.Parameter], batch: Batch, longest: int) -> Pass:
    """The loss of a `Distillation`, detached, its sums, and the gradients, which the parameters do not keep."""
    for p in parameters:
        p.grad = None
    loss, sums = model(**batch, longest=longest)
    loss.backward()
    grads = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return loss.detach(), sums, grads


class Record(Protocol):
    """Makes recordings."""

    def __call__(self, name: str, run: Callable[[], Pass]) -> tuple[Pass, Callable[[], None]]:
        """What `run` returns, of no value yet, and a function that begins to fill it in."""
        ...

    def join(self) -> None:
        """What is done next comes after all replays that have begun."""


class CudaGraphs:
    """Records what a function does on the GPU.

    Recordings of one name follow one another and share the memory of what none of them returns; those of different
    names run side by side, the small ones where the large ones leave multiprocessors idle.
    """

    def __init__(self) -> None:
        self.pools: dict[str, Any] = {}
        self.streams: dict[str, torch.cuda.Stream] = {}

    def __call__(self, name: str, run: Callable[[], Pass]) -> tuple[Pass, Callable[[], None]]:
        """As `Record` says."""
        torch.cuda.empty_cache()  # the recording gets memory that earlier passes held
        stream = self.streams.setdefault(name, torch.cuda.Stream())
        graph = torch.cuda.CUDAGraph()
        # On the stream of its name: a stream has its own workspace for matrix products, with counters that two products
        # at a time would spoil. Another thread may pin memory meanwhile.
        with torch.cuda.graph(graph, self.pools.get(name), stream, capture_error_mode="thread_local"):
            found = run()
        self.pools[name] = graph.pool()

        def replay() -> None:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()

        return found, replay

    def join(self) -> None:
        """As `Record` says."""
        for stream in self.streams.values():
            torch.cuda.current_stream().wait_stream(stream)


@dataclass
class Recording:
    """Tensors that a replay reads and writes, where they are."""

    inputs: Batch
    found: Pass
    replay: Callable[[], None]


@dataclass
class Recorder:
    """Forward and backward passes of a `Distillation`; one that comes often is recorded and then replayed.

    A pass is known by its name, its shapes and the windows of the layers. The gradients it returns are overwritten by
    the next pass of that name and by no other.
    """

    model: Any
    parameters: list[nn.Parameter]
    record: Record | None = field(default_factory=CudaGraphs)
    seen: Counter = field(default_factory=Counter)
    recordings: dict[tuple, Recording] = field(default_factory=dict)

    def __call__(self, batches: Sequence[tuple[str, Batch]], longest: int) -> list[Pass]:
        """For batches of different names: the loss, detached, the sums and the gradients of the parameters.

        A tensor of a batch may be on the CPU.
        """
        found = [self._pass(name, batch, longest) for name, batch in batches]
        if self.record is not None:
            self.record.join()
        return [(loss, sums.clone(), grads) for loss, sums, grads in found]

    def _pass(self, name: str, batch: Batch, longest: int) -> Pass:
        """One pass, or what its replay, which has begun, will fill in."""
        key = (name, longest, *self.model.windows_in_use, *(x.shape for x in batch.values()))
        self.seen[key] += 1
        device = self.parameters[0].device
        if key not in self.recordings:
            batch = {n: x.to(device, non_blocking=True) for n, x in batch.items()}
            if self.record is None or self.seen[key] <= WARM or len(self.recordings) == MOST:
                return forward_backward(self.model, self.parameters, batch, longest)
            inputs = {n: x.clone() for n, x in batch.items()}
            self.record.join()
            try:
                found, replay = self.record(
                    name, lambda: forward_backward(self.model, self.parameters, inputs, longest)
                )
            except torch.OutOfMemoryError:
                warnings.warn("no memory for another CUDA graph, running passes without", stacklevel=3)
                self.record = None
                return forward_backward(self.model, self.parameters, batch, longest)
            self.recordings[key] = Recording(inputs, found, replay)
        recording = self.recordings[key]
        for n, x in recording.inputs.items():
            x.copy_(batch[n], non_blocking=True)
        recording.replay()
        return recording.found
