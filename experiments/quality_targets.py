"""The targets of `experiments/quality.py`, and which of them each run meets, with intervals of 95 %."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nha.evaluate.bootstrap import LEVEL, wilson

MAX_TOKENS = {"4full": 25e6, "1full": 50e6, "constant": 100e6}
ROUNDED = 1.001  # a run ends with a whole step
PERPLEXITIES = ("ppl_2k", "ppl_8k")
# Perplexity over the fair control's, at most; the rest as a share of the control's, at least.
SHARES: dict[str, dict[str, float]] = {
    "4full": {"ppl_2k": 1.03, "ppl_8k": 1.03, "average": 0.99, "squad": 0.95, "cloze_near": 0.99, "cloze_far": 0.98},
    "1full": {"ppl_2k": 1.05, "ppl_8k": 1.05, "average": 0.985, "squad": 0.85, "cloze_near": 0.95, "cloze_far": 0.80},
    "constant": {"ppl_2k": 1.06, "ppl_8k": 1.08, "average": 0.98, "squad": 0.75, "cloze_near": 0.85, "cloze_far": 0.40},
}
NEEDLES = {  # written, of all, at least
    "4full": {"8192": 0.95, "32768": 0.90},
    "1full": {},
    "constant": {"8192": 0.97, "32768": 0.90, "65536": 0.90, "131072": 0.80},
}


@dataclass(frozen=True)
class Judged:
    """One target of a run: what was measured, and its interval."""

    name: str
    target: float
    value: float | None
    interval: Sequence[float] | None

    @property
    def verdict(self) -> str:
        """ "met" or "missed", with "not surely" where the interval has the target in it, or "not measured".

        >>> Judged("squad", 0.75, 0.80, (0.77, 0.83)).verdict, Judged("ppl_2k", 1.05, 1.06, (1.04, 1.08)).verdict
        ('met', 'missed, not surely')
        """
        if self.value is None:
            return "not measured"
        is_met = self.value <= self.target if self.name in PERPLEXITIES else self.value >= self.target
        word = "met" if is_met else "missed"
        inside = self.interval is not None and self.interval[0] < self.target < self.interval[1]
        return f"{word}, not surely" if inside else word


def judge(row: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Judged]:
    """All targets of a row, whose shares of its control's numbers are `found`."""
    for name, target in SHARES[row["budget"]].items():
        ratio = found.get(name) or {}
        yield Judged(name, target, ratio.get("ratio"), ratio.get("interval"))
    for length, target in NEEDLES[row["budget"]].items():
        value, count = (row["needle"] or {}).get(length, (None, 0))
        interval = None if value is None else wilson(round(value * count), count, level=LEVEL)
        yield Judged(f"needle {int(length) // 1024}K", target, value, interval)


def _shown(judged: Judged) -> list[str]:
    digits = (lambda x: f"{x:.3f}") if judged.name in PERPLEXITIES else (lambda x: f"{100 * x:.0f} %")
    bound = "at most" if judged.name in PERPLEXITIES else "at least"
    target = f"{judged.target:.2f}" if judged.name in PERPLEXITIES else f"{100 * judged.target:g} %"
    value = "" if judged.value is None else digits(judged.value)
    interval = "" if judged.interval is None else " to ".join(map(digits, judged.interval))
    return [f"{bound} {target}", value, interval, judged.verdict]


def targets_table(rows: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]], titles: Mapping[str, str]) -> str:
    """A Markdown table of all targets of runs, given as (row, name, shares); `titles` name the numbers."""
    lines = ["Targets: perplexity over the fair control's, recall and sets as shares of the control's, needles of all."]
    lines += ["", "| run | number | target | measured | 95 % interval | |", "|---|---|---|---|---|---|"]
    for row, name, found in rows:
        if row["budget"] not in SHARES or row["tokens"] > ROUNDED * MAX_TOKENS[row["budget"]]:
            continue
        for judged in judge(row, found):
            cells = [f"{name} ({row['budget']})", titles.get(judged.name, judged.name), *_shown(judged)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
