"""A teacher that is trained first: the hybrid starts from it and is distilled from it, and every stage resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nha.distill.run
from nha.data.stream import Stream
from nha.distill.checkpoint import latest_checkpoint
from nha.distill.estimate import estimate
from nha.distill.run import control_identity, distill, make_mixture, teacher_mixture, train_teacher
from nha.distill.settings import DistillSettings
from nha.distill.trainer import Reports
from tests.distill.material import LENGTH, material, settings, tiny
from tests.distill.test_recipes import SHAPE

ROOT = Path(__file__).parents[2]
STEP = 2 * LENGTH  # tokens
WORKER = """
import sys
from pathlib import Path
from typing import Any
from nha.distill.run import distill
from nha.distill.trainer import Reports
from nha.data.corpus import open_corpus
from transformers import AutoTokenizer
from tests.distill.material import tiny
from tests.distill.test_teacher import taught

place, run = Path(sys.argv[1]), sys.argv[2]
reports = Reports(
    log=lambda entry: print("hybrid", entry["step"], flush=True),
    teacher_log=lambda entry: print("teacher", entry["step"], flush=True),
)
distill(tiny(), AutoTokenizer.from_pretrained(place), open_corpus(place / "corpus"), run, taught(), reports=reports)
"""


def taught(**changes):
    """Three steps of the teacher, then three of the hybrid."""
    return settings(**({"teacher_tokens": 3 * STEP, "save_every": 1} | changes))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def whole_run(given, tmp_path_factory):
    """A run that nothing disturbed, and where it is."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return distill(tiny(), given[1], given[0], run, taught()), run


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_the_tokens_of_both_stages_are_those_of_the_run(whole_run):
    found, _ = whole_run
    assert found.finished and found.steps == 6
    assert [entry["step"] for entry in found.teacher_log] == [entry["step"] for entry in found.log] == [1, 2, 3]
    assert [entry["tokens"] / STEP for entry in found.teacher_log + found.log] == [1, 2, 3, 4, 5, 6]
    # each learning rate ends at the end of its stage
    assert found.teacher_log[-1]["lr"] == found.log[-1]["lr"] < found.log[0]["lr"]
    assert all(entry["kl"] == 0 for entry in found.teacher_log) and all(entry["kl"] > 0 for entry in found.log)


