"""The report's sentences as functions of the numbers, the unwelcome ones included. All are plain text."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nha.report.results import Distilled, Results

SAME = 0.005  # relative change of a perplexity below which the report calls two the same
STEADY = 0.1  # relative change of a time below which the report calls it steady


@dataclass(frozen=True)
class Verdict:
    """The judgement at the top: `level` is good, fair, poor or failed."""

    level: str
    opening: str
    text: str


def number(value: float) -> str:
    """A perplexity with as many digits as mean something.

    >>> number(26.234), number(205.4), number(18_930.2), number(float("inf"))
    ('26.2', '205', '18,930', 'over a million')
    """
    if math.isnan(value):
        return "not a number"
    if value >= 1e6:
        return "over a million"
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def megabytes(count: float) -> str:
    """Bytes as megabytes or gigabytes.

    >>> megabytes(4_432_560), megabytes(755e6), megabytes(1.51e9), megabytes(3200)
    ('4.4 MB', '755 MB', '1.5 GB', '3.2 kB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.0f} {unit}" if count / size >= 99.95 else f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def tokens(count: float) -> str:
    """A number of tokens as people write it.

    >>> tokens(512), tokens(2048), tokens(131072)
    ('512', '2K', '128K')
    """
    return f"{count / 1024:g}K" if count >= 1024 and count % 1024 == 0 else f"{count:,.0f}"


def change(ratio: float) -> str:
    """A ratio of perplexities in words.

    >>> change(1.24), change(1.004), change(0.97), change(9.7), change(float("nan"))
    ('24 % higher', 'the same', '3 % lower', '9.7 times as high', 'not comparable')
    """
    if math.isnan(ratio):
        return "not comparable"
    if ratio >= 1e4:
        return "more than 10,000 times as high"
    if ratio >= 2:
        return f"{times(ratio)} times as high"
    if abs(ratio - 1) <= SAME:
        return "the same"
    percent = 100 * abs(ratio - 1)
    shown = f"{percent:.0f}" if percent >= 1.5 else f"{percent:.1f}"
    return f"{shown} % {'higher' if ratio > 1 else 'lower'}"


def times(ratio: float) -> str:
    """A factor with two digits or so.

    >>> times(170.3), times(2.54), times(1.04)
    ('170', '2.5', '1.0')
    """
    return f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.1f}"


def trend(ms: Sequence[float]) -> str:
    """How a time goes, from milliseconds at growing lengths; one that goes up and down is given by its extremes.

    >>> trend([41.0, 44.0]), trend([40.0, 90.0, 120.0]), trend([40.0, 20.0])
    ('stays between 41 and 44 ms', 'grows from 40 to 120 ms', 'falls from 40 to 20 ms')
    >>> trend([75.0, 48.0, 78.0])
    'varies between 48 and 78 ms'
    """
    start, end, low, high = ms[0], ms[-1], min(ms), max(ms)
    if high - low <= STEADY * start:
        return (
            f"stays at {low:,.0f} ms" if round(low) == round(high) else f"stays between {low:,.0f} and {high:,.0f} ms"
        )
    if max(start, end) < (1 - STEADY) * high or min(start, end) > (1 + STEADY) * low:
        return f"varies between {low:,.0f} and {high:,.0f} ms"
    return f"{'grows' if end > start else 'falls'} from {start:,.0f} to {end:,.0f} ms"


def verdict(results: Results) -> Verdict:
    """The one paragraph to read: quality lost and memory saved."""
    failed = [check.name for check in results.checks if not check.passed]
    if failed:
        return Verdict("failed", f"A check failed: {', '.join(failed)}.", "Do not rely on the numbers below.")
    ratio = results.ratio
    level = "good" if ratio <= 1.1 else "fair" if ratio <= 1.35 else "poor"
    if ratio < 1 - SAME:
        opening = "The hybrid's perplexity is lower than the original's."
    elif ratio <= 1 + SAME:
        opening = "The hybrid's perplexity is the original's."
    else:
        opening = {
            "good": "The hybrid lost a little.",
            "fair": "The hybrid lost some quality.",
            "poor": "The hybrid lost much.",
        }[level]
    how = "after a short training of its gates and sinks" if results.tuning else "without any training"
    how = "after distillation" if results.distilled else how
    text = (
        f"Its perplexity on long documents is {change(ratio)} ({number(results.perplexity('hybrid'))}, original "
        f"{number(results.perplexity('teacher'))}) {how}."
    )
    return Verdict(level, opening, " ".join([text, *distilled_text(results), *memory_text(results)]))


