"""Training and measuring one model on recall tasks of random tokens, as Zoology does: one model for all sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from nha.data.synthetic import IGNORED, TaskSize
from nha.errors import OutOfTime
from nha.evaluate.bootstrap import interval
from nha.models.head import head_logits, hidden_states

VALID_SEED, TEST_SEED = 1 << 20, 1 << 21  # seeds of training are below
WARMUP, WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 0.1, 1.0
PROBE_STEPS = 20  # after which the time of a run is known
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


def answer_positions(targets: Tensor, most: int) -> Tensor:
    """Positions [N, most] of all targets in each row of targets [N, T], and of others where there are fewer.

    >>> answer_positions(torch.tensor([[-100, 7, -100, 8]]), 2).tolist()
    [[1, 3]]
    """
    # A mask would have to tell the host how many entries it selects, and the GPU would wait.
    return (targets == IGNORED).int().sort(dim=1, stable=True).indices[:, :most]


def answers(model: PreTrainedModel, size: TaskSize, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, A, V] in float32 and targets [N, A] at the positions where ids [N, T] ask something."""
    at = answer_positions(targets, size.max_answers)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        hidden = hidden_states(model, ids)
        logits = head_logits(model, hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2])))
    return logits.float(), targets.gather(1, at)


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
    progress: Callable[[int, float], None] | None = None,
) -> RecallOutcome:
    """Train a model on its device and measure it.

    Batches are a function of plan, seed and kind of device, the same for all models. `progress` is called with (steps,
    loss) now and then.

    Raises:
        OutOfTime: the run would take longer than `time_left` seconds; known after a few steps.
        FloatingPointError: the loss is no longer finite.
    """
    started, device = time.monotonic(), model.device
    order = np.random.default_rng([seed, 1]).choice(
        len(plan.train), plan.steps, p=np.array(plan.weights) / sum(plan.weights)
    )
    generator = torch.Generator(device).manual_seed(seed)
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, plan.steps))
    tokens = step = 0
    loss = torch.zeros(())
    timed = started
    for step in range(1, plan.steps + 1):
        size = plan.train[order[step - 1]]
        ids, targets = size.draw(plan.batch_of(size), generator)
        logits, wanted = answers(model.train(), size, ids, targets)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*decayed, *others], MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        tokens += ids.numel()
        if step == PROBE_STEPS:  # kernels are compiled
            loss.item()
            timed = time.monotonic()
        if step == 2 * PROBE_STEPS or step % plan.valid_every == 0:
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} after {step} steps")
            a_step = (time.monotonic() - timed) / max(1, step - PROBE_STEPS)
            needed = a_step * (plan.steps - step)
            if needed > time_left - (time.monotonic() - started):
                raise OutOfTime(needed)
            if progress is not None:
                progress(step, value)
        if step % plan.valid_every == 0 and step < plan.steps and _knows_all(model, plan):
            break
    scores = tuple(measure_size(model, size, plan.examples) for size in plan.test)
    return RecallOutcome(scores, step, tokens, time.monotonic() - started, loss.item())


def _knows_all(model: PreTrainedModel, plan: RecallPlan) -> bool:
    trained = dict.fromkeys(plan.train)
    return all(accuracy_of(model, size, VALID_EXAMPLES, VALID_SEED).mean() >= plan.enough for size in trained)


@torch.no_grad()
def accuracy_of(model: PreTrainedModel, size: TaskSize, count: int, seed: int, batch_tokens: int = 32768) -> np.ndarray:
    """The fraction of right answers in each of `count` examples drawn with a seed, [count]."""
    model.eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    found: list[Tensor] = []
    batch = max(1, batch_tokens // size.seq_len)
    for start in range(0, count, batch):
        ids, targets = size.draw(min(batch, count - start), generator)
        logits, wanted = answers(model, size, ids, targets)
        asked = wanted != IGNORED
        right = (logits.argmax(-1) == wanted) & asked
        found.append(right.sum(1) / asked.sum(1))
    return torch.cat(found).double().cpu().numpy()


def measure_size(model: PreTrainedModel, size: TaskSize, examples: int) -> SizeScore:
    """The score of a model at one size, on examples that no seed of training draws."""
    values = accuracy_of(model, size, examples, TEST_SEED)
    valid = accuracy_of(model, size, min(examples, VALID_EXAMPLES), VALID_SEED)
    return SizeScore(size, float(values.mean()), interval(values), len(values), float(valid.mean()))


def mean_valid(scores: Sequence[SizeScore]) -> float:
    """Mean validation accuracy, by which learning rates are chosen."""
    return float(np.mean([score.valid_accuracy for score in scores]))
