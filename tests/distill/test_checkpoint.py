"""Checkpoints are verified when a run is resumed, and a run's directory belongs to one process at a time."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nha.distill import checkpoint as module
from nha.distill.checkpoint import check_whole, latest_checkpoint, load_trained, locked, publish, read_log
from nha.distill.run import distill
from tests.distill.material import material, settings, tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def stopped(given, tmp_path_factory):
    """A run that stopped after its first step."""
    run = tmp_path_factory.mktemp("runs") / "run"
    distill(tiny(), given[1], given[0], run, settings(budget=0.0))
    return run


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def files(checkpoint):
    return sorted(path.name for path in checkpoint.iterdir())


def test_a_checkpoint_has_all_that_a_run_needs(stopped):
    names = {"manifest.json", "trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert names <= set(files(stopped / "checkpoint-1"))
    assert latest_checkpoint(stopped) == stopped / "checkpoint-1"


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "one bit"])
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(name, damage, run, given):
    path = run / "checkpoint-1" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(b"" if damage == "empty" else data)
    with pytest.raises(ValueError, match=name):
        distill(tiny(), given[1], given[0], run, settings())


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_file_that_the_manifest_leaves_out_is_missing(name, run):
    path = run / "checkpoint-1" / "manifest.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))
    with pytest.raises(ValueError, match=name):
        check_whole(run / "checkpoint-1")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": ["x", "y"]}'])
def test_a_damaged_manifest_is_refused(text, run):
    (run / "checkpoint-1" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json"):
        latest_checkpoint(run)


def test_the_newest_whole_checkpoint_wins(run):
    for step in (2, 10):
        shutil.copytree(run / "checkpoint-1", run / f"checkpoint-{step}")
    (run / "checkpoint-x").mkdir()
    assert latest_checkpoint(run) == run / "checkpoint-10"
    (run / "checkpoint-10" / "optimizer.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="checkpoint-10.*checkpoint-2"):
        assert latest_checkpoint(run) == run / "checkpoint-2"


def test_random_damage_never_passes_for_a_whole_checkpoint(run):
    checkpoint = run / "checkpoint-1"
    generator = random.Random(0)
    for _ in range(60):
        path = generator.choice([path for path in checkpoint.iterdir() if path.name != "manifest.json"])
        data = path.read_bytes()
        cut, flip = generator.randrange(len(data)), bytearray(data)
        flip[cut] ^= 1 << generator.randrange(8)
        path.write_bytes(generator.choice([data[:cut], bytes(flip), data + b"\0"]))
        with pytest.raises(ValueError, match=path.name):
            check_whole(checkpoint)
        path.write_bytes(data)
    check_whole(checkpoint)


def test_an_older_checkpoint_stays_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / ".work").mkdir()
    (tmp_path / ".work" / "x").write_text("x")
    seen = []
    for name in ("sync_tree", "sync_directory"):
        monkeypatch.setattr(module, name, lambda path: seen.append(files(tmp_path)))
    publish(tmp_path / ".work", tmp_path / "checkpoint-2")
    assert seen == [[".work", "checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    assert files(tmp_path) == ["checkpoint-2"]


def test_trained_tensors_of_other_names_or_shapes_are_refused_and_nothing_is_copied(run):
    from nha.distill.student import Distillation
    from tests.distill.test_student import student_of

    student: Distillation = student_of(tiny())
    wanted = {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
    file = run / "checkpoint-1" / "trained.safetensors"
    tensors = load_file(file)
    name = next(name for name, x in tensors.items() if x.dim() == 2)
    for changed, message in (
        ({name: torch.ones(1)}, r"shape \[.*\].*got \[1\]"),
        ({name: tensors[name].T.contiguous()[:1]}, "shape"),
        ({"other": torch.ones(1)}, "other unknown"),
    ):
        save_file(tensors | changed, file)
        with pytest.raises(ValueError, match=message) as error:
            load_trained(student, run / "checkpoint-1")
        assert str(file) in str(error.value)
    save_file({n: x for n, x in tensors.items() if n != name}, file)
    with pytest.raises(ValueError, match="missing"):
        load_trained(student, run / "checkpoint-1")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="trained.safetensors"):
        load_trained(student, run / "checkpoint-1")
    for n, p in student.named_parameters():
        assert n not in wanted or torch.equal(p, wanted[n])


def test_lines_of_a_log_that_a_crash_cut_short_are_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\nnull\n{"loss": 1}\n\0\0\0\n{"step": 3}\n{"st')
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3]
    assert [entry["step"] for entry in read_log(tmp_path, until=2)] == [1, 2]
    assert read_log(tmp_path / "nowhere") == []


def test_a_second_process_in_the_same_directory_is_refused_by_number(run, given):
    with locked(run):
        with pytest.raises(ValueError, match=f"got process {os.getpid()}"):
            distill(tiny(), given[1], given[0], run, settings())
        child = os.fork()
        if child == 0:  # such as a data loader
            os._exit(0 if not module._open_locks else 1)
        assert os.waitpid(child, 0)[1] == 0
    with locked(run):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = "import sys, time; from pathlib import Path; from nha.distill.checkpoint import locked\n"
    code += "with locked(Path(sys.argv[1])):\n print('locked', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"got process {process.pid}"), locked(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
    with locked(tmp_path / "run"):
        pass
