"""Draw the tables of benchmarks/results; needs matplotlib and no GPU.

length-NAME.png   time against length at a constant number of tokens, with the length from which the hybrid is faster
speedup.png       speed-up of each window over the fastest full attention, slowdowns included
roofline.png      the percentage of the machine's bandwidth or arithmetic that a call reaches
decode.png        time of one token against the number of sequences
model-NAME.png    a whole model of models/NAME.csv: reading a prompt, decoding a token, memory
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nha.bench import model_page
from nha.bench.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    Points,
    Record,
    about,
    add_legend,
    by_log,
    by_tokens,
    crossover,
    make_figure,
)
from nha.bench.roofline import roofline_fraction
from nha.bench.timing import read_table
from nha.io import write_atomically
from nha.report.drawing import LIGHT, to_png
from nha.report.sentences import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PASSES = {"fwd": "forward", "fwd+bwd": "forward and backward"}
SHAPES = {
    (32, 8, 128): ("llama", "Llama-3-8B"),
    (28, 4, 128): ("qwen", "Qwen2.5-7B"),
    (9, 3, 64): ("smollm", "SmolLM2"),
}
FULL = ("sdpa-cudnn", "sdpa-flash")
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


def of_one_gpu(records: list[Record]) -> list[Record]:
    """The records of the GPU that most of them are from: times of two kinds do not belong into one curve."""
    gpus = [r.get("gpu") for r in records]
    return [r for r in records if r.get("gpu") == max(gpus, key=gpus.count)]


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


def length(records: list[Record], name: str) -> Figure | None:
    """Time against length; None without at least two lengths of the kernels."""
    records = constant_tokens(records)
    if len(curve(records, "triton", 64)) < 2:
        return None
    figure, axes = make_figure(2, 3.6, f"{name}: attention of one layer, constant number of tokens ({about(records)})")
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
        by_tokens(one, [r["T"] for r in rows])
        by_log(one)
        total = max((r["B"] * r["T"] for r in rows if r["B"] > 1), default=0)
        one.set_xlabel(f"tokens of a sequence ({total:,} in all; one sequence beyond)" if total else "tokens")
        one.set_ylabel(f"{PASSES[kind]}, ms")
        _mark_crossover(one, curve(rows, "triton", 64), best(curve(rows, impl, -1) for impl in FULL))
    add_legend(figure, axes)
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
    figure, axes = make_figure(2, 0.8 + 0.42 * len(windows), title)
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
    figure, axes = make_figure(
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
    add_legend(figure, axes)
    return figure


def _named(impl: str, window: int) -> str:
    return f"{'nha' if impl == 'triton' else impl}, {'full' if window < 0 else f'W {window}'}"


def decode(records: list[Record]) -> Figure | None:
    """Time of one token against the number of sequences, called and as CUDA graphs."""
    rows = [r for r in select(records, kind="decode") if r["W"] in (64, -1)]
    if not select(rows, W=64):
        return None
    figure, axes = make_figure(1, 4.2, f"One token of one layer ({about(rows)})")
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
    by_log(one)
    one.set_xlabel("sequences")
    one.set_ylabel("ms")
    add_legend(figure, axes, 1)
    return figure


def pictures(results: Path) -> dict[str, Callable[[], Any]]:
    """Functions that draw the tables in a folder, by the name of the picture."""
    found: dict[str, Callable[[], Any]] = {}
    table = results / "ops.csv"
    if table.exists():
        records = of_one_gpu(read_table(table))
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
    for table in sorted((results / "models").glob("*.csv")):
        if ".part-" not in table.name:
            rows = read_table(table)
            found[f"model-{table.stem}.png"] = lambda rows=rows, name=table.stem: model_page.draw(rows, name)
    return found


def draw(results: Path, out: Path, log: Callable[[str], None] = print) -> None:
    """Draw every table in `results` into `out`.

    Raises ValueError if there is no table.
    """
    wanted = pictures(results)
    if not wanted:
        raise ValueError(f"expected ops.csv or models/*.csv in {results}, found neither")
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in wanted.items():
        figure = picture()
        if figure is None:
            log(f"{name}: not enough rows")
            continue
        write_atomically(out / name, to_png(figure))
        log(str(out / name))
