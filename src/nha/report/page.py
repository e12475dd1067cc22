"""The report's page: one HTML file with everything inside, readable in light and dark, on a phone and on paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nha.report import drawing, plots, sentences
from nha.report.results import VARIANTS, Check, Results, to_json
from nha.report.sentences import megabytes, number, times, tokens

ALT = {
    "memories": "The original keeps every token. The hybrid keeps the last tokens exactly and writes older ones to a "
    "fixed number of slots; the next token reads both.",
    "perplexity": "Perplexity by position in the document for the original, the hybrid and its variants.",
    "cache": "Memory of one conversation against context length, for the original and the hybrid.",
    "speed": "Time to write one token against context length, for the original and the hybrid.",
    "recall": "Share of the digits of a number that the hybrid writes back, against the distance to it.",
}
CAPTIONS = {
    "memories": "Both kinds of memory are read in one step, by one softmax.",
    "perplexity": "Perplexity is how many equally likely tokens the model is torn between, on average, before it sees "
    "the next one; lower is better. Each point is one stretch of the documents.",
    "cache": "The memory of one conversation: keys and values of every token, or slots and window.",
    "speed": "Median over several tokens on this machine.",
    "recall": "Greedy answers from a memory of one size.",
}
RENDERINGS = {
    "wide_light": (drawing.LIGHT, plots.WIDE),
    "wide_dark": (drawing.DARK, plots.WIDE),
    "narrow_light": (drawing.LIGHT, plots.NARROW),
    "narrow_dark": (drawing.DARK, plots.NARROW),
}


def write_report(results: Results, directory: Path) -> Path:
    """Write results.json, one PNG per figure and index.html into an existing directory; return the page's path.

    The numbers are written first. A figure that cannot be drawn is left out: a failed check is added to `results`,
    and with it to page and results.json.
    """
    write_results(results, directory)
    figures: dict[str, dict[str, bytes]] = {}
    for name in plots.figure_names(results):
        try:
            figures[name] = {which: plots.png(results, name, *how) for which, how in RENDERINGS.items()}
            (directory / f"{name}.png").write_bytes(figures[name]["wide_light"])
        except Exception as error:
            results.checks.append(Check(f"drawing {name}.png", False, f"{type(error).__name__}: {error}"))
            write_results(results, directory)
    page = directory / "index.html"
    page.write_text(render(results, figures), encoding="utf-8", errors="replace")
    return page


def write_results(results: Results, directory: Path) -> None:
    """Write results.json."""
    (directory / "results.json").write_text(to_json(results.to_dict()), encoding="utf-8")


def render(results: Results, figures: Mapping[str, Mapping[str, bytes]]) -> str:
    """The whole page. `figures` maps names to the PNG bytes of every one of `RENDERINGS`."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters |= {"tokens": tokens, "megabytes": megabytes, "unbroken": unbroken, "unwrapped": unwrapped}
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(
        results=results,
        css=Markup(css),
        verdict=sentences.verdict(results),
        key_numbers=sentences.key_numbers(results),
        conversion=sentences.conversion_text(results),
        memory=sentences.memory_text(results),
        speed=sentences.speed_text(results),
        quality=sentences.quality_text(results),
        recall=sentences.recall_text(results),
        limits=sentences.limits_text(results),
        next_steps=sentences.next_steps(results),
        settings=sentences.settings_text(results),
        costs_note=sentences.COSTS_NOTE,
        variants=variant_rows(results),
        figures={name: _figure(name, images) for name, images in figures.items()},
        python=python_example(results),
    )


def unwrapped(text: str) -> str:
    """Text of a document without its line ends and indentation; paragraphs stay.

    >>> unwrapped("A line that\\n  goes on.\\n\\n  Note:")
    'A line that goes on.\\n\\nNote:'
    """
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()))


def unbroken(text: str) -> str:
    """Text whose numbers and units stay on one line.

    >>> unbroken("15 % of 3 MB").count("\N{NO-BREAK SPACE}")
    2
    """
    return re.sub(r"(?<=\d) (?=(%|bytes|[kMG]B|ms|s)(?!\w))", "\N{NO-BREAK SPACE}", text)


def _figure(name: str, images: Mapping[str, bytes]) -> dict[str, str]:
    sources = {which: "data:image/png;base64," + base64.b64encode(png).decode() for which, png in images.items()}
    return sources | {"alt": ALT[name], "caption": CAPTIONS[name]}


def variant_rows(results: Results) -> list[dict[str, Any]]:
    """The rows of the table of variants, as text."""
    teacher, rows = results.perplexity("teacher"), []
    for name in results.table:
        variant = results.variant(name)
        if variant is None:
            continue
        label, meaning = VARIANTS[name]
        ratio = variant.perplexity / teacher
        rows.append(
            {
                "name": name,
                "label": label,
                "meaning": meaning,
                "perplexity": number(variant.perplexity),
                "ratio": f"{ratio:.2f}×" if ratio < 10 else f"{times(ratio)}×" if ratio < 1e6 else "over a million×",
                "last": number(variant.by_position[-1]) if variant.by_position else "",
                "memory": "" if variant.bytes is None else megabytes(variant.bytes),
            }
        )
    return rows


def python_example(results: Results) -> str:
    """Loading the hybrid and changing its windows, as Python code."""
    folder = results.saved_to or "my-hybrid"
    return (
        "import nha\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n"
        "# Windows are a run-time setting; full layers (-1) stay as they are.\n"
        "nha.set_windows(model, 128)"
    )
