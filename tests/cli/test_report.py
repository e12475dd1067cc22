"""The page, its plots and its sentences follow from the results alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from nha.report import Cost, Results, plots, write_report
from nha.report.page import render
from nha.report.words import costs_text, quality_text, saving_text, verdict, what_happened
from tests.cli.fixtures import results

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "source", "br", "link"}


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return render(results())


def test_report_is_written_whole(tmp_path):
    page = write_report(results(), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cache.png", "index.html", "memories.png", "perplexity.png", "results.json", "speed.png"]
    assert page.name == "index.html"
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(PNG)


def test_results_survive_json(tmp_path):
    write_report(results(), tmp_path)
    assert Results.from_dict(json.loads((tmp_path / "results.json").read_text())) == results()


def test_foreign_json_is_refused():
    with pytest.raises(ValueError, match="expected results of format 'nha-quickstart-v1', got None"):
        Results.from_dict({"model": "x"})


def test_page_is_self_contained_and_well_formed(page):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"""(src|href|srcset)=["'](?!data:)""", page)
    assert page.count("data:image/png;base64,") == 16  # four figures, light and dark, wide and narrow
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_generated_text_is_escaped(page):
    assert "&lt;b&gt;art&lt;/b&gt;" in page and "<b>art</b>" not in page
    assert "Tower &amp; its museums" in page


def test_every_form_is_in_the_table(page):
    for label in ("original", "hybrid, slots off", "window only", "hybrid, window off", "paper's form"):
        assert label in page


def test_figures_without_timings_are_left_out():
    untimed = replace(results(), costs=[Cost(512, 100_000, 5_000), Cost(1024, 200_000, 5_000)])
    assert plots.figure_names(untimed) == ["memories", "perplexity", "cache"]
    assert "ms to write" not in render(untimed)


@pytest.mark.parametrize("ratio, level", [(1.05, "good"), (1.24, "fair"), (3.0, "poor")])
def test_verdict_follows_the_ratio(ratio, level):
    found = results()
    found.forms[1].perplexity = 21.1 * ratio
    assert verdict(found).level == level


def test_verdict_names_a_failed_check():
    found = results()
    found.checks[0].passed = False
    assert verdict(found).level == "failed" and found.checks[0].name in verdict(found).text


def test_slower_hybrid_is_said_to_be_slower():
    found = results()
    for cost in found.costs:
        cost.hybrid_ms = 500.0
    assert found.crossover() is None
    assert "slower up to 16,384 tokens" in " ".join(saving_text(found))
    assert "slower at every length" in " ".join(costs_text(found))


def test_faster_hybrid_is_not_said_to_be_slower():
    found = results()
    for cost in found.costs:
        cost.hybrid_ms = 1.0
    assert found.crossover() == 512
    assert "shorter one at every length" in " ".join(saving_text(found))
    assert "Speed" not in " ".join(costs_text(found))


def test_useless_slots_are_said_to_be_useless():
    found = results()
    found.forms[3].perplexity = 25.0  # the window without slots does better than the hybrid
    assert "the slots do not help" in " ".join(quality_text(found))


def test_layers_kept_whole_are_mentioned():
    found = results()
    found.window_sizes[:4] = [-1] * 4
    assert "26 of 30 layers" in " ".join(what_happened(found))
    assert "other 4 layers still keep every token" in " ".join(what_happened(found))


def test_infinite_perplexity_makes_a_page(tmp_path):
    found = results()
    found.forms[4].perplexity = float("inf")
    write_report(found, tmp_path)
    assert "over a million" in (tmp_path / "index.html").read_text()
    assert "Infinity" not in (tmp_path / "results.json").read_text()


@pytest.mark.parametrize("values", [[5.0, 5.0], [5.0] * 4, [9.8, 9.9, 8.6], [0.1, 0.0, 1.2], [1.0, 5.0, 9.0]])
def test_labels_never_overlap(values):
    placed = sorted(plots.spread(values, 1.0, 0.0, 10.0))
    assert all(b - a >= 0.999 for a, b in pairwise(placed))
    assert min(placed) >= 0 and max(placed) <= 10
