"""Training and measuring one model on recall tasks of random tokens, as Zoology does: one model for all sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.ablate.steps import Batch, Steps, answer_states, draw_ahead, draw_batch
from nha.data.synthetic import IGNORED, TaskSize
from nha.errors import OutOfTime
from nha.evaluate.bootstrap import interval
from nha.models.head import head_logits
from nha.train.rows import draw_window

VALID_SEED, TEST_SEED = 1 << 20, 1 << 21  # seeds of training are below
WARMUP = 0.1
PROBE_STEPS = 20  # that are not timed, and that are timed at least
VALID_EXAMPLES = 256


@dataclass(frozen=True)
class RecallPlan:
    """How models learn recall, and what they are measured on.

    Attributes:
        train: sizes to train on; every batch is of one of them.
        weights: how often each is drawn.
        test: sizes to measure on.
        steps: batches to train on.
        batch_size: examples of a batch, fewer where they would hold more than `batch_tokens` tokens.
        batch_tokens: tokens of a batch, at most.
        examples: of each size to measure on.
        valid_every: steps between looks at the accuracy, which end a run early once all are above `enough`.
        enough: accuracy at which a model has learned a size.
    """

    train: tuple[TaskSize, ...]
    weights: tuple[float, ...]
    test: tuple[TaskSize, ...]
    steps: int = 4000
    batch_size: int = 256
    batch_tokens: int = 65536
    examples: int = 1000
    valid_every: int = 250
    enough: float = 0.995

    def __post_init__(self) -> None:
        if not self.train or not self.test or len(self.weights) != len(self.train):
            raise ValueError(
                f"expected sizes to train on, a weight for each and sizes to measure on, got {len(self.train)}, "
                f"{len(self.weights)} and {len(self.test)}"
            )
        if min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise ValueError(f"expected weights of at least 0 and one above, got {list(self.weights)}")

    @property
    def vocab_size(self) -> int:
        """Tokens of the largest vocabulary."""
        return max(size.vocab_size for size in (*self.train, *self.test))

    def batch_of(self, size: TaskSize) -> int:
        """Examples of a batch of this size."""
        return max(1, min(self.batch_size, self.batch_tokens // size.seq_len))

    def batches(self, seed: int, device: torch.device) -> Iterator[Batch]:
        """The batches of all steps, a function of the seed and the kind of device."""
        weights = np.array(self.weights) / sum(self.weights)
        order = np.random.default_rng([seed, 1]).choice(len(self.train), self.steps, p=weights)
        generator = torch.Generator(device).manual_seed(seed)
        for index in order:
            size = self.train[index]
            yield draw_batch(size, self.batch_of(size), generator)


@dataclass(frozen=True)
class SizeScore:
    """Accuracy over all answers of one size, with its 95 % bootstrap interval over examples, and on validation data."""

    size: TaskSize
    accuracy: float
    interval: tuple[float, float]
    count: int
    valid_accuracy: float


@dataclass(frozen=True)
class RecallOutcome:
    """One trained and measured model."""

    scores: tuple[SizeScore, ...]
    steps: int
    tokens: int
    seconds: float
    loss: float


def answers(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits [N, A, V] in float32 at the positions where a batch asks something."""
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=batch.ids.is_cuda):
        return head_logits(model, answer_states(model, batch)).float()


def lr_factor(step: int, steps: int) -> float:
    """The learning rate of a step relative to its peak: a linear warm-up, then a cosine to 0.

    >>> [round(lr_factor(step, 100), 2) for step in (0, 9, 55, 100)]
    [0.1, 1.0, 0.5, 0.0]
    """
    warmup = WARMUP * steps
    if step + 1 < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


Progress = Callable[[int, int, float], None]