def distilled_text(results: Results) -> list[str]:
    """How a distilled hybrid fares beside the fair control, and the facts that it recalled; nothing for others."""
    found = results.distilled
    if found is None:
        return []
    lines = []
    ratio = found.relative.get("ppl_2k")
    if ratio is not None:
        lines.append(
            f"Relative to the original trained on the same tokens, perplexity on held-out books is {change(ratio)}."
        )
    if found.recall:
        last = found.recall[-1]
        numbers = "1 number" if last.facts == 1 else f"{last.facts} numbers"
        lines.append(
            f"Asked for {numbers} that it read {last.tokens:,} tokens before, it wrote {last.digits} of "
            f"{last.of_digits} digits right from the first on, and {last.recalled} of {numbers} exactly."
        )
        lines += packed_text(results)
        if last.recalled + last.continued < last.facts:
            lines.append("Do not rely on it for exact numbers from long before.")
        elif last.continued:
            lines.append("It may write further digits after a number from long before.")
    return lines


def packed_text(results: Results) -> list[str]:
    """The furthest numbers asked of states in 8 bits, beside the original's memory of as many tokens; or nothing."""
    found = results.distilled
    if found is None or not found.recall_int8:
        return []
    last = found.recall_int8[-1]
    cost = next((cost for cost in results.costs if cost.context == last.tokens), None)
    beside = "" if cost is None else f", {100 * last.bytes / cost.teacher_bytes:.1f} % of the original's"
    return [
        f"With states in 8 bits its memory of these {last.tokens:,} tokens takes {megabytes(last.bytes)}{beside}, and "
        f"it wrote {last.digits} of {last.of_digits} digits."
    ]


def recall_text(results: Results) -> list[str]:
    """How many digits come back at every distance, for a distilled hybrid that was asked; nothing for others."""
    found = results.distilled
    if found is None or not found.recall:
        return []
    first, last = found.recall[0], found.recall[-1]
    right = [f"{one.digits} of {one.of_digits}" for one in (first, last)]
    continued, facts = (sum(getattr(one, name) for one in found.recall) for name in ("continued", "facts"))
    more = f" {continued} of {facts} answers had every digit and went on with further ones." if continued else ""
    return [
        f"A text begins with a number, followed by {results.document}. As the text grows, the hybrid is asked for the "
        f"number and writes the likeliest tokens. Counted are digits that are right from the first on: {right[0]} "
        f"after {first.tokens:,} tokens, {right[1]} after {last.tokens:,}. Guessing gives 2 %.{more}",
        *packed_recall_text(found),
        f"The text holds one number. Of several that are alike, a hybrid may write the wrong one.{cloze_text(found)}",
    ]


def packed_recall_text(found: Distilled) -> list[str]:
    """The same questions asked of states in 8 bits; nothing if they were not."""
    if not found.recall_int8:
        return []
    digits, every = (sum(getattr(one, name) for one in found.recall_int8) for name in ("digits", "of_digits"))
    plain = sum(one.digits for one in found.recall)
    sizes = f"{megabytes(found.recall_int8[-1].bytes)} in place of {megabytes(found.recall[-1].bytes)}"
    return [
        "The same questions were asked of a copy of the hybrid's memory with states in 8 bits (--state-dtype int8), "
        f"{sizes}: {digits} of {every} digits at all distances, {plain} without. Packing takes time at every token."
    ]


def cloze_text(found: Distilled) -> str:
    """How often names of natural text come back beside the fair control, as a sentence after others, or nothing."""
    near, far = (found.relative.get(name) for name in ("cloze_near", "cloze_far"))
    if near is None or far is None:
        return ""
    return (
        f" Names in books come back {100 * near:.0f} % as often as from the original trained on the same tokens up to "
        f"256 tokens later, and {100 * far:.0f} % as often 500 to 4,000 tokens later."
    )


