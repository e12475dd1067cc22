"""Rotations compose and are undone."""

import pytest
import torch

from nha.ops.rotary import deinterleave, rotate, unrotate, unrotate_for_slots


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


def test_interleaved_pairs_are_those_of_reordered_dimensions():
    x, near = rows(2, 5, 2, 8), tables(rows(2, 5, 3, seed=1))
    rotated = rotate(x, *near, interleaved=True)
    assert torch.allclose(deinterleave(rotated[..., :6]), rotate(deinterleave(x[..., :6]), *near))
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    assert torch.allclose(unrotate(rotated, *near, interleaved=True), x)
    far = tables(rows(1, 1, 3, seed=2))
    slot_q, slot_k = unrotate_for_slots(rotated, rotated, near, far, interleaved=True)
    assert torch.allclose(slot_k, x)
    assert torch.allclose(slot_q, rotate(x, *far, interleaved=True))
