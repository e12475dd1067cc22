"""The report's figures. Colours differ in lightness as well as in hue, and every line has its own dash and a label."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nha.report.drawing import (
    LIGHT,
    Theme,
    add_title,
    context_axis,
    end_labels,
    new_figure,
    plain_log_ticks,
    style_axes,
    to_png,
)
from nha.report.results import VARIANTS, Results
from nha.report.sentences import megabytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = (7.7, 3.85), (4.0, 4.2)  # inches
GUESSING = 100 * sum(0.1**n for n in range(1, 7)) / 6  # per cent of six digits, right from the first on


def perplexity(results: Results, theme: Theme, size: tuple[float, float]) -> Figure:
    """Perplexity by position in the document, one line per variant."""
    narrow = size[0] < 6
    figure, axes = new_figure(theme, size)
    edges = results.bucket_edges
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    entries = []
    every: list[float] = []
    for name in ("slots_off", "longer_window", "all_hybrid", "untrained", "teacher", "hybrid"):
        variant = results.variant(name)
        if variant is None:
            continue
        colour, dash = theme.variants["all_hybrid" if name == "untrained" else name]  # there is one of the two
        strong = name in ("teacher", "hybrid")
        points = [(x, y) for x, y in zip(middles, variant.by_position, strict=True) if math.isfinite(y)]
        if not points:
            continue
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle=dash,
            linewidth=2.4 if strong else 1.6,
            marker="o" if strong else None,
            markersize=4,
            solid_capstyle="round",
            zorder=3 if strong else 2,
        )
        every += [y for _, y in points]
        entries.append((*points[-1], VARIANTS[name][0], colour))
    axes.set_yscale("log")
    low, high = min(every) * 0.93, max(every) * 1.07
    window = results.window
    shaded = window > middles[0]
    if shaded:  # a strip below all points, for the note
        low /= (high / low) ** 0.22
    axes.set_ylim(low, high)
    plain_log_ticks(axes.yaxis, low, high)
    ticks = sorted({2 ** math.ceil(math.log2(max(edge, 1))) for edge in edges[1:]})
    context_axis(axes, ticks, "position in the document (tokens)", 5 if narrow else 9)
    axes.set_xlim(middles[0] / 1.15, middles[-1] * 1.04)
    style_axes(figure, axes, theme, right=1.12)
    if shaded:
        axes.axvspan(axes.get_xlim()[0], window, color=theme.fill, zorder=0)
        axes.annotate(
            f"← inside the window: {'all exact' if results.distilled else 'the same model'}",
            (window, low),
            xytext=(6, 6),
            textcoords="offset points",
            color=theme.muted,
            fontsize=8.5,
            va="bottom",
        )
    add_title(axes, theme, "Perplexity (logarithmic, lower is better)")
    end_labels(axes, theme, entries)
    return figure


def _two_lines(
    results: Results,
    theme: Theme,
    size: tuple[float, float],
    values: tuple[list[float], list[float]],
    text: Callable[[float], str],
    title: str,
    *,
    log: bool,
) -> Figure:
    """Original and hybrid against context length, with the last values spelt out."""
    narrow = size[0] < 6
    figure, axes = new_figure(theme, size)
    contexts = [cost.context for cost in results.costs][: len(values[0])]
    entries = []
    for name, ys in zip(("teacher", "hybrid"), values, strict=True):
        colour, dash = theme.variants[name]
        axes.plot(contexts, ys, color=colour, linestyle=dash, linewidth=2.4, marker="o", markersize=4.5)
        entries.append((contexts[-1], ys[-1], f"{VARIANTS[name][0]}\n{text(ys[-1])}", colour))
    every = values[0] + values[1]
    if log:
        axes.set_yscale("log")
        low, high = min(every) / 1.6, max(every) * 1.6
    else:
        low, high = 0.0, max(every) * 1.1
    axes.set_ylim(low, high)
    if log:
        plain_log_ticks(axes.yaxis, low, high)
    context_axis(axes, contexts, "context already read (tokens)", 5 if narrow else 9)
    axes.set_xlim(contexts[0] / 1.12, contexts[-1] * 1.06)
    style_axes(figure, axes, theme, right=0.98)
    add_title(axes, theme, title)
    end_labels(axes, theme, entries)
    return figure


def cache(results: Results, theme: Theme, size: tuple[float, float]) -> Figure:
    """Megabytes of cache against context length, logarithmic."""
    values = ([c.teacher_bytes / 1e6 for c in results.costs], [c.hybrid_bytes / 1e6 for c in results.costs])
    title = "Memory of one conversation (MB, logarithmic)"
    return _two_lines(results, theme, size, values, lambda value: megabytes(1e6 * value), title, log=True)


def speed(results: Results, theme: Theme, size: tuple[float, float]) -> Figure:
    """Milliseconds to write one token against context length."""
    values = ([c.teacher_ms for c in results.timed], [c.hybrid_ms for c in results.timed])
    title = "Time to write one token (milliseconds)"
    return _two_lines(results, theme, size, values, lambda ms: f"{ms:,.0f} ms", title, log=False)


def recall(results: Results, theme: Theme, size: tuple[float, float]) -> Figure:
    """Share of the digits of a number that come back, against the distance to it."""
    narrow = size[0] < 6
    figure, axes = new_figure(theme, size)
    assert results.distilled is not None
    points = [(one.tokens, 100 * one.digits / one.of_digits) for one in results.distilled.recall]
    colour, dash = theme.variants["hybrid"]
    axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=2.4, marker="o", markersize=4.5)
    axes.axhline(GUESSING, color=theme.muted, linewidth=1.2, linestyle=(0, (2, 2)))
    axes.set_ylim(0, 108)
    axes.set_yticks([0, 25, 50, 75, 100])
    distances = [distance for distance, _ in points]
    context_axis(axes, distances, "tokens between the number and the question", 5 if narrow else 9)
    axes.set_xlim(distances[0] / 1.12, distances[-1] * 1.06)
    style_axes(figure, axes, theme, right=0.98)
    add_title(axes, theme, "Digits that are right from the first on (%)")
    last = points[-1]
    labels = [(*last, f"{VARIANTS['hybrid'][0]}\n{last[1]:.0f} %", colour)]
    end_labels(axes, theme, [*labels, (last[0], GUESSING, f"guessing\n{GUESSING:.0f} %", theme.muted)])
    return figure


def _cell(axes: Axes, x: float, y: float, size: tuple[float, float], face: str, edge: str, alpha: float = 1.0) -> None:
    """A box with round corners; x, y and size in inches."""
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.045"
    axes.add_patch(
        FancyBboxPatch((x, y), *size, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.0, alpha=alpha)
    )


def _label(axes: Axes, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    """Text in the middle of its line at x, y in inches."""
    options = {"fontsize": 9, "va": "center", "ha": "left", "linespacing": 1.3, **options}
    axes.text(x, y, text, color=colour, **options)


def _arrow(theme: Theme, **more: Any) -> dict[str, Any]:
    return {"arrowstyle": "-|>", "color": theme.muted, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0, **more}


def memories(results: Results, theme: Theme, size: tuple[float, float]) -> Figure:
    """Draw the memory of a layer: every token, or slots and a window."""
    narrow = size[0] < 6
    figure, axes = new_figure(theme, size)
    width, height = size
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    left, right = 0.25, width - 0.25
    grey, blue = theme.variants["teacher"][0], theme.hybrid
    count, inside = (16, 5) if narrow else (30, 8)
    pitch = (right - left) / count
    box = (pitch * 0.78, 0.26)
    end = right - (pitch - box[0])

    top = height - (0.9 if narrow else 0.95)
    _label(axes, left, height - 0.22, "Full attention", grey, fontsize=10.5, fontweight="bold")
    _label(axes, left, height - 0.47, "a layer keeps every token, so its memory grows", theme.muted)
    for i in range(count):
        _cell(axes, left + i * pitch, top, box, theme.fill, grey)
    _label(axes, left, top - 0.17, "first token", theme.muted, fontsize=8)
    _label(axes, end, top - 0.17, "newest", theme.muted, fontsize=8, ha="right")

    base = top - (1.85 if narrow else 1.62)
    above = base + (1.23 if narrow else 0.97)
    _label(axes, left, above, "Hybrid layer", blue, fontsize=10.5, fontweight="bold")
    _label(axes, left, above - 0.25, "keeps a fixed amount, whatever the length of the text", theme.muted)
    for i in range(count):
        recent = i >= count - inside
        colours = (blue, blue) if recent else (theme.background, theme.line)
        _cell(axes, left + i * pitch, base, box, *colours)
    window = f"window: the last {results.window} tokens, exact"
    _label(axes, end, base + 0.43, window, blue, fontsize=8.5, ha="right")
    leaving = left + (count - inside - 1) * pitch + box[0] / 2
    _slots(axes, results, theme, (left + (0.1 if narrow else 1.6), 0.34), (leaving, base), end, narrow)
    return figure


def _slots(
    axes: Axes,
    results: Results,
    theme: Theme,
    origin: tuple[float, float],
    leaving: tuple[float, float],
    end: float,
    narrow: bool,
) -> None:
    """The slots, the token that is written to them, and the query that reads them and the window."""
    (x, low), (leaving_x, base) = origin, leaving
    pitch, slot, count = 0.3, 0.235, 6 if narrow else 8
    for i, shade in enumerate((0.35, 0.8, 0.5, 0.95, 0.3, 0.65, 0.45, 0.75)[:count]):
        _cell(axes, x + i * pitch, low, (slot, slot), theme.hybrid_soft, theme.hybrid)
        _cell(axes, x + i * pitch, low, (slot, slot * shade), theme.hybrid, "none", alpha=0.55)
    slots_end = x + (count - 1) * pitch + slot
    if narrow:
        name = f"{results.num_slots} slots: summaries of the rest"
        _label(axes, x, low - 0.19, name, theme.hybrid, fontsize=8.5)
    else:
        name = f"slots: {results.num_slots} running\nsummaries of the rest"
        options = {"fontsize": 8.5, "ha": "right", "multialignment": "right"}
        _label(axes, x - 0.12, low + slot / 2, name, theme.hybrid, **options)
    axes.annotate(
        "",
        xy=(slots_end - slot / 2, low + slot + 0.05),
        xytext=(leaving_x, base - 0.05),
        arrowprops=_arrow(theme, connectionstyle="arc3,rad=-0.12"),
    )
    text = "leaving the window" if narrow else "a token that leaves the window\nis written to the slots"
    options = {"fontsize": 8, "ha": "right", "multialignment": "right"}
    between = (slots_end + leaving_x) / 2
    _label(axes, between - (0.16 if narrow else 0.0), (base + low + slot) / 2 + 0.16, text, theme.muted, **options)
    query_x, query_y = end - 0.45, low + slot / 2
    _cell(axes, query_x - 0.42, query_y - 0.15, (0.84, 0.3), theme.background, theme.ink)
    _label(axes, query_x, query_y, "next token", theme.ink, fontsize=8, ha="center")
    reads = (
        ((query_x - 0.46, query_y), (slots_end + 0.06, query_y)),
        ((query_x, query_y + 0.18), (query_x, base - 0.05)),
    )
    for to, start in reads:
        axes.annotate("", xy=to, xytext=start, arrowprops=_arrow(theme))


FIGURES: dict[str, Callable[[Results, Theme, tuple[float, float]], Figure]] = {
    "memories": memories,
    "perplexity": perplexity,
    "cache": cache,
    "speed": speed,
    "recall": recall,
}


def figure_names(results: Results) -> list[str]:
    """The figures there is data for."""
    there = {"memories": True, "perplexity": True, "cache": len(results.costs) >= 2, "speed": len(results.timed) >= 2}
    there["recall"] = results.distilled is not None and len(results.distilled.recall) >= 2
    return [name for name in FIGURES if there[name]]


def png(results: Results, name: str, theme: Theme = LIGHT, size: tuple[float, float] = WIDE) -> bytes:
    """One figure as a PNG file's bytes."""
    return to_png(FIGURES[name](results, theme, size))
