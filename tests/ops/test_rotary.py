"""Rotations compose, are undone, and are those of every supported family."""

import sys

import pytest
import torch

from nha.models.adapter import attention_layers
from nha.ops.rotary import rotate, unrotate, unrotate_for_slots
from tests.models.families import FAMILIES, hybrid, tokens


def tables(angle, scale=1.0):
    angle = angle.repeat(1, 1, 2)
    return scale * angle.cos(), scale * angle.sin()


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [8, 6], ids=["whole head", "part of the head"])
def test_slots_see_keys_without_position_and_queries_at_a_distance(size):
    q, k, angle = rows(2, 5, 4, 8), rows(2, 5, 2, 8, seed=1), rows(2, 5, size // 2, seed=2)
    near, far = tables(angle, scale=1.5), tables(rows(1, 1, size // 2, seed=3))
    slot_q, slot_k = unrotate_for_slots(rotate(q, *near), rotate(k, *near), near, far)
    times = torch.ones(8, dtype=torch.float64)
    times[:size] = 1.5  # the scale of the tables stays
    assert torch.allclose(slot_k, k * times)
    assert torch.allclose(slot_q, rotate(q * times, *far))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_rotates_in_this_way(family):
    model = hybrid(family, 8)
    attention, seen = attention_layers(model)[0], {}
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(tables=kwargs["position_embeddings"]), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens(2, 5))
    apply = sys.modules[attention.family.__module__].apply_rotary_pos_emb
    x = rows(2, 3, 5, attention.head_dim)
    turned = apply(x, x, *seen["tables"])[0].transpose(1, 2)
    assert torch.allclose(turned, rotate(x.transpose(1, 2), *seen["tables"]))
    assert torch.allclose(unrotate(turned, *seen["tables"]), x.transpose(1, 2))
