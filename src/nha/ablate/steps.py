"""Optimizer steps on recall tasks: the loss of the answers alone, and on a GPU CUDA graphs of whole steps."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.data.synthetic import IGNORED, TaskSize
from nha.distill.cuda_graphs import CUDAGraphs
from nha.distill.loss import Head
from nha.models.config import FULL
from nha.models.head import hidden_states
from nha.models.windows import temporary_window
from nha.ops.heads import all_windows
from nha.train.loss import cross_entropy

WEIGHT_DECAY, MAX_GRAD_NORM, BETAS = 0.1, 1.0, (0.9, 0.98)
WARMUP_STEPS = 2  # of each shape before its graph is captured: they compile
RECOMPILE_LIMIT = 256  # a process trains several models, each with graphs of its own


class Batch(NamedTuple):
    """Examples and what they ask.

    Attributes:
        ids: [N, T] tokens.
        at: [N, A] positions of the answers.
        wanted: [N, A] tokens to name there, -100 where an example asks less than A times.
    """

    ids: Tensor
    at: Tensor
    wanted: Tensor


def answer_positions(targets: Tensor, count: int) -> Tensor:
    """Positions [N, count] of all targets in each row of targets [N, T], and of others where there are fewer.

    >>> answer_positions(torch.tensor([[-100, 7, -100, 8]]), 2).tolist()
    [[1, 3]]
    """
    # A mask would have to tell the host how many entries it selects, and the GPU would wait.
    return (targets == IGNORED).int().sort(dim=1, stable=True).indices[:, :count]


def draw_batch(size: TaskSize, count: int, generator: torch.Generator) -> Batch:
    """`count` examples on the generator's device."""
    ids, targets = size.draw(count, generator)
    at = answer_positions(targets, size.max_answers)
    return Batch(ids, at, targets.gather(1, at))


def draw_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches; on a GPU each is drawn on a stream of its own while the one before is trained on.

    Drawing sorts random numbers, which keeps few multiprocessors busy for a third of a step.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def draw() -> tuple[Batch | None, Any]:
        with torch.cuda.stream(stream):
            return next(batches, None), stream.record_event()

    batch, drawn = draw()
    while batch is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(drawn)
        for x in batch:
            x.record_stream(current)
        following = draw()
        yield batch
        batch, drawn = following


def answer_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states [N, A, hidden] at the positions of the answers, before the head."""
    hidden = hidden_states(model, batch.ids)
    return hidden.gather(1, batch.at[..., None].expand(-1, -1, hidden.shape[2]))


def answer_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy [] of the answers, under autocast to bfloat16 on a GPU. No other position has logits.

    >>> from nha import NHAConfig, NHAForCausalLM
    >>> model = NHAForCausalLM(NHAConfig.tiny(vocab_size=64))
    >>> batch = draw_batch(TaskSize("mqar", 32, 4, vocab_size=64), 2, torch.Generator().manual_seed(0))
    >>> labels = torch.full_like(batch.ids, IGNORED).scatter(1, batch.at, batch.wanted)
    >>> whole = torch.nn.functional.cross_entropy(model(batch.ids).logits.flatten(0, 1), labels.flatten())
    >>> torch.allclose(answer_loss(model, batch), whole)
    True
    """
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=batch.ids.is_cuda):
        hidden = answer_states(model, batch)
        return cross_entropy(hidden.flatten(0, 1), Head.of(model), batch.wanted.flatten())


def can_compile(model: PreTrainedModel) -> bool:
    """Whether layers of a model may be compiled in steps that are captured: it is of this library, and no layer or head
    has full attention.

    With such a layer the capture of compiled steps failed on an H200 (torch 2.11); that of eager ones does not.

    >>> from nha import NHAConfig, NHAForCausalLM
    >>> [can_compile(NHAForCausalLM(NHAConfig.tiny(window_sizes=windows))) for windows in (16, [0, -1])]
    [True, False]
    """
    windows = getattr(model.config, "window_sizes", None)
    return windows is not None and FULL not in all_windows(windows)


def first_error(error: BaseException) -> BaseException:
    """The error during whose handling others came up: ending a capture that has failed raises one of its own.

    >>> try:
    ...     try:
    ...         raise RuntimeError("first")
    ...     finally:
    ...         raise RuntimeError("second")
    ... except RuntimeError as error:
    ...     print(first_error(error))
    first
    """
    while error.__context__ is not None:
        error = error.__context__
    return error


def leave_capture(stream: torch.cuda.Stream) -> None:
    """After a capture that failed: run on `stream` again, and let random numbers be drawn.

    The end of such a capture restores neither the stream nor the state of the random numbers. Compiling another model
    would then fail, since it saves that state.
    """
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device.index]
    generator.graphsafe_set_state(generator.clone_state())


