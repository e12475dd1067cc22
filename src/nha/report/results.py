"""Results of a quickstart run as plain data: page, pictures and results.json are made from nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = "nha-quickstart-v2"

# Name -> (label, description), in the order that tables show them.
VARIANTS: dict[str, tuple[str, str]] = {
    "teacher": ("original", "the model as it came: full attention"),
    "hybrid": ("hybrid", "every hybrid layer reads its window and its slots"),
    "all_hybrid": ("no full layers", "the hybrid with the layers that kept full attention converted as well"),
    "untrained": ("untrained", "the hybrid as converted: gates and sinks calibrated, nothing trained"),
    "slots_off": ("slots off", "the hybrid without its slots: window and sinks alone"),
    "longer_window": ("longer window", "no slots, and a window longer by as many tokens: as many keys and values"),
    "window_off": ("window off", "the hybrid with a window of 0: every token is written to the slots at once"),
    "untuned": ("before training", "the hybrid before the short training of its gates and sinks"),
}
TABLE = tuple(name for name in VARIANTS if name not in ("untuned", "untrained"))  # at most six rows


def to_json(value: Any) -> str:
    """A JSON document of dicts, lists and numbers; NaN and infinities become null, which JSON lacks.

    >>> to_json({"ppl": float("inf"), "n": 3})
    '{\\n  "ppl": null,\\n  "n": 3\\n}\\n'
    """

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(k): clean(v) for k, v in item.items()}
        if isinstance(item, (list, tuple)):
            return [clean(v) for v in item]
        if isinstance(item, float) and (not math.isfinite(item)):
            return None
        return item

    cleaned = clean(value)
    text = json.dumps(cleaned, indent=2, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):  # a lone surrogate is not UTF-8
        text = json.dumps(cleaned, indent=2)
    return text + "\n"


@dataclass
class Variant:
    """One way of running the model.

    `error` is the standard error of the mean loss, in nats per token; `by_position` has one perplexity per bucket of
    `Results.bucket_edges`; `bytes` is the cache after the longest context of `Results.costs` (None: not measured).
    """

    name: str
    perplexity: float
    error: float
    by_position: list[float]
    bytes: int | None = None


@dataclass
class Cost:
    """Bytes held after `context` tokens and milliseconds to write one more token (None: not measured)."""

    context: int
    teacher_bytes: int
    hybrid_bytes: int
    teacher_ms: float | None = None
    hybrid_ms: float | None = None


@dataclass(frozen=True)
class TimedCost:
    """A `Cost` whose two times were measured."""

    context: int
    teacher_ms: float
    hybrid_ms: float


@dataclass
class Sample:
    """The texts of original and hybrid for one prompt of `prompt_tokens` tokens, both decoded greedily."""

    title: str
    prompt: str
    prompt_tokens: int
    teacher: str
    hybrid: str


@dataclass
class Check:
    """A property that must hold for every model; an error in a step of the run is a failed check too."""

    name: str
    passed: bool
    detail: str


@dataclass
class Tuning:
    """A short training after the conversion."""

    what: str
    steps: int
    tokens: int
    seconds: float
    perplexity_before: float
    perplexity_after: float


@dataclass
class RecallAt:
    """Numbers that a distilled hybrid was asked for some distance after it had read them.

    Attributes:
        tokens: the distance.
        facts: how many were asked for.
        recalled: how many were written exactly.
        continued: how many were written exactly but for further digits after the last one.
        digits, of_digits: digits that were right from the first on, and all digits.
        bytes: of the cache that the numbers were asked of (0: not measured).
    """

    tokens: int
    facts: int
    recalled: int
    continued: int
    digits: int
    of_digits: int
    bytes: int = 0


@dataclass
class Distilled:
    """The distilled hybrid that this package ships for the embedded model.

    Attributes:
        bytes: of its file.
        relative: its numbers relative to those of the original trained on the same tokens, as ratios by name.
        recall: numbers recalled by distance, the nearest first.
        recall_int8: the same with states in 8 bits.
    """

    bytes: int
    relative: dict[str, float] = field(default_factory=dict)
    recall: list[RecallAt] = field(default_factory=list)
    recall_int8: list[RecallAt] = field(default_factory=list)


@dataclass
class Results:
    """Everything a quickstart run measured.

    `model` is the label and `source` the name that a command line takes. `window_sizes` has one entry per layer
    (-1: the layer as it came, of which `sliding_layers` have a sliding window of their own).
    `bucket_edges` are token positions, one more than buckets. `seconds` maps the steps of the run to their wall time.
    """

    model: str
    source: str
    layers: int
    parameters: int
    added_parameters: int
    window_sizes: list[int]
    num_slots: int
    num_sinks: int
    document: str
    documents: int
    document_tokens: int
    bucket_edges: list[int]
    variants: list[Variant]
    costs: list[Cost]
    samples: list[Sample]
    checks: list[Check]
    seconds: dict[str, float]
    versions: dict[str, str | None]
    machine: str
    seed: int
    sliding_layers: int = 0
    saved_to: str | None = None
    tuning: Tuning | None = None
    distilled: Distilled | None = None
    notes: list[str] = field(default_factory=list)

    def variant(self, name: str) -> Variant | None:
        """The variant of this name, if it was measured."""
        return next((variant for variant in self.variants if variant.name == name), None)

    @property
    def table(self) -> tuple[str, ...]:
        """The names of the variants in tables; a distilled hybrid stands beside the untrained one."""
        if self.distilled is None:
            return TABLE
        return tuple("untrained" if name == "all_hybrid" else name for name in TABLE)

    def perplexity(self, name: str) -> float:
        """Perplexity of a variant that must have been measured; KeyError otherwise."""
        variant = self.variant(name)
        if variant is None:
            raise KeyError(name)
        return variant.perplexity

    @property
    def ratio(self) -> float:
        """Perplexity of the hybrid relative to that of the original."""
        return self.perplexity("hybrid") / self.perplexity("teacher")

    @property
    def timed(self) -> list[TimedCost]:
        """The costs that have both times."""
        return [
            TimedCost(c.context, c.teacher_ms, c.hybrid_ms)
            for c in self.costs
            if c.teacher_ms is not None and c.hybrid_ms is not None
        ]

    @property
    def window(self) -> int:
        """The smallest window of the converted layers (-1 if no layer is converted)."""
        return min((w for w in self.window_sizes if w >= 0), default=-1)

    @property
    def converted(self) -> int:
        """The number of hybrid layers."""
        return sum(w >= 0 for w in self.window_sizes)

    @property
    def full(self) -> int:
        """The number of layers that keep full attention."""
        return self.layers - self.converted - self.sliding_layers

    @property
    def healthy(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def crossover(self) -> int | None:
        """The shortest measured context from which on the hybrid writes a token at least as fast as the original."""
        found = None
        for cost in reversed(self.timed):
            if cost.hybrid_ms > cost.teacher_ms:
                break
            found = cost.context
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with `format` and the derived headline numbers."""
        headline = {"perplexity_ratio": self.ratio, "healthy": self.healthy}
        return {"format": FORMAT, **headline, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Results:
        """The inverse of `to_dict`. Raises ValueError for data of another format and for missing or unknown fields."""
        if data.get("format") != FORMAT:
            raise ValueError(f"expected results of format {FORMAT!r}, got {data.get('format')!r}")
        try:
            data = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
            data["variants"] = [_variant(variant) for variant in data["variants"]]
            data["costs"] = [Cost(**cost) for cost in data["costs"]]
            data["samples"] = [Sample(**sample) for sample in data["samples"]]
            data["checks"] = [Check(**check) for check in data["checks"]]
            data["tuning"] = Tuning(**data["tuning"]) if data["tuning"] else None
            data["distilled"] = _distilled(data["distilled"]) if data.get("distilled") else None
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected results of format {FORMAT!r} with all their fields, got {error}") from None


def _distilled(data: dict[str, Any]) -> Distilled:
    found = Distilled(**data)
    found.recall = [RecallAt(**one) for one in data["recall"]]
    found.recall_int8 = [RecallAt(**one) for one in data.get("recall_int8", [])]
    return found


def _variant(data: dict[str, Any]) -> Variant:
    """A variant from JSON, in which what is not finite is null."""
    found = Variant(**data)
    found.perplexity = math.inf if found.perplexity is None else found.perplexity
    found.error = math.nan if found.error is None else found.error
    found.by_position = [math.inf if value is None else value for value in found.by_position]
    return found
