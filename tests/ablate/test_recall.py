"""Training on recall tasks: same batches for all models, learning, an early end, and a run that does not fit."""

from __future__ import annotations

import pytest
import torch

from nha import NHAConfig
from nha.ablate import recall
from nha.ablate.recall import (
    Learner,
    RecallPlan,
    accuracy_of,
    answers,
    measure_learner,
    train_learners,
    train_recall,
)
from nha.ablate.specs import ModelSpec
from nha.ablate.steps import Steps, answer_loss, answer_positions, draw_batch
from nha.data.synthetic import IGNORED, TaskSize
from nha.errors import OutOfTime

EASY = TaskSize("in_context_recall", 8, vocab_size=2)  # one key, one value: known from the first pair
SHAPE = NHAConfig.tiny(vocab_size=8, hidden_size=16, intermediate_size=16)
SPEC = ModelSpec("nha", windows=4, num_slots=4)


def plan(**changes) -> RecallPlan:
    values = dict(train=(EASY,), weights=(1.0,), test=(EASY,), steps=30, batch_size=8, examples=16, valid_every=10)
    return RecallPlan(**(values | changes))


def test_positions_hold_all_answers_of_a_row():
    targets = TaskSize("in_context_recall", 32, vocab_size=8).draw(16, torch.Generator().manual_seed(0)).targets
    at = answer_positions(targets, 16)
    chosen = targets.gather(1, at)
    assert ((chosen != IGNORED).sum(1) == (targets != IGNORED).sum(1)).all()


def labels_of(batch):
    return torch.full_like(batch.ids, IGNORED).scatter(1, batch.at, batch.wanted)


@torch.no_grad()
def test_answers_are_those_of_the_whole_logits():
    size = TaskSize("mqar", 32, 4, vocab_size=64)
    model = SPEC.build(NHAConfig.tiny(vocab_size=64))
    batch = draw_batch(size, 4, torch.Generator().manual_seed(0))
    whole = model(batch.ids, use_cache=False).logits
    torch.testing.assert_close(answers(model, batch), whole.gather(1, batch.at[..., None].expand(-1, -1, 64)))
    targets = size.draw(4, torch.Generator().manual_seed(0)).targets
    assert torch.equal(labels_of(batch), targets)


@pytest.mark.parametrize("size", [TaskSize("mqar", 32, 4, vocab_size=64), TaskSize("in_context_recall", 32)])
def test_the_loss_of_the_answers_and_its_gradients_are_those_of_the_whole_logits(size):
    model = SPEC.build(NHAConfig.tiny(vocab_size=size.vocab_size)).double()
    batch = draw_batch(TaskSize(size.task, 32, size.num_items, vocab_size=64), 3, torch.Generator().manual_seed(0))
    logits = model(batch.ids, use_cache=False).logits
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_of(batch).flatten())
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(whole, parameters, allow_unused=True)
    loss = answer_loss(model, batch)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    rounding = torch.finfo(torch.float32).eps  # of one answer's weight in the mean
    torch.testing.assert_close(loss, whole, rtol=rounding, atol=0)
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=rounding * other.abs().max().item() + 1e-300)


