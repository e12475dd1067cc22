"""The report's sentences. Each is derived from the numbers, the unwelcome ones included."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from nha.report.plots import tokens
from nha.report.results import Results


@dataclass
class Verdict:
    """One judgement: `level` is good, fair, poor or failed; `text` is HTML."""

    level: str
    text: str


def number(value: float) -> str:
    """A perplexity with as many digits as mean something.

    >>> number(26.234), number(205.4), number(18_930.2), number(float("inf"))
    ('26.2', '205', '18,930', 'over a million')
    """
    if not math.isfinite(value) or value >= 1e6:
        return "over a million"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def megabytes(count: float) -> str:
    """Bytes as megabytes or gigabytes.

    >>> megabytes(4_432_560), megabytes(755e6), megabytes(1.51e9), megabytes(3200)
    ('4.4 MB', '755 MB', '1.5 GB', '3.2 kB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.0f} {unit}" if count / size >= 100 else f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def percent_more(ratio: float) -> str:
    """A ratio of perplexities in words.

    >>> percent_more(1.24), percent_more(1.0), percent_more(0.97), percent_more(9.7)
    ('24% higher', 'the same', '3% lower', '9.7 times as high')
    """
    if ratio >= 2:
        return f"{ratio:.1f} times as high"
    change = round(100 * (ratio - 1))
    if change == 0:
        return "the same"
    return f"{change}% higher" if change > 0 else f"{-change}% lower"


def times(ratio: float) -> str:
    """How many times, with two digits or so.

    >>> times(170.3), times(2.54), times(1.04)
    ('170', '2.5', '1.0')
    """
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def trained(results: Results) -> str:
    return "after a short training of its gates" if results.tuning else "without any training"


def verdict(results: Results) -> Verdict:
    """The one paragraph to read: memory saved, quality lost, and whether the slots earn their keep."""
    last = results.costs[-1]
    failed = [check.name for check in results.checks if not check.passed]
    if failed:
        names = html.escape(", ".join(failed))
        return Verdict("failed", f"<b>A check failed: {names}.</b> Do not rely on the numbers below.")
    saved = last.teacher_bytes / last.hybrid_bytes
    ratio = results.ratio
    level = "good" if ratio <= 1.1 else "fair" if ratio <= 1.35 else "poor"
    opening = {
        "good": "It worked, and little was lost.",
        "fair": "It worked, at a price.",
        "poor": "It runs, but much was lost.",
    }[level]
    text = (
        f"<b>{opening}</b> {capital(trained(results))}, the hybrid holds a conversation of {last.context:,} tokens in "
        f"{megabytes(last.hybrid_bytes)}, where the original needs {megabytes(last.teacher_bytes)}: "
        f"{times(saved)} times "
        f"less, and the gap grows with every token. Its perplexity on long documents is {percent_more(ratio)} "
        f"({number(results.perplexity('hybrid'))} against {number(results.perplexity('teacher'))})."
    )
    return Verdict(level, text)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def key_numbers(results: Results) -> list[tuple[str, str]]:
    """(value, what it is) of the three or four numbers to remember."""
    last = results.costs[-1]
    found = [
        (
            f"{megabytes(last.teacher_bytes)} → {megabytes(last.hybrid_bytes)}",
            f"memory of a conversation of {tokens(last.context)} tokens",
        ),
        (
            f"{number(results.perplexity('teacher'))} → {number(results.perplexity('hybrid'))}",
            f"perplexity on long documents, {results.ratio:.2f} times the original's",
        ),
    ]
    timed = [c for c in results.costs if c.teacher_ms is not None and c.hybrid_ms is not None]
    if timed:
        cost = timed[-1]
        found.append(
            (
                f"{cost.teacher_ms:.0f} → {cost.hybrid_ms:.0f} ms",
                f"to write one token after {tokens(cost.context)} tokens on this machine",
            )
        )
    return found


def what_happened(results: Results) -> list[str]:
    """The idea, for someone who has not read the paper."""
    some = (
        f"All {results.layers}" if results.converted == results.layers else f"{results.converted} of {results.layers}"
    )
    window = f"{results.window}" if len({w for w in results.window_sizes if w >= 0}) == 1 else "a few dozen"
    kept = ""
    if results.converted < results.layers:
        kept = f" The other {results.layers - results.converted} layers still keep every token."
    tuned = ""
    if results.tuning:
        t = results.tuning
        tuned = (
            f" Then {html.escape(t.what)} were trained for {t.steps} steps on {t.tokens:,} tokens "
            f"({t.seconds:.0f} s), which brought the perplexity from {number(t.perplexity_before)} to "
            f"{number(t.perplexity_after)}."
        )
    return [
        "A language model looks back at everything it has read before it writes the next token. To do so, the "
        "original keeps a record of every token in every layer. A text twice as long needs twice the memory, and "
        "every new token takes longer than the one before.",
        f"{some} layers of this model now keep two small memories instead. The <b>window</b> holds the last {window} "
        f"tokens exactly. The <b>slots</b> are {results.num_slots} running summaries: a token that leaves the window "
        "is blended into the slots it resembles. Both are read together, so the model itself decides, token by token, "
        f"how much to trust recent words and how much its summaries.{kept}",
        "The weights are the original's. A short look at some text was enough to decide which slot listens to what."
        + tuned,
    ]


def saving_text(results: Results) -> list[str]:
    """Memory and time, in sentences."""
    first, last = results.costs[0], results.costs[-1]
    lines = [
        f"After {last.context:,} tokens the original has stored {megabytes(last.teacher_bytes)} of keys and values. "
        f"The hybrid holds {megabytes(last.hybrid_bytes)}, "
        + (
            f"exactly as much as after {first.context:,} tokens."
            if first.hybrid_bytes == last.hybrid_bytes
            else f"against {megabytes(first.hybrid_bytes)} after {first.context:,} tokens."
        )
    ]
    timed = [c for c in results.costs if c.teacher_ms is not None and c.hybrid_ms is not None]
    if len(timed) >= 2:
        start, end = timed[0], timed[-1]
        assert start.teacher_ms and start.hybrid_ms and end.teacher_ms and end.hybrid_ms
        crossover = results.crossover()
        if crossover is None:
            where = (
                f"The hybrid's time hardly changes, but on this machine it is slower up to {end.context:,} tokens "
                f"({end.hybrid_ms:.0f} ms against {end.teacher_ms:.0f} ms)."
            )
        elif crossover == start.context:
            where = (
                f"The hybrid's time hardly changes and is the shorter one at every length measured: "
                f"{end.hybrid_ms:.0f} ms against {end.teacher_ms:.0f} ms at the end."
            )
        else:
            where = (
                f"The hybrid's time hardly changes. It is the faster one from about {crossover:,} tokens on; below "
                f"that it is slower ({start.hybrid_ms:.0f} ms against {start.teacher_ms:.0f} ms after "
                f"{start.context:,} tokens)."
            )
        lines.append(
            f"Writing one more token takes the original {start.teacher_ms:.0f} ms after {start.context:,} tokens and "
            f"{end.teacher_ms:.0f} ms after {end.context:,}. {where}"
        )
    return lines


def quality_text(results: Results) -> list[str]:
    """Perplexity, and what the parts contribute, in sentences."""
    teacher, hybrid = results.perplexity("teacher"), results.perplexity("hybrid")
    lines = [
        f"On {results.documents} stretches of {results.document_tokens:,} tokens from {html.escape(results.document)}, "
        f"the hybrid's perplexity is {number(hybrid)}, the original's {number(teacher)}. Up to {results.window} tokens "
        "the two are the same model; after that, whatever the summaries fail to keep is gone."
    ]
    sink, off = results.form("sink_only"), results.form("slots_off")
    if sink is not None:
        gain = math.log(sink.perplexity) - math.log(hybrid)
        lost = math.log(sink.perplexity) - math.log(teacher)
        if gain <= 0:
            judged = (
                "Here the slots do not help: a window without them does as well. "
                "Training is what makes them useful; see the guide on hybridizing."
            )
        elif lost > 0:
            judged = (
                f"That is the honest baseline: the slots win back {100 * gain / lost:.0f}% of what it loses. "
                "Most of the rest needs training."
            )
        else:
            judged = "That baseline loses nothing here, so this text says little about the slots."
        lines.append(f"A window without slots reaches {number(sink.perplexity)}. {judged}")
    longer = results.form("longer_window")
    if longer is not None:
        better = (
            "The slots are the better use of the memory."
            if hybrid < longer.perplexity
            else "On plain perplexity, before any real training, that is the better use of the memory; what slots add "
            "is that they reach further back than any window."
        )
        lines.append(
            f"A window of {results.window + results.num_slots} tokens and no slots holds as many keys and values: "
            f"it gives {number(longer.perplexity)}. {better}"
        )
    if off is not None:
        lines.append(
            f"With the slots switched off in the hybrid itself the perplexity is {number(off.perplexity)}: "
            + ("the model does read them." if off.perplexity > hybrid * 1.002 else "it hardly reads them.")
        )
    return lines


def costs_text(results: Results) -> list[str]:
    """What one gives up, plainly."""
    lines = []
    if results.ratio > 1.005:
        lines.append(
            f"<b>Quality.</b> Perplexity is {percent_more(results.ratio)} on long text. Details from further back than "
            f"{results.window} tokens are mostly lost until the model is trained to use its slots; "
            f"looking up a name or a "
            "number from an earlier page will often fail."
        )
    crossover = results.crossover()
    timed = [c for c in results.costs if c.teacher_ms is not None and c.hybrid_ms is not None]
    if timed and crossover is None:
        lines.append("<b>Speed.</b> On this machine the hybrid was slower at every length measured.")
    elif timed and crossover != timed[0].context:
        first = timed[0]
        assert first.teacher_ms and first.hybrid_ms
        lines.append(
            f"<b>Speed on short texts.</b> Below about {crossover:,} tokens the hybrid is slower: "
            f"{first.hybrid_ms / first.teacher_ms:.1f} times the time per token after {first.context:,} tokens."
        )
    lines.append(
        f"<b>Size.</b> The gates add {results.added_parameters / 1e6:.1f} million parameters "
        f"({100 * results.added_parameters / results.parameters:.1f}%)."
    )
    lines.append(
        "<b>No way back in the text.</b> What the slots have blended cannot be taken apart, so a "
        "conversation cannot be "
        "rewound further than its last part."
    )
    lines.append(
        "<b>Keeping a few layers whole helps most.</b> With <code>--full-layers</code> some layers keep every token: "
        "recall comes back, and memory grows again, but only in those layers."
    )
    return lines


def measured_text(results: Results) -> str:
    """Settings of the run."""
    windows = sorted({w for w in results.window_sizes if w >= 0})
    shown = ", ".join(map(str, windows)) or "none"
    return html.escape(
        f"{results.converted} of {results.layers} layers converted; window {shown}, {results.num_slots} slots and "
        f"{results.num_sinks} sink per key-value head; seed {results.seed}; {results.machine}. Text: "
        f"{results.document}, {results.documents} × {results.document_tokens:,} tokens, none of it "
        f"used for calibration. "
        f"The standard error of the mean loss is {results.forms[0].error:.3f} nats per token; the forms see the same "
        "tokens, so their differences are known better than that."
    )


def added_share(results: Results) -> str:
    """How the speed and memory numbers came about."""
    return html.escape(
        "Memory is the exact number of bytes the caches hold. Times were taken with caches filled to the length shown; "
        "their contents do not matter for the time."
    )
