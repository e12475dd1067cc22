"""Picture and page of `nha bench model`: each hybrid beside the strongest original, losses included.

The strongest original at a length is the fastest row of "original" and "original-kernels", however it was run.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nha.bench.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    Points,
    about,
    add_legend,
    by_log,
    by_tokens,
    crossover,
    make_figure,
)
from nha.bench.shapes import ORIGINALS
from nha.io import write_atomically
from nha.report.drawing import LIGHT, to_png
from nha.report.sentences import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
TASKS = {
    "prefill": "Prompt",
    "decode": "One more token",
    "throughput": "Tokens a second of as many sequences as fit",
    "throughput-80gb": "Tokens a second of as many sequences as fit into an 80 GB GPU",
    "throughput-80gb-int8": "The same with keys and values of full attention in 8 bits",
}
IN_SEGMENTS = "read in segments, or by generate"
DRAWN = {"prefill": ("reading a prompt, s", 1e-3), "decode": ("one more token, ms", 1.0)}


class Style(NamedTuple):
    label: str
    colour: str
    marker: str
    dash: Any


def style(variant: str) -> Style:
    """How a variant is named and drawn."""
    if variant == "original":
        return Style("original, Hugging Face", GREY, "s", (0, (4, 1.5)))
    if variant == "original-kernels":
        return Style("original, kernels of nha", GREEN, "D", "-")
    count = variant.removeprefix("hybrid-")
    if count == "0":
        return Style("hybrid, no full layer", SKY, "v", "-")
    return Style(f"hybrid, {count} full layers", BLUE, "o", "-")


def variants_of(rows: Iterable[Row]) -> list[str]:
    """The variants in these rows: originals first, then hybrids with fewer and fewer full layers."""
    found = {row["variant"] for row in rows}
    hybrids = sorted(found - set(ORIGINALS), key=lambda name: -int(name.removeprefix("hybrid-")))
    return [name for name in ORIGINALS if name in found] + hybrids


def fastest(rows: Iterable[Row], task: str, variants: Iterable[str], length: int) -> Row | None:
    """The row of the most tokens a second of some variants at a task and a length, however it was run."""
    wanted = set(variants)
    found = [
        row
        for row in rows
        if row["task"] == task and row["T"] == length and row["variant"] in wanted and row["status"] == "ok"
    ]
    return max(found, key=lambda row: row["tokens_s"], default=None)


def comparable(rows: list[Row]) -> list[Row]:
    """The rows that comparisons and curves are made of: no eager tokens of a variant that was timed otherwise as well.

    At a length where nothing else was timed, such a token would show the host and not the model.
    """
    other = {row["variant"] for row in rows if row["task"] == "decode" and row["how"] != "eager"}
    return [r for r in rows if (r["task"], r["how"]) != ("decode", "eager") or r["variant"] not in other]


def lengths_of(rows: Iterable[Row], task: str) -> list[int]:
    return sorted({row["T"] for row in rows if row["task"] == task})


def curve(rows: list[Row], task: str, variants: Iterable[str]) -> Points:
    """(T, ms) of the fastest way at each length."""
    rows, variants = comparable(rows), list(variants)
    found = {length: fastest(rows, task, variants, length) for length in lengths_of(rows, task)}
    return [(float(length), float(row["ms"])) for length, row in found.items() if row is not None]


def speed_up(rows: list[Row], task: str, variant: str, length: int) -> float | None:
    """Tokens a second of a variant over those of the strongest original; None where one of them is absent."""
    rows = comparable(rows)
    ours, theirs = fastest(rows, task, [variant], length), fastest(rows, task, ORIGINALS, length)
    return None if ours is None or theirs is None else ours["tokens_s"] / theirs["tokens_s"]


def crossover_text(rows: list[Row], task: str, variant: str) -> tuple[str, float | None]:
    """From which length on a hybrid is faster than the strongest original, in words and in tokens."""
    ours, theirs = curve(rows, task, [variant]), curve(rows, task, ORIGINALS)
    common = sorted({t for t, _ in ours} & {t for t, _ in theirs})
    if not common:
        return "not compared", None
    at = crossover(ours, theirs)
    if at is None:
        return f"not faster up to {tokens(common[-1])} tokens", None
    if at == 0:
        return f"faster at every length from {tokens(common[0])} tokens", common[0]
    return f"faster from {at:,.0f} tokens on", at


def summary(rows: list[Row]) -> list[str]:
    """One sentence for each task and hybrid: where it is faster, by how much, and where it is slower."""
    lines = []
    for variant in variants_of(rows):
        if variant in ORIGINALS:
            continue
        for task, title in TASKS.items():
            ratios = {n: speed_up(rows, task, variant, n) for n in lengths_of(rows, task)}
            known = {n: x for n, x in ratios.items() if x is not None}
            if not known:
                continue
            first = crossover_text(rows, task, variant)[0] + "; " if task in DRAWN else ""
            factors = ", ".join(f"{x:.2f} at {tokens(n)}" for n, x in known.items())
            strong = fastest(comparable(rows), task, ORIGINALS, max(known))
            assert strong is not None
            name = f"{style(strong['variant']).label} ({strong['how']})"
            lines.append(
                f"{style(variant).label}, {title[0].lower() + title[1:]}: {first}"
                f"speed-up over the strongest original {factors}; "
                f"the strongest at {tokens(max(known))}: {name}"
            )
    return lines


def draw(rows: list[Row], name: str) -> Figure | None:
    """Times of prompts and tokens and the peak of memory against the length; None where nothing was measured."""
    rows = [row for row in rows if row["status"] == "ok"]
    if not any(row["task"] in DRAWN for row in rows):
        return None
    figure, axes = make_figure(3, 3.0, f"{name}: original and hybrids ({about(rows)})")
    slower: dict[str, Points] = {task: [] for task in DRAWN}
    for one, (task, (unit, factor)) in zip(axes, DRAWN.items(), strict=False):
        for variant in variants_of(rows):
            points = [(t, ms * factor) for t, ms in curve(rows, task, [variant])]
            _plot(one, points, style(variant))
            if variant not in ORIGINALS:
                slower[task] += [(t, y) for t, y in points if (speed_up(rows, task, variant, int(t)) or 1) < 1]
        _mark_losses(one, slower[task])
        _mark_crossovers(one, rows, task)
        _finish(one, lengths_of(rows, task), unit)
    for variant in variants_of(rows):
        how = style(variant)
        _plot(axes[2], _peaks(rows, variant, "one call"), how)
        parts = _peaks(rows, variant, "segments", "generate")
        _plot(axes[2], parts, how._replace(label=IN_SEGMENTS, marker="*", dash="none"))
    _finish(axes[2], lengths_of(rows, "prefill"), "peak of memory, GiB")
    add_legend(figure, axes)
    return figure


def _peaks(rows: list[Row], variant: str, *hows: str) -> Points:
    """(T, GiB) of a variant's prompts, read in one of these ways."""
    found = [r for r in rows if (r["task"], r["variant"]) == ("prefill", variant) and r["how"] in hows]
    found = [r for r in found if r["peak_gib"]]
    return sorted((float(row["T"]), row["peak_gib"]) for row in found)


