"""Bytes of a quickstart's caches are those of caches that read every token."""

from __future__ import annotations

import pytest
import torch

from nha import NHAConfig, NHAForCausalLM
from nha.models.adapter import to_hybrid
from nha.models.cache import cache_nbytes
from nha.report.costs import as_teacher, costs, filled_cache
from nha.report.quickstart import run_checks
from tests.models.families import teacher


@pytest.mark.parametrize("windows", [[8, 8, 8], [8, [40, 8], 8], [8, [-1, 24], -1]])
def test_bytes_are_those_of_a_model_that_read_the_whole_text(windows):
    model = teacher().eval()
    to_hybrid(model, windows, num_slots=4)
    ids, contexts = torch.randint(97, (1, 30)), (16, 32, 64, 96)
    found = costs(model, ids, contexts)
    for cost in found:
        text = torch.randint(97, (1, cost.context))
        assert cost.hybrid_bytes == cache_nbytes(model(text, use_cache=True).past_key_values)
        with as_teacher(model):
            assert cost.teacher_bytes == cache_nbytes(model(text, use_cache=True).past_key_values)
        assert cost.hybrid_ms and cost.teacher_ms and cost.hybrid_ms > 0 and cost.teacher_ms > 0
    assert [cost.context for cost in found] == list(contexts)


def test_a_cache_is_lengthened_where_it_stands():
    model = NHAForCausalLM(NHAConfig.tiny(window_sizes=[16, -1])).eval()
    ids = torch.randint(model.config.vocab_size, (1, 20))
    cache = filled_cache(model, ids, 12)
    assert filled_cache(model, ids, 40, cache) is cache and cache.get_seq_length() == 40
    assert cache_nbytes(cache) == cache_nbytes(filled_cache(model, ids, 40))


def test_windows_longer_than_the_text_are_filled_before_their_bytes_are_compared():
    model = NHAForCausalLM(NHAConfig.tiny(window_sizes=[8, [4, 64]])).eval()
    checks = {check.name: check for check in run_checks(model, torch.randint(model.config.vocab_size, (1, 30)))}
    assert (
        checks["hybrid layers do not grow"].passed and "after 96 tokens" in checks["hybrid layers do not grow"].detail
    )
