"""Table and pictures of what `experiments/quality.py` measured, every number relative to the fair control."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from experiments.quality_curves import facts_png, nearest_control, seeds_table, tokens_png
from experiments.quality_runs import NOT_DRAWN, RECIPES
from experiments.quality_targets import targets_table
from nha.distill.settings import DistillSettings
from nha.evaluate.bootstrap import LEVEL, RESAMPLES
from nha.evaluate.public.run import KNOWLEDGE, relative
from nha.io import write_atomically
from nha.report.results import to_json

Run = dict[str, Any]  # a file of runs/: row, settings, log, eval
LOWER = ("ppl_2k", "ppl_8k")
SHOWN = {
    "ppl_2k": "perplexity 2K",
    "ppl_8k": "perplexity 8K",
    "average": "average of 6 sets",
    "without_boolq": "the same without BoolQ",
    "squad": "SQuAD, written",
    "cloze_near": "near cloze, written",
    "cloze_far": "far cloze, written",
}
AVERAGES = {"average": KNOWLEDGE, "without_boolq": tuple(name for name in KNOWLEDGE if name != "boolq")}
PARTS = {"ppl_2k": "perplexity 2,048", "ppl_8k": "perplexity 8,192", "squad": "squad_qa"}
DPI, LONG_SEQ_LEN = 160, DistillSettings.long_seq_len
MARK = "\n\\* beside the control of the nearest tokens and seed: none read the same batches.\n"


def read_runs(folder: Path) -> list[Run]:
    """All runs of a folder: controls first, then by budget, tokens and seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "runs").glob("*.json"))]
    for run in found:
        run["row"].setdefault("long_seq_len", run["settings"]["long_seq_len"])
    order = {"beyond": 0, "4full": 1, "1full": 2, "constant": 3}

    def key(run: Run) -> tuple[Any, ...]:
        row = run["row"]
        return (
            row["arm"] != "control",
            order[row["budget"]],
            row["arm"],
            row["tokens"],
            row["long_seq_len"],
            row["seed"],
        )

    return sorted(found, key=key)


def name_of(row: Mapping[str, Any]) -> str:
    """A run in a few words; controls say how long their long sequences are where it is not the default.

    >>> name_of({"arm": "4full", "tokens": 24_969_216, "seed": 1, "budget": "4full"})
    '4full, 25 M, seed 1'
    >>> name_of({"arm": "control", "tokens": 50e6, "seed": 0, "long_seq_len": 32768})
    'control of 32K, 50 M'
    """
    seed, long = f", seed {row['seed']}" if row["seed"] else "", row.get("long_seq_len", LONG_SEQ_LEN)
    of = f" of {long // 1024}K" if row["arm"] == "control" and long != LONG_SEQ_LEN else ""
    return f"{row['arm']}{of}, {row['tokens'] / 1e6:.0f} M{seed}"


def find_control(run: Run, runs: Sequence[Run]) -> Run | None:
    """The control of a run: it read the same batches."""
    row = run["row"]
    same = ("control", "tokens", "seed")
    matches = [r for r in runs if r["row"]["arm"] == "control" and all(r["row"][k] == row[k] for k in same)]
    return matches[0] if matches else None


def beside(run: Run, runs: Sequence[Run]) -> tuple[dict[str, Any], str]:
    """The shares of a run and its name, with a mark where the nearest control stands in for one of the same batches."""
    mark = "" if find_control(run, runs) is not None else r" \*"
    return shares(run, nearest_control(run, runs)), name_of(run["row"]) + mark


def value_of(row: Mapping[str, Any], name: str) -> float | None:
    """A number of a row without its count."""
    value = row.get(name)
    return value[0] if isinstance(value, list) else value


