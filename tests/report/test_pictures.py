"""Labels do not overlap or leave the picture, and colours differ in grey, in light and dark."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from matplotlib.colors import to_rgb

from nha.report import drawing, plots
from tests.report.fixtures import distilled_results, results


@pytest.mark.parametrize("values", [[5.0, 5.0], [5.0] * 4, [9.8, 9.9, 8.6], [0.1, 0.0, 1.2], [1.0, 5.0, 9.0]])
def test_labels_never_overlap(values):
    placed = sorted(drawing.spread(values, 1.0, 0.0, 10.0))
    assert all(b - a >= 0.999 for a, b in pairwise(placed))
    assert min(placed) >= 0 and max(placed) <= 10


@pytest.mark.parametrize("size", [plots.WIDE, plots.NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", list(plots.FIGURES))
def test_no_text_is_cut_off_and_none_covers_another(name, size):
    figure = plots.FIGURES[name](distilled_results(), drawing.LIGHT, size)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height(physical=True)
    axes = figure.axes[0]
    ticks = [label for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()] if axes.axison else []
    texts = [*figure.texts, *axes.texts, *ticks]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]
    for text, box in boxes:
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text
    for (one, a), (other, b) in combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one, other)


@pytest.mark.parametrize("found, words", [(distilled_results(), "all exact"), (results(), "the same model")])
def test_weights_that_were_distilled_are_not_called_the_same_model(found, words):
    figure = plots.perplexity(found, drawing.LIGHT, plots.WIDE)
    notes = [text.get_text() for text in figure.axes[0].texts if "inside the window" in text.get_text()]
    assert notes == [f"← inside the window: {words}"]


@pytest.mark.parametrize("size", [plots.WIDE, plots.NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ["perplexity", "cache", "speed", "recall"])
def test_no_text_covers_a_point(name, size):
    figure = plots.FIGURES[name](distilled_results(), drawing.LIGHT, size)
    figure.canvas.draw()
    axes = figure.axes[0]
    points = [axes.transData.transform(xy) for line in axes.lines for xy in line.get_xydata()]
    for text in [*figure.texts, *axes.texts]:
        box = text.get_window_extent()
        assert not any(box.contains(*point) for point in points), text.get_text()


def luminance(colour: str) -> float:
    """Relative luminance of a colour (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [drawing.LIGHT, drawing.DARK], ids=["light", "dark"])
def test_colours_differ_in_grey_and_from_the_background(theme):
    # L* of CIELAB: about 2 is a just noticeable difference of adjacent areas; lines are further apart.
    grey = sorted(116 * luminance(colour) ** (1 / 3) - 16 for colour, _ in theme.variants.values())
    assert all(b - a >= 8 for a, b in pairwise(grey))
    background = luminance(theme.background)
    for colour, _ in theme.variants.values():
        low, high = sorted((luminance(colour), background))
        assert (high + 0.05) / (low + 0.05) >= 3  # WCAG's minimum for graphics
