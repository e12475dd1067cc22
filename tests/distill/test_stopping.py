"""A first signal stops a run with a checkpoint, a second one at once; signals before training are never lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nha.distill.checkpoint import latest_checkpoint
from nha.distill.run import distill
from nha.distill.stopping import SIGNALS, Stop, handle_signals
from nha.distill.trainer import Reports
from tests.convert.test_hybridize import byte_tokenizer
from tests.data.test_corpus import texts
from tests.distill.material import material, settings, tiny

ROOT = Path(__file__).parents[2]
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny model and text for it."""
    path = tmp_path_factory.mktemp("place")
    tiny().save_pretrained(path / "tiny")
    byte_tokenizer(path / "tiny")
    (path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts()))
    return path


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_training_asks_for_a_checkpoint_and_before_it_interrupts(number):
    stop = Stop()
    with handle_signals(stop):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):  # also where the first one was swallowed
            stop.check()
    stop = Stop()
    stop.training = True
    before = signal.getsignal(number)
    with handle_signals(stop):
        assert not stop.due()
        signal.raise_signal(number)
        assert stop.due() and stop.reason == number.name
    assert signal.getsignal(number) == before


def test_a_second_signal_ends_the_process():
    code = "import signal, sys; from nha.distill.stopping import *\nstop = Stop(); stop.training = True\n"
    code += "with handle_signals(stop):\n signal.raise_signal(int(sys.argv[1])); print('on', flush=True)\n"
    code += " signal.raise_signal(int(sys.argv[2])); print('still on')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    for first, second in ((signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)):
        command = [sys.executable, "-c", code, str(int(first)), str(int(second))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (-second, "on\n"), done.stderr


def test_under_torchrun_the_interrupt_that_it_passes_on_is_no_second_signal(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    stop = Stop()
    stop.training = True
    with handle_signals(stop):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert stop.due()


def test_a_run_that_a_signal_stopped_resumes_with_the_same_bits(given, tmp_path):
    corpus, tokenizer = given
    wanted = distill(tiny(), tokenizer, corpus, tmp_path / "one", settings())

    def interrupt(stage, done, total):
        if (stage, done) == ("train", 3):
            signal.raise_signal(signal.SIGINT)

    reports = Reports(progress=interrupt)
    first = distill(tiny(), tokenizer, corpus, tmp_path / "two", settings(), reports=reports)
    assert not first.finished and first.stopped_by == "SIGINT" and 3 <= first.steps <= 4
    assert latest_checkpoint(tmp_path / "two").name == f"checkpoint-{first.steps}"
    found = distill(tiny(), tokenizer, corpus, tmp_path / "two", settings())
    assert found.finished and found.stopped_by is None
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, wanted.model.state_dict()[name]), name


def command(place, run):
    options = "--window 16 --slots 6 --batch-size 2 --seq-len 320 --recall-fraction 0.5 --align-steps 1 --log-every 1"
    source = [str(place / "tiny"), str(run), "--text", str(place / "texts.jsonl"), "--tokens", "1e7"]
    return [sys.executable, "-m", "nha", "distill", *source, *options.split()]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_says_how_to_resume(number, place, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = tmp_path / "run"
    with subprocess.Popen(command(place, run), env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (run / "log.jsonl").is_file() and (run / "log.jsonl").read_text(), process)
        process.send_signal(number)
        _, printed = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODES[number], printed
    assert "run the same command again to resume" in printed.splitlines()[-1]
    assert "Traceback" not in printed and latest_checkpoint(run) is not None


def test_an_interrupt_within_a_destructor_is_raised_at_the_next_check_without_a_traceback(capsys):
    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    stop = Stop()
    with handle_signals(stop):
        Interrupted()
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            stop.check()
    assert capsys.readouterr().err == ""


def test_the_command_is_interrupted_in_its_first_seconds(place, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    for number, wait in ((signal.SIGINT, 0.0), (signal.SIGTERM, 0.5)):
        run = tmp_path / number.name
        with subprocess.Popen(command(place, run), env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            first = process.stderr.readline()  # the command has begun
            time.sleep(wait)
            process.send_signal(number)
            _, printed = process.communicate(timeout=120)
        assert process.returncode == EXIT_CODES[number], first + printed
        assert "Traceback" not in printed and "run the same command again" in printed.splitlines()[-1], printed


def wait_for(condition, process, seconds=120):
    """Wait until a condition holds while a process runs."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
