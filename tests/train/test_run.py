"""A run trains, resumes to the same bits, refuses what does not fit, and stops where the loss is lost."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nha.distill.checkpoint import latest_checkpoint, step_of
from nha.distill.stopping import Stop
from nha.distill.trainer import Reports
from nha.train.run import train
from nha.train.trainer import TrainingDiverged
from tests.train.material import LENGTH, Copying, material, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return material(tmp_path_factory.mktemp("material"))[0]


def losses(result):
    return [entry["loss"] for entry in result.log if "loss" in entry]


def stopping_at(step: int) -> tuple[Stop, Reports]:
    """A stop that is asked for during a step, and so ends it."""
    stop = Stop()

    def progress(stage: str, done: int, total: int) -> None:
        if done == step - 1:
            stop.reason = "SIGTERM"

    return stop, Reports(progress=progress)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon", "schedule": "wsd", "random_windows": (0, 8, -1)},
        {"random_windows": (0, 8, -1), "windows_per_step": 2},
    ],
    ids=str,
)
def test_a_stopped_run_resumes_to_the_same_bits(corpus, changes, tmp_path):
    whole = train(corpus, tmp_path / "whole", settings(**changes))
    stop, reports = stopping_at(3)
    first = train(corpus, tmp_path / "parts", settings(**changes), stop=stop, reports=reports)
    assert (first.finished, first.steps, first.stopped_by) == (False, 3, "SIGTERM")
    second = train(corpus, tmp_path / "parts", settings(**changes))
    assert second.finished and losses(second) == losses(whole) and len(losses(whole)) == 6
    for name, weight in second.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name
    assert second.summary["eval_loss"] == whole.summary["eval_loss"]
    assert second.model.config.window_sizes == [8, 8]


def test_accumulated_micro_batches_train_like_one_batch(tmp_path):
    several = train(Copying(), tmp_path / "several", settings())
    one = train(Copying(), tmp_path / "one", settings(micro_batch_size=4))
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)


def test_all_windows_of_a_step_count_the_same(tmp_path):
    def first_loss(name: str, **changes) -> float:
        return losses(train(Copying(), tmp_path / name, settings(log_every=1, **changes)))[0]

    alone = [first_loss(f"w{window}", window_size=window) for window in (1, 8)]
    both = first_loss("both", random_windows=(1, 8), windows_per_step=2)
    assert alone[0] != alone[1] and both == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_a_task_is_learned_and_measured_on_the_way(tmp_path):
    seen = []

    def evaluate(model) -> dict[str, float]:
        seen.append(model.training)
        return {"half": 0.5}

    sizes = dict(tokens=60 * 16 * LENGTH, batch_size=16, micro_batch_size=16, window_size=-1)
    long = settings(**sizes, eval_every=20, log_every=10, save_every=60)
    found = train(Copying(), tmp_path / "run", long, evaluate=evaluate)
    assert losses(found)[-1] < losses(found)[0] - 0.05
    assert [entry["step"] for entry in found.log if "half" in entry] == [20, 40] and seen == [False] * 3
    assert found.summary["half"] == 0.5 and found.summary["tokens"] == 60 * 16 * LENGTH
    assert len(losses(found)) == 6 and found.log[-1]["seconds_left"] == 0


def test_any_causal_language_model_can_be_trained(corpus, tmp_path):
    def llama():
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        return LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes))

    found = train(corpus, tmp_path / "run", settings(packing="joined"), make_model=llama)
    assert found.finished and losses(found)[0] == pytest.approx(math.log(320), abs=0.2)
    with pytest.raises(ValueError, match="packing"):
        train(corpus, tmp_path / "other", settings(), make_model=llama)
    assert not (tmp_path / "other").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(corpus, tmp_path):
    run = tmp_path / "run"
    for changes, words in (
        ({"seq_len": 1 << 20, "tokens": 1 << 22}, str(1 << 20)),
        ({"batch_size": 3}, "batch_size"),
        ({"window_size": 1000}, "1000"),
        ({"window_size": (8, 8, 8)}, "3"),
        ({"full_layers": (2,)}, "full_layers"),
    ):
        with pytest.raises(ValueError, match=words):
            train(corpus, run, settings(**changes))
        assert not run.exists()


def test_a_vocabulary_that_is_too_small_is_refused(corpus, tmp_path):
    def small():
        return LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))

    with pytest.raises(ValueError, match="100"):
        train(corpus, tmp_path / "run", settings(packing="joined"), make_model=small)


def test_a_run_is_resumed_with_its_own_settings_only(corpus, tmp_path):
    stop, reports = stopping_at(2)
    train(corpus, tmp_path / "run", settings(), stop=stop, reports=reports)
    for changes in ({"lr": 1e-4}, {"num_slots": 7}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            train(corpus, tmp_path / "run", settings(**changes))
    with pytest.raises(ValueError, match="data"):
        train(Copying(), tmp_path / "run", settings())
    assert train(corpus, tmp_path / "run", settings(log_every=3)).finished


class Wrong(Copying):
    """A task whose sequences from the ninth on repeat their loss with the targets of another one."""

    identity = "wrong"

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, targets = super().row(index)
        return ids, targets if index < 16 else np.where(targets == -100, 63, -100)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_whole_checkpoint(tmp_path, monkeypatch):
    from nha.train.loss import LanguageModel

    forward = LanguageModel.forward
    calls = []

    def broken(self, **batch):
        calls.append(1)
        return forward(self, **batch) * (math.nan if len(calls) > 6 else 1.0)

    monkeypatch.setattr(LanguageModel, "forward", broken)
    with pytest.raises(TrainingDiverged, match="nan.*checkpoint-2"):
        train(Copying(), tmp_path / "run", settings(log_every=5))
    kept = latest_checkpoint(tmp_path / "run")
    assert kept is not None and step_of(kept) == 2


def test_a_spike_stops_and_keeps_the_last_whole_checkpoint(tmp_path):
    with pytest.raises(TrainingDiverged, match="checkpoint-4"):
        train(Wrong(), tmp_path / "run", settings(max_spike=0.05))
    kept = latest_checkpoint(tmp_path / "run")
    assert kept is not None and step_of(kept) == 4


RUN = """
from pathlib import Path
from tests.train.material import Copying, settings
from nha.train.run import train
train(Copying(), Path({path!r}), settings(tokens=40 * 4 * 32, save_every=2))
"""


def test_a_killed_run_resumes_to_the_same_loss_curve(tmp_path):
    long = settings(tokens=40 * 4 * LENGTH, save_every=20)
    whole = train(Copying(), tmp_path / "whole", long)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN.format(path=str(tmp_path / "run"))], env=environment, cwd=ROOT
    )
    try:
        until = time.monotonic() + 240
        while latest_checkpoint_step(tmp_path / "run") < 4:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "run" / "checkpoint-40").exists()
    found = train(Copying(), tmp_path / "run", long)
    assert losses(found) == losses(whole) and len(losses(whole)) == 40
    for name, weight in found.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name


def latest_checkpoint_step(run: Path) -> int:
    return max((step_of(path) for path in run.glob("checkpoint-*")), default=-1)
