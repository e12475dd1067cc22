"""`nha ablate`: a table in, a page out; exit codes, and one line for bad input."""

from __future__ import annotations

import json

import pytest

from nha.cli import app
from tests.ablate.test_run import TINY
from tests.cli.conftest import runner


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_a_table_is_made_and_the_same_command_finds_it_done(table, tmp_path):
    for made in (2, 0):
        arguments = ["ablate", str(table), "--output", str(tmp_path / "out"), "--lrs", "1e-3", "--json"]
        result = runner.invoke(app, arguments)
        found = json.loads(result.stdout)
        assert result.exit_code == 0 and len(found["made"]) == made
    assert (tmp_path / "out" / "summary.json").exists()


def test_processes_share_the_rows_of_one_command(table, tmp_path):
    result = runner.invoke(app, ["ablate", str(table), "--output", str(tmp_path / "out"), "--processes", "2", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and len(set(found["made"])) == len(found["made"]) == 4
    assert not any(found[name] for name in ("late", "failed", "elsewhere"))


def test_a_budget_that_is_too_short_leaves_with_code_3_and_names_the_rows(table, tmp_path):
    result = runner.invoke(app, ["ablate", str(table), "--output", str(tmp_path / "out"), "--budget", "0"])
    assert result.exit_code == 3 and "tiny--window-only--lr0.001--seed0" in result.stderr


def test_rows_of_another_machine_are_added_by_one_command(table, tmp_path):
    there, here = str(tmp_path / "there"), str(tmp_path / "here")
    runner.invoke(app, ["ablate", str(table), "--output", there, "--lrs", "1e-3"])
    result = runner.invoke(app, ["ablate", "recall-cpu", "--summarize", "--add", there, "--output", here])
    assert result.exit_code == 0 and "2 rows added" in result.stderr
    page = (tmp_path / "here" / "README.md").read_text()
    assert "A tiny table" in page and "`nha ablate recall-cpu`" in page


def test_the_built_in_tables_are_listed(tmp_path):
    found = json.loads(runner.invoke(app, ["ablate", "--list", "--json"]).stdout)
    assert {"recall", "recall-cpu", "language"} <= found.keys()


@pytest.mark.parametrize(
    "arguments, names",
    [
        ([], ("--list",)),
        (["no-such-table"], ("recall-cpu", "no-such-table")),
        (["recall-cpu", "--models", "mamba"], ("nha", "mamba")),
        (["recall-cpu", "--shard", "3/2"], ("3/2",)),
        (["recall-cpu", "--shard", "1/2", "--processes", "2"], ("--processes", "1/2")),
        (["recall-cpu", "--lrs", "fast"], ("--lrs", "fast")),
        (["recall-cpu", "--budget", "-1"], ("--budget", "-1")),
        (["language"], ("--corpus", "--data")),
        (["recall-cpu", "--add", "elsewhere"], ("--summarize", "elsewhere")),
        (["--summarize", "--add", "elsewhere"], ("rows", "elsewhere")),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, names, tmp_path):
    result = runner.invoke(app, ["ablate", *arguments, *(["--output", str(tmp_path)] if arguments else [])])
    assert result.exit_code == 2
    line = result.stderr.strip().splitlines()[-1]
    assert all(name in line for name in names)
