"""What a quickstart run found, as plain data: the only thing that page, plots and results.json are made from."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = "nha-quickstart-v1"

# Name -> (label, what it is), in the order tables show them.
VARIANTS: dict[str, tuple[str, str]] = {
    "teacher": ("original", "the model as it came: full attention, remembers every token exactly"),
    "hybrid": ("hybrid", "window and slots read together"),
    "slots_off": ("hybrid, slots off", "the same model, but nothing is ever written to the slots"),
    "sink_only": ("window only", "the same window and an untrained sink, no slots"),
    "longer_window": ("longer window only", "no slots, and a window longer by as many tokens: the baseline to beat"),
    "window_off": ("hybrid, window off", "reads the slots alone, the recent tokens are hidden"),
    "paper": ("paper's form", "slots at zero from the start, gates copied from the keys, no sink, no training"),
    "untuned": ("hybrid before tuning", "the hybrid before the short training of its gates"),
}


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
class Form:
    """One way of running the model. `error` is the standard error of the mean loss, in nats per token;
    `by_position` has one perplexity per bucket of `Results.bucket_edges`."""

    name: str
    perplexity: float
    error: float
    by_position: list[float]


@dataclass
class Cost:
    """What one more token costs after `context` tokens: bytes kept and milliseconds (None: not measured)."""

    context: int
    teacher_bytes: int
    hybrid_bytes: int
    teacher_ms: float | None = None
    hybrid_ms: float | None = None


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
    """Something that must hold whatever the numbers are."""

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
class Results:
    """Everything a quickstart run measured.

    `window_sizes` has one entry per layer (-1: full attention). `bucket_edges` are token positions, one more than
    buckets. `seconds` maps the steps of the run to their wall time.
    """

    model: str
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
    forms: list[Form]
    costs: list[Cost]
    samples: list[Sample]
    checks: list[Check]
    seconds: dict[str, float]
    versions: dict[str, str | None]
    machine: str
    seed: int
    saved_to: str | None = None
    tuning: Tuning | None = None
    notes: list[str] = field(default_factory=list)

    def form(self, name: str) -> Form | None:
        """The form of this name, if it was measured."""
        return next((form for form in self.forms if form.name == name), None)

    def perplexity(self, name: str) -> float:
        """Perplexity of a form that must have been measured; KeyError otherwise."""
        form = self.form(name)
        if form is None:
            raise KeyError(name)
        return form.perplexity

    @property
    def ratio(self) -> float:
        """Perplexity of the hybrid over that of the original."""
        return self.perplexity("hybrid") / self.perplexity("teacher")

    @property
    def window(self) -> int:
        """The smallest window of the converted layers (-1 if no layer is converted)."""
        return min((w for w in self.window_sizes if w >= 0), default=-1)

    @property
    def converted(self) -> int:
        """How many layers are hybrid."""
        return sum(w >= 0 for w in self.window_sizes)

    @property
    def healthy(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def crossover(self) -> int | None:
        """The shortest measured context from which on the hybrid writes a token at least as fast as the original."""
        timed = [c for c in self.costs if c.teacher_ms is not None and c.hybrid_ms is not None]
        found = None
        for cost in reversed(timed):
            if cost.hybrid_ms > cost.teacher_ms:  # type: ignore[operator]
                break
            found = cost.context
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with `format` and the derived headline numbers."""
        headline = {"perplexity_ratio": self.ratio, "healthy": self.healthy}
        return {"format": FORMAT, **headline, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Results:
        """The inverse of `to_dict`. Raises ValueError for data of another format."""
        if data.get("format") != FORMAT:
            raise ValueError(f"expected results of format {FORMAT!r}, got {data.get('format')!r}")
        data = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        data["forms"] = [Form(**form) for form in data["forms"]]
        data["costs"] = [Cost(**cost) for cost in data["costs"]]
        data["samples"] = [Sample(**sample) for sample in data["samples"]]
        data["checks"] = [Check(**check) for check in data["checks"]]
        data["tuning"] = Tuning(**data["tuning"]) if data["tuning"] else None
        return cls(**data)
