"""Times are taken, rows are chosen, and a table on disk is whole."""

from __future__ import annotations

import pytest
import torch

from nha.bench.timing import Table, flushes_for, median_ms, read_table, require_gpu, select


def test_rows_are_on_disk_before_the_table_is_done_and_an_older_table_is_kept(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def broken():
        with Table(path, ["a", "b"]) as table:
            table.add({"a": 1, "b": None})
            assert read_table(table.partial) == [{"a": 1, "b": None}]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert path.read_text() == "old"
    with Table(path, ["a", "b"]) as table:
        table.add({"a": 1.5, "b": "x"})
    assert read_table(path) == [{"a": 1.5, "b": "x"}] and not table.partial.exists()


def test_one_call_is_timed_without_a_gpu():
    calls = []
    assert median_ms(lambda: calls.append(1)) >= 0
    assert len(calls) == 1 or torch.cuda.is_available()


def test_the_cache_is_flushed_for_longer_than_the_host_works_but_not_without_end():
    assert flushes_for(0.0) == 1
    for host in (1e-4, 1e-3, 5e-3):
        assert flushes_for(host) * 50e-6 > host
    assert flushes_for(10.0) == 400


def test_rows_are_chosen_by_a_pattern():
    assert select(["a 1", "b 2"], None) == ["a 1", "b 2"]
    assert select(["a 1", "b 2"], "^b") == ["b 2"]
    with pytest.raises(ValueError, match="'c'"):
        select(["a 1", "b 2"], "c")
    with pytest.raises(ValueError, match=r"'\('"):
        select(["a 1"], "(")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named():
    require_gpu(tiny=True)
    with pytest.raises(ValueError, match="CUDA"):
        require_gpu(tiny=False)
