"""The figure of an evaluation on public sets: accuracy by set, needles by length, perplexity by position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nha.report.drawing import DPI, LIGHT, legend_columns, line_styles, to_png
from nha.report.sentences import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Models = Mapping[str, Mapping[str, Any]]


def public_png(models: Models) -> bytes:
    """Results of `nha.evaluate.public.run.measure_public` by model name, as a PNG file's bytes.

    Panels without data are left out. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    rows = list(models.values())
    panels = [_accuracy] if any(row["sets"] for row in rows) else []
    panels += [_needles] if any(row["needle"] for row in rows) else []
    panels += [_positions] if any(row["perplexity"] for row in rows) else []
    bars = max((len(row["sets"]) for row in rows), default=0) * (len(models) + 1)
    heights = [max(1.6, 0.14 * bars) if panel is _accuracy else 2.4 for panel in panels]
    size = (7.7, sum(heights) + 0.7 * len(panels))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor=LIGHT.background)
    axes = figure.subplots(max(1, len(panels)), 1, squeeze=False, height_ratios=heights or None)[:, 0]
    for panel, each in zip(panels, axes, strict=False):
        panel(each, models)
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(colors=LIGHT.ink, labelsize=9)
    if len(models) > 1 and panels:
        handles, labels = axes[0].get_legend_handles_labels()
        columns = legend_columns(labels, size[0])
        figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=LIGHT.ink
        )
    return to_png(figure)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=LIGHT.ink)


def _accuracy(axes: Axes, models: Models) -> None:
    names = list(dict.fromkeys(name for row in models.values() for name in row["sets"]))
    height = 0.8 / len(models)
    for number, (model, (colour, _)) in enumerate(line_styles(list(models)).items()):
        sets = models[model]["sets"]
        known = [i for i, name in enumerate(names) if name in sets]
        values = [100 * sets[names[i]]["accuracy"] for i in known]
        bounds = [[100 * bound for bound in sets[names[i]]["interval"]] for i in known]
        errors = [[v - low for v, (low, _) in zip(values, bounds, strict=True)]]
        errors += [[high - v for v, (_, high) in zip(values, bounds, strict=True)]]
        places = [i + (number - (len(models) - 1) / 2) * height for i in known]
        axes.barh(places, values, 0.9 * height, color=colour, label=model)
        axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=LIGHT.muted, elinewidth=1)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    _title(axes, "Correct answers (%), bars: 95 % intervals")


def _needles(axes: Axes, models: Models) -> None:
    lengths = sorted({int(n) for row in models.values() for n in row["needle"]})
    for model, (colour, dash) in line_styles(list(models)).items():
        known = {int(n): found for n, found in models[model]["needle"].items()}
        x = sorted(known)
        axes.plot(x, [100 * known[n]["accuracy"] for n in x], color=colour, linestyle=dash, marker="o", label=model)
        low, high = ([100 * known[n]["interval"][i] for n in x] for i in (0, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [tokens(n) for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 103)
    _title(axes, "Needles found (%) by tokens of the prompt, bands: 95 % intervals")


def _positions(axes: Axes, models: Models) -> None:
    edges: list[int] = []
    for model, (colour, dash) in line_styles(list(models)).items():
        known = models[model]["perplexity"]
        if not known:
            continue
        found = known[max(known, key=int)]
        edges = max(edges, found["edges"], key=len)
        middles = [math.sqrt(max(a, 16) * b) for a, b in itertools.pairwise(found["edges"])]
        axes.plot(middles, found["by_position"], color=colour, linestyle=dash, marker="o", markersize=3.5, label=model)
    axes.set_xscale("log", base=2)
    shown = [edge for edge in edges if edge]
    axes.set_xticks(shown, [tokens(edge) for edge in shown])
    axes.minorticks_off()
    _title(axes, "Perplexity by position in held-out documents")
