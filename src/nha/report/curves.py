"""Figures of an evaluation and of a search, in the report's style: recall by distance, loss against memory."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nha.report.plots import DPI, LIGHT, _context_axis, _figure, _plain_log_ticks, _style, _title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of the report's variants first, then others.
KNOWN = {"model": "hybrid", "full attention": "teacher"}
SPARE = ("#d55e00", "#009e73", "#8a6d00", "#56b4e9", "#7f3c8d", "#5f6871")
MARKERS = "osD^vPX"  # colours alone are hard to tell apart in grey
WIDTH = 4.9  # inches: text of 9 points is readable where the picture is 390 pixels wide
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (3, 1.5, 1, 1.5)))


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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=LIGHT.background)
    return buffer.getvalue()


def _place(figure: Figure, axes: Axes, left: float, bottom: float, width: float, height: float) -> None:
    """Put axes at inches from the lower left corner."""
    w, h = figure.get_size_inches()
    axes.set_position((left / w, bottom / h, width / w, height / h))


def _legend_above(figure: Figure, columns: int) -> None:
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


def recall_png(variants: Mapping[str, Mapping[str, Any]], metric: str) -> bytes:
    """Recall by distance, one panel a task and one line a variant, as a PNG file's bytes.

    `variants` is {variant: {task: {distance: {metric: 0 to 1, metric + "_interval": [low, high]}}}}; bands are the
    intervals.
    """
    tasks = list(dict.fromkeys(task for scores in variants.values() for task in scores))
    columns = 1 if len(tasks) <= 2 else 2
    rows = math.ceil(len(tasks) / columns)
    named = max(1, min(4, int(WIDTH / (0.5 + 0.075 * max(map(len, variants))))))  # names side by side, in inches
    lines = math.ceil(len(variants) / named)
    gap, head, foot = (0.42, 0.72), 0.6 + 0.2 * lines, 0.62
    panel = ((WIDTH - 0.4) / columns - gap[0], 1.7)
    size = (WIDTH, head + rows * (panel[1] + gap[1]) - gap[1] + foot)
    figure, first = _figure(LIGHT, size)
    styles = line_styles(list(variants))
    distances = sorted({int(d) for scores in variants.values() for found in scores.values() for d in found})
    for number, task in enumerate(tasks):
        axes = first if number == 0 else figure.add_axes((0.0, 0.0, 1.0, 1.0))
        row, column = divmod(number, columns)
        for index, (name, scores) in enumerate(variants.items()):
            known = {int(d): s for d, s in scores.get(task, {}).items() if s[metric] is not None}
            x = sorted(known)
            colour, dash = styles[name]
            axes.plot(
                x,
                [100 * known[d][metric] for d in x],
                color=colour,
                linestyle=dash,
                linewidth=1.8,
                marker=MARKERS[index % len(MARKERS)],
                markersize=4.5,
                label=name if number == 0 else None,
                clip_on=False,
                zorder=3,
            )
            bands = [known[d][f"{metric}_interval"] for d in x]
            low, high = ([100 * band[i] for band in bands] for i in (0, 1))
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_ylim(0, 100)
        _context_axis(axes, distances, "", most=5 if columns == 1 else 3)
        axes.set_xlim(distances[0] / 1.1, distances[-1] * 1.1)
        _style(figure, axes, LIGHT, right=0.2)
        bottom = foot + (rows - 1 - row) * (panel[1] + gap[1])
        _place(figure, axes, 0.55 + column * (panel[0] + gap[0]), bottom, *panel)
        axes.set_title(task.replace("_", " "), loc="left", fontsize=9, color=LIGHT.ink, pad=6)
        if number >= len(tasks) - columns:
            axes.set_xlabel("tokens between fact and answer")
    names = {"digits": "Tokens of the answer", "exact": "Whole answers", "generated": "Answers written"}
    _title(first, LIGHT, f"{names[metric]} that are right (%), bands: 95 % intervals")
    _legend_above(figure, named)
    return _png(figure)


def front_png(result: Mapping[str, Any]) -> bytes:
    """A search's losses against the bytes of the cache, as a PNG file's bytes.

    `result` is a `SearchResult` as plain data: its front as a line, the placements by rule as points.
    """
    size = (WIDTH, 3.9)
    figure, axes = _figure(LIGHT, size)
    rows = result["front"]
    sizes = {len(row["full_layers"]): row["bytes"] / 1e6 for row in rows}
    blue = LIGHT.hybrid
    axes.plot(
        [row["bytes"] / 1e6 for row in rows],
        [row["loss"] for row in rows],
        color=blue,
        linewidth=2.2,
        marker="o",
        markersize=5,
        zorder=3,
        label="best found",
    )
    for row in rows:
        axes.annotate(
            str(len(row["full_layers"])),
            (row["bytes"] / 1e6, row["loss"]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=blue,
        )
    count = len(result["full_layers"])
    for (name, marker), colour in zip((("uniform", "s"), ("first", "^"), ("last", "v")), SPARE, strict=False):
        layers = result["placements"].get(name)
        if layers and count in sizes:
            loss = result["evaluated"][",".join(map(str, layers))]["loss"]
            axes.plot([sizes[count]], [loss], marker=marker, color=colour, linestyle="", markersize=7, label=name)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    _plain_log_ticks(axes.xaxis, low, high)
    axes.set_xlabel(f"cache of one text of {result['context']:,} tokens (MB, logarithmic)")
    axes.margins(x=0.05, y=0.14)
    _style(figure, axes, LIGHT, right=0.25)
    _place(figure, axes, 0.62, 0.56, size[0] - 0.87, size[1] - 1.4)
    _title(axes, LIGHT, "Loss (nats, recall and text weighted); numbers: full layers")
    _legend_above(figure, 4)
    return _png(figure)
