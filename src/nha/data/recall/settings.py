"""The settings of recall text for training."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("fact", "passkey", "needle", "phone_book", "pairs", "copy")
RANGES = ("facts", "distances", "digits", "copy_words")
FRACTIONS = ("long_range_fraction", "scattered_fraction", "questions_at_end_fraction")
MAX_RANGE = 1 << 40  # fits a float64 and an int64


@dataclass(frozen=True)
class RecallSettings:
    """How recall sequences for training are drawn.

    Attributes:
        tasks: drawn uniformly; a task that is named twice is drawn twice as often.
        facts: (min, max) facts in a sequence, drawn log-uniformly.
        distances: (min, max) tokens between a value and its answer, drawn log-uniformly. The minimum always holds;
            the maximum is a target where questions crowd.
        long_range_fraction: fraction of sequences whose distances are drawn log-uniformly from the long end instead.
            In sequences of 8,192 tokens with up to 64 facts, 3 % of the questions lie more than half a sequence after
            their fact and 0.1 % more than nine tenths; with a fraction of 0.5 these are 40 and 15 %.
        scattered_fraction: fraction of sequences whose facts and questions are scattered; the others have one block
            of facts.
        questions_at_end_fraction: fraction of the sequences with a block whose questions follow one another.
        digits: (min, max) digits of a number.
        copy_words: (min, max) words of a list to copy.

    Raises ValueError for an unknown task, a range that is not 1 <= min <= max, a fraction outside 0 to 1.

    >>> RecallSettings(facts=(1, 4)).facts
    (1, 4)
    >>> RecallSettings(digits=(5, 2))
    Traceback (most recent call last):
        ...
    ValueError: expected digits as two integers (min, max) with 1 <= min <= max, got (5, 2)
    """

    tasks: tuple[str, ...] = TASKS
    facts: tuple[int, int] = (1, 16)
    distances: tuple[int, int] = (72, 1 << 20)
    long_range_fraction: float = 0.0
    scattered_fraction: float = 0.5
    questions_at_end_fraction: float = 0.3
    digits: tuple[int, int] = (3, 7)
    copy_words: tuple[int, int] = (4, 12)

    def __post_init__(self) -> None:
        if not self.tasks or any(task not in TASKS for task in self.tasks):
            raise ValueError(f"expected tasks out of {TASKS}, got {self.tasks}")
        for name in RANGES:
            given = getattr(self, name)
            low, high = given if len(given) == 2 else (0, 0)
            if not (isinstance(low, int) and isinstance(high, int) and 1 <= low <= high <= MAX_RANGE):
                raise ValueError(f"expected {name} as two integers (min, max) with 1 <= min <= max, got {given}")
        for name in FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} from 0 to 1, got {getattr(self, name)}")
