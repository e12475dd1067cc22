"""The report's page: one HTML file with everything inside, readable in light and dark, on a phone and on paper."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from nha.report import plots
from nha.report.results import VARIANTS, Results, to_json
from nha.report.style import CSS
from nha.report.words import (
    added_share,
    costs_text,
    key_numbers,
    measured_text,
    number,
    quality_text,
    saving_text,
    verdict,
    what_happened,
)

ALT = {
    "memories": "The original keeps every token. The hybrid keeps the last tokens exactly and blends older ones "
    "into a fixed number of slots; the next token reads both.",
    "perplexity": "Perplexity by position in the document for the original, the hybrid and its variants.",
    "cache": "Memory of one conversation against context length: the original's grows, the hybrid's is flat.",
    "speed": "Time to write one token against context length for the original and the hybrid.",
}


def write_report(results: Results, directory: Path) -> Path:
    """Write index.html, results.json and one PNG per figure into an existing directory; return the page's path."""
    for name in plots.figure_names(results):
        (directory / f"{name}.png").write_bytes(plots.png(results, name))
    (directory / "results.json").write_text(to_json(results.to_dict()), encoding="utf-8")
    page = directory / "index.html"
    page.write_text(render(results), encoding="utf-8")
    return page


def _picture(results: Results, name: str, caption: str) -> str:
    """One figure in four renderings: the browser takes the one for its width and colour scheme."""

    def source(theme: plots.Theme, size: tuple[float, float]) -> str:
        return "data:image/png;base64," + base64.b64encode(plots.png(results, name, theme, size)).decode()

    narrow = "(max-width: 620px)"
    dark = "(prefers-color-scheme: dark)"
    return f"""<figure>
<picture>
<source media="{narrow} and {dark}" srcset="{source(plots.DARK, plots.NARROW)}">
<source media="{narrow}" srcset="{source(plots.LIGHT, plots.NARROW)}">
<source media="{dark}" srcset="{source(plots.DARK, plots.WIDE)}">
<img src="{source(plots.LIGHT, plots.WIDE)}" alt="{html.escape(ALT[name])}">
</picture>
<figcaption>{caption}</figcaption>
</figure>"""


def _paragraphs(lines: list[str]) -> str:
    return "\n".join(f"<p>{line}</p>" for line in lines)


def _forms_table(results: Results) -> str:
    teacher = results.perplexity("teacher")
    rows = []
    for name, (label, meaning) in VARIANTS.items():
        form = results.form(name)
        if form is None:
            continue
        last = number(form.by_position[-1]) if form.by_position else ""
        ratio = (
            f"{form.perplexity / teacher:.2f}" if form.perplexity < 10 * teacher else number(form.perplexity / teacher)
        )
        kind = ' class="strong"' if name == "hybrid" else ""
        rows.append(
            f'<tr{kind}><th scope="row"><span class="key {name}"></span>{label}<small>{meaning}</small></th>'
            f"<td>{number(form.perplexity)}</td><td>{ratio}×</td><td>{last}</td></tr>"
        )
    edges = results.bucket_edges
    return f"""<div class="scroll"><table>
<thead><tr><th scope="col">How the model runs</th><th scope="col">Perplexity</th>
<th scope="col">against the original</th><th scope="col">tokens {edges[-2]:,} to {edges[-1]:,}</th></tr></thead>
<tbody>{"".join(rows)}</tbody>
</table></div>"""


def _costs_table(results: Results) -> str:
    timed = "speed" in plots.figure_names(results)
    rows = []
    for cost in results.costs:
        cells = f"<td>{cost.teacher_bytes / 1e6:,.1f} MB</td><td>{cost.hybrid_bytes / 1e6:,.1f} MB</td>"
        if timed:
            for ms in (cost.teacher_ms, cost.hybrid_ms):
                cells += "<td>not timed</td>" if ms is None else f"<td>{ms:.0f} ms</td>"
        rows.append(f'<tr><th scope="row">{plots.tokens(cost.context)} tokens</th>{cells}</tr>')
    times = '<th scope="col">time, original</th><th scope="col">time, hybrid</th>' if timed else ""
    return f"""<div class="scroll"><table>
<thead><tr><th scope="col">Context</th><th scope="col">memory, original</th><th scope="col">memory, hybrid</th>
{times}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>"""


