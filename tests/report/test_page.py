"""The page and its files follow from the results alone, are whole, and show every name as it is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nha.report import Cost, Results, plots
from nha.report.page import RENDERINGS, render, write_report
from nha.report.results import TABLE, VARIANTS
from tests.report.fixtures import distilled_results, results

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """The page's text, its tags checked to be balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def pictures(found: Results) -> dict[str, dict[str, bytes]]:
    """Stand-ins for the drawn figures."""
    return {name: dict.fromkeys(RENDERINGS, PNG) for name in plots.figure_names(found)}


def page_of(found: Results) -> str:
    return render(found, pictures(found))


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(results())


def test_report_is_written_whole(tmp_path):
    page = write_report(results(), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cache.png", "index.html", "memories.png", "perplexity.png", "results.json", "speed.png"]
    assert page.name == "index.html"
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(PNG)


def test_a_figure_that_fails_leaves_everything_else_and_is_named(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no font [regular]")

    monkeypatch.setitem(plots.FIGURES, "cache", broken)
    found = results()
    write_report(found, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"index.html", "memories.png", "perplexity.png", "results.json", "speed.png"}
    assert not found.healthy
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["checks"][-1]["detail"] == "RuntimeError: no font [regular]"
    assert "no font [regular]" in Page((tmp_path / "index.html").read_text()).text


def test_results_survive_json(tmp_path):
    write_report(results(), tmp_path)
    assert Results.from_dict(json.loads((tmp_path / "results.json").read_text())) == results()


@pytest.mark.parametrize(
    "data, named",
    [
        ({"model": "x"}, "None"),
        ({"format": "nha-quickstart-v1"}, "nha-quickstart-v1"),
        ({"format": "nha-quickstart-v2", "model": "x"}, "variants"),
    ],
)
def test_foreign_and_old_results_are_refused_by_name(data, named):
    with pytest.raises(ValueError, match=named):
        Results.from_dict(data)


def test_page_is_self_contained_and_well_formed(page):
    Page(page)
    assert not re.search(r"""(src|href|srcset)=["'](?!data:)""", page)
    assert page.count("data:image/png;base64,") == 16  # four figures, light and dark, wide and narrow
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


@pytest.mark.parametrize(
    "name", ["a [bold]model[/]", "<b>bold</b> & co", "quo\"te's", "two\nlines", "</style><script>"]
)
def test_every_name_is_shown_as_it_is(name):
    found = replace(results(), model=name, source=name, document=name, saved_to=name)
    found.samples[0].hybrid = name
    found.checks[0].detail = name
    text = Page(page_of(found)).text
    assert text.count(" ".join(name.split())) >= 5
    assert "<script>" not in page_of(found)


def test_every_variant_of_the_table_is_a_row_with_its_description(page):
    text = Page(page).text
    assert len(TABLE) <= 6
    for name in TABLE:
        for words in VARIANTS[name]:
            assert words in text


def test_next_steps_name_the_commands(page):
    text = Page(page).text
    for command in ("nha chat report/hybrid", "nha distill smollm2", "nha search smollm2", "nha doctor"):
        assert command in text


def test_the_page_of_a_distilled_hybrid_shows_recall_by_distance():
    page = page_of(distilled_results())
    Page(page)
    assert page.count("data:image/png;base64,") == 20 and "Recall by distance" in page
    assert "<td>6 of 12</td><td>0 of 2</td><td>0 of 2</td><td>5 of 12</td>" in page


def test_figures_without_data_are_left_out():
    untimed = replace(results(), costs=[Cost(512, 100_000, 5_000), Cost(1024, 200_000, 5_000)])
    assert plots.figure_names(untimed) == ["memories", "perplexity", "cache"]
    assert "ms" not in Page(page_of(untimed)).text.split()
    without = replace(results(), costs=[])
    assert plots.figure_names(without) == ["memories", "perplexity"]
    Page(page_of(without))


def test_infinite_perplexity_makes_a_page(tmp_path):
    found = results()
    found.variants[-1].perplexity = float("inf")
    found.variants[-1].by_position[2] = float("inf")
    write_report(found, tmp_path)
    assert "over a million" in (tmp_path / "index.html").read_text()
    assert "Infinity" not in (tmp_path / "results.json").read_text()
    assert Results.from_dict(json.loads((tmp_path / "results.json").read_text())) == found