def summary_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of summary.json; a control that serves several budgets has one row for each."""
    rows = []
    for run in runs:
        row = run["row"]
        if row["arm"] != "control":
            rows.append(row)
            continue
        budgets = {r["row"]["budget"] for r in runs if find_control(r, runs) is run} | {row["budget"]}
        rows += [row | {"budget": budget} for budget in sorted(budgets)]
    return rows


def shares(run: Run, control: Run | None) -> dict[str, Any]:
    """{name: {ratio, interval}} of a run's shown numbers relative to its control's."""
    if control is None:
        return {}
    ratios = relative(run["eval"], control["eval"])
    found = {name: ratios[PARTS.get(name, name)] for name in SHOWN if PARTS.get(name, name) in ratios}
    for name, sets in AVERAGES.items():
        ratio = average_ratio(run, control, sets)
        found |= {name: ratio} if ratio else {}
    return found


def average_ratio(run: Run, control: Run, sets: Sequence[str], seed: int = 0) -> dict[str, Any] | None:
    """The ratio of the mean accuracies over sets, with a paired bootstrap over the items of each; None without all."""
    own, other = (one["eval"]["sets"] for one in (run, control))
    if any(name not in own or name not in other for name in sets):
        return None
    drawn, means, ratio = np.random.default_rng(seed), np.zeros((2, RESAMPLES)), np.zeros(2)
    for name in sets:
        pair = np.array([[int(c) for c in one[name]["correct"]] for one in (own, other)])
        kinds = np.bincount(2 * pair[0] + pair[1], minlength=4)  # of items: none right, control's, own, both
        counts = drawn.multinomial(pair.shape[1], kinds / pair.shape[1], RESAMPLES)
        means += np.stack([counts[:, 2] + counts[:, 3], counts[:, 1] + counts[:, 3]]) / pair.shape[1]
        ratio += pair.mean(1)
    if not ratio[1]:
        return None
    ratios = means[0] / np.maximum(means[1], 1e-9)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"ratio": float(ratio[0] / ratio[1]), "interval": [float(low), float(high)]}


def number(row: Mapping[str, Any], name: str) -> str:
    sets = row["sets"] or {}
    if name == "without_boolq":
        row = {name: _mean([sets[n][0] for n in AVERAGES[name]]) if all(n in sets for n in AVERAGES[name]) else None}
    value = value_of(row, name)
    if value is None:
        return ""
    return f"{value:.2f}" if name in LOWER else f"{100 * value:.1f}"


def share(found: Mapping[str, Any] | None, name: str) -> str:
    if not found or found["ratio"] is None:
        return ""
    digits = (lambda x: f"{x:.3f}") if name in LOWER else (lambda x: f"{100 * x:.0f}")
    interval = "" if found["interval"] is None else " ({} to {})".format(*map(digits, found["interval"]))
    return f"{digits(found['ratio'])}{interval}"


def table(runs: Sequence[Run]) -> str:
    """Three tables in Markdown: the numbers, their shares of the control's, and needles and clozes by distance."""
    head = ["run, tokens", "full layers", "MB at 16K", *SHOWN.values()]
    kept = "in bf16, in 8 bits for `_int8`, `_floor`, `_long` and `shipped`"
    lines = [f"Accuracies in %. MB: the cache of one sequence of 16,384 tokens {kept}.", "", _line(head), _rule(head)]
    for run in runs:
        row = run["row"]
        layers = full_layers(row["windows"])
        numbers = [number(row, name) for name in SHOWN]
        lines.append(_line([name_of(row), layers, f"{row['bytes_16k'] / 1e6:.1f}", *numbers]))
    others = [run for run in runs if run["row"]["arm"] != "control"]
    lines += [
        "",
        "Relative to the fair control, the original trained on the same batches with full attention: perplexity",
    ]
    lines[-1] += " as a ratio, the rest in % of the control's; 95 % intervals by paired bootstrap over items."
    head = ["run, tokens", *SHOWN.values()]
    lines += ["", _line(head), _rule(head)]
    for run in others:
        found, named = beside(run, runs)
        lines.append(_line([named, *(share(found.get(name), name) for name in SHOWN)]))
    lines += MARK.splitlines() if any(find_control(run, runs) is None for run in others) else []
    lengths = sorted({int(n) for run in runs for n in run["row"]["needle"] or {}})
    edges = list(dict.fromkeys(edge for run in runs for part in distances(run) for edge in part))
    head = ["run, tokens", *(f"needle {n // 1024}K" for n in lengths), *(f"cloze {edge}" for edge in edges)]
    lines += [
        "",
        "By distance in tokens, %. A needle is right if nothing but the number is written; in brackets: also if",
    ]
    lines[-1] += " other digits follow it (the rule of RULER)."
    lines += ["", _line(head), _rule(head)]
    for run in runs:
        needles, clozes = run["row"]["needle"] or {}, {k: v for part in distances(run) for k, v in part.items()}
        cells = [needle_cell(run, n) if str(n) in needles else "" for n in lengths]
        cells += [f"{100 * clozes[edge][0]:.0f}" if edge in clozes else "" for edge in edges]
        lines.append(_line([name_of(run["row"]), *cells]))
    head = ["run, tokens", *KNOWLEDGE, "tokens/s", "training, s", "measuring, s"]
    lines += [
        "",
        "The sets in %, and the time on one GPU, unless several runs shared it. In brackets: BoolQ's mean over",
    ]
    lines[-1] += " its two answers, 50 for who always gives the same."
    lines += ["", _line(head), _rule(head)]
    for run in runs:
        row = run["row"]
        cells = [set_cell(run, n) if n in (row["sets"] or {}) else "" for n in KNOWLEDGE]
        times = [f"{row['tokens_per_s'] or 0:,.0f}", f"{row['train_seconds']:.0f}", f"{row['eval_seconds']:.0f}"]
        lines.append(_line([name_of(row), *cells, *(times if row.get("processes", 1) == 1 else [""] * 3)]))
    return "\n".join(lines) + "\n"


