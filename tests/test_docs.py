"""Code on the pages and in the examples runs as it stands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from nha.models.families import families_summary, families_table

ROOT = Path(__file__).parent.parent
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_on_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    exec(compile(code, str(page), "exec"), {})


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
