"""A run can be stopped anywhere and goes on with the same bits; what does not fit is refused and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import nha.distill.trainer
from nha.data.recall import RecallSettings
from nha.distill.run import DistillSettings, distill
from nha.distill.trainer import combine, latest_checkpoint, schedule
from tests.distill.material import LENGTH, material, settings, tiny
from tests.models.families import teacher

ROOT = Path(__file__).parents[2]
WORKER = """
import sys
from pathlib import Path
from nha.distill.run import distill
from nha.data.corpus import open_corpus
from transformers import AutoTokenizer
from tests.distill.material import settings, tiny

place, run = Path(sys.argv[1]), sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(place)
print("ready", flush=True)
corpus = open_corpus(place / "corpus")
distill(tiny(), tokenizer, corpus, run, settings(), report=lambda e: print(e["step"], flush=True))
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
    assert {"loss", "divergence", "cross_entropy", "answer_loss", "tokens_per_s"} <= found.log[0].keys()
    assert {path.name for path in run.iterdir()} == {"run.json", "log.jsonl", "checkpoint-6", "tensorboard"}
    assert found.model.config.use_cache


def test_a_run_that_is_killed_goes_on_with_the_same_bits(given, whole_run, tmp_path):
    place, run = given[0].path.parent, tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, "-c", WORKER, str(place), str(run)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if line.strip() == "5":  # after the checkpoint of step 4, which the next step has no part in
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL and latest_checkpoint(run).name == "checkpoint-4"
    corpus, tokenizer = given
    steps = []
    found = distill(tiny(), tokenizer, corpus, run, settings(), report=lambda entry: steps.append(entry["step"]))
    assert steps == [5, 6] and found.finished
    assert_same_bits(weights(found.model), weights(whole_run[0].model))
    timeless = [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in found.log]
    assert timeless == [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in whole_run[0].log]


def test_a_finished_run_is_read_back(given, whole_run):
    wanted, run = whole_run
    corpus, tokenizer = given
    started = time.perf_counter()
    found = distill(tiny(), tokenizer, corpus, run, settings())
    assert found.finished and time.perf_counter() - started < 20
    assert_same_bits(weights(found.model), weights(wanted.model))


def test_a_run_stops_in_time_and_goes_on(given, whole_run, tmp_path):
    corpus, tokenizer = given
    first = distill(tiny(), tokenizer, corpus, tmp_path / "run", settings(), budget=0.0)
    assert not first.finished and first.steps == 1
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-1"
    found = distill(tiny(), tokenizer, corpus, tmp_path / "run", settings())
    assert_same_bits(weights(found.model), weights(whole_run[0].model))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradients": "together", "cross_entropy": 0.1},
        {"gradients": "normalise", "window_dropout": 0.5, "grow": 0.5},
        {"trained": "lora", "rank": 2},
        {"trained": "layers", "full_layers": (1,), "micro_batch_size": 1},
        {"divergence": 0.0, "cross_entropy": 1.0, "init": "paper", "align_steps": 0},
        {"window_size": -1, "divergence": 0.0, "cross_entropy": 1.0},
        {"slots_off": True, "checkpointing": True},
        {"long_tokens": 2 * 2 * LENGTH, "long_length": 2 * LENGTH},
    ],
    ids=str,
)
def test_every_kind_of_run_goes_on_where_it_stopped(changes, given, tmp_path):
    corpus, tokenizer = given
    chosen = settings(tokens=4 * 2 * LENGTH, **changes)
    wanted = distill(tiny(), tokenizer, corpus, tmp_path / "one", chosen)
    assert wanted.finished
    assert not distill(tiny(), tokenizer, corpus, tmp_path / "two", chosen, budget=0.0).finished
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


def test_a_checkpoint_that_was_half_written_is_not_gone_on_from(given, whole_run, tmp_path):
    corpus, tokenizer = given
    run = tmp_path / "run"
    distill(tiny(), tokenizer, corpus, run, settings(), budget=0.0)
    (run / ".checkpoint-2.partial" / "checkpoint-2").mkdir(parents=True)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    found = distill(tiny(), tokenizer, corpus, run, settings())
    assert_same_bits(weights(found.model), weights(whole_run[0].model))
    assert [entry["step"] for entry in found.log] == [1, 2, 3, 4, 5, 6]


def refused(given, run, message, chosen=None, model=None, corpus=None):
    with pytest.raises(ValueError, match=message):
        distill(model or tiny(), given[1], corpus or given[0], run, chosen or settings())