def _samples(results: Results) -> str:
    parts = []
    for sample in results.samples:
        prompt = html.escape(sample.prompt)
        parts.append(
            f'<h3>{html.escape(sample.title)}</h3><p class="prompt"><b>Prompt</b> '
            f"({sample.prompt_tokens:,} tokens) {prompt}</p>"
            f'<div class="pair"><div><h4><span class="key teacher"></span>original</h4>'
            f"<p>{html.escape(sample.teacher)}</p></div>"
            f'<div><h4><span class="key hybrid"></span>hybrid</h4><p>{html.escape(sample.hybrid)}</p></div></div>'
        )
    return "\n".join(parts)


def _checks(results: Results) -> str:
    items = []
    for check in results.checks:
        mark = '<span class="yes">passed</span>' if check.passed else '<span class="no">FAILED</span>'
        items.append(f"<li>{mark} <b>{html.escape(check.name)}</b>: {html.escape(check.detail)}</li>")
    return "<ul class='checks'>" + "".join(items) + "</ul>"


def _commands(results: Results) -> str:
    model = html.escape(results.saved_to or "report/hybrid")
    lines = [
        ("Write with the hybrid", f'nha generate {model} "Why is the sky blue?"'),
        ("Measure it on your own text", f"nha eval perplexity {model} --text notes.txt"),
        (
            "Convert another model, keeping four layers on full attention",
            "nha hybridize HuggingFaceTB/SmolLM2-360M-Instruct my-hybrid --full-layers 3,11,18,26",
        ),
        ("See which implementation runs on this machine", "nha doctor"),
    ]
    shell = "".join(f"<dt>{what}</dt><dd><pre><code>{code}</code></pre></dd>" for what, code in lines)
    python = html.escape(
        "import nha\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{results.saved_to or "report/hybrid"}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{results.saved_to or "report/hybrid"}")\n'
        "nha.set_windows(model, 128)   # a longer exact memory, at once; -1 is the original again"
    )
    return f"<dl>{shell}<dt>Use it from Python</dt><dd><pre><code>{python}</code></pre></dd></dl>"


def render(results: Results) -> str:
    """The whole page as a string."""
    model = html.escape(results.model)
    judged = verdict(results)
    tiles = "".join(
        f'<div class="tile"><b>{value}</b><span>{html.escape(what)}</span></div>'
        for value, what in key_numbers(results)
    )
    timed = "speed" in plots.figure_names(results)
    speed = ""
    if timed:
        caption = "Median over several tokens on this machine; what is already read does not change the timing."
        speed = _picture(results, "speed", caption)
    generated = ""
    if results.samples:
        generated = f"""<section><h2>What they write</h2>
<p>Both continue the same prompts, always taking the likeliest next token.</p>
{_samples(results)}</section>"""
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in results.notes)
    seconds = ", ".join(f"{html.escape(step)} {value:.0f} s" for step, value in results.seconds.items())
    versions = ", ".join(f"{name} {v}" for name, v in results.versions.items() if v)
    perplexity_caption = (
        "Perplexity is how many equally likely tokens the model is torn between, on average, before it sees the "
        "next one; lower is better. Each point is one stretch of the documents."
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{model} as a hybrid: report</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header>
<p class="kicker">Native Hybrid Attention</p>
<h1>{model} with a memory that does not grow</h1>
<p class="verdict {judged.level}">{judged.text}</p>
<div class="tiles">{tiles}</div>
</header>

<section>
<h2>What happened</h2>
{_paragraphs(what_happened(results))}
{_picture(results, "memories", "Both kinds of memory are read in one step, by one softmax.")}
</section>

<section>
<h2>What it saves</h2>
{_paragraphs(saving_text(results))}
{_picture(results, "cache", "The memory of one conversation: keys and values of every token, or slots and window.")}
{speed}
<details><summary>All numbers</summary>{_costs_table(results)}</details>
</section>

<section>
<h2>What it keeps</h2>
{_paragraphs(quality_text(results))}
{_picture(results, "perplexity", perplexity_caption)}
{_forms_table(results)}
</section>

{generated}

<section>
<h2>What it costs</h2>
<ul>{"".join(f"<li>{line}</li>" for line in costs_text(results))}</ul>
</section>

<section>
<h2>How to go on</h2>
{_commands(results)}
</section>

<footer>
<h2>How this was measured</h2>
{_checks(results)}
<p>{measured_text(results)} {added_share(results)}</p>
{f"<ul>{notes}</ul>" if notes else ""}
<p>Time taken: {seconds}. Versions: {html.escape(versions)}. The same numbers for programs are in
<code>results.json</code>, the plots beside it as PNG.</p>
</footer>
</main>
</body>
</html>
"""
