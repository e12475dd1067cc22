"""A run resumes with the same bits wherever it was stopped; misfits are refused, and nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nha.distill.student
import nha.distill.trainer
from nha.distill.checkpoint import latest_checkpoint, step_of
from nha.distill.run import distill
from nha.distill.trainer import Reports
from tests.distill.material import LENGTH, material, settings, tiny
from tests.models.families import teacher

ROOT = Path(__file__).parents[2]
WORKER = """
import sys
from pathlib import Path
from nha.distill.run import distill
from nha.distill.trainer import Reports
from nha.data.corpus import open_corpus
from transformers import AutoTokenizer
from tests.distill.material import settings, tiny

place, run = Path(sys.argv[1]), sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(place)
print("ready", flush=True)
corpus = open_corpus(place / "corpus")
reports = Reports(log=lambda entry: print(entry["step"], flush=True))
distill(tiny(), tokenizer, corpus, run, settings(), reports=reports)
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def whole_run(given, tmp_path_factory):
    """A run that nothing disturbed, and where it is."""
    corpus, tokenizer = given
    run = tmp_path_factory.mktemp("runs") / "whole"
    return distill(tiny(), tokenizer, corpus, run, settings()), run


def start_worker(place, run):
    """A process that trains in `run` and prints every step."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-c", WORKER, str(place), str(run)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def weights(model):
    return model.state_dict()


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_a_run_trains_attention_and_gates_and_leaves_the_rest(whole_run):
    found, run = whole_run
    assert found.finished and found.steps == 6
    assert all(after <= before for before, after in found.aligned)
    before = tiny().state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, found.model.state_dict()[name])}
    assert moved == {name for name in before if ".self_attn." in name}
    assert [entry["step"] for entry in found.log] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "kl", "cross_entropy", "answer_loss", "tokens_per_s"} <= found.log[0].keys()
    files = {".lock", "run.json", "log.jsonl", "timeline.json", "checkpoint-6", "tensorboard"}
    assert {path.name for path in run.iterdir()} == files
    assert found.model.config.use_cache


def test_a_killed_run_resumes_with_the_same_bits(given, whole_run, tmp_path):
    place, run = given[0].path.parent, tmp_path / "run"
    process = start_worker(place, run)
    for line in process.stdout:
        if line.strip() == "5":  # after the checkpoint of step 4, which the next step has no part in
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL and latest_checkpoint(run).name == "checkpoint-4"
    corpus, tokenizer = given
    steps = []
    found = distill(
        tiny(), tokenizer, corpus, run, settings(), reports=Reports(log=lambda entry: steps.append(entry["step"]))
    )
    assert steps == [5, 6] and found.finished
    assert_same_bits(weights(found.model), weights(whole_run[0].model))
    timeless = [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in found.log]
    assert timeless == [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in whole_run[0].log]


def test_a_run_that_is_killed_at_random_moments_resumes_with_the_same_bits(given, whole_run, tmp_path):
    place, run, generator = given[0].path.parent, tmp_path / "run", random.Random(0)
    step = -1
    for _ in range(4):
        with start_worker(place, run) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(generator.uniform(0, 3))
            process.kill()
        checkpoint = latest_checkpoint(run) if run.is_dir() else None
        before, step = step, -1 if checkpoint is None else step_of(checkpoint)
        assert step >= before
    found = distill(tiny(), given[1], given[0], run, settings())
    assert [entry["step"] for entry in found.log] == [1, 2, 3, 4, 5, 6]
    assert_same_bits(weights(found.model), weights(whole_run[0].model))


def test_a_finished_run_is_read_back(given, whole_run):
    wanted, run = whole_run
    corpus, tokenizer = given
    started = time.perf_counter()
    found = distill(tiny(), tokenizer, corpus, run, settings())
    assert found.finished and time.perf_counter() - started < 20
    assert_same_bits(weights(found.model), weights(wanted.model))


def test_a_run_stops_in_time_and_resumes(given, whole_run, tmp_path):
    corpus, tokenizer = given
    first = distill(tiny(), tokenizer, corpus, tmp_path / "run", settings(budget=0.0))
    assert not first.finished and first.steps == 1
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-1"
    found = distill(tiny(), tokenizer, corpus, tmp_path / "run", settings())
    assert_same_bits(weights(found.model), weights(whole_run[0].model))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradients": "together", "ce_weight": 0.1},
        {"gradients": "normalise", "window_dropout": 0.5, "fact_warmup": 0.5},
        {"trainable": "lora", "lora_rank": 2},
        {"trainable": "layers", "full_layers": (1,), "micro_batch_size": 1},
        {"kl_weight": 0.0, "ce_weight": 1.0, "init": "paper", "align_steps": 0},
        {"window_size": -1, "kl_weight": 0.0, "ce_weight": 1.0},
        {"slots_off": True, "gradient_checkpointing": True},
        {"long_tokens": 2 * 2 * LENGTH, "long_seq_len": 2 * LENGTH},
    ],
    ids=str,
)
def test_every_kind_of_run_resumes_where_it_stopped(changes, given, tmp_path):
    corpus, tokenizer = given
    chosen = settings(tokens=4 * 2 * LENGTH, **changes)
    wanted = distill(tiny(), tokenizer, corpus, tmp_path / "one", chosen)
    assert wanted.finished
    assert not distill(tiny(), tokenizer, corpus, tmp_path / "two", replace(chosen, budget=0.0)).finished
    found = distill(tiny(), tokenizer, corpus, tmp_path / "two", chosen)
    assert_same_bits(weights(found.model), weights(wanted.model))


def test_a_full_disk_leaves_the_last_checkpoint(given, whole_run, tmp_path, monkeypatch):
    corpus, tokenizer = given
    run = tmp_path / "run"
    save, calls = torch.save, []

    def full(value, path, *args, **kwargs):
        calls.append(path)
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        distill(tiny(), tokenizer, corpus, run, settings())
    assert latest_checkpoint(run).name == "checkpoint-2"
    assert not list(run.glob(".checkpoint*"))
    monkeypatch.setattr(torch, "save", save)
    found = distill(tiny(), tokenizer, corpus, run, settings())
    assert_same_bits(weights(found.model), weights(whole_run[0].model))


def test_torch_reporting_a_full_disk_in_its_own_way_is_understood(given, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="expected room for a checkpoint"):
        distill(tiny(), given[1], given[0], tmp_path / "run", settings())


def test_a_half_written_checkpoint_is_ignored(given, whole_run, tmp_path):
    corpus, tokenizer = given
    run = tmp_path / "run"
    distill(tiny(), tokenizer, corpus, run, settings(budget=0.0))
    (run / ".checkpoint-2.partial" / "checkpoint-2").mkdir(parents=True)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    found = distill(tiny(), tokenizer, corpus, run, settings())
    assert_same_bits(weights(found.model), weights(whole_run[0].model))
    assert [entry["step"] for entry in found.log] == [1, 2, 3, 4, 5, 6]


def refused(given, run, message, chosen=None, model=None, corpus=None):
    """A run raises ValueError with a message that matches."""
    with pytest.raises(ValueError, match=message):
        distill(model or tiny(), given[1], corpus or given[0], run, chosen or settings())


def test_resuming_with_other_settings_is_refused_and_nothing_is_lost(given, whole_run, tmp_path):
    _, run = whole_run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    refused(given, run, "lr not set, got 0.001", settings(lr=1e-3))
    refused(given, run, "max_facts = 16, got 2; seed = 0, got 1", settings(max_facts=2, seed=1))
    other = tiny()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[-1, -1] += 1
    refused(given, run, "with teacher = ", model=other)
    other = tiny()
    other.config.rope_parameters["rope_theta"] *= 2
    refused(given, run, "with teacher = ", model=other)
    for name in ("checksums", "digest"):
        corpus = replace(given[0], meta=given[0].meta | {name: ["1"]})
        refused(given, run, "with corpus = ", corpus=corpus)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_how_often_to_save_may_change_when_a_run_is_resumed(given, whole_run, tmp_path):
    corpus, tokenizer = given
    distill(tiny(), tokenizer, corpus, tmp_path / "run", settings(budget=0.0))
    found = distill(tiny(), tokenizer, corpus, tmp_path / "run", settings(save_every=100, log_every=3))
    assert_same_bits(weights(found.model), weights(whole_run[0].model))


def test_a_shift_of_gates_comes_after_training_and_once(given, whole_run, tmp_path):
    corpus, tokenizer = given
    _, run = whole_run
    place = tmp_path / "run"
    shutil.copytree(run, place)
    wanted = dict(distill(tiny(), tokenizer, corpus, place, settings()).model.state_dict())
    for _ in range(2):  # a run that is read back is shifted from what was trained
        found = distill(tiny(), tokenizer, corpus, place, settings(gate_shift=1.5)).model
        for name, x in found.state_dict().items():
            shift = 1.5 if name.endswith("g_proj.bias") else 0.0
            assert torch.equal(x, wanted[name] + shift), name


def test_a_directory_with_something_else_is_left_alone(given, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    refused(given, tmp_path, "thesis.txt")
    (tmp_path / "run").mkdir()
    for text, message in (("{broken", "something else"), ("", "an empty file"), ('{"lr": 1}', "an earlier version")):
        (tmp_path / "run" / "run.json").write_text(text)
        refused(given, tmp_path / "run", f"run.json.*got .*{message}")
    refused(given, tmp_path / "thesis.txt", "to be a directory, got a file")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json"}


def test_a_teacher_that_cannot_become_a_hybrid_is_refused(given, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300))
    refused(given, tmp_path / "run", "gpt2", model=model)
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    refused(given, tmp_path / "run", "nan", model=model)
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_does_not_fit_is_refused(given, tmp_path):
    refused(given, tmp_path / "run", "97 different tokens, the model's, got", model=teacher())
    long = settings(window_size=4096, seq_len=5000)
    refused(given, tmp_path / "run", "longer than the window, 4096 tokens", long)
    some = settings(window_size=(4096, 16, 16), seq_len=5000, tokens=40_000, teacher_tokens=20_000)
    refused(given, tmp_path / "run", "documents of at least 4097 tokens", some)  # before its teacher is trained
    refused(given, tmp_path / "run", "seq_len above the smallest window, 4096, got", settings(window_size=4096))
    refused(
        given, tmp_path / "run", "recall sequences of at least 167 tokens, got 40", settings(seq_len=40, tokens=400)
    )
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(given, tmp_path, monkeypatch):
    head_loss = nha.distill.student.head_loss

    def not_finite(*args):
        found = head_loss(*args)
        return found._replace(loss=found.loss * float("nan"))

    monkeypatch.setattr(nha.distill.student, "head_loss", not_finite)
    refused(given, tmp_path / "run", "nan at step 1")


def test_only_what_can_be_seen_from_outside_waits_for_the_device(given, tmp_path, monkeypatch):
    """Between two entries of the log nothing reads a number back: that would stall a GPU in every step."""
    counted = []
    real = torch.Tensor.item

    def item(self):
        counted.append(sys._getframe(1).f_code.co_name)
        return real(self)

    monkeypatch.setattr(torch.Tensor, "item", item)
    monkeypatch.setattr(nha.distill.trainer.torch.Tensor, "item", item)
    distill(tiny(), given[1], given[0], tmp_path / "run", settings(log_every=100, save_every=100, align_steps=0))
    assert counted.count("_maybe_log_save_evaluate") <= 1
    assert not [name for name in counted if name in ("training_step", "combine", "forward", "_run_epoch")]
