"""Draw the tables of benchmarks/results; needs matplotlib and no GPU.

length-NAME.png   time against length at a constant number of tokens, with the length from which the hybrid is faster
speedup.png       speed-up of each window over the fastest full attention, slowdowns included
roofline.png      the percentage of the machine's bandwidth or arithmetic that a call reaches
decode.png        time of one token against the number of sequences
model.png         a whole model: reading a prompt and decoding a token
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nha.bench.roofline import roofline_fraction
from nha.bench.timing import read_table
from nha.io import atomic_write
from nha.report.plots import LIGHT, spread, tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
Points = list[tuple[float, float]]
DPI = 160
WIDTH = 5.0  # inches
PASSES = {"fwd": "forward", "fwd+bwd": "forward and backward"}
SHAPES = {
    (32, 8, 128): ("llama", "Llama-3-8B"),
    (28, 4, 128): ("qwen", "Qwen2.5-7B"),
    (9, 3, 64): ("smollm", "SmolLM2"),
}
FULL = ("sdpa-cudnn", "sdpa-flash")
BLUE, ORANGE, GREY, GREEN, PINK, SKY = "#0072b2", "#c75000", "#3d444c", "#007a5a", "#a8558a", "#56b4e9"
# (implementation, W) -> (label, colour, dash, marker); W None for any.
STYLES: dict[tuple[str, int | None], tuple[str, str, Any, str]] = {
    ("triton", 64): ("nha, W 64", BLUE, "-", "o"),
    ("triton", 0): ("nha, W 0", SKY, "-", "v"),
    ("triton", 512): ("nha, W 512", BLUE, (0, (4, 1.5)), "^"),
    ("sdpa-cudnn", -1): ("full, cuDNN", GREY, "-", "s"),
    ("sdpa-flash", -1): ("full, FlashAttention-2", GREY, (0, (4, 1.5)), "D"),
    ("flex-window", 64): ("window 64, FlexAttention", GREEN, (0, (1.2, 1.6)), "P"),
    ("fa2-window", 64): ("window 64, FlashAttention-2", GREEN, (0, (4, 1.5)), "X"),
    ("gsa", 0): ("GSA, flash-linear-attention", ORANGE, "-", "p"),
    ("gsa+window", 64): ("GSA + window 64, merged", ORANGE, (0, (4, 1.5)), "*"),
    ("w0+window", 64): ("nha W 0 + window 64, merged", PINK, (0, (4, 1.5)), "*"),
}


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records with these values; `kind` stands for the column "pass"."""
    wanted = {("pass" if n == "kind" else n): x for n, x in wanted.items()}
    return [r for r in records if all(r.get(n) == x for n, x in wanted.items())]


def of_shape(records: Iterable[Record], shape: tuple[int, int, int], dtype: str = "bf16") -> list[Record]:
    return select(records, HQ=shape[0], H=shape[1], D=shape[2], dtype=dtype)


def constant_tokens(records: list[Record]) -> list[Record]:
    """The records with the most common number of tokens, and single sequences that are longer."""
    counts = [r["B"] * r["T"] for r in records if r["B"] > 1]
    if not counts:
        return records
    common = max(set(counts), key=counts.count)
    return [r for r in records if r["B"] * r["T"] == common or (r["B"] == 1 and r["T"] > common)]


def curve(records: Iterable[Record], impl: str, window: int | None) -> Points:
    """(T, ms) of an implementation by length."""
    rows = [r for r in records if r["impl"] == impl and (window is None or r["W"] == window)]
    return sorted({r["T"]: (float(r["T"]), float(r["ms"])) for r in rows}.values())


def best(curves: Iterable[Points]) -> Points:
    """The fastest of several curves at each length."""
    found: dict[float, float] = {}
    for points in curves:
        for t, ms in points:
            found[t] = min(ms, found.get(t, math.inf))
    return sorted(found.items())


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


def _figure(panels: int, height: float, title: str) -> tuple[Figure, list[Axes]]:
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


def _by_tokens(axes: Axes, lengths: Iterable[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))


def _by_log(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: list[Axes], columns: int = 2) -> None:
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
    """The machine and the date of records."""
    return ", ".join(sorted({f"{r['gpu']}, {r['date']}" for r in records}))


def length(records: list[Record], name: str) -> Figure | None:
    """Time against length; None without at least two lengths of the kernels."""
    records = constant_tokens(records)
    if len(curve(records, "triton", 64)) < 2:
        return None
    figure, axes = _figure(2, 3.6, f"{name}: attention of one layer, constant number of tokens ({about(records)})")
    for one, kind in zip(axes, PASSES, strict=True):
        rows = select(records, kind=kind)
        for (impl, window), (label, colour, dash, marker) in STYLES.items():
            points = curve(rows, impl, window)
            if points:
                one.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    linestyle=dash,
                    marker=marker,
                    markersize=4.5,
                    label=label,
                    linewidth=2.2 if impl == "triton" else 1.5,
                    zorder=3 if impl == "triton" else 2,
                )
        _by_tokens(one, [r["T"] for r in rows])
        _by_log(one)
        total = max((r["B"] * r["T"] for r in rows if r["B"] > 1), default=0)
        one.set_xlabel(f"tokens of a sequence ({total:,} in all; one sequence beyond)" if total else "tokens")
        one.set_ylabel(f"{PASSES[kind]}, ms")
        _mark_crossover(one, curve(rows, "triton", 64), best(curve(rows, impl, -1) for impl in FULL))
    _legend(figure, axes)
    return figure


