"""Code on the pages and in the examples runs as it stands."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from nha.cli import app
from nha.models.families import families_summary, families_table

ROOT = Path(__file__).parent.parent
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    exec(compile(code, str(page), "exec"), {})


def command_lines(page: Path) -> list[str]:
    """The words after `nha` in every line of shell on a page, and in its text."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`(nha [^`\n]+)`", text)
    found = [re.search(r"(?:^|[\s;&|])(?:-m )?nha ([a-z].*)", line) for line in lines]
    return [re.split(r"\s[|&]\s|;", match[1])[0].rstrip(" &") for match in found if match]


def wrong_words(line: str) -> list[str]:
    """The command and the options of a line that `nha` does not have, and the arguments that it lacks.

    A line without an argument, such as `nha search --heads`, names a command and is not one to type.
    """
    command: Any = typer.main.get_command(app)
    words = shlex.split(line, comments=True)
    while words and getattr(command, "commands", None):
        name = words.pop(0)
        if name not in command.commands:
            return [] if name.startswith("-") or not re.fullmatch(r"[a-z]+", name) else [name]
        command = command.commands[name]
    known = {"--help", *(name for option in command.params for name in (*option.opts, *option.secondary_opts))}
    given = words[: words.index("--")] if "--" in words else words
    unknown = [word for word in given if word.startswith("--") and word.split("=")[0] not in known]
    if unknown or not words or words[0].startswith("-"):
        return unknown
    found, _, _ = command.make_parser(typer.Context(command)).parse_args(list(words))
    wanted = [one.name for one in command.params if one.param_type_name == "argument" and one.required]
    return [name for name in wanted if found.get(name) is None]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.stem)
def test_commands_on_the_page_have_these_options_and_all_arguments(page):
    assert {line: bad for line in command_lines(page) if (bad := wrong_words(line))} == {}


def test_an_option_that_does_not_exist_and_an_argument_that_is_missing_are_found():
    assert wrong_words("distill MODEL run --text books/ --tokns 3 # --not") == ["--tokns"]
    assert wrong_words("hybridise MODEL run") == ["hybridise"]
    assert wrong_words("generate MODEL --state-dtype int8") == ["prompt"]
    assert wrong_words("search --heads") == []
    assert sum(len(command_lines(page)) for page in (ROOT / "docs").rglob("*.md")) > 60


def test_the_readme_names_only_what_exists():
    import nha

    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"from nha import (.*)", text):
        assert set(name.split(", ")) <= set(nha.__all__)
    # Their examples read a model from the Hub, so they are not run.
    for page, fence in (("README.md", "python"), ("docs/index.md", "py")):
        blocks = re.findall(rf"```{fence}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        assert blocks
        compile("\n".join(blocks), page, "exec")


def test_the_example_from_scratch_recalls_with_slots_and_guesses_without():
    train = runpy.run_path(str(ROOT / "examples" / "recall_from_scratch.py"))["train"]
    assert train(slots=True, steps=500) > 0.95
    assert train(slots=False, steps=60) < 0.15  # a guess is right in one of 16 cases


@pytest.mark.parametrize("page, table", [("README.md", families_summary), ("docs/families.md", families_table)])
def test_the_families_on_a_page_are_those_of_the_table(page, table):
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = text.partition("<!-- families -->\n")[2].partition("<!-- /families -->")[0]
    assert shown.strip() == table()
