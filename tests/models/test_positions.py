"""Positions with gaps and repeats belong to one sequence; a step backwards begins another."""

import pytest
import torch

from nha.models.masks import packed_boundaries
from tests.models.families import hybrid, teacher, tokens

POSITIONS = {
    "gap": [0, 1, 2, 3, 10, 11, 12, 13],
    "repeat": [0, 1, 2, 3, 4, 5, 6, 6],
    "from afar": [500, 501, 502, 510, 511, 511, 512, 900],
    "first repeated": [0, 0, 1, 2, 3, 4, 5, 6],
}
each_position = pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@each_position
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_within_the_window_they_give_the_originals_bits(family, positions):
    position = torch.tensor([positions])
    ids = tokens(1, 8)
    assert torch.equal(
        logits(hybrid(family, 8), ids, position_ids=position), logits(teacher(family), ids, position_ids=position)
    )


@each_position
@pytest.mark.parametrize("windows", [4, 0, [-1, 4, 4]], ids=str)
def test_they_are_read_alike_with_and_without_a_cache_and_in_pieces(windows, positions):
    model, ids, position = hybrid("llama", windows).double(), tokens(1, 8), torch.tensor([positions])
    whole = logits(model, ids, position_ids=position, use_cache=False)
    assert torch.allclose(logits(model, ids, position_ids=position), whole, atol=1e-9)
    cache, found = None, []
    with torch.no_grad():
        for at in range(8):
            step = model(ids[:, at : at + 1], position_ids=position[:, at : at + 1], past_key_values=cache)
            cache = step.past_key_values
            found.append(step.logits)
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-9)


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [
        ([0, 1, 2, 3], None),
        ([0, 0, 7, 7], None),
        ([0, 1, 2, 0, 1], [0, 3, 5]),
        ([0, 1, 2, 0, 0, 1], [0, 3, 4, 6]),
        ([4, 5, 2, 9], [0, 2, 4]),
    ],
)
def test_a_sequence_begins_where_positions_step_backwards(positions, wanted):
    found = packed_boundaries(torch.tensor([positions]))
    assert (None if found is None else found.tolist()) == wanted
