"""The loss in chunks is the loss over the whole vocabulary, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nha.distill.loss import Head, head_loss
from nha.models.head import hidden_states
from tests.inputs import assert_close_to
from tests.models.families import teacher, tokens

N, HIDDEN, VOCAB = 37, 12, 50


def inputs(dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, other, weight = random(N, HIDDEN), random(N, HIDDEN), random(VOCAB, HIDDEN)
    target = torch.randint(VOCAB, (N,), generator=generator)
    by = torch.rand(2, N, generator=generator, dtype=torch.float64) * (torch.rand(2, N, generator=generator) > 0.3)
    cast = [x.to(dtype) for x in (student, other, weight, *by)]
    return [*cast[:3], target, *cast[3:]]


def naive(student, other, weight, target, kl_weight, ce_weight, scale, cap):
    def logits(hidden):
        raw = hidden @ weight.T * scale
        return raw if cap is None else cap * torch.tanh(raw / cap)

    found = F.log_softmax(logits(student), -1)
    cross = F.nll_loss(found, target, reduction="none")
    if other is None:
        return (ce_weight * cross).sum()
    wanted = F.log_softmax(logits(other), -1)
    divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    return (kl_weight * divergence).sum() + (ce_weight * cross).sum()


@pytest.mark.parametrize("has_teacher", [True, False], ids=["teacher", "alone"])
@pytest.mark.parametrize("scale, cap", [(1.0, None), (0.5, None), (1.0, 2.0)])
def test_loss_and_gradient_equal_the_whole_vocabulary_at_once(scale, cap, has_teacher):
    results = {}
    for name, dtype in (("truth", torch.float64), ("rounded", torch.float32), ("ours", torch.float32)):
        student, other, weight, target, *by = inputs(dtype)
        student.requires_grad_()
        other = other if has_teacher else None
        if name == "ours":
            loss = head_loss(student, other, Head(weight, scale, cap), target, *by, chunk_size=8).loss
        else:
            loss = naive(student, other, weight, target, *by, scale, cap)
        (3 * loss).backward()
        results[name] = (loss.detach(), student.grad)
    for index, what in enumerate(("loss", "gradient")):
        size = results["truth"][index].abs().max()
        band = (results["rounded"][index] - results["truth"][index]).abs().max()
        error = (results["ours"][index] - results["truth"][index]).abs().max()
        assert error <= 2 * (band + 2**-23 * size), what
    student, other, weight, target, *by = inputs(torch.float64)
    ours = head_loss(student, other if has_teacher else None, Head(weight, scale, cap), target, *by, chunk_size=8).loss
    assert_close_to(ours, results["truth"][0], "in float64")


def test_per_token_numbers_do_not_depend_on_the_chunk():
    student, other, weight, target, *by = inputs(torch.float64)
    target[:5] = (student @ weight.T).argmax(-1)[:5]
    whole = head_loss(student, other, Head(weight), target, *by)
    parts = head_loss(student, other, Head(weight), target, *by, chunk_size=5)
    assert_close_to(parts.kl, whole.kl, "divergence")
    assert_close_to(parts.cross_entropy, whole.cross_entropy, "cross-entropy")
    assert torch.equal(parts.correct, whole.correct) and whole.correct[:5].all()
    assert torch.equal(whole.correct, (student @ weight.T).argmax(-1) == target)


def test_no_tensor_of_all_logits_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    student, other, weight, target, *by = inputs(torch.float32)
    student.requires_grad_()
    with Watch():
        head_loss(student, other, Head(weight), target, *by, chunk_size=4).loss.backward()
    assert largest < N * VOCAB / 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_the_head_of_a_family_gives_its_logits(family):
    model = teacher(family)
    ids = torch.randint(3, 97, (1, 9))
    head = Head.of(model)
    with torch.no_grad():
        wanted = model(ids).logits[0]
        hidden = model.get_decoder()(ids).last_hidden_state[0]
        target = torch.arange(9)
        ours = head_loss(hidden, None, head, target, torch.zeros(9), torch.ones(9)).cross_entropy
    assert torch.allclose(ours, F.cross_entropy(wanted, target, reduction="none"), rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    student, other, weight, target, *by = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"expected target of shape \[37\], one per token, got \[36\]"):
        head_loss(student, other, Head(weight), target[1:], *by)
    with pytest.raises(ValueError, match="expected the teacher's hidden states"):
        head_loss(student, other[1:], Head(weight), target, *by)
    layer = torch.nn.Linear(3, 4)

    class Model:
        config = None

        def get_output_embeddings(self):
            return layer

    with pytest.raises(ValueError, match="expected a language model head without a bias"):
        Head.of(Model())


@pytest.mark.parametrize("family", ["cohere", "granite", "gemma2", "hyperclovax"])
def test_the_head_of_the_loss_computes_the_logits_of_the_family(family):
    model, ids = teacher(family), tokens(1, 8)
    head = Head.of(model)
    with torch.no_grad():
        own, raw = model(ids).logits, hidden_states(model, ids) @ head.weight.T * head.scale
    found = raw if head.cap is None else torch.tanh(raw / head.cap) * head.cap
    assert torch.allclose(found, own, atol=8 * torch.finfo(own.dtype).eps * own.abs().max().item())
