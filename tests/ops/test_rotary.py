"""Rotations compose and are undone."""

import pytest
import torch

from nha.ops.rotary import deinterleave, rotate, shared_distance, unrotate, unrotate_for_slots


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


@pytest.mark.parametrize("rotated, interleaved", [(8, False), (4, False), (8, True)])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_token_is_unrotated_as_a_token_of_many(rows, rotated, interleaved):
    q, k = (torch.randn(3, 4, heads, 8, dtype=torch.float64) for heads in (4, 2))
    angle = torch.randn(rows, 4, rotated // 2, dtype=torch.float64).repeat(1, 1, 2)
    far = torch.randn(1, 1, rotated // 2, dtype=torch.float64).repeat(1, 1, 2)
    options = {"interleaved": interleaved}
    many = unrotate_for_slots(q, k, (angle.cos(), angle.sin()), (far.cos(), far.sin()), **options)
    for t in (2, 3):
        one = slice(t, t + 1)
        tables = angle[:, one].cos(), angle[:, one].sin()
        for distance in (far, far + 1, far):
            found = unrotate_for_slots(q[:, one], k[:, one], tables, (distance.cos(), distance.sin()), **options)
            assert torch.allclose(found[1], many[1][:, one], atol=1e-12)
            assert torch.allclose(found[0], many[0][:, one], atol=1e-12) == (distance is far)
        tables[0].neg_()  # what is kept from the last token is not used once its tables have changed
        found = unrotate_for_slots(q[:, one], k[:, one], tables, (far.cos(), far.sin()), **options)
        assert not torch.allclose(found[1], many[1][:, one], atol=1e-3)


def test_equal_tables_of_two_dtypes_are_not_shared():
    table = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    double = table[0].double(), table[1].double()
    first = shared_distance(table)
    assert shared_distance((table[0].clone(), table[1].clone())) is first
    assert shared_distance(double)[0].dtype == torch.float64