def memory_text(results: Results) -> list[str]:
    """Memory of a conversation at the longest context, and how it grows."""
    if not results.costs:
        return []
    first, last = results.costs[0], results.costs[-1]
    teacher, hybrid = last.teacher_bytes, last.hybrid_bytes
    amounts = f"A conversation of {last.context:,} tokens takes {megabytes(hybrid)}, original {megabytes(teacher)}"
    if hybrid < teacher:
        lines = [f"{amounts}: {times(teacher / hybrid)} times less."]
    else:
        lines = [f"{amounts}: nothing is saved."]
    if last.context > first.context:
        grown = last.hybrid_bytes - first.hybrid_bytes
        if grown == 0:
            lines.append(f"The hybrid's memory is the same after {first.context:,} tokens: it does not grow.")
        elif (full := filled_from(results)) < last.context:
            lines.append(f"The hybrid's memory is the same from {full:,} tokens on, which fill its windows.")
        elif teacher > first.teacher_bytes:
            share = grown / (teacher - first.teacher_bytes)
            lines.append(f"Each further token takes {100 * share:.0f} % of the memory that it takes in the original.")
    return lines


def filled_from(results: Results) -> int:
    """The first context after which the hybrid takes as many bytes as after the longest one."""
    return next(cost.context for cost in results.costs if cost.hybrid_bytes == results.costs[-1].hybrid_bytes)


def key_numbers(results: Results) -> list[tuple[str, str]]:
    """(value, caption) of the two to four numbers to remember."""
    found = [
        (
            f"{number(results.perplexity('teacher'))} → {number(results.perplexity('hybrid'))}",
            f"perplexity on long documents, {change(results.ratio)}",
        )
    ]
    if results.costs:
        last = results.costs[-1]
        memory = f"{megabytes(last.teacher_bytes)} → {megabytes(last.hybrid_bytes)}"
        found.insert(0, (memory, f"memory of a conversation of {tokens(last.context)} tokens"))
    if results.distilled and results.distilled.recall:
        last = (results.distilled.recall_int8 or results.distilled.recall)[-1]
        how = f", from {megabytes(last.bytes)} with states in 8 bits" if results.distilled.recall_int8 else ""
        found.append((f"{last.digits} of {last.of_digits} digits", f"recalled after {tokens(last.tokens)} tokens{how}"))
    if results.timed:
        cost = results.timed[-1]
        found.append(
            (
                f"{cost.teacher_ms:,.0f} → {cost.hybrid_ms:,.0f} ms",
                f"to write one token after {tokens(cost.context)} tokens on this machine",
            )
        )
    return found


def layers_text(results: Results) -> str:
    """Which layers are hybrid and what the others do.

    Names the layers that keep full attention if there are at most eight.
    """
    if results.converted == results.layers:
        return f"All {results.layers} layers of this model are hybrid now."
    parts = []
    if results.full:
        full = [index for index, window in enumerate(results.window_sizes) if window < 0]
        named = f" ({', '.join(map(str, full))})" if len(full) <= 8 and not results.sliding_layers else ""
        parts.append(f"{results.full} keep full attention{named}")
    if results.sliding_layers:
        parts.append(f"{results.sliding_layers} keep the sliding window that they were trained with")
    return f"{results.converted} of {results.layers} layers of this model are hybrid now; {' and '.join(parts)}."


def conversion_text(results: Results) -> list[str]:
    """The idea, for a reader who does not know the paper."""
    sizes = sorted({w for w in results.window_sizes if w >= 0})
    held = f"the last {sizes[0]} tokens" if len(sizes) == 1 else f"the last {sizes[0]} to {sizes[-1]} tokens"
    exact = " ".join([f"The window holds {held} exactly.", *results.notes])
    lines = [
        "A language model with full attention keeps the key and value of every token in every layer. A text twice as "
        "long takes twice the memory, and each new token has twice as much to read.",
        f"{layers_text(results)} A hybrid layer has two memories. {exact} The slots are "
        f"{results.num_slots} running summaries: a token that leaves the window is written to the slots that its key "
        "resembles. One softmax reads both, so each query decides how much attention goes to recent tokens and how "
        "much to the summaries.",
    ]
    weights = "The weights are the original's. Gates and sinks were calibrated on text that is not measured below."
    if results.distilled:
        weights = (
            "Gates, sinks and changes of the attention's weights were distilled from the original on books; a "
            f"file of {megabytes(results.distilled.bytes)} in this package holds them. The row 'untrained' shows the "
            "conversion without them."
        )
    if results.tuning:
        t = results.tuning
        weights += (
            f" Then {t.what} were trained for {t.steps} steps on {t.tokens:,} tokens ({t.seconds:.0f} s); perplexity "
            f"was {number(t.perplexity_before)} before and {number(t.perplexity_after)} after."
        )
    return [*lines, weights]