def test_going_on_with_other_settings_is_refused_and_nothing_is_lost(given, whole_run, tmp_path):
    _, run = whole_run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    refused(given, run, r"as it began, with rate = None, got 0.001", settings(rate=1e-3))
    refused(given, run, r"as it began, with recall = .*digits", settings(recall=RecallSettings(digits=(2, 2))))
    other = tiny()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 1
    refused(given, run, r"as it began, with teacher = ", model=other)
    corpus = dataclasses.replace(given[0], meta=given[0].meta | {"checksums": [1]})
    refused(given, run, r"as it began, with corpus = ", corpus=corpus)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_directory_with_something_else_is_left_alone(given, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    refused(given, tmp_path, "it holds other files")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{broken")
    refused(given, tmp_path / "run", "expected the settings of a run in")
    refused(given, tmp_path / "thesis.txt", "to be a directory, it is a file")


def test_a_teacher_that_cannot_become_a_hybrid_is_refused(given, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300))
    refused(given, tmp_path / "run", "got gpt2: its positions", model=model)
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_does_not_fit_is_refused(given, tmp_path):
    refused(given, tmp_path / "run", "expected a corpus of at most 97 different tokens", model=teacher())
    refused(
        given, tmp_path / "run", "expected documents longer than the window, 4096 tokens", settings(window_size=4096)
    )
    refused(given, tmp_path / "run", "expected recall sequences of at least .* tokens", settings(length=40, tokens=400))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rate": -1.0}, "expected rate of at least 0, got -1.0"),
        ({"rate": float("nan")}, "expected rate of at least 0, got nan"),
        ({"tokens": 0}, "expected tokens of at least 1, got 0"),
        ({"recall_share": 1.5}, "expected recall_share from 0 to 1, got 1.5"),
        ({"trained": "all"}, "expected trained to be one of"),
        ({"init": "random"}, "expected init to be one of"),
        ({"gradients": "sum"}, "expected gradients to be one of"),
        ({"clip": 0.0}, "expected clip above 0, got 0.0"),
        ({"divergence": 0.0, "cross_entropy": 0.0, "recall_share": 0.0}, "expected a loss"),
        ({"long_tokens": 1e9}, "expected long_tokens of at most tokens"),
    ],
    ids=str,
)
def test_settings_outside_what_they_can_be_are_refused(changes, message, given, tmp_path):
    refused(given, tmp_path / "run", message, settings(**changes))
    assert not (tmp_path / "run").exists()


def test_an_unknown_choice_of_what_to_compile_is_refused(given, tmp_path):
    with pytest.raises(ValueError, match="expected what is compiled to be one of .*, got 'all'"):
        distill(tiny(), given[1], given[0], tmp_path / "run", settings(), compiled="all")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(given, tmp_path):
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    refused(given, tmp_path / "run", "expected a finite loss, got nan at step 1", model=model)


def test_settings_are_json_and_have_defaults_that_work():
    DistillSettings().check()
    json.dumps(dataclasses.asdict(DistillSettings()))
    mixture = DistillSettings(tokens=1e6, rows=8, length=1024, long_tokens=1e5, long_length=4096).mixture(world=2)
    assert mixture.steps == round(9e5 / 16384) + round(1e5 / 16384) and mixture.shape(mixture.steps - 1) == (2, 4096)
    assert DistillSettings(window_size=256).mixture().recall.distances[0] == 264


def test_gradients_of_text_and_recall_are_treated_apart():
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    text, recall = [torch.tensor([3.0, 4.0]), None, None], [torch.tensor([0.0, 8.0]), torch.tensor([6.0]), None]

    def run(treatment, weight=0.5):
        copies = {"text": [None if g is None else g.clone() for g in text]}
        if treatment == "together":
            pairs = zip(text, recall, strict=True)
            copies["text"] = [None if a is None and b is None else (0 if a is None else a) + b for a, b in pairs]
        else:
            copies["recall"] = [None if g is None else g.clone() for g in recall]
        norms = combine(copies, parameters, treatment, 1.0, weight)
        return {k: v.item() for k, v in norms.items()}, [p.grad for p in parameters]

    norms, grads = run("clip")
    assert norms == {"text": 5.0, "recall": 10.0}
    assert torch.allclose(grads[0], torch.tensor([0.6, 0.8 + 0.8])) and torch.allclose(grads[1], torch.tensor([0.6]))
    assert grads[2] is None
    _, grads = run("normalise")
    assert torch.allclose(grads[0], torch.tensor([0.6, 0.8 + 0.4])) and torch.allclose(grads[1], torch.tensor([0.3]))
    norms, grads = run("together")
    assert torch.cat(grads[:2]).norm().item() == pytest.approx(1.0)


def test_the_schedule_rises_and_falls():
    shares = [schedule(step, 100, 0.1) for step in range(100)]
    assert shares[9] == max(shares) == pytest.approx(1.0, abs=0.03) and shares[0] == pytest.approx(0.1, abs=1e-2)
    assert shares[9:] == sorted(shares[9:], reverse=True) and 0.05 <= shares[-1] < 0.06


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