@pytest.mark.parametrize(
    "changes", [{}, {"fact_warmup": 1 / 3}, {"long_tokens": 2 * STEP, "long_seq_len": STEP // 2}], ids=str
)
def test_both_stages_read_the_batches_that_the_control_reads(changes, given):
    corpus, tokenizer = given
    chosen = taught(**changes)
    control = Stream(corpus, tokenizer, make_mixture(chosen, control=True))
    first, rest = (
        Stream(corpus, tokenizer, teacher_mixture(chosen)),
        Stream(corpus, tokenizer, make_mixture(chosen), first=3),
    )
    assert (len(first), len(rest), len(control)) == (3, 3, 6)
    for step in range(6):
        batches = first[step] if step < 3 else rest[step - 3]
        for (_, one), (_, two) in zip(batches, control[step], strict=True):
            for name in ("ids", "target", "follows", "answers", "position_ids", "cu_seqlens"):
                assert torch.equal(one[name], two[name]), (step, name)
            if step < 3:
                assert torch.equal(one["ce_weight"], two["ce_weight"])


def test_the_hybrid_starts_from_the_trained_teacher_and_is_distilled_from_it(given, tmp_path, monkeypatch):
    corpus, tokenizer = given
    trained, original = tiny(), tiny()
    assert train_teacher(trained, tokenizer, corpus, tmp_path / "teacher", taught()).model is trained
    students = []
    make = nha.distill.run.make_student

    def keep(*args, **kwargs):
        student, ids = make(*args, **kwargs)
        students.append(student)
        return student, ids

    monkeypatch.setattr(nha.distill.run, "make_student", keep)

    def stop(entry):
        raise StopIteration  # after one step: the teacher must not have moved with the student

    options = {"teacher_run": tmp_path / "teacher", "reports": Reports(log=stop)}
    with pytest.raises(StopIteration):
        distill(tiny(), tokenizer, corpus, tmp_path / "run", taught(), **options)
    (student,) = students  # stage 0 was there already
    ids = torch.arange(1, 41)[None]
    with torch.no_grad(), student.teacher():
        logits = student.causal(ids).logits
    with torch.no_grad():
        assert torch.equal(logits, trained(ids).logits)
        assert not torch.allclose(logits, original(ids).logits)
        short = torch.arange(1, 17)[None]  # no longer than the window: the hybrid is full attention
        before = tiny()
        train_teacher(before, tokenizer, corpus, tmp_path / "teacher", taught())
        hybrid, _ = make(before, corpus, taught(), [16] * 3)
        assert torch.allclose(hybrid.causal(short).logits, trained(short).logits, atol=1e-5)


def test_a_run_resumes_with_the_same_bits_within_and_between_the_stages(given, whole_run, tmp_path):
    corpus, tokenizer = given
    run, stages = tmp_path / "run", []
    for _ in range(6):  # a budget of 0 stops after one step
        found = distill(tiny(), tokenizer, corpus, run, taught(budget=0.0))
        stages.append((found.steps, (run / "run.json").exists()))
    assert stages == [(step, step > 3) for step in range(1, 7)]
    found = distill(tiny(), tokenizer, corpus, run, taught())
    assert found.finished and found.steps == 6
    assert_same_bits(found.model.state_dict(), whole_run[0].model.state_dict())


def test_a_run_that_is_killed_in_either_stage_resumes_with_the_same_bits(given, whole_run, tmp_path):
    place, run = given[0].path.parent, tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    for moment, folder in (("teacher 2", run / "teacher"), ("hybrid 2", run)):
        command = [sys.executable, "-c", WORKER, str(place), str(run)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            for line in process.stdout or []:
                if line.strip() == moment:
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL and latest_checkpoint(folder) is not None
    found = distill(tiny(), given[1], given[0], run, taught())
    assert_same_bits(found.model.state_dict(), whole_run[0].model.state_dict())


def test_runs_share_a_teacher_and_other_batches_are_refused(given, whole_run, tmp_path):
    corpus, tokenizer = given
    teacher = whole_run[1] / "teacher"
    before = (teacher / "checkpoint-3").stat().st_mtime_ns
    found = distill(
        tiny(), tokenizer, corpus, tmp_path / "run", taught(full_layers=(1,), tokens=8 * STEP), teacher_run=teacher
    )
    assert found.finished and found.steps == 8 and (teacher / "checkpoint-3").stat().st_mtime_ns == before
    for change in ({"seed": 1}, {"lr": 1e-3}, {"teacher_tokens": 2 * STEP}):
        with pytest.raises(ValueError, match=next(iter(change)).replace("teacher_tokens", "steps")):
            distill(tiny(), tokenizer, corpus, tmp_path / "other", taught(**change), teacher_run=teacher)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="teacher_tokens"):
        distill(tiny(), tokenizer, corpus, whole_run[1], settings(save_every=1))


def test_a_control_reads_all_batches_in_one_stage(given):
    corpus, _ = given
    assert control_identity(tiny(), corpus, taught()) == control_identity(tiny(), corpus, settings())
    assert make_mixture(taught(), control=True) == make_mixture(settings(), control=True)


def test_what_leaves_a_stage_without_work_is_refused():
    refused: list[dict[str, Any]] = [
        {"teacher_tokens": 1e6, "tokens": 1e6},
        {"teacher_tokens": 6e5, "tokens": 1e6, "long_tokens": 5e5},
        {"teacher_tokens": 1e5, "trainable": "lora"},
        {"teacher_tokens": 1e5, "trainable": "slots"},
    ]
    for changes in refused:
        with pytest.raises(ValueError, match="teacher_tokens"):
            DistillSettings(**changes)
    assert "teacher_tokens" not in DistillSettings().identity()  # that of runs before this setting
    with pytest.raises(ValueError, match="teacher_tokens"):
        teacher_mixture(DistillSettings(tokens=2e4, teacher_tokens=1e4))


def test_an_estimate_counts_the_stage_of_the_teacher():
    plain = estimate(SHAPE, DistillSettings(tokens=1e7), device="H100")
    found = estimate(SHAPE, DistillSettings(tokens=1e7, teacher_tokens=5e6), device="H100")
    assert (found.steps, found.tokens, plain.teacher_tokens) == (plain.steps, plain.tokens, 0)
    assert found.teacher_tokens == pytest.approx(5e6, rel=0.01)
    assert found.seconds < plain.seconds  # a step of the teacher has no teacher of its own


def test_a_stage_that_was_stopped_leaves_the_model_as_it_was(given, tmp_path):
    corpus, tokenizer = given
    model = tiny()
    found = train_teacher(model, tokenizer, corpus, tmp_path / "teacher", replace(taught(), budget=0.0))
    assert not found.finished and found.model is model
    assert_same_bits(model.state_dict(), tiny().state_dict())