class Replays:
    """Stands in for CUDA graphs: a replay runs the step again, capturing does not run it."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, name, run):
        self.captured += 1
        loss = torch.zeros(())

        def replay():
            self.replayed += 1
            loss.copy_(run())

        return loss, replay

    def join(self):
        pass


def test_captured_steps_take_the_steps_that_others_take():
    sizes = [TaskSize("in_context_recall", length, vocab_size=8) for length in (8, 12)]
    given = plan(train=sizes, weights=(1.0, 1.0), steps=16)
    expected = train_recall(SPEC.build(SHAPE), given, lr=1e-2, seed=0)
    model = SPEC.build(SHAPE)
    steps = Steps(model)
    steps.graphs = Replays()
    found = train_recall(model, given, lr=1e-2, seed=0, steps=steps)
    assert steps.graphs.captured == 2 and steps.graphs.replayed == 16 - 2 * 2
    assert found.loss == expected.loss and found.scores == expected.scores


def test_a_step_that_no_graph_holds_runs_without():
    def refuse(name, run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    given, model = plan(steps=8), SPEC.build(SHAPE)
    steps = Steps(model)
    steps.graphs = refuse
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
        found = train_recall(model, given, lr=1e-3, seed=0, steps=steps)
    assert found.loss == train_recall(SPEC.build(SHAPE), given, lr=1e-3, seed=0).loss


def test_measuring_uses_no_compiled_layer():
    model = SPEC.build(SHAPE)
    steps = Steps(model, compiled=True)
    assert len(steps.layers) == 2 and all(layer._compiled_call_impl is None for layer, _ in steps.layers)
    with steps._compiled_layers():
        assert all(layer._compiled_call_impl is call is not None for layer, call in steps.layers)
    assert all(layer._compiled_call_impl is None for layer, _ in steps.layers)


def test_steps_draw_their_windows_and_the_model_keeps_its_own():
    given = plan(train=(TaskSize("in_context_recall", 16, vocab_size=8),), steps=5)
    expected = train_recall(ModelSpec("nha", windows=2, num_slots=4).build(SHAPE), given, lr=1e-3, seed=0)
    model = SPEC.build(SHAPE)
    learner = Learner(model, 1e-3, Steps(model), windows=(2,))
    train_learners([learner], given)
    assert learner.read_loss() == expected.loss != train_recall(SPEC.build(SHAPE), given, lr=1e-3, seed=0).loss
    assert model.config.window_sizes == [4, 4]


def test_a_run_is_a_function_of_its_seed():
    hard = plan(train=(TaskSize("in_context_recall", 16, vocab_size=8),), steps=5)
    losses = [train_recall(SPEC.build(SHAPE), hard, lr=1e-3, seed=seed).loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_task_that_is_learned_ends_the_run_early_and_counts_its_tokens():
    outcome = train_recall(SPEC.build(SHAPE), plan(steps=500), lr=1e-2, seed=0)
    assert outcome.steps < 500 and outcome.tokens == outcome.steps * 8 * 8
    assert outcome.scores[0].accuracy >= 0.99 and outcome.scores[0].interval[1] == 1.0


def test_a_run_that_does_not_fit_into_the_time_left_ends_after_a_few_steps(monkeypatch):
    seen = []
    with pytest.raises(OutOfTime) as error:
        train_recall(
            SPEC.build(SHAPE), plan(steps=10**6), lr=1e-3, seed=0, time_left=5.0, progress=lambda *now: seen.append(now)
        )
    assert error.value.needed > 5.0 and not seen


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError):
        train_recall(SPEC.build(SHAPE), plan(steps=60), lr=1e30, seed=0)


def test_accuracy_does_not_depend_on_the_size_of_its_batches():
    model = SPEC.build(SHAPE)
    first, second = (accuracy_of(model, EASY, 8, 3, batch_tokens=tokens) for tokens in (8 * 8, 10**6))
    assert first.shape == second.shape == (8,)
    assert recall.measure_size(model, EASY, 8).count == 8


def test_a_plan_without_sizes_is_refused():
    with pytest.raises(ValueError, match="0, 1 and 1"):
        plan(train=())


def learners(*lrs):
    models = [SPEC.build(SHAPE) for _ in lrs]
    return [Learner(model, lr, Steps(model)) for model, lr in zip(models, lrs, strict=True)]


def test_models_that_are_trained_together_are_those_that_are_trained_alone():
    together = learners(1e-2, 1e-3)
    train_learners(together, plan(steps=500))
    for learner, lr in zip(together, (1e-2, 1e-3), strict=True):
        model = SPEC.build(SHAPE)
        alone = train_recall(model, plan(steps=500), lr=lr, seed=0)
        found = measure_learner(learner, plan(steps=500))
        assert (found.scores, found.loss, found.tokens) == (alone.scores, alone.loss, alone.tokens)
        assert all(map(torch.equal, learner.model.parameters(), model.parameters()))
    assert together[0].taken < together[1].taken  # an early end of one does not end the other


def test_a_model_that_diverges_does_not_take_others_along():
    broken, sound = learners(1e30, 1e-3)
    train_learners([broken, sound], plan(steps=60))
    with pytest.raises(FloatingPointError):
        measure_learner(broken, plan())
    assert measure_learner(sound, plan()).loss == train_recall(SPEC.build(SHAPE), plan(steps=60), lr=1e-3, seed=0).loss


def test_a_model_whose_step_fails_does_not_take_others_along(monkeypatch):
    broken, sound = learners(1e-3, 1e-3)
    broken.steps._step = lambda batch: (_ for _ in ()).throw(RuntimeError("no kernel"))
    train_learners([broken, sound], plan(steps=20))
    with pytest.raises(RuntimeError, match="no kernel"):
        measure_learner(broken, plan())
    assert broken.taken == 0 and measure_learner(sound, plan()).scores


def test_the_last_models_are_given_up_where_time_is_short():
    three = learners(1e-3, 1e-3, 1e-3)
    recall._drop_late(three, needed=3.0, left=2.5)
    assert [learner.done for learner in three] == [False, False, True]
    recall._drop_late(three, needed=2.0, left=0.5)
    assert all(isinstance(learner.failure, OutOfTime) for learner in three)