def speed_text(results: Results) -> list[str]:
    """Time to write a token, and from which length on the hybrid is the faster one."""
    if len(results.timed) < 2:
        return []
    start, end = results.timed[0], results.timed[-1]
    lines = [
        f"From {start.context:,} to {end.context:,} tokens of context, the time to write one more token "
        f"{trend([cost.teacher_ms for cost in results.timed])} with the original and "
        f"{trend([cost.hybrid_ms for cost in results.timed])} "
        "with the hybrid."
    ]
    crossover = results.crossover()
    if crossover is None:
        lines.append(f"On this machine the hybrid is slower at {end.context:,} tokens, the longest context measured.")
    elif crossover == start.context:
        lines.append("On this machine the hybrid is at least as fast at every length measured.")
    else:
        lines.append(f"On this machine the hybrid is at least as fast at every length from {crossover:,} tokens on.")
    return [" ".join(lines)]


def window_text(results: Results) -> str:
    """How the hybrid fares inside the window, just past it, and at the end of the documents."""
    window, edges = results.window, results.bucket_edges
    same = f"Up to {window} tokens the two are the same model." if window > 0 else "No token is read exactly."
    if results.distilled and window > 0:
        same = f"Up to {window} tokens the hybrid reads every token exactly, with weights that were distilled."
    past = next((i for i, (low, _) in enumerate(pairwise(edges)) if low >= max(window, 0)), None)
    teacher, hybrid = results.variant("teacher"), results.variant("hybrid")
    if past is None or teacher is None or hybrid is None:
        return same
    last = len(edges) - 2

    def stretch(index: int) -> str:
        return change(hybrid.by_position[index] / teacher.by_position[index])

    just = f"Just past the window (tokens {edges[past]:,} to {edges[past + 1]:,}) its perplexity is {stretch(past)}"
    if past == last:
        return f"{same} {just}."
    return f"{same} {just}; in the last stretch ({edges[last]:,} to {edges[last + 1]:,}) it is {stretch(last)}."


def quality_text(results: Results) -> list[str]:
    """Perplexity, by position and by variant."""
    teacher, hybrid = results.perplexity("teacher"), results.perplexity("hybrid")
    lines = [
        f"On {results.documents} stretches of {results.document_tokens:,} tokens from {results.document}, the hybrid's "
        f"perplexity is {number(hybrid)} and the original's {number(teacher)}: {change(results.ratio)}. "
        f"{window_text(results)}"
    ]
    every = results.variant("all_hybrid")
    if every is not None:
        ratio = every.perplexity / hybrid
        compared = (
            "the same" if abs(ratio - 1) <= SAME else f"{number(every.perplexity)}, {change(ratio)} than with them"
        )
        memory = "" if every.bytes is None else f", and memory after {last_context(results)} {megabytes(every.bytes)}"
        lines.append(f"With the {results.full} full layers converted as well, perplexity is {compared}{memory}.")
    off = results.variant("slots_off")
    if off is not None:
        lines.append(f"Without its slots the hybrid's perplexity is {number(off.perplexity)}. {slots_text(results)}")
    longer = results.variant("longer_window")
    if longer is not None:
        lines.append(longer_window_text(results, longer.perplexity))
    return lines


def last_context(results: Results) -> str:
    """The longest context measured, in words."""
    return f"{results.costs[-1].context:,} tokens" if results.costs else "the same text"


def slots_text(results: Results) -> str:
    """Which part of what window and sinks alone lose the slots win back, in nats."""
    teacher, hybrid = results.perplexity("teacher"), results.perplexity("hybrid")
    off = results.perplexity("slots_off")
    gain, lost = math.log(off / hybrid), math.log(off / teacher)
    if gain <= SAME:
        return "The slots do not help on this text: the hybrid is no better with them."
    if lost <= SAME:
        return "Window and sinks alone lose nothing here, so this text says little about the slots."
    if gain >= lost:
        return "The slots win back all that window and sinks alone lose."
    return f"The slots win back {100 * gain / lost:.0f} % of what window and sinks alone lose."


