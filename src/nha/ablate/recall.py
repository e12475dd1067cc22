"""Training and measuring one model on recall tasks of random tokens, as Zoology does: one model for all sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nha.ablate.steps import Batch, Steps, answer_states, draw_ahead, draw_batch
from nha.data.synthetic import IGNORED, TaskSize
from nha.errors import OutOfTime
from nha.evaluate.bootstrap import interval
from nha.models.head import head_logits

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
    started = time.monotonic()
    steps = steps or Steps(model)
    tokens = step = timed_step = 0
    loss, timed, known = torch.zeros(()), started, False
    for step, batch in enumerate(draw_ahead(plan.batches(seed, model.device), model.device), 1):
        loss = steps(batch, lr * lr_factor(step - 1, plan.steps))
        tokens += batch.ids.numel()
        if step <= PROBE_STEPS or steps.prepared:  # the time of a step is known from now on
            loss.item()
            timed, timed_step = time.monotonic(), step
        first = not known and step % PROBE_STEPS == 0 and step - timed_step >= PROBE_STEPS
        if first or step % plan.valid_every == 0:
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} after {step} steps")
            known, now = step > timed_step, time.monotonic()
            needed = (now - timed) / max(1, step - timed_step) * (plan.steps - step)
            if known and needed > time_left - (now - started):
                raise OutOfTime(needed)
            if known and progress is not None:
                progress(step, value)
        if step % plan.valid_every == 0 and step < plan.steps and _knows_all(model, plan):
            break
    scores = tuple(measure_size(model, size, plan.examples) for size in plan.test)
    return RecallOutcome(scores, step, tokens, time.monotonic() - started, loss.item())


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
