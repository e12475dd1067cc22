"""Pictures of tables: accuracy against the bytes of the state, perplexity by position, measures against the window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from nha.ablate.language import WINDOW
from nha.models.config import FULL
from nha.report.drawing import (
    LIGHT,
    MARKERS,
    WIDTH,
    add_title,
    context_axis,
    legend_above,
    line_styles,
    new_figure,
    place_axes,
    plain_log_ticks,
    style_axes,
    to_png,
)

Data = dict[str, Any]
MAX_PANELS = 6
PANEL = 1.7  # inches
GAP = (0.5, 0.8)


def draw(rows: Sequence[Data]) -> dict[str, bytes]:
    """PNG files by name, from the best rows of all tables; names begin with that of the table."""
    found: dict[str, bytes] = {}
    for table in dict.fromkeys(row["table"] for row in rows):
        own = [row for row in rows if row["table"] == table]
        if own[0]["kind"] == "recall":
            found[f"{table}-state.png"] = accuracy_png(own)
        elif any(size["task"] == "perplexity" for row in own for size in row["sizes"]):
            found[f"{table}-position.png"] = position_png(own)
        at = [(row["model"], size) for row in own for size in row["sizes"] if size["task"] == WINDOW]
        if at:
            found[f"{table}-windows.png"] = windows_png(
                [
                    WindowPoint(model, int(size["size"]), size["ppl"], size["recall"], size["state_bytes"])
                    for model, size in at
                ]
            )
    return found


def _legend_room(names: Sequence[str]) -> tuple[int, float]:
    """Names side by side, and inches above the axes for title and legend."""
    columns = max(1, min(4, int(WIDTH / (0.5 + 0.075 * max(map(len, names))))))
    return columns, 0.6 + 0.2 * math.ceil(len(names) / columns)


class WindowPoint(NamedTuple):
    """Measures of a model with a window, -1 for full attention: recall from 0 to 1, bytes of the cache of one text."""

    model: str
    window: int
    perplexity: float
    recall: float
    cache_bytes: int


def windows_png(points: Sequence[WindowPoint]) -> bytes:
    """Perplexity, recall and bytes of cache against the window: a panel each, a line a model (mean over seeds)."""
    names, windows = list(dict.fromkeys(p.model for p in points)), sorted({p.window for p in points if p.window >= 0})
    windows += [FULL] * any(p.window < 0 for p in points)
    named, head = _legend_room(names)
    height = PANEL + 0.55
    figure, first = new_figure(LIGHT, (WIDTH, head + 3 * height + 0.1))
    styles = line_styles(names)
    panels = (
        ("perplexity (logarithmic)", lambda p: p.perplexity, "log"),
        ("recall of a text read twice (%)", lambda p: 100 * p.recall, "linear"),
        ("cache of one text, KiB (logarithmic)", lambda p: p.cache_bytes / 1024, "log"),
    )
    axes = first
    for number, (title, value, scale) in enumerate(panels):
        axes = first if number == 0 else figure.add_axes((0.0, 0.0, 1.0, 1.0))
        for index, name in enumerate(names):
            own = [(windows.index(p.window), value(p)) for p in points if p.model == name]
            at = sorted({x for x, _ in own})
            means = [float(np.mean([y for x, y in own if x == each])) for each in at]
            colour, dash = styles[name]
            marker, label = MARKERS[index % len(MARKERS)], name if number == 0 else None
            axes.plot(
                at, means, color=colour, linestyle=dash, marker=marker, markersize=4.5, linewidth=1.5, label=label
            )
        axes.set_yscale(scale)
        axes.set_xlim(-0.4, len(windows) - 0.6)
        if scale == "log":
            plain_log_ticks(axes.yaxis, *axes.get_ylim())
        else:
            axes.set_ylim(0, 100)
        style_axes(figure, axes, LIGHT, right=0.2)
        place_axes(figure, axes, 0.62, 0.56 + (2 - number) * height, WIDTH - 0.82, PANEL)
        axes.set_xticks(range(len(windows)), ["full" if window == FULL else f"{window}" for window in windows])
        axes.set_title(title, loc="left", fontsize=9, color=LIGHT.ink, pad=6)
    axes.set_xlabel("window at run time, tokens")
    add_title(first, LIGHT, "One trained model a line, its windows changed at run time")
    legend_above(figure, named)
    return to_png(figure)


def accuracy_png(rows: Sequence[Data]) -> bytes:
    """Accuracy against the bytes of one sequence's state: a panel a size, a point a model, bars from lowest to highest
    seed."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    sizes = list(dict.fromkeys(f"{s['task']} {s['size']}" for row in rows for s in row["sizes"]))
    sizes = sizes[-MAX_PANELS:]
    columns = 1 if len(sizes) == 1 else 2
    lines = math.ceil(len(sizes) / columns)
    named, head = _legend_room(models)
    width = (WIDTH - 0.4) / columns - GAP[0]
    figure, first = new_figure(LIGHT, (WIDTH, head - 0.25 + lines * (PANEL + GAP[1])))
    styles = line_styles(models)
    for number, size in enumerate(sizes):
        axes = first if number == 0 else figure.add_axes((0.0, 0.0, 1.0, 1.0))
        row_number, column = divmod(number, columns)
        memory: list[float] = []
        for index, model in enumerate(models):
            found = [
                s for row in rows if row["model"] == model for s in row["sizes"] if f"{s['task']} {s['size']}" == size
            ]
            if not found:
                continue
            values = [100 * s["accuracy"] for s in found]
            middle, x = float(np.mean(values)), found[0]["state_bytes"] / 1024
            memory.append(x)
            axes.errorbar(
                [x],
                [middle],
                yerr=[[middle - min(values)], [max(values) - middle]],
                color=styles[model][0],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5.5,
                linestyle="",
                label=model if number == 0 else None,
                clip_on=False,
                zorder=3,
            )
        axes.set_xscale("log")
        axes.set_xlim(min(memory) / 1.5, max(memory) * 1.5)
        _doubling_ticks(axes.xaxis, *axes.get_xlim())
        axes.set_ylim(0, 100)
        style_axes(figure, axes, LIGHT, right=0.2)
        bottom = 0.5 + (lines - 1 - row_number) * (PANEL + GAP[1])
        place_axes(figure, axes, 0.55 + column * (width + GAP[0]), bottom, width, PANEL)
        axes.set_title(size, loc="left", fontsize=9, color=LIGHT.ink, pad=6)
    label = {"ha": "center", "va": "bottom", "color": LIGHT.muted, "fontsize": 9}
    figure.text(0.5, 0.012, "state of one sequence, KiB (logarithmic)", **label)
    add_title(first, LIGHT, "Answers that are right (%), by tokens / pairs of an example")
    legend_above(figure, named)
    return to_png(figure)