def set_cell(run: Run, name: str) -> str:
    """The accuracy on a set in %, and in brackets the mean over its answers where that is known."""
    found = run["eval"]["sets"][name]
    balanced = f" ({100 * found['balanced']:.1f})" if "balanced" in found else ""
    return f"{100 * found['accuracy']:.1f}{balanced}"


def needle_cell(run: Run, length: int) -> str:
    """Needles of a length that a run found, in %, and in brackets by the rule of RULER where that is known."""
    found = run["eval"]["needle"][str(length)]
    contained = f" ({100 * found['contained']['accuracy']:.0f})" if "contained" in found else ""
    return f"{100 * found['accuracy']:.0f}{contained}"


def full_layers(windows: Sequence[Any]) -> str:
    """The full layers in words; heads with full attention in other layers are counted.

    >>> full_layers([64, -1, [64, -1, -1]])
    '1, 2 heads'
    """
    full = [str(i) for i, window in enumerate(windows) if window == -1]
    heads = sum(list(window).count(-1) for window in windows if not isinstance(window, int))
    if len(full) == len(windows):
        return "all"
    return ", ".join([*full, *([f"{heads} heads"] if heads else [])]) or "none"


def distances(run: Run) -> list[dict[str, Any]]:
    """Accuracy of near and far clozes by distance."""
    sets = run["eval"]["sets"]
    return [sets[name]["by_distance"] for name in ("cloze_near", "cloze_far") if name in sets]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(cells: Sequence[str]) -> str:
    return "|" + "---|" * len(cells)


