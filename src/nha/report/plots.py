"""The report's figures. Colours differ in lightness as well as in hue, and every line has its own dash and a label."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nha.report.results import VARIANTS, Results
from nha.report.sentences import megabytes, tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = (7.7, 3.85), (4.0, 4.2)  # inches
DPI = 200  # twice an ordinary screen's
GUESSING = 100 * sum(0.1**n for n in range(1, 7)) / 6  # per cent of six digits, right from the first on


@dataclass(frozen=True)
class Theme:
    """Colours of one figure; `variants` maps a variant's name to (colour, dash)."""

    background: str
    ink: str
    muted: str
    line: str
    fill: str
    hybrid: str
    hybrid_soft: str
    variants: dict[str, tuple[str, Any]]


LIGHT = Theme(
    background="#ffffff",
    ink="#1f2328",
    muted="#5f6871",
    line="#d9dde2",
    fill="#f1f3f5",
    hybrid="#0065a3",
    hybrid_soft="#cfe3f1",
    variants={
        "teacher": ("#1f2328", "-"),
        "hybrid": ("#0065a3", "-"),
        "all_hybrid": ("#cb5500", (0, (5, 2))),
        "slots_off": ("#b881b3", (0, (1.2, 1.6))),
        "longer_window": ("#004a36", (0, (3, 1.5, 1, 1.5))),
    },
)
DARK = Theme(
    background="#15181d",
    ink="#e7e9ec",
    muted="#9aa4af",
    line="#343a42",
    fill="#20252c",
    hybrid="#56b4e9",
    hybrid_soft="#1f4258",
    variants={
        "teacher": ("#eef0f3", "-"),
        "hybrid": ("#56b4e9", "-"),
        "all_hybrid": ("#cf7a22", (0, (5, 2))),
        "slots_off": ("#9a629c", (0, (1.2, 1.6))),
        "longer_window": ("#7fdcb8", (0, (3, 1.5, 1, 1.5))),
    },
)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Label positions at least `gap` apart, each as near to its value as the order allows, within [low, high].

    >>> spread([1.0, 1.1, 5.0], 0.5, 0.0, 10.0)
    [0.8, 1.3, 5.0]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[float]] = []  # [centre, count] of labels pushed together
    for i in order:
        groups.append([values[i], 1])
        while len(groups) > 1:
            (c1, n1), (c2, n2) = groups[-2], groups[-1]
            if c2 - c1 >= gap * (n1 + n2) / 2 - 1e-12:
                break
            groups[-2:] = [[(c1 * n1 + c2 * n2) / (n1 + n2), n1 + n2]]
    placed: list[float] = []
    for centre, count in groups:
        half = gap * (count - 1) / 2
        centre = max(min(centre, high - half), low + half)
        placed += [centre - half + gap * j for j in range(int(count))]
    for i in range(len(placed) - 2, -1, -1):  # a group held back at the top may have reached the one below
        placed[i] = min(placed[i], placed[i + 1] - gap)
    result = [0.0] * len(values)
    for i, y in zip(order, placed, strict=True):
        result[i] = round(y, 9)
    return result


def _figure(theme: Theme, size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, facecolor=theme.background)
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0.0, 0.0, 1.0, 1.0))


def _style(figure: Figure, axes: Axes, theme: Theme, right: float) -> None:
    """Margins in inches, so that labels keep their room at any width."""
    width, height = figure.get_size_inches()
    left, top, bottom = 0.62, 0.46, 0.56
    axes.set_position((left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height))
    axes.set_facecolor(theme.background)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.line)
    axes.grid(axis="y", color=theme.line, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=9, colors=theme.muted, pad=5)
    axes.tick_params(axis="x", which="major", length=3, color=theme.line)
    axes.xaxis.label.set(color=theme.muted, fontsize=9)


def _title(axes: Axes, theme: Theme, text: str) -> None:
    """The y axis' quantity, written out above it instead of turned sideways."""
    figure = axes.figure
    height = float(figure.get_size_inches()[1])  # type: ignore[union-attr]
    figure.text(0.012, 1 - 0.13 / height, text, ha="left", va="top", color=theme.muted, fontsize=9)


