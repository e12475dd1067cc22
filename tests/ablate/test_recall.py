"""Training on recall tasks: same batches for all arms, learning, an early end, and a run that does not fit."""

from __future__ import annotations

import pytest
import torch

from nha import NHAConfig
from nha.ablate import recall
from nha.ablate.arms import Arm
from nha.ablate.recall import RecallPlan, accuracy_of, answer_positions, answers, train_recall
from nha.data.synthetic import IGNORED, TaskSize
from nha.errors import OutOfTime

EASY = TaskSize("in_context_recall", 8, vocab_size=2)  # one key, one value: known from the first pair
SHAPE = NHAConfig.tiny(vocab_size=8, hidden_size=16, intermediate_size=16)
ARM = Arm("nha", windows=4, num_slots=4)


def plan(**changes) -> RecallPlan:
    values = dict(train=(EASY,), weights=(1.0,), test=(EASY,), steps=30, batch_size=8, examples=16, valid_every=10)
    return RecallPlan(**(values | changes))


def test_positions_hold_all_answers_of_a_row():
    targets = TaskSize("in_context_recall", 32, vocab_size=8).draw(16, torch.Generator().manual_seed(0)).targets
    at = answer_positions(targets, 16)
    chosen = targets.gather(1, at)
    assert ((chosen != IGNORED).sum(1) == (targets != IGNORED).sum(1)).all()


@torch.no_grad()
def test_answers_are_those_of_the_whole_logits():
    size = TaskSize("mqar", 32, 4, vocab_size=64)
    model = ARM.build(NHAConfig.tiny(vocab_size=64))
    ids, targets = size.draw(4, torch.Generator().manual_seed(0))
    logits, wanted = answers(model, size, ids, targets)
    whole = model(ids, use_cache=False).logits
    at = answer_positions(targets, 4)
    torch.testing.assert_close(logits, whole.gather(1, at[..., None].expand(-1, -1, 64)))
    assert torch.equal(wanted.sort(1).values, targets[targets != IGNORED].view(4, 4).sort(1).values)


def test_a_run_is_a_function_of_its_seed():
    hard = plan(train=(TaskSize("in_context_recall", 16, vocab_size=8),), steps=5)
    losses = [train_recall(ARM.build(SHAPE), hard, lr=1e-3, seed=seed).loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_task_that_is_learned_ends_the_run_early_and_counts_its_tokens():
    outcome = train_recall(ARM.build(SHAPE), plan(steps=500), lr=1e-2, seed=0)
    assert outcome.steps < 500 and outcome.tokens == outcome.steps * 8 * 8
    assert outcome.scores[0].accuracy >= 0.99 and outcome.scores[0].interval[1] == 1.0


def test_a_run_that_does_not_fit_into_the_time_left_ends_after_a_few_steps(monkeypatch):
    seen = []
    with pytest.raises(OutOfTime) as error:
        train_recall(
            ARM.build(SHAPE), plan(steps=10**6), lr=1e-3, seed=0, time_left=5.0, progress=lambda *now: seen.append(now)
        )
    assert error.value.needed > 5.0 and not seen


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError):
        train_recall(ARM.build(SHAPE), plan(steps=60), lr=1e30, seed=0)


def test_accuracy_does_not_depend_on_the_size_of_its_batches():
    model = ARM.build(SHAPE)
    first, second = (accuracy_of(model, EASY, 8, 3, batch_tokens=tokens) for tokens in (8 * 8, 10**6))
    assert first.shape == second.shape == (8,)
    assert recall.measure_size(model, EASY, 8).count == 8


def test_a_plan_without_sizes_is_refused():
    with pytest.raises(ValueError, match="0, 1 and 1"):
        plan(train=())
