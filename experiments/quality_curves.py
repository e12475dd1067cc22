"""Numbers of recipes of `experiments/quality.py` by tokens, and their spread between seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.quality_targets import NEEDLES, PERPLEXITIES, SHARES, judge

Run = dict[str, Any]
Shares = Callable[[Run, Run | None], Mapping[str, Any]]
PANELS = {
    "ppl_8k": "Perplexity 8K, times the control's",
    "average": "Average of 6 sets, % of it",
    "squad": "SQuAD, % of it",
    "cloze_near": "Near cloze, % of it",
    "cloze_far": "Far cloze, % of it",
    "8192": "Needles in 8K, %",
    "32768": "Needles in 32K, %",
}


def nearest_control(run: Run, runs: Sequence[Run]) -> Run | None:
    """The control of a run or, where it has none, the one with the nearest number of tokens, its seed, its batches."""
    row = run["row"]

    def key(one: Run) -> tuple[Any, ...]:
        own = one["row"]
        return (
            abs(own["tokens"] - row["tokens"]),
            own["seed"] != row["seed"],
            own["control"] != row["control"],
            own["seed"],
        )

    return min((one for one in runs if one["row"]["arm"] == "control"), key=key, default=None)


def runs_of_several(runs: Sequence[Run], what: str) -> dict[str, list[Run]]:
    """Hybrids by recipe, those alone that differ in `what` ("tokens" or "seed").

    >>> rows = [{"arm": "a", "tokens": 1e6}, {"arm": "a", "tokens": 2e6}, {"arm": "b", "tokens": 1e6}]
    >>> list(runs_of_several([{"row": row} for row in rows], "tokens"))
    ['a']
    """
    recipes: dict[str, list[Run]] = {}
    for run in runs:
        if run["row"]["arm"] != "control":
            recipes.setdefault(run["row"]["arm"], []).append(run)
    return {name: some for name, some in recipes.items() if len({run["row"][what] for run in some}) > 1}


def points(some: Sequence[Run], name: str, found: Mapping[int, Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(million tokens, value) of a number of runs, whose shares are `found` by the run's id."""
    values = []
    for run in some:
        needle = (run["row"]["needle"] or {}).get(name)
        share = (found[id(run)].get(name) or {}).get("ratio")
        value = 100 * needle[0] if needle else share if share is None or name in PERPLEXITIES else 100 * share
        if value is not None:
            values.append((run["row"]["tokens"] / 1e6, value))
    return values


