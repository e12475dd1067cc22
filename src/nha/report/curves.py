"""Figures of an evaluation and of a search, in the report's style: recall by distance, loss against memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nha.report.drawing import (
    LIGHT,
    MARKERS,
    SPARE,
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
    figure, first = new_figure(LIGHT, size)
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
        context_axis(axes, distances, "", most=5 if columns == 1 else 3)
        axes.set_xlim(distances[0] / 1.1, distances[-1] * 1.1)
        style_axes(figure, axes, LIGHT, right=0.2)
        bottom = foot + (rows - 1 - row) * (panel[1] + gap[1])
        place_axes(figure, axes, 0.55 + column * (panel[0] + gap[0]), bottom, *panel)
        axes.set_title(task.replace("_", " "), loc="left", fontsize=9, color=LIGHT.ink, pad=6)
        if number >= len(tasks) - columns:
            axes.set_xlabel("tokens between fact and answer")
    names = {"digits": "Tokens of the answer", "exact": "Whole answers", "generated": "Answers written"}
    add_title(first, LIGHT, f"{names[metric]} that are right (%), bands: 95 % intervals")
    legend_above(figure, named)
    return to_png(figure)


def front_png(result: Mapping[str, Any]) -> bytes:
    """A search's losses against the bytes of the cache, as a PNG file's bytes.

    `result` is a `SearchResult` as plain data: its front as a line, the placements by rule as points.
    """
    size = (WIDTH, 3.9)
    figure, axes = new_figure(LIGHT, size)
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
    plain_log_ticks(axes.xaxis, low, high)
    axes.set_xlabel(f"cache of one text of {result['context']:,} tokens (MB, logarithmic)")
    axes.margins(x=0.05, y=0.14)
    style_axes(figure, axes, LIGHT, right=0.25)
    place_axes(figure, axes, 0.62, 0.56, size[0] - 0.87, size[1] - 1.4)
    add_title(axes, LIGHT, "Loss (nats, recall and text weighted); numbers: full layers")
    legend_above(figure, 4)
    return to_png(figure)
