"""Parts of the report's pictures: themes, axes, ticks, legends, and a colour, dash and marker for every line."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nha.report.sentences import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200  # twice an ordinary screen's
# Colours of the report's variants first, then others.
KNOWN = {"model": "hybrid", "full attention": "teacher"}
SPARE = ("#d55e00", "#009e73", "#8a6d00", "#56b4e9", "#7f3c8d", "#5f6871")
MARKERS = "osD^vPX"  # colours alone are hard to tell apart in grey
WIDTH = 4.9  # inches: text of 9 points is readable where the picture is 390 pixels wide
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (3, 1.5, 1, 1.5)))


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


def new_figure(theme: Theme, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure of `size` inches, and axes that fill it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, facecolor=theme.background)
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0.0, 0.0, 1.0, 1.0))


def style_axes(figure: Figure, axes: Axes, theme: Theme, right: float) -> None:
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


def add_title(axes: Axes, theme: Theme, text: str) -> None:
    """The y axis' quantity, written out above it instead of turned sideways."""
    figure = axes.figure
    height = float(figure.get_size_inches()[1])  # type: ignore[union-attr]
    figure.text(0.012, 1 - 0.13 / height, text, ha="left", va="top", color=theme.muted, fontsize=9)


def end_labels(axes: Axes, theme: Theme, entries: list[tuple[float, float, str, str]]) -> None:
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


def plain_log_ticks(axis: Any, low: float, high: float) -> None:
    """From two to about six round numbers between `low` and `high` on a logarithmic axis, written as numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    steps: list[float] = []
    for wanted in ([1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1]):
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        steps = [s * 10.0**p for p in powers for s in wanted if low <= s * 10.0**p <= high]
        if len(steps) <= 6:
            break
    if len(steps) < 2:
        steps = [value for value in MaxNLocator(4).tick_values(low, high) if low <= value <= high]
    axis.set_major_locator(FixedLocator(steps))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def context_axis(axes: Axes, contexts: Sequence[int], label: str, most: int) -> None:
    """Label an axis of tokens, logarithmic, at `most` of the contexts, the largest among them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    shown = list(contexts)
    while len(shown) > most:
        shown = shown[::-1][::2][::-1]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))
    axes.set_xlabel(label)


def line_styles(names: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """A colour and a dash for every variant, always the same for those that the report knows.

    >>> line_styles(["model", "teacher", "mine"])["mine"]
    ('#d55e00', '-')
    """
    found: dict[str, tuple[str, Any]] = {}
    spare = 0
    for name in names:
        known = KNOWN.get(name, name.replace(" ", "_"))
        if known in LIGHT.variants and LIGHT.variants[known] not in found.values():
            found[name] = LIGHT.variants[known]
        else:
            found[name] = (SPARE[spare % len(SPARE)], DASHES[spare // len(SPARE) % len(DASHES)])
            spare += 1
    return found


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG file's bytes, in its own resolution."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi="figure", facecolor=figure.get_facecolor())
    return buffer.getvalue()


def place_axes(figure: Figure, axes: Axes, left: float, bottom: float, width: float, height: float) -> None:
    """Put axes at inches from the lower left corner."""
    w, h = figure.get_size_inches()
    axes.set_position((left / w, bottom / h, width / w, height / h))


def legend_columns(labels: Sequence[str], width: float, most: int = 4) -> int:
    """How many columns of a legend in 9 points fit into `width` inches, at the least one and `most` at most.

    >>> legend_columns(["original", "hybrid"], 7.7), legend_columns(["a hybrid of a long name, 50 M"], 7.7)
    (4, 2)
    """
    # A letter is some 0.07 inches wide, a handle with its spaces 0.6.
    return max(1, min(most, int(width / (0.07 * max(map(len, labels)) + 0.6))))


def legend_above(figure: Figure, columns: int) -> None:
    """A legend between the title and the axes, where it covers no point."""
    height = float(figure.get_size_inches()[1])
    figure.legend(
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.24 / height),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=LIGHT.ink,
        handlelength=1.8,
        columnspacing=1.2,
        labelspacing=0.3,
    )
