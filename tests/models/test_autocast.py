"""A float32 hybrid under autocast: caches keep one dtype, whatever a prompt's length, and add no error of their own."""

import pytest
import torch

from nha.models.peft_slots import SlotsConfig
from tests.models.families import FAMILIES, hybrid, tokens

PROMPTS = [5, 30]  # shorter and longer than the window


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("length", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_err_no_more_than_one_pass(family, length):
    model, ids = hybrid(family, [8, -1, 0]).eval(), tokens(2, length + 12, seed=1)
    with torch.no_grad():
        exact = model(ids).logits[:, length - 1 :]
        with autocast():
            whole = model(ids).logits[:, length - 1 :]
            part = model(ids[:, :length], use_cache=True)
            found = [part.logits[:, -1:]]
            for at in range(length, ids.shape[1]):
                part = model(ids[:, at : at + 1], past_key_values=part.past_key_values, use_cache=True)
                found.append(part.logits)
    steps = torch.cat(found, 1)
    off, limit = (x.float().sub(exact).square().mean().sqrt() for x in (steps, whole))
    assert off <= 2 * (limit + torch.finfo(torch.bfloat16).eps * exact.square().mean().sqrt())


@pytest.mark.parametrize("length", PROMPTS)
def test_generation_runs_with_drafts_and_beams(length):
    model, ids = hybrid("llama", [8, -1, 0]).eval(), tokens(1, length, seed=2)
    for options in ({}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}):
        with autocast():
            found = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, **options)
        assert found.shape == (1, length + 12)


def test_learned_slots_train():
    from peft import get_peft_model

    adapted = get_peft_model(hybrid("llama", [8, -1, 0]), SlotsConfig(task_type="CAUSAL_LM", start="random"))
    ids = tokens(2, 30, seed=3)
    with autocast():
        adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