class Steps:
    """Takes optimizer steps (AdamW, clipped gradients) on a model.

    On a GPU decoder layers are compiled, and from its third batch on a shape is a CUDA graph of the whole step:
    launching the kernels of a small model takes longer than they run. Steps run on a stream of the model's own, so
    that the steps of several small models, of which none fills the GPU, run at once: `join` waits for them.

    Args:
        model: trained in place.
        compiled: compile decoder layers; default: on a GPU, where `can_compile`.
        captured: use CUDA graphs; default: on a GPU.

    Attributes:
        prepared: whether the last step compiled or captured something.
        stream: where the steps run, None on a CPU.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool | None = None, captured: bool | None = None):
        self.model, on_gpu = model.train(), model.device.type == "cuda"
        self.layers = self._compile() if (on_gpu and can_compile(model) if compiled is None else compiled) else []
        self.graphs = CUDAGraphs() if (on_gpu if captured is None else captured) else None
        self.counts: Counter = Counter()
        self.captured: dict[tuple, tuple[Batch, Tensor, Callable[[], None]]] = {}
        self.prepared = False
        self.stream = torch.cuda.Stream(model.device) if on_gpu else None
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.parameters = [p for group in groups for p in group["params"]]
        self.lr = torch.zeros((), device=model.device)  # a graph reads it anew in each step
        for group in groups:
            group["lr"] = self.lr if on_gpu else 0.0
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=on_gpu, capturable=on_gpu)

    def __call__(self, batch: Batch, lr: float, window: int | None = None) -> Tensor:
        """Start a step, with this window in layers without full attention, by default their own.

        Returns the loss [] before it, which may be read after `join` and which the next overwrites.
        """
        with self._own_stream(batch), nullcontext() if window is None else temporary_window(self.model, window):
            return self._take((*batch.ids.shape, batch.at.shape[1], window), batch, lr)

    def join(self) -> None:
        """Let the current stream wait for all steps that have started."""
        if self.stream is not None:
            torch.cuda.current_stream(self.model.device).wait_stream(self.stream)

    @contextmanager
    def _own_stream(self, batch: Batch) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.model.device))
        for x in batch:
            x.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield

    def _take(self, key: tuple, batch: Batch, lr: float) -> Tensor:
        self._set_lr(lr)
        self.counts[key] += 1
        self.prepared = key not in self.captured and self.counts[key] <= WARMUP_STEPS + 1
        if key not in self.captured and not self._capture(key, batch):
            return self._step(batch)
        inputs, loss, replay = self.captured[key]
        for given, own in zip(batch, inputs, strict=True):
            own.copy_(given)
        replay()
        assert self.graphs is not None
        self.graphs.join()
        return loss

    def _step(self, batch: Batch) -> Tensor:
        for p in self.parameters:
            p.grad = None
        with self._compiled_layers():
            loss = answer_loss(self.model, batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        return loss.detach()

    def _capture(self, key: tuple, batch: Batch) -> bool:
        """Capture the step of a shape that comes often. Returns False where it is not a graph, or not yet."""
        if self.graphs is None or self.counts[key] <= WARMUP_STEPS:
            return False
        inputs = Batch(*(x.clone() for x in batch))
        try:
            loss, replay = self.graphs("step", lambda: self._step(inputs))  # type: ignore[arg-type]
        except RuntimeError as error:  # a library may wait for the GPU, which no graph holds
            warnings.warn(f"training without CUDA graphs: {str(first_error(error)).splitlines()[0]}", stacklevel=5)
            self.graphs = None
            if self.stream is not None:
                leave_capture(self.stream)
            return False
        self.captured[key] = inputs, loss, replay  # type: ignore[assignment]
        return True

    def _set_lr(self, lr: float) -> None:
        self.lr.fill_(lr)
        if self.model.device.type != "cuda":
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    def _compile(self) -> list[tuple[Any, Any]]:
        """Decoder layers and their compiled calls, which measuring on batches of other sizes must not use."""
        torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        found = []
        decoder: Any = self.model.get_decoder()
        for layer in decoder.layers:
            layer.compile(dynamic=False)
            found.append((layer, layer._compiled_call_impl))
            layer._compiled_call_impl = None
        return found

    @contextmanager
    def _compiled_layers(self) -> Iterator[None]:
        for layer, call in self.layers:
            layer._compiled_call_impl = call
        try:
            yield
        finally:
            for layer, _ in self.layers:
                layer._compiled_call_impl = None