def _mark_crossover(axes: Axes, ours: Points, theirs: Points) -> None:
    at = crossover(ours, theirs)
    if not {t for t, _ in ours} & {t for t, _ in theirs}:
        return
    if at is None:
        text, x = "W 64 is slower than full attention up to the longest", max(t for t, _ in ours)
    elif at == 0.0:
        text, x = "W 64 is faster at every length", min(t for t, _ in ours)
    else:
        text, x = f"W 64 is faster from {at / 1024:.1f}K tokens on", at
    axes.axvline(x, color=LIGHT.muted, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    right = at is None
    axes.annotate(
        text,
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if right else 5, -4),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        fontsize=8.5,
        color=LIGHT.ink,
    )


def speedup(records: list[Record]) -> Figure | None:
    """Windows by lengths: the time of the fastest full attention over the kernels' time."""
    records = constant_tokens(records)
    windows = sorted({r["W"] for r in select(records, impl="triton")}, key=lambda w: (w < 0, w))
    lengths = sorted({r["T"] for r in records if r["impl"] in FULL} & {r["T"] for r in select(records, impl="triton")})
    if not windows or not lengths:
        return None
    title = f"Speed-up over the fastest full attention; below 1 is slower ({about(records)})"
    figure, axes = _figure(2, 0.8 + 0.42 * len(windows), title)
    for one, kind in zip(axes, PASSES, strict=True):
        rows = select(records, kind=kind)
        full = dict(best(curve(rows, impl, -1) for impl in FULL))
        one.grid(visible=False)
        for y, window in enumerate(windows):
            ours = dict(curve(rows, "triton", window))
            for x, t in enumerate(lengths):
                if t in ours and t in full:
                    _cell(one, x, y, full[t] / ours[t])
        one.set_xlim(-0.5, len(lengths) - 0.5)
        one.set_ylim(len(windows) - 0.5, -0.5)
        one.set_xticks(range(len(lengths)), [tokens(t) for t in lengths])
        one.set_yticks(range(len(windows)), ["full (-1)" if w < 0 else f"W {w}" for w in windows])
        one.tick_params(length=0)
        one.set_xlabel(f"tokens of a sequence; {PASSES[kind]}")
    return figure


def _cell(axes: Axes, x: float, y: float, factor: float) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    strength = min(abs(math.log2(factor)) / 4, 1) ** 0.7
    base = to_rgb(BLUE if factor >= 1 else ORANGE)
    colour = tuple(1 - (1 - c) * strength for c in base)
    axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, edgecolor=LIGHT.line, linewidth=0.6))
    text = f"{factor:.2f}" if factor < 10 else f"{factor:.0f}"
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color="white" if strength > 0.6 else LIGHT.ink)


def roofline(records: list[Record], limits: dict[str, float]) -> Figure | None:
    """Bars: the percentage of the roofline that implementations reach at 2,048 tokens, by pass."""
    records = [r for r in constant_tokens(records) if r["pass"] in PASSES]
    ours = select(records, impl="triton")
    if not ours:
        return None
    t = 2048 if any(r["T"] == 2048 for r in ours) else min(r["T"] for r in ours)
    rows = select(records, T=t)
    order = sorted(rows, key=lambda r: (r["impl"] != "triton", r["impl"] not in FULL, r["impl"], r["W"] % 2**31))
    names = list(dict.fromkeys((r["impl"], r["W"]) for r in order))
    figure, axes = _figure(
        1, 0.8 + 0.4 * len(names), f"Percentage of the roofline at {tokens(t)} tokens ({about(rows)})"
    )
    one = axes[0]
    for shift, (kind, colour) in zip((-0.2, 0.2), (("fwd", BLUE), ("fwd+bwd", SKY)), strict=True):
        bars = [
            (y, 100 * roofline_fraction(r, limits))
            for y, (impl, w) in enumerate(names)
            for r in select(rows, impl=impl, W=w, kind=kind)[:1]
        ]
        if bars:
            drawn = one.barh([y + shift for y, _ in bars], [x for _, x in bars], 0.36, color=colour, label=PASSES[kind])
            one.bar_label(drawn, fmt="%.0f %%", padding=3, fontsize=8, color=LIGHT.muted)
    one.set_yticks(range(len(names)), [_named(impl, w) for impl, w in names])
    one.invert_yaxis()
    one.grid(axis="y", visible=False)
    one.grid(axis="x", color=LIGHT.line, linewidth=0.7)
    one.set_xlim(0, 105)
    one.set_xlabel(
        f"% of what {limits['bytes_per_s'] / 1e12:.1f} TB/s and {limits['operations_per_s'] / 1e12:.0f} TFLOP/s allow"
    )
    _legend(figure, axes)
    return figure