def _plot(axes: Axes, points: Points, how: Style) -> None:
    if points:
        label, colour, marker, dash = how
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            linestyle=dash,
            markersize=4.5,
            label=label,
            zorder=3,
        )


def _mark_losses(axes: Axes, points: Points) -> None:
    if points:
        axes.scatter(
            *zip(*points, strict=True),
            s=95,
            facecolors="none",
            edgecolors=ORANGE,
            linewidths=1.6,
            zorder=4,
            label="slower than the strongest original",
        )


def _mark_crossovers(axes: Axes, rows: list[Row], task: str) -> None:
    texts = []
    for variant in variants_of(rows):
        if variant in ORIGINALS:
            continue
        text, at = crossover_text(rows, task, variant)
        if text != "not compared":
            texts.append(f"{style(variant).label}: {text}")
        if at is not None:
            axes.axvline(at, color=style(variant).colour, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    axes.set_title("\n".join(texts), fontsize=8.5, loc="left", color=LIGHT.ink)


def _finish(axes: Axes, lengths: list[int], unit: str) -> None:
    if lengths:
        by_tokens(axes, lengths if len(lengths) < 9 else lengths[::2])
        by_log(axes)
    axes.set_xlabel("tokens before" if "token" in unit else "tokens of the prompt")
    axes.set_ylabel(unit)


CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
img { max-width: 100%; height: auto } table { border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0 }
div { overflow-x: auto } th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #d9dde2 }
.loss { color: #a33d00; font-weight: 600 } small { color: #5f6871 }
"""


def table(rows: list[Row], task: str) -> str:
    """One task as an HTML table: every variant at its fastest, and hybrids over the strongest original."""
    variants = variants_of(rows)
    hybrids = [name for name in variants if name not in ORIGINALS]
    heads = ["tokens", *(style(name).label for name in variants), *(f"speed-up, {style(n).label}" for n in hybrids)]
    lines = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in heads) + "</tr>"]
    for length in lengths_of(rows, task):
        cells = [tokens(length), *(_cell(rows, task, name, length) for name in variants)]
        cells += [_ratio(speed_up(rows, task, name, length)) for name in hybrids]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<div><table>{''.join(lines)}</table></div>"


def _cell(rows: list[Row], task: str, variant: str, length: int) -> str:
    row = fastest(rows, task, [variant], length)
    if row is None:
        same = [r for r in rows if (r["task"], r["variant"], r["T"]) == (task, variant, length)]
        return html.escape(same[0]["status"][:40]) if same else ""
    memory = "" if row["peak_gib"] is None else f", {row['peak_gib']:.1f} GiB"
    number = f"{row['tokens_s']:,.0f}/s, B {row['B']}" if task not in DRAWN else f"{row['ms']:,.2f} ms"
    return f"{number}<br><small>{html.escape(row['how'])}{memory}</small>"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio >= 1 else f'<span class="loss">{ratio:.2f}, slower</span>'


SHOWN = (
    *(("prefill", n, "read {} tokens") for n in (512, 2048, 131072)),
    *(("decode", n, "a token after {}") for n in (32768, 131072)),
    ("throughput", 32768, "tokens/s after {}, as many sequences as fit"),
    ("throughput-80gb", 32768, "tokens/s after {}, as many as fit into 80 GB"),
    ("throughput-80gb-int8", 32768, "the same, keys and values of full attention in 8 bits"),
)


def markdown(rows: list[Row]) -> str:
    """The rows that the documentation shows: hybrids beside the strongest original, which is named, losses included."""
    hybrids = [name for name in variants_of(rows) if name not in ORIGINALS]
    heads = ["", *(style(name).label for name in hybrids), "strongest original", "speed-up"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for task, length, text in SHOWN:
        theirs = fastest(rows, task, ORIGINALS, length)
        ours = [fastest(rows, task, [name], length) for name in hybrids]
        if theirs is None or not any(ours):
            continue
        ratios = [speed_up(rows, task, name, length) for name in hybrids]
        told = " / ".join("" if x is None else f"{x:.2f}" + (", slower" if x < 1 else "") for x in ratios)
        name = f"{_number(theirs)} ({style(theirs['variant']).label}, {theirs['how']})"
        cells = [text.format(tokens(length)), *("" if row is None else _number(row) for row in ours), name, told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(row: Row) -> str:
    if row["task"] not in DRAWN:
        return f"{row['tokens_s']:,.0f} (B {row['B']:,})"
    ms = row["ms"]
    shown = f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms"
    return shown + (f", {row['peak_gib']:.1f} GiB" if row["task"] == "prefill" and row["peak_gib"] else "")


def page(rows: list[Row], name: str, png: bytes | None) -> str:
    """The whole page as one HTML file."""
    machine = html.escape(about(rows))
    versions = sorted({f"torch {r['torch']}, transformers {r['transformers']}, nha {r['nha']}" for r in rows})
    picture = (
        ""
        if png is None
        else f'<img alt="Times and memory" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    )
    tables = "".join(f"<h2>{title}</h2>{table(rows, task)}" for task, title in TASKS.items() if lengths_of(rows, task))
    points = "".join(f"<li>{html.escape(line)}</li>" for line in summary(rows))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(name)}</title><style>{CSS}</style><h1>{html.escape(name)}: original and hybrids</h1>"
        f"<p>{machine}. {html.escape('; '.join(versions))}. Each cell is the fastest way that was measured; a speed-up "
        f"is over the strongest original, and below 1 a loss.</p><ul>{points}</ul>{picture}{tables}</html>\n"
    )


def write(rows: list[Row], name: str, stem: Path) -> list[Path]:
    """Write STEM.png (with matplotlib), STEM.html and STEM.md; the paths."""
    png, paths = None, []
    try:
        figure = draw(rows, name)
    except ImportError:  # matplotlib is an extra
        figure = None
    if figure is not None:
        png = to_png(figure)
        paths.append(stem.with_name(stem.name + ".png"))
        write_atomically(paths[-1], png)
    for end, text in ((".html", page(rows, name, png)), (".md", markdown(rows))):
        paths.append(stem.with_name(stem.name + end))
        write_atomically(paths[-1], text)
    return paths