def longer_window_text(results: Results, longer: float) -> str:
    """The hybrid beside a window with as many keys and values."""
    found = (
        f"A window longer by {results.num_slots} tokens, without slots, holds as many keys and values; its perplexity "
        f"is {number(longer)}"
    )
    ratio = longer / results.perplexity("hybrid")
    if abs(ratio - 1) <= SAME:
        return f"{found}, the same as the hybrid's."
    if ratio > 1:
        return f"{found}: here the slots are the better use of that memory."
    return f"{found}: on the perplexity of this text, the window is the better use of that memory."


def limits_text(results: Results) -> list[tuple[str, str]]:
    """(title, sentence) of everything that one gives up."""
    found = []
    if results.ratio > 1 + SAME:
        found.append(("Quality", f"Perplexity on long text is {change(results.ratio)}."))
    found.append(
        (
            "Recall",
            "Perplexity says little about single facts. nha eval recall measures whether a name or a number is "
            "recalled after many tokens.",
        )
    )
    slower = [cost for cost in results.timed if cost.hybrid_ms > cost.teacher_ms]
    if slower:
        worst = max(slower, key=lambda cost: cost.hybrid_ms / cost.teacher_ms)
        found.append(
            (
                "Speed",
                f"At {len(slower)} of {len(results.timed)} lengths the hybrid is slower on this machine, at most "
                f"{worst.hybrid_ms / worst.teacher_ms:.2f} times the original's time (after {worst.context:,} tokens).",
            )
        )
    found.append(
        (
            "Size",
            f"Gates and sinks add {results.added_parameters / 1e6:.1f} million parameters "
            f"({100 * results.added_parameters / results.parameters:.1f} %).",
        )
    )
    if results.full:
        found.append(
            ("Memory", f"The {results.full} layers with full attention keep every token, so memory still grows there.")
        )
    found.append(
        (
            "No rewinding",
            "A token written to the slots cannot be taken out, so a conversation cannot be rewound further than its "
            "last part.",
        )
    )
    return found


def next_steps(results: Results) -> list[tuple[str, str]]:
    """(purpose, command line) of what to do after the quickstart."""
    source, found = shlex.quote(results.source), []
    hybrid = shlex.quote(results.saved_to or "my-hybrid")
    full = [str(index) for index, window in enumerate(results.window_sizes) if window < 0]
    if results.saved_to is None:
        kept = f" --full-layers {','.join(full)}" if full and not results.sliding_layers else ""
        found.append(("Convert the model again and keep it", f"nha hybridize {source} {hybrid}{kept}"))
    kept = f" --full-layers {','.join(full)}" if full and not results.sliding_layers else ""
    return [
        *found,
        ("Talk to the hybrid", f"nha chat {hybrid}"),
        ("Train a hybrid to predict what the original predicts", f"nha distill {source} run --text books/{kept}"),
        ("Find the layers that should keep full attention", f"nha search {source} search.json --full 4"),
        ("Measure how often facts are recalled", f"nha eval recall {hybrid} --compare teacher={source}"),
        ("Measure perplexity on your own text", f"nha eval perplexity {hybrid} --text notes.txt"),
        ("See which implementation runs on this machine", "nha doctor"),
    ]


def settings_text(results: Results) -> str:
    """Settings of the run."""
    windows = sorted({w for w in results.window_sizes if w >= 0})
    shown = ", ".join(map(str, windows)) or "none"
    error = results.variants[0].error
    spread = "" if math.isnan(error) else f" The standard error of the mean loss is {error:.3f} nats per token;"
    paired = " all variants read the same tokens, so their differences are known better than that." if spread else ""
    return (
        f"{results.converted} of {results.layers} layers converted; window {shown}, {results.num_slots} slots and "
        f"{results.num_sinks} sink per key-value head; seed {results.seed}; {results.machine}. Text: "
        f"{results.document}, {results.documents} × {results.document_tokens:,} tokens, none of it used for "
        f"calibration.{spread}{paired}"
    )


COSTS_NOTE = (
    "Memory is the exact number of bytes that the caches hold. Times are medians over several tokens, taken with "
    "caches filled to the length shown; their contents do not change the time."
)