@dataclass
class Learner:
    """A model on its way through the steps of a plan.

    Attributes:
        model: trained in place.
        lr: its learning rate at the peak.
        steps: takes its steps.
        seed: of its batches.
        windows: of which every step draws one for all layers without full attention; none: the model's own.
        taken: steps that it has taken.
        tokens: that it has read.
        seconds: since all began, when it was trained.
        loss: of its last step [].
        failure: why it was given up, if it was.
        done: whether it takes no further step.
    """

    model: PreTrainedModel
    lr: float
    steps: Steps
    seed: int = 0
    windows: tuple[int, ...] = ()
    taken: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    failure: Exception | None = None
    done: bool = False

    def step(self, batch: Batch, factor: float) -> None:
        """Start a step; the learning rate is `factor` times its peak. A step that cannot run is its failure."""
        window = draw_window(self.windows, self.seed, self.taken) if self.windows else None
        with self.failing():
            self.loss = self.steps(batch, self.lr * factor, window)
        if self.done:
            return
        self.taken += 1
        self.tokens += batch.ids.numel()

    def read_loss(self) -> float:
        """The loss of the last step, once it has been taken."""
        self.steps.join()
        return self.loss.item()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Make an error in here, such as one for lack of memory, the model's failure: it takes no further step."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            self.stop(failure=error)

    def stop(self, seconds: float = 0.0, failure: Exception | None = None) -> None:
        """Take no further step. A failure forgets where it came up, since that would keep the memory of its step."""
        self.done, self.seconds = True, seconds
        self.failure = None if failure is None else failure.with_traceback(None)