def _named(impl: str, window: int) -> str:
    return f"{'nha' if impl == 'triton' else impl}, {'full' if window < 0 else f'W {window}'}"


def decode(records: list[Record]) -> Figure | None:
    """Time of one token against the number of sequences, called and as CUDA graphs."""
    rows = [r for r in select(records, kind="decode") if r["W"] in (64, -1)]
    if not select(rows, W=64):
        return None
    figure, axes = _figure(1, 4.2, f"One token of one layer ({about(rows)})")
    one, batches = axes[0], sorted({r["B"] for r in rows})
    series: dict[tuple, list[Record]] = {}
    for r in rows:
        full = r["W"] < 0
        series.setdefault((r["impl"], r["W"], r["T"] if full else 0), []).append(r)
    colours = {"triton": BLUE, "sdpa-flash": GREY, "sdpa-cudnn": GREY}
    for (impl, window, seen), of in sorted(series.items(), key=str):
        graph = impl.endswith("-graph")
        colour, dash = colours.get(impl.removesuffix("-graph"), ORANGE), "-" if graph else (0, (4, 1.5))
        name = impl.removesuffix("-graph")
        label = f"{name}, full, {tokens(seen)} tokens" if window < 0 else f"{_named(name, window)}, any length"
        points = sorted({r["B"]: (r["B"], r["ms"]) for r in of}.values())
        marker = "o" if window >= 0 else ("s" if seen > 4096 else "D")
        one.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=4.5,
            label=label + (", CUDA graph" if graph else ", called"),
        )
    one.set_xscale("log", base=2)
    one.set_xticks(batches, [str(b) for b in batches])
    _by_log(one)
    one.set_xlabel("sequences")
    one.set_ylabel("ms")
    _legend(figure, axes, 1)
    return figure


def model(records: list[Record]) -> Figure | None:
    """Prompt and token times of whole models against the context, one line per way to run."""
    figure, axes = _figure(2, 3.6, f"Llama-3-8B shape, random weights, bf16 ({about(records)})")
    drawn = False
    for one, task, unit in ((axes[0], "prefill", "reading a prompt, s"), (axes[1], "decode", "decoding a token, ms")):
        series: dict[tuple[str, str], Points] = {}
        for r in select(records, task=task, B=1):
            series.setdefault((r["model"], r["how"]), []).append((r["T"], r["ms"] / (1e3 if task == "prefill" else 1)))
        ends = []
        for (name, how), points in sorted(series.items()):
            colour = {"hybrid": BLUE, "full": GREY}.get(name, ORANGE)
            dash = "-" if how in ("one call", "graph") else (0, (4, 1.5))
            points.sort()
            one.plot(*zip(*points, strict=True), color=colour, linestyle=dash, marker="o", markersize=4)
            ends.append((points[-1], f"{name}, {how}: {points[-1][1]:.3g}", colour))
            drawn = True
        if ends:
            _by_tokens(one, [r["T"] for r in select(records, task=task, B=1)])
            _by_log(one)
            _end_labels(one, ends)
        one.set_xlabel("tokens")
        one.set_ylabel(unit)
    return figure if drawn else None


def _end_labels(axes: Axes, ends: list[tuple[tuple[float, float], str, str]]) -> None:
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


def pictures(results: Path) -> dict[str, Callable[[], Any]]:
    """Functions that draw the tables in a folder, by the name of the picture."""
    found: dict[str, Callable[[], Any]] = {}
    table = results / "ops.csv"
    if table.exists():
        records = read_table(table)
        for shape, (short, name) in SHAPES.items():
            own = of_shape(records, shape)
            found[f"length-{short}.png"] = lambda own=own, name=name: length(
                [r for r in own if r["pass"] in PASSES], name
            )
        llama = of_shape(records, (32, 8, 128))
        found["speedup.png"] = lambda: speedup([r for r in llama if r["pass"] in PASSES])
        found["decode.png"] = lambda: decode(llama)
        if (results / "ceilings.json").exists():
            limits = json.loads((results / "ceilings.json").read_text())
            found["roofline.png"] = lambda: roofline(llama, limits)
    tables = [results / name for name in ("model.csv", "decode.csv") if (results / name).exists()]
    if tables:
        rows = [row for path in tables for row in read_table(path)]
        found["model.png"] = lambda: model(rows)
    return found


def draw(results: Path, out: Path, log: Callable[[str], None] = print) -> None:
    """Draw every table in `results` into `out`.

    Raises ValueError if there is no table.
    """
    wanted = pictures(results)
    if not wanted:
        raise ValueError(f"expected ops.csv, model.csv or decode.csv in {results}, found none of them")
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in wanted.items():
        figure = picture()
        if figure is None:
            log(f"{name}: not enough rows")
            continue
        with atomic_write(out / name) as work:
            figure.savefig(work, format="png")
        log(str(out / name))
