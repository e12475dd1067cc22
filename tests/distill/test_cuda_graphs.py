"""A pass that comes often is captured once, and its replays give what running it gives."""

import pytest
import torch

from nha.distill.cuda_graphs import MAX_GRAPHS, WARMUP_PASSES, CUDAGraphRunner
from nha.distill.student import Distillation
from tests.distill.test_student import batch, student_of


class Rerun:
    """Stands in for CUDA graphs: a replay runs the pass again, into the tensors of the capture."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, name, run):
        self.captured += 1
        found = tuple(torch.zeros_like(x) if torch.is_tensor(x) else x for x in run())
        for grad in found[2]:
            if grad is not None:
                grad.zero_()

        def replay():
            self.replayed += 1
            loss, sums, grads = run()
            found[0].copy_(loss)
            found[1].copy_(sums)
            for held, grad in zip(found[2], grads, strict=True):
                assert (held is None) == (grad is None)
                if held is not None:
                    held.copy_(grad)

        return found, replay

    def join(self):
        pass


@pytest.fixture
def student() -> Distillation:
    return student_of().train()


def given(seed, lengths=(40, 9, 25)):
    made = batch(lengths, seed)
    return {n: x for n, x in made.items() if n != "max_seq_len"}, made["max_seq_len"]


def wanted(student, parameters, one, max_seq_len):
    for p in parameters:
        p.grad = None
    loss, sums = student(**one, max_seq_len=max_seq_len)
    loss.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in parameters]
    return loss.detach(), sums, grads


def test_replays_give_what_the_pass_gives(student):
    parameters = [p for p in student.parameters() if p.requires_grad]
    rerun = Rerun()
    runner = CUDAGraphRunner(student, parameters, rerun)
    for seed in range(WARMUP_PASSES + 3):
        one, max_seq_len = given(seed)
        loss, sums, grads = wanted(student, parameters, one, max_seq_len)
        (found,) = runner([("text", one)], max_seq_len)
        assert torch.equal(found[0], loss) and torch.equal(found[1], sums)
        for grad, right in zip(found[2], grads, strict=True):
            assert (grad is None) == (right is None) and (grad is None or torch.equal(grad, right))
        assert all(p.grad is None for p in parameters)
    assert (rerun.captured, rerun.replayed) == (1, 3)


def test_sums_are_the_callers_and_gradients_of_two_names_are_apart(student):
    parameters = [p for p in student.parameters() if p.requires_grad]
    runner = CUDAGraphRunner(student, parameters, Rerun())
    for _ in range(WARMUP_PASSES + 1):
        one, max_seq_len = given(0)
        ((_, sums, grads),) = runner([("text", one)], max_seq_len)
        before = sums.clone(), [None if g is None else g.clone() for g in grads]
        other, max_seq_len = given(7)
        runner([("recall", other)], max_seq_len)
        assert torch.equal(sums, before[0])
        assert all(g is None or torch.equal(g, x) for g, x in zip(grads, before[1], strict=True))
    assert len(runner.captured) == 2


def test_two_passes_of_a_step_are_those_of_two_steps(student):
    parameters = [p for p in student.parameters() if p.requires_grad]
    runner = CUDAGraphRunner(student, parameters, Rerun())
    for seed in range(WARMUP_PASSES + 2):
        (one, max_seq_len), (other, _) = given(seed), given(seed + 7)
        found = runner([("text", one), ("recall", other)], max_seq_len)
        for inputs, (loss, sums, grads) in zip((one, other), found, strict=True):
            right = wanted(student, parameters, inputs, max_seq_len)
            assert torch.equal(loss, right[0]) and torch.equal(sums, right[1])
            assert all(g is None or torch.equal(g, x) for g, x in zip(grads, right[2], strict=True))


def test_other_shapes_and_windows_are_recorded_apart_and_not_without_end(student):
    parameters = [p for p in student.parameters() if p.requires_grad]
    rerun = Rerun()
    runner = CUDAGraphRunner(student, parameters, rerun)
    for window in (8, 2):
        with student.using([window] * len(student.windows)):
            for _ in range(WARMUP_PASSES + 1):
                one, max_seq_len = given(0)
                runner([("text", one)], max_seq_len)
    assert rerun.captured == 2
    for length in range(30, 30 + MAX_GRAPHS):
        for _ in range(WARMUP_PASSES + 1):
            one, max_seq_len = given(0, (length,))
            runner([("text", one)], max_seq_len)
    assert rerun.captured == len(runner.captured) == MAX_GRAPHS


def test_without_memory_for_a_capture_passes_run_as_before(student):
    class Full(Rerun):
        def __call__(self, name, run):
            run()
            raise torch.OutOfMemoryError("CUDA out of memory")

    parameters = [p for p in student.parameters() if p.requires_grad]
    runner = CUDAGraphRunner(student, parameters, Full())
    one, max_seq_len = given(0)
    right = wanted(student, parameters, one, max_seq_len)
    for turn in range(WARMUP_PASSES + 2):
        if turn == WARMUP_PASSES:
            with pytest.warns(UserWarning, match="no memory"):
                (found,) = runner([("text", one)], max_seq_len)
        else:
            (found,) = runner([("text", one)], max_seq_len)
        assert torch.equal(found[0], right[0])
        assert all(g is None or torch.equal(g, x) for g, x in zip(found[2], right[2], strict=True))
    assert not runner.captured


def test_a_pass_asks_nothing_of_the_device(student):
    """A pass that waits for the device cannot be captured."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            assert not any(word in name for word in ("local_scalar", "nonzero", "masked_select", "unique")), name
            return func(*args, **(kwargs or {}))

    one, max_seq_len = given(0)
    with Watch():
        student(**one, max_seq_len=max_seq_len)[0].backward()