def _doubling_ticks(axis: Any, low: float, high: float) -> None:
    """At most four powers of two on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    axis.set_major_locator(FixedLocator([2**power for power in powers[:: math.ceil(len(powers) / 4)]]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def position_png(rows: Sequence[Data]) -> bytes:
    """Perplexity by position in the longest documents, one line a model (mean loss over seeds)."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    longest = max(int(s["size"]) for row in rows for s in row["sizes"] if s["task"] == "perplexity")
    named, head = _legend_room(models)
    size = (WIDTH, 2.65 + head)
    figure, axes = new_figure(LIGHT, size)
    styles = line_styles(models)
    edges: list[int] = []
    for index, model in enumerate(models):
        found = [
            s
            for row in rows
            if row["model"] == model
            for s in row["sizes"]
            if s["task"] == "perplexity" and int(s["size"]) == longest
        ]
        if not found:
            continue
        edges = found[0]["edges"]
        middles = [math.sqrt(max(1, a) * b) for a, b in pairwise(edges)]
        values = np.exp(np.log([s["by_position"] for s in found]).mean(0))
        colour, dash = styles[model]
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(
            middles, values, color=colour, linestyle=dash, marker=marker, markersize=4.5, linewidth=1.8, label=model
        )
    axes.set_yscale("log")
    context_axis(axes, [edge for edge in edges if edge], "position in the document, tokens", most=6)
    low, high = axes.get_ylim()
    plain_log_ticks(axes.yaxis, low, high)
    style_axes(figure, axes, LIGHT, right=0.25)
    place_axes(figure, axes, 0.62, 0.56, size[0] - 0.87, size[1] - head - 0.31)
    add_title(axes, LIGHT, f"Perplexity by position, documents of {longest:,} tokens (logarithmic)")
    legend_above(figure, named)
    return to_png(figure)
