"""Parts of the benchmarks' pictures: figures that a phone can show, axes, labels, and where two curves cross."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nha.report.drawing import LIGHT, spread
from nha.report.sentences import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
Points = list[tuple[float, float]]
DPI = 160
WIDTH = 5.0  # inches
BLUE, ORANGE, GREY, GREEN, PINK, SKY = "#0072b2", "#c75000", "#3d444c", "#007a5a", "#a8558a", "#56b4e9"


def crossover(ours: Points, theirs: Points) -> float | None:
    """The length from which on `ours` is faster at every common length: 0 if always, None if not at the longest.

    Curves are interpolated linearly in logarithms.

    >>> crossover([(1024, 2.0), (4096, 2.0)], [(1024, 1.0), (4096, 4.0)])
    2048.0
    """
    other = dict(theirs)
    gaps = [(t, math.log(ms / other[t])) for t, ms in ours if t in other]
    if not gaps or gaps[-1][1] >= 0:
        return None
    slower = [i for i, (_, gap) in enumerate(gaps) if gap >= 0]
    if not slower:
        return 0.0
    (t0, g0), (t1, g1) = gaps[slower[-1]], gaps[slower[-1] + 1]
    return round(math.exp(math.log(t0) + (math.log(t1) - math.log(t0)) * g0 / (g0 - g1)), 6)


def make_figure(panels: int, height: float, title: str) -> tuple[Figure, list[Axes]]:
    """Panels one below another, narrow enough to be read on a phone; `height` of one in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.9 + height * panels), dpi=DPI, facecolor=LIGHT.background, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    figure.suptitle(textwrap.fill(title, 52), x=0.01, ha="left", fontsize=10.5, color=LIGHT.ink)
    for one in axes:
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            one.spines[side].set_color(LIGHT.line)
        one.grid(axis="y", color=LIGHT.line, linewidth=0.7)
        one.set_axisbelow(True)
        one.tick_params(which="both", labelsize=8.5, colors=LIGHT.muted)
        one.xaxis.label.set(color=LIGHT.muted, fontsize=9)
        one.yaxis.label.set(color=LIGHT.muted, fontsize=9)
    return figure, list(axes)


def by_tokens(axes: Axes, lengths: Iterable[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))


def by_log(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def add_legend(figure: Figure, axes: list[Axes], columns: int = 2) -> None:
    found: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=LIGHT.ink,
    )


def about(records: list[Record]) -> str:
    """The machines of records, each with its first and last date.

    >>> about([{"gpu": "NVIDIA H200", "date": date} for date in ("2026-11-28", "2026-11-29", "2026-11-28")])
    'NVIDIA H200, 2026-11-28 to 2026-11-29'
    """
    dates: dict[str, set[str]] = {}
    for record in records:
        dates.setdefault(record["gpu"], set()).add(str(record["date"]))
    spans = {gpu: sorted({min(own), max(own)}) for gpu, own in sorted(dates.items())}
    return ", ".join(f"{gpu}, {' to '.join(span)}" for gpu, span in spans.items())


def end_labels(axes: Axes, ends: list[tuple[tuple[float, float], str, str]]) -> None:
    """Labels beside the last points, moved apart where they would overlap."""
    low, high = (math.log(y) for y in axes.get_ylim())
    places = spread([math.log(y) for (_, y), _, _ in ends], (high - low) / 16, low, high)
    for ((x, _), text, colour), y in zip(ends, places, strict=True):
        axes.annotate(
            text,
            (x, math.exp(y)),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