def tokens_png(runs: Sequence[Run], shares: Shares) -> bytes | None:
    """The numbers of recipes by tokens, a dot for every seed and a line through their means; None without such recipes.

    A number is relative to the run's control, or to the nearest one; dashes are the targets. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    from nha.report.drawing import LIGHT, MARKERS, line_styles, to_png

    recipes = runs_of_several(runs, "tokens")
    if not recipes:
        return None
    found = {id(run): shares(run, nearest_control(run, runs)) for some in recipes.values() for run in some}
    figure = Figure(figsize=(4.9, 8.2), dpi=160, layout="constrained", facecolor=LIGHT.background)
    panels = list(figure.subplots(4, 2, sharex=True).flat)
    styles = line_styles(list(recipes))
    budgets = {run["row"]["budget"] for some in recipes.values() for run in some} & SHARES.keys()
    for axes, (name, title) in zip(panels, PANELS.items(), strict=False):
        for index, (some, (recipe, (colour, dash))) in enumerate(zip(recipes.values(), styles.items(), strict=True)):
            dots = points(some, name, found)
            axes.plot(*zip(*dots, strict=True), MARKERS[index], color=colour, markersize=4) if dots else None
            counts = sorted({x for x, _ in dots})
            means = [_mean([y for x, y in dots if x == count]) for count in counts]
            axes.plot(counts, means, color=colour, linestyle=dash, label=recipe if name == "ppl_8k" else None)
        for budget in budgets:
            target = NEEDLES[budget].get(name, SHARES[budget].get(name))
            if target is not None:
                axes.axhline(target if name in PERPLEXITIES else 100 * target, color=LIGHT.muted, linestyle=":")
        axes.set_title(title, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=LIGHT.line, linewidth=0.8)
    for axes in panels[len(PANELS) :]:
        axes.set_visible(False)
    figure.supxlabel("million tokens, the teacher's among them; dotted: the target", fontsize=9)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    return to_png(figure)


FACT_RUNS = {"hybrid": False, "long": True, "long_quarter": True, "long_recall": True}  # ends in sequences of 8,192
FACT_DISTANCES = ("512", "1900", "4096", "8044")


def facts_png(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Recall of template facts by tokens for hybrids with windows of 64, rows of `results/hybridize`; needs matplotlib.

    A mark for every run, filled where the last tokens came in sequences of 8,192, and a line through the means.
    """
    from matplotlib.figure import Figure

    from nha.report.drawing import LIGHT, MARKERS, line_styles, to_png

    some = [row for row in rows if row["run"] in FACT_RUNS and row["slots"]]
    figure = Figure(figsize=(4.9, 6.2), dpi=160, layout="constrained", facecolor=LIGHT.background)
    panels = figure.subplots(2, 1, sharex=True)
    styles = line_styles([f"{int(distance):,} tokens back" for distance in FACT_DISTANCES])
    for axes, (task, title) in zip(
        panels, (("one_fact", "One fact, %"), ("four_facts", "One of four facts, %")), strict=True
    ):
        for index, (distance, (label, (colour, dash))) in enumerate(zip(FACT_DISTANCES, styles.items(), strict=True)):
            dots: dict[float, list[float]] = {}
            for row in some:
                found = row["recall"][task].get(distance)
                if found is None:
                    continue
                x, y = row["tokens"] / 1e6, 100 * found["exact"]
                dots.setdefault(x, []).append(y)
                inside = colour if FACT_RUNS[row["run"]] else "none"
                axes.plot(x, y, MARKERS[index], color=colour, markerfacecolor=inside, markersize=5)
            means = [_mean(dots[x]) for x in sorted(dots)]
            axes.plot(sorted(dots), means, color=colour, linestyle=dash, label=label if task == "one_fact" else None)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xscale("log")
        axes.set_xticks([6, 12, 25, 50, 100], ["6", "12", "25", "50", "100"])
        axes.minorticks_off()
        axes.set_ylim(-3, 103)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=LIGHT.line, linewidth=0.8)
    panels[1].set_xlabel("million tokens; filled: the last ones in sequences of 8,192")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    return to_png(figure)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def seeds_table(runs: Sequence[Run], shares: Shares, titles: Mapping[str, str]) -> str:
    """Markdown: every target of the recipes that were trained with several seeds, each seed's value and the mean."""
    lines: list[str] = []
    for recipe, several in runs_of_several(runs, "seed").items():
        for tokens in sorted({run["row"]["tokens"] for run in several}):
            some = [run for run in several if run["row"]["tokens"] == tokens and run["row"]["budget"] in SHARES]
            if len(some) < 2:
                continue
            judged = [list(judge(run["row"], shares(run, nearest_control(run, runs)))) for run in some]
            for number in zip(*judged, strict=True):
                values = [one.value for one in number if one.value is not None]
                if not values:
                    continue
                lower = number[0].name in PERPLEXITIES
                mean, target = _mean(values), number[0].target
                shown = (lambda x: f"{x:.3f}") if lower else (lambda x: f"{100 * x:.0f}")
                met = sum(value <= target if lower else value >= target for value in values)
                cells = [f"{recipe}, {tokens / 1e6:.0f} M", titles.get(number[0].name, number[0].name), shown(target)]
                cells += [" / ".join(map(shown, values)), shown(mean), f"{met} of {len(values)}"]
                lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return ""
    head = ["Rows of several seeds, in %, perplexity as a ratio, each beside the control of its own batches or,"]
    head[0] += " where there is none, of the nearest tokens and seed."
    head += ["", "| run | number | target | by seed | mean | seeds that meet it |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) + "\n"