def train_recall(
    model: PreTrainedModel,
    plan: RecallPlan,
    *,
    lr: float,
    seed: int,
    time_left: float = math.inf,
    steps: Steps | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> RecallOutcome:
    """Train a model on its device and measure it.

    Batches are a function of plan, seed and kind of device, the same for all models. `steps` takes the steps (default:
    `Steps(model)`), and `progress` is called with (steps, loss) now and then.

    Raises:
        OutOfTime: the run would take longer than `time_left` seconds; known after a few steps.
        FloatingPointError: the loss is no longer finite.
    """
    learner = Learner(model, lr, steps or Steps(model), seed)
    report = None if progress is None else lambda index, step, loss: progress(step, loss)
    train_learners([learner], plan, time_left=time_left, progress=report)
    return measure_learner(learner, plan)


def _step_all(learners: Sequence[Learner], drawn: Mapping[int, Iterator[Batch]], factor: float) -> list[Learner]:
    """Start a step of every model that is not done, on the batch of its seed; those that are not done after it."""
    active = [learner for learner in learners if not learner.done]
    for seed in dict.fromkeys(learner.seed for learner in active):
        readers = [learner for learner in active if learner.seed == seed]
        if (batch := _draw(drawn[seed], readers)) is not None:
            for learner in readers:
                learner.step(batch, factor)
    return [learner for learner in active if not learner.done]


def _stop_those_that_know(learners: Sequence[Learner], plan: RecallPlan, started: float) -> None:
    """Stop the models that answer every size of the plan well enough."""
    for learner in learners:
        if not learner.done:
            with learner.failing():
                if _knows_all(learner.model, plan):
                    learner.stop(time.monotonic() - started)


def train_learners(
    learners: Sequence[Learner],
    plan: RecallPlan,
    *,
    time_left: float = math.inf,
    progress: Progress | None = None,
) -> None:
    """Train several models, each as `train_recall` does; on a GPU their steps run at once.

    Models of one seed read the same batches. One that fails keeps its `failure` and takes no other along. Where the
    time is short, the last models are given up first. `progress` is called with (number of the model, steps, loss) now
    and then.
    """
    started = timed = time.monotonic()
    device = learners[0].model.device
    timed_step, known = 0, False
    drawn = {seed: draw_ahead(plan.batches(seed, device), device) for seed in dict.fromkeys(x.seed for x in learners)}
    for step in range(1, plan.steps + 1):
        active = _step_all(learners, drawn, lr_factor(step - 1, plan.steps))
        if step <= PROBE_STEPS or any(learner.steps.prepared for learner in active):
            for learner in active:  # the time of a step is known from now on
                with learner.failing():
                    learner.read_loss()
            timed, timed_step = time.monotonic(), step
        validates = step % plan.valid_every == 0
        first = not known and step % PROBE_STEPS == 0 and step - timed_step >= PROBE_STEPS
        if first or validates:
            losses = [_checked_loss(learner, step) for learner in active]
            known, now = step > timed_step, time.monotonic()
            if known:
                needed = (now - timed) / (step - timed_step) * (plan.steps - step)
                _drop_late(active, needed, time_left - (now - started))
                for learner, loss in zip(active, losses, strict=True):
                    if progress is not None and not learner.done:
                        progress(learners.index(learner), step, loss)
        if validates and step < plan.steps:
            _stop_those_that_know(active, plan, started)
        if all(learner.done for learner in learners):
            return
    for learner in learners:
        if not learner.done:
            _checked_loss(learner, plan.steps)
            learner.stop(time.monotonic() - started, learner.failure)


def _draw(drawn: Iterator[Batch], readers: Sequence[Learner]) -> Batch | None:
    """The next batch of the models that read it; None where it cannot be drawn, which is the failure of them all."""
    try:
        return next(drawn)
    except (RuntimeError, MemoryError) as error:
        for learner in readers:
            learner.stop(failure=error)
        return None


def _checked_loss(learner: Learner, step: int) -> float:
    """The loss of the last step; a model whose loss is not finite, or cannot be read, stops."""
    value = math.nan
    with learner.failing():
        value = learner.read_loss()
    if not math.isfinite(value) and not learner.done:
        learner.stop(failure=FloatingPointError(f"the loss is {value} after {step} steps"))
    return value


def _drop_late(active: Sequence[Learner], needed: float, left: float) -> None:
    """Stop the last of the models, as many as let the others fit into `left` seconds, if all need `needed`."""
    running = [learner for learner in active if not learner.done]
    if needed > left:
        for learner in running[int(len(running) * max(0.0, left) / needed) :]:
            learner.stop(failure=OutOfTime(needed))


def measure_learner(learner: Learner, plan: RecallPlan) -> RecallOutcome:
    """The outcome of a model that was trained. Raises its failure."""
    if learner.failure is not None:
        raise learner.failure
    begun = time.monotonic()
    scores = tuple(measure_size(learner.model, size, plan.examples) for size in plan.test)
    seconds = learner.seconds + time.monotonic() - begun
    return RecallOutcome(scores, learner.taken, learner.tokens, seconds, learner.read_loss())


def _knows_all(model: PreTrainedModel, plan: RecallPlan) -> bool:
    trained = sorted(dict.fromkeys(plan.train), key=lambda size: (size.num_items, size.seq_len), reverse=True)
    # The hardest first: mostly one look is enough.
    return all(accuracy_of(model, size, VALID_EXAMPLES, VALID_SEED).mean() >= plan.enough for size in trained)


@torch.no_grad()
def accuracy_of(model: PreTrainedModel, size: TaskSize, count: int, seed: int, batch_tokens: int = 32768) -> np.ndarray:
    """The fraction of right answers in each of `count` examples drawn with a seed, [count]."""
    was_training = model.training
    model.eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    found: list[Tensor] = []
    limit = max(1, batch_tokens // size.seq_len)
    for start in range(0, count, limit):
        batch = draw_batch(size, min(limit, count - start), generator)
        asked = batch.wanted != IGNORED
        right = (answers(model, batch).argmax(-1) == batch.wanted) & asked
        found.append(right.sum(1) / asked.sum(1))
    model.train(was_training)
    return torch.cat(found).double().cpu().numpy()


def measure_size(model: PreTrainedModel, size: TaskSize, examples: int) -> SizeScore:
    """The score of a model at one size, on examples that no seed of training draws."""
    values = accuracy_of(model, size, examples, TEST_SEED)
    valid = accuracy_of(model, size, min(examples, VALID_EXAMPLES), VALID_SEED)
    return SizeScore(size, float(values.mean()), interval(values), len(values), float(valid.mean()))


def mean_valid(scores: Sequence[SizeScore]) -> float:
    """Mean validation accuracy, by which learning rates are chosen."""
    return float(np.mean([score.valid_accuracy for score in scores]))
