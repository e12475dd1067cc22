"""Distillation with a window for each KV head: runs, resumes, windows of CUDA graphs, gradients of every head."""

from collections import Counter

import pytest
import torch

from nha.distill.cuda_graphs import CUDAGraphRunner
from nha.distill.run import distill, make_mixture
from nha.distill.student import Distillation
from nha.distill.trainer import Reports
from nha.settings import parse_window
from tests.distill.material import LENGTH, material, settings, tiny
from tests.models.families import hybrid

WINDOWS = ((8, 32), 16, (-1, 16))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return material(tmp_path_factory.mktemp("material"))


def test_a_run_trains_all_heads_and_resumes_with_the_same_bits(given, tmp_path):
    corpus, tokenizer = given
    options = settings(window_size=WINDOWS, tokens=4 * 2 * LENGTH, window_dropout=0.5)
    whole = distill(tiny(), tokenizer, corpus, tmp_path / "whole", options)
    assert whole.finished and whole.model.config.window_sizes == [[8, 32], 16, [-1, 16]]
    assert all(after <= before for before, after in whole.aligned)

    class Halt(Exception):
        pass

    def stop(entry):
        if entry["step"] == 3:
            raise Halt

    with pytest.raises(Halt):
        distill(tiny(), tokenizer, corpus, tmp_path / "cut", options, reports=Reports(log=stop))
    resumed = distill(tiny(), tokenizer, corpus, tmp_path / "cut", options)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="window_size"):
        distill(tiny(), tokenizer, corpus, tmp_path / "cut", settings(window_size=((8, 32), 16, 16)))


def test_windows_of_heads_are_part_of_the_name_of_a_graph():
    student = Distillation(hybrid("llama", [list(WINDOWS[0]), 16, -1]))
    assert student.current_windows == ((8, 32), 16, -1)
    keys = Counter()
    for windows in (student.windows, [[4, 32], 16, -1], student.windows):
        with student.using(windows):
            keys[student.current_windows] += 1
    assert sorted(keys.values()) == [1, 2]
    assert CUDAGraphRunner(student, list(student.parameters()), capture=None).captured == {}


def test_recall_text_does_not_depend_on_windows_so_that_hybrids_share_a_control():
    for windows in (((8, 300), 16, -1), (300, 16, -1), 300):
        assert make_mixture(settings(window_size=windows)) == make_mixture(settings())


@pytest.mark.parametrize(
    "windows, words",
    [(((8, 16.0), 16), "16.0"), (((8, ()), 16), "window_size"), (((8, -2), 16), "-2"), ((), "empty")],
    ids=str,
)
def test_settings_that_cannot_be_are_named(windows, words):
    with pytest.raises(ValueError, match=words):
        settings(window_size=windows)


def test_windows_of_layers_are_read_from_the_command_line():
    assert settings(window_size=parse_window("8,-1,8")).window_size == (8, -1, 8)
    assert settings(window_size=[[8, 16], -1]).window_size == [[8, 16], -1]


def test_windows_longer_than_the_sequences_of_alignment_are_trained_in_longer_ones(given, tmp_path):
    corpus, tokenizer = given
    long = {"long_tokens": 2 * 2 * LENGTH, "long_seq_len": 2 * LENGTH}
    options = settings(window_size=((16, LENGTH + 100), 16, 16), tokens=4 * 2 * LENGTH, **long)
    found = distill(tiny(), tokenizer, corpus, tmp_path / "run", options)
    assert found.finished and found.model.config.window_sizes[0] == [16, LENGTH + 100]
    assert all(torch.isfinite(weight).all() for weight in found.model.parameters())
