"""A cache under any sequence of operations equals reading every row's tokens anew."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import DynamicCache, StaticCache

from nha import load_cache, save_cache
from tests.inputs import assert_close_to
from tests.models.families import hybrid, tokens

WINDOWS = [[8, 8, 8], [8, -1, 0], [3, 8, -1]]
STEPS, ROWS, LENGTH = 8, 6, 120


class Conversation:
    """A cache and the tokens [B, T] that it should have read."""

    def __init__(self, model, static: bool, draw: random.Random, path):
        self.model, self.draw, self.path, self.static = model, draw, path, static
        self.cache = StaticCache(config=model.config, max_cache_len=2 * LENGTH) if static else DynamicCache()
        self.ids = tokens(draw.randint(1, 3), 0)
        self.recorded = 0
        self.recording = False

    def read(self) -> None:
        length = self.draw.choice([1, 1, 2, 5, 9, 20])
        ids = tokens(len(self.ids), length, seed=self.draw.randrange(1000))
        self.ids = torch.cat([self.ids, ids], 1)
        with torch.no_grad():
            found = self.model(ids, past_key_values=self.cache, use_cache=True).logits
            wanted = self.model(self.ids, use_cache=False).logits[:, -length:]
        assert_close_to(found, wanted)
        self.recorded += length if self.recording else 0

    def record(self) -> None:
        self.cache.activate_past_recording()
        self.recording = True

    def crop(self) -> None:
        back = self.draw.randint(0, self.recorded)
        self.cache.crop(-back)
        self.ids = self.ids[:, : self.ids.shape[1] - back]
        self.recorded = 0

    def crop_too_much(self) -> None:
        before = copy.deepcopy(self.cache)
        with pytest.raises(RuntimeError, match="slots cannot forget"):
            self.cache.crop(-self.recorded - 1)
        for old, new in zip(before.layers, self.cache.layers, strict=True):
            assert old.get_seq_length() == new.get_seq_length()

    def reorder(self) -> None:
        rows = torch.tensor([self.draw.randrange(len(self.ids)) for _ in self.ids])
        self.cache.reorder_cache(rows)
        self.ids = self.ids[rows]

    def select(self) -> None:
        rows = torch.tensor([self.draw.randrange(len(self.ids)) for _ in range(self.draw.randint(1, ROWS))])
        self.cache.batch_select_indices(rows)
        self.ids = self.ids[rows]

    def repeat(self) -> None:
        if len(self.ids) * 2 <= ROWS:
            self.cache.batch_repeat_interleave(2)
            self.ids = self.ids.repeat_interleave(2, 0)

    def copy(self) -> None:
        self.cache = copy.deepcopy(self.cache)

    def save_and_load(self) -> None:
        save_cache(self.cache, self.path, self.model)
        self.cache, self.recorded, self.recording = load_cache(self.path, self.model), 0, False

    def step(self) -> None:
        choices = [self.read, self.read, self.record, self.reorder, self.copy]
        if self.ids.shape[1]:
            choices += [self.crop_too_much] if self.recorded < self.ids.shape[1] else []
            if not self.static:
                choices += [self.select, self.repeat, self.save_and_load]
            if self.recording and not (self.static and -1 in self.model.config.window_sizes):
                choices += [self.crop, self.crop]
        self.draw.choice(choices)()


def run(seed: int, path) -> None:
    draw = random.Random(seed)
    model = hybrid("llama", draw.choice(WINDOWS)).double()
    one = Conversation(model, seed % 4 == 0, draw, path)
    for _ in range(STEPS):
        one.read() if not one.ids.shape[1] else one.step()
        if one.ids.shape[1] > LENGTH:
            break
    one.read()


@pytest.mark.parametrize("block", range(6))
def test_random_interleavings(block, request, tmp_path):
    cases = 200 if request.config.getoption("--long") else 10
    for seed in range(block * cases, (block + 1) * cases):
        run(seed, tmp_path / "cache")
