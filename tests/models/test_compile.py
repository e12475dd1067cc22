"""Hybrids compile once for many lengths, are exported for any, and let torch.func differentiate them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap

from tests.inputs import assert_close_to
from tests.models.families import hybrid, teacher, tokens

LENGTHS = [*range(4, 13), *range(20, 42, 2)]  # within the window of 8 and beyond
WINDOWS = [[8, 8, 8], [8, -1, 0]]


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("windows, padded", [(WINDOWS[0], False), (WINDOWS[1], True)], ids=str)
def test_twenty_lengths_take_three_graphs_at_most(windows, padded, counter):
    assert len(LENGTHS) == 20
    model = hybrid("llama", windows).double()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in LENGTHS:
        ids, options = tokens(2, length), {}
        if padded:
            options["attention_mask"] = torch.ones_like(ids)
            options["attention_mask"][0, :3] = 0
        found, wanted = logits(compiled, ids, **options), logits(model, ids, **options)
        assert_close_to(found[:, 3:], wanted[:, 3:])
    assert counter.frame_count <= 3


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_a_compiled_pass_fills_a_cache_that_serves_later_passes(windows, counter):
    model, ids = hybrid("llama", windows).double(), tokens(2, 30)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        found = compiled(ids[:, :20], use_cache=True)
        later = model(ids[:, 20:], past_key_values=found.past_key_values).logits
    wanted = logits(model, ids)
    assert_close_to(found.logits, wanted[:, :20])
    assert_close_to(later, wanted[:, 20:])


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_an_exported_model_reads_any_length(windows):
    model = hybrid("llama", windows).double()
    shapes = {"input_ids": {1: torch.export.Dim("length", min=9, max=512)}, "use_cache": None}
    options = {"dynamic_shapes": shapes, "strict": False}
    program = torch.export.export(model, (tokens(1, 30),), {"use_cache": False}, **options)
    for length in (9, 17, 40):
        found = program.module()(tokens(1, length), use_cache=False).logits
        assert_close_to(found, logits(model, tokens(1, length)))


@pytest.mark.parametrize("length", [8, 30])
def test_gradients_of_every_sample_at_once_are_those_one_by_one(length):
    model, ids = hybrid("llama", [8, -1, 0]).double(), tokens(3, length)
    parameters = {name: x.detach() for name, x in model.named_parameters()}

    def loss(parameters, row):
        return functional_call(model, parameters, (row[None],), {"use_cache": False}).logits.logsumexp(-1).mean()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    for row, sample in enumerate(ids):
        alone = grad(loss)(parameters, sample)
        for name, x in alone.items():
            assert_close_to(found[name][row], x, name)


def test_the_original_takes_as_many_graphs(counter):
    """Transformers' own models do what is asked of hybrids."""
    compiled = torch.compile(teacher(), backend=counter, fullgraph=True, dynamic=True)
    for length in LENGTHS:
        logits(compiled, tokens(2, length))
    assert counter.frame_count <= 3