def shares_png(runs: Sequence[Run]) -> bytes:
    """Shares of the control's quality, a line for every number and recipe, a point for every seed; needs matplotlib."""
    from matplotlib.figure import Figure

    from nha.report.drawing import LIGHT, MARKERS, line_styles, to_png

    found = {id(run): shares(run, find_control(run, runs)) for run in runs if run["row"]["arm"] != "control"}
    groups = by_recipe([run for run in runs if found.get(id(run))])
    names = [name for name in SHOWN if any((each.get(name) or {}).get("ratio") for each in found.values())]
    height = 0.1 * len(names) * len(groups) + 0.1 * len(names) + 1.5
    figure = Figure(figsize=(4.9, height), dpi=DPI, layout="constrained", facecolor=LIGHT.background)
    axes = figure.add_subplot()
    for index, (label, (colour, _)) in enumerate(line_styles(list(groups)).items()):
        places, values = [], []
        for at, name in enumerate(names):
            ratios = [(found[id(run)].get(name) or {}).get("ratio") for run in groups[label]]
            values += [100 / ratio if name in LOWER else 100 * ratio for ratio in ratios if ratio]
            places += [at + 0.8 * ((index + 0.5) / len(groups) - 0.5)] * sum(map(bool, ratios))
        axes.plot(values, places, MARKERS[index % len(MARKERS)], color=colour, label=label, markersize=5)
    axes.axvline(100, color=LIGHT.line, linewidth=1)
    for at in range(1, len(names)):
        axes.axhline(at - 0.5, color=LIGHT.line, linewidth=0.8)
    axes.set_yticks(range(len(names)), [SHOWN[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("% of the fair control's\n(perplexity: control's / hybrid's)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=LIGHT.line, linewidth=0.8)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    return to_png(figure)


def distances_png(runs: Sequence[Run]) -> bytes:
    """Verbatim clozes and needles by distance, a line for every recipe, the mean of its seeds; needs matplotlib."""
    from matplotlib.figure import Figure

    from nha.report.drawing import LIGHT, MARKERS, line_styles, to_png

    figure = Figure(figsize=(4.9, 6.4), dpi=DPI, layout="constrained", facecolor=LIGHT.background)
    clozes, needles = figure.subplots(2, 1)
    groups = by_recipe(runs)
    styles = line_styles(list(groups))
    for index, (label, (colour, dash)) in enumerate(styles.items()):
        line = {"color": colour, "linestyle": dash, "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        near_and_far = mean_accuracies([part for run in groups[label] for part in distances(run)])
        places = {edges: [float(edge.replace(",", "")) for edge in edges.split(" to ")] for edges in near_and_far}
        clozes.plot([math.prod(places[n]) ** 0.5 for n in places], list(near_and_far.values()), label=label, **line)
        found = mean_accuracies([run["row"]["needle"] or {} for run in groups[label]])
        lengths = sorted(found, key=int)
        needles.plot([int(n) for n in lengths], [found[n] for n in lengths], **line)
    for axes, title in ((clozes, "Clozes of books, written, %"), (needles, "Needles, written, %")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xscale("log", base=2)
        ticks = [2**n for n in range(6 if axes is clozes else 11, 13 if axes is clozes else 18)]
        axes.set_xticks(ticks, [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks])
        axes.set_ylim(-3, 103)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=LIGHT.line, linewidth=0.8)
    needles.set_xlabel("tokens from source to answer; of the prompt, for needles")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    return to_png(figure)


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of all seeds by recipe and tokens; the name says how many seeds there are where it is more than one."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(name_of(run["row"] | {"seed": 0}), []).append(run)
    return {
        name_of(some[0]["row"]) if len(some) == 1 else f"{name}, {len(some)} seeds": some
        for name, some in found.items()
    }


def mean_accuracies(found: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """The mean accuracy in % of every name, over those of `found`, {name: (accuracy, n)}, that have it.

    >>> mean_accuracies([{"8192": (0.5, 20), "32768": (0.1, 20)}, {"8192": (0.7, 20)}])
    {'8192': 60.0, '32768': 10.0}
    """
    names = dict.fromkeys(name for each in found for name in each)
    return {name: 100 * _mean([each[name][0] for each in found if name in each]) for name in names}


def learning_png(runs: Sequence[Run]) -> bytes:
    """KL divergence of text and answers to recall text by tokens read, means over 9 entries of each hybrid's log."""
    from matplotlib.figure import Figure

    from nha.report.drawing import DASHES, LIGHT, line_styles, to_png

    figure = Figure(figsize=(4.9, 5.6), dpi=DPI, layout="constrained", facecolor=LIGHT.background)
    panels = figure.subplots(2, 1, sharex=True)
    styles = line_styles([name_of(run["row"]) for run in runs])
    for index, (run, (label, (colour, _))) in enumerate(zip(runs, styles.items(), strict=True)):
        dash = DASHES[index % len(DASHES)]
        x = [entry["tokens"] / 1e6 for entry in run["log"]]
        for axes, name, factor in zip(panels, ("kl", "answer_accuracy"), (1.0, 100.0), strict=True):
            values = smooth([factor * entry[name] for entry in run["log"]])
            axes.plot(x, values, color=colour, linestyle=dash, label=label if name == "kl" else None)
    for axes, title in zip(
        panels, ("KL divergence from the teacher, nats", "Answers to recall text, % of tokens"), strict=True
    ):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylim(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=LIGHT.line, linewidth=0.8)
    panels[1].set_xlabel("million tokens, the teacher's among them")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    return to_png(figure)


def to_draw(runs: Sequence[Run]) -> list[Run]:
    """The runs that pictures show: those of `NOT_DRAWN` only where there is no other hybrid.

    >>> control, hybrid, other = ({"row": {"arm": name}} for name in ("control", "4full", "constant_long"))
    >>> len(to_draw([control, hybrid])), to_draw([control, hybrid, other]) == [control, other]
    (2, True)
    """
    found = [run for run in runs if run["row"]["arm"] not in NOT_DRAWN]
    return found if any(run["row"]["arm"] != "control" for run in found) else list(runs)


def repeats_training(row: Mapping[str, Any]) -> bool:
    """Whether a row measures a small file, or other gates, made of another row's training, whose log it holds."""
    recipe = RECIPES.get(row["arm"])
    if recipe is None or recipe.source is None:
        return False
    return recipe.shipped is not None or "gate_shift" in recipe.changes


def smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """Means over up to `width` neighbours, fewer at the ends.

    >>> smooth([1.0, 2.0, 6.0], 3)
    [1.5, 3.0, 4.0]
    """
    half = width // 2
    return [_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def write_report(folder: Path) -> str:
    """Write summary.json, logs.jsonl, table.md, targets.md and, with matplotlib, pictures. Returns the table."""
    runs = read_runs(folder)
    write_atomically(folder / "summary.json", to_json(summary_rows(runs)))
    if not runs:
        return "no runs\n"
    kept = ("arm", "budget", "seed", "tokens")
    logs = [json.dumps({k: run["row"][k] for k in kept} | {"log": run["log"]}) for run in runs]
    write_atomically(folder / "logs.jsonl", "\n".join(logs) + "\n")
    text = table(runs)
    write_atomically(folder / "table.md", text)
    paired = [(run, *beside(run, runs)) for run in runs if run["row"]["arm"] != "control"]
    judged = [(run["row"], named, found) for run, found, named in paired if found]
    seeds, mark = seeds_table(runs, shares, SHOWN), MARK if any(named.endswith("*") for _, named, _ in judged) else ""
    write_atomically(folder / "targets.md", targets_table(judged, SHOWN) + mark + (f"\n{seeds}" if seeds else ""))
    if find_spec("matplotlib") is not None:
        from nha.report.public import public_png

        measured = [run for run in runs if any(run["eval"][kind] for kind in ("sets", "needle", "perplexity"))]
        drawn = to_draw(measured)
        first = [some[0] for some in by_recipe(drawn).values()]
        if any(shares(run, find_control(run, drawn)) for run in drawn):
            write_atomically(folder / "shares.png", shares_png(drawn))
        facts = folder.parent / "hybridize" / "summary.json"
        if facts.is_file():
            write_atomically(folder / "facts.png", facts_png(json.loads(facts.read_text(encoding="utf-8"))))
        curves = tokens_png(runs, shares)
        if curves is not None:
            write_atomically(folder / "tokens.png", curves)
        if first:
            write_atomically(folder / "distances.png", distances_png(drawn))
            trained = [run for run in first if run["log"] and not repeats_training(run["row"])]
            hybrids = [run for run in trained if run["row"]["arm"] != "control"]
            if hybrids:
                write_atomically(folder / "learning.png", learning_png(hybrids))
            models = {name_of(run["row"]): run["eval"] for run in first}
            write_atomically(folder / "public.png", public_png(models))
    return text