def _end_labels(axes: Axes, theme: Theme, entries: list[tuple[float, float, str, str]]) -> None:
    """Labels right of the last points: (x, y, text, colour), moved apart where they would overlap."""
    figure = axes.figure
    figure.canvas.draw()
    dots = [axes.transData.transform((x, y)) for x, y, _, _ in entries]
    lines = [text.count("\n") + 1 for _, _, text, _ in entries]
    box = axes.get_window_extent()
    gap = 0.165 * float(figure.dpi) * max(lines, default=1)
    heights = spread([float(d[1]) for d in dots], gap, box.y0 + gap / 2, box.y1 - gap / 4)
    pad = 0.07 * float(figure.dpi)
    for (_, _, text, colour), dot, y in zip(entries, dots, heights, strict=True):
        x = box.x1 + pad
        axes.annotate(
            text,
            xy=(float(dot[0]), float(dot[1])),
            xytext=(x, y),
            xycoords="figure pixels",
            textcoords="figure pixels",
            ha="left",
            va="center",
            color=colour,
            fontsize=9,
            linespacing=1.25,
            annotation_clip=False,
        )


def _plain_log_ticks(axis: Any, low: float, high: float) -> None:
    """A few round numbers on a logarithmic axis, written as numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    steps: list[float] = []
    for wanted in ([1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1]):
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        steps = [s * 10.0**p for p in powers for s in wanted if low <= s * 10.0**p <= high]
        if len(steps) <= 6:
            break
    axis.set_major_locator(FixedLocator(steps))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _context_axis(axes: Axes, contexts: Sequence[int], label: str, most: int) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    shown = list(contexts)
    while len(shown) > most:
        shown = shown[::-1][::2][::-1]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))
    axes.set_xlabel(label)


def perplexity(results: Results, theme: Theme, size: tuple[float, float]) -> Figure:
    """Perplexity by position in the document, one line per variant."""
    narrow = size[0] < 6
    figure, axes = _figure(theme, size)
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
    _plain_log_ticks(axes.yaxis, low, high)
    ticks = sorted({2 ** math.ceil(math.log2(max(edge, 1))) for edge in edges[1:]})
    _context_axis(axes, ticks, "position in the document (tokens)", 5 if narrow else 9)
    axes.set_xlim(middles[0] / 1.15, middles[-1] * 1.04)
    _style(figure, axes, theme, right=1.12)
    if shaded:
        axes.axvspan(axes.get_xlim()[0], window, color=theme.fill, zorder=0)
        axes.annotate(
            "← inside the window: the same model",
            (window, low),
            xytext=(6, 6),
            textcoords="offset points",
            color=theme.muted,
            fontsize=8.5,
            va="bottom",
        )
    _title(axes, theme, "Perplexity (logarithmic, lower is better)")
    _end_labels(axes, theme, entries)
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
    figure, axes = _figure(theme, size)
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
        _plain_log_ticks(axes.yaxis, low, high)
    _context_axis(axes, contexts, "context already read (tokens)", 5 if narrow else 9)
    axes.set_xlim(contexts[0] / 1.12, contexts[-1] * 1.06)
    _style(figure, axes, theme, right=0.98)
    _title(axes, theme, title)
    _end_labels(axes, theme, entries)
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
    figure, axes = _figure(theme, size)
    assert results.distilled is not None
    points = [(one.tokens, 100 * one.digits / one.of_digits) for one in results.distilled.recall]
    colour, dash = theme.variants["hybrid"]
    axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=2.4, marker="o", markersize=4.5)
    axes.axhline(GUESSING, color=theme.muted, linewidth=1.2, linestyle=(0, (2, 2)))
    axes.set_ylim(0, 108)
    axes.set_yticks([0, 25, 50, 75, 100])
    distances = [distance for distance, _ in points]
    _context_axis(axes, distances, "tokens between the number and the question", 5 if narrow else 9)
    axes.set_xlim(distances[0] / 1.12, distances[-1] * 1.06)
    _style(figure, axes, theme, right=0.98)
    _title(axes, theme, "Digits that are right from the first on (%)")
    last = points[-1]
    labels = [(*last, f"{VARIANTS['hybrid'][0]}\n{last[1]:.0f} %", colour)]
    _end_labels(axes, theme, [*labels, (last[0], GUESSING, f"guessing\n{GUESSING:.0f} %", theme.muted)])
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
    figure, axes = _figure(theme, size)
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
    figure = FIGURES[name](results, theme, size)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=theme.background)
    return buffer.getvalue()
