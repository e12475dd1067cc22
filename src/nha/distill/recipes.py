"""Recipes of a distillation: measured settings for some, few or no full heads, which every option overrides.

Imports no PyTorch: the command line needs this file to print its help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nha.convert.head_ranks import FULL, HeadRanks
from nha.convert.settings import FULL_FRACTION, fraction_of, searched_layers
from nha.distill.settings import DistillSettings
from nha.settings import option_name


@dataclass(frozen=True)
class Recipe:
    """Settings of a distillation as a function of the model's size.

    Attributes:
        meaning: one sentence for the command line and the docs.
        tiers: (fraction of the KV heads, window) for the first heads by rank, then for those that follow; -1 is full
            attention.
        window_size: tokens in the window of all other heads.
        full_fraction: fraction of the layers that keep full attention where heads have no ranks, at least one if it is
            not 0.
        teacher_fraction: fraction of the tokens that train the original first, where whole matrices are trained.
        changes: other settings that are not the default.
        long_fraction: fraction of the tokens that come in longer sequences.
    """

    meaning: str
    tiers: tuple[tuple[float, int], ...]
    window_size: int
    full_fraction: float
    teacher_fraction: float
    changes: Mapping[str, Any]
    long_fraction: float = 0.5

    def head_tiers(self, total: int) -> tuple[tuple[int, int], ...]:
        """(heads, window) of a model with so many KV heads, at least one of each kind while there are any.

        >>> RECIPES["balanced"].head_tiers(90), RECIPES["balanced"].head_tiers(4)
        (((2, -1), (10, 2144), (8, 896)), ((1, -1), (1, 2144), (1, 896)))
        """
        left, found = total, []
        for fraction, window in self.tiers:
            count = min(left, fraction_of(total, fraction))
            left -= count
            found.append((count, window))
        return tuple(found)


# Measured in results/quality. Recipes with full heads share a mixture, hence a control. Without one slots have to learn
# recall, which takes more tokens and questions that windows cannot answer.
MIXTURE = {"tokens": 25e6, "long_range_fraction": 0.5, "recall_fraction": 0.25}
RECIPES = {
    "quality": Recipe(
        "some full heads, 6 of 90, and long windows: the most recall",
        ((6 / 90, FULL), (14 / 90, 7008)),
        64,
        FULL_FRACTION,
        0.5,
        MIXTURE,
    ),
    "balanced": Recipe(
        "few full heads, 2 of 90: a third of the cache of quality",
        ((2 / 90, FULL), (10 / 90, 2144), (8 / 90, 896)),
        64,
        1 / 30,
        0.5,
        MIXTURE,
    ),
    "constant": Recipe(
        "no full head: memory that does not grow",
        ((12 / 90, 1088),),
        64,
        0.0,
        0.15,
        {
            "tokens": 50e6,
            "long_range_fraction": 0.75,
            "recall_fraction": 0.5,
            "answer_weight": 1.0,
            "gate_shift": 2.1,
        },
        0.6,
    ),
}
SEARCHED_SINGLE: dict[tuple[int, ...], tuple[int, ...]] = {
    (8, 18, 20, 23): (18,)
}  # the best layer alone, where a search found these four


def choose_full_layers(base: str, layers: int, fraction: float) -> tuple[int, ...]:
    """The layers that keep full attention, where heads have no ranks: searched ones, else evenly spaced ones.

    >>> choose_full_layers("HuggingFaceTB/SmolLM2-135M-Instruct", 30, 4 / 30)
    (8, 18, 20, 23)
    >>> choose_full_layers("some/model", 32, 4 / 30), choose_full_layers("some/model", 32, 0.0)
    ((4, 12, 20, 28), ())
    """
    count = fraction_of(layers, fraction)
    found = searched_layers(base)
    for known in (found, SEARCHED_SINGLE.get(found, ())):
        if known and len(known) == count and max(known) < layers:
            return known
    return tuple(layers * (2 * i + 1) // (2 * count) for i in range(count))


def recipe_settings(
    name: str,
    layers: int,
    base: str = "",
    given: Mapping[str, Any] | None = None,
    context: int | None = None,
    ranks: HeadRanks | None = None,
) -> DistillSettings:
    """The settings of a recipe for a model of so many layers; those `given` override the recipe's.

    Windows go to heads by their `ranks`; without them whole layers keep full attention, and others the default window.
    Windows or full layers that are given override both. No sequence is longer than `context`, the tokens that the model
    was made for: beyond it the teacher has nothing to teach. Raises ValueError for an unknown recipe.

    >>> recipe_settings("quality", 12, given={"tokens": 1e6}).full_layers
    (3, 9)
    >>> recipe_settings("quality", 2, ranks=HeadRanks((2, 2), ((0, 1), (1, 0)))).window_size
    ((64, -1), (7008, 64))
    >>> short = recipe_settings("constant", 12, context=1024)
    >>> short.seq_len, short.long_tokens
    (1024, 0.0)
    """
    if name not in RECIPES:
        raise ValueError(f"expected a recipe out of {', '.join(RECIPES)}, got {name!r}")
    recipe, given = RECIPES[name], dict(given or {})
    values = {**recipe.changes, **given}
    if values.get("slot_write", "soft") != "soft" and "gate_shift" not in given:  # such slots have no gates to shift
        values.pop("gate_shift", None)
    tokens = values.get("tokens", DistillSettings().tokens)
    values = _within(context, values) if context else values
    plain = {name: values.get(name, getattr(DistillSettings, name)) for name in ("seq_len", "long_seq_len")}
    longer = plain["long_seq_len"] > plain["seq_len"]
    values.setdefault("long_tokens", recipe.long_fraction * tokens if longer else 0.0)
    if values.get("trainable", "attention") in ("attention", "layers"):  # others cannot train a teacher
        values.setdefault("teacher_tokens", min(recipe.teacher_fraction * tokens, tokens - values["long_tokens"]))
    if ranks is not None and takes_heads(given):
        values["window_size"] = ranks.windows(recipe.head_tiers(ranks.total), recipe.window_size)
    elif not isinstance(values.get("window_size", 0), (tuple, list)):
        values.setdefault("full_layers", choose_full_layers(base, layers, recipe.full_fraction))
    return DistillSettings(**values)


def takes_heads(given: Mapping[str, Any]) -> bool:
    """Whether a recipe's windows per head are used beside settings that are given.

    >>> takes_heads({"tokens": 1e6}), takes_heads({"full_layers": (1,)})
    (True, False)
    """
    return not given.keys() & {"window_size", "full_layers"}


def _within(context: int, values: dict[str, Any]) -> dict[str, Any]:
    """Settings with sequences of at most `context` tokens, except where they name other lengths."""
    lengths = {name: min(getattr(DistillSettings, name), context) for name in ("seq_len", "long_seq_len")}
    return {n: x for n, x in lengths.items() if x != getattr(DistillSettings, n)} | values


def changed_settings(settings: DistillSettings, names: Collection[str] | None = None) -> dict[str, Any]:
    """The settings that are not the default, by name.

    >>> changed_settings(DistillSettings(tokens=1e6))
    {'tokens': 1000000.0}
    """
    plain = DistillSettings()
    found = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(settings)}
    return {n: v for n, v in found.items() if v != getattr(plain, n) and (names is None or n in names)}


def recipes_table(heads: int = 90) -> str:
    """A Markdown table of all recipes: the windows of a model with so many KV heads, by rank, and the settings."""
    lines = [f"| recipe | meaning | windows of {heads} KV heads | settings |", "|---|---|---|---|"]
    options = {entry.name: option_name(entry) for entry in dataclasses.fields(DistillSettings)}
    for name, recipe in RECIPES.items():
        tiers = recipe.head_tiers(heads)
        kinds = [*tiers, (heads - sum(count for count, _ in tiers), recipe.window_size)]
        windows = ", ".join(f"{n} full" if window == FULL else f"{n} of {window:,}" for n, window in kinds)
        settings = changed_settings(recipe_settings(name, 1, given={"full_layers": ()}))
        words = [f"`{options[n]} {_text(value)}`" for n, value in settings.items()]
        lines.append(f"| `{name}` | {recipe.meaning} | {windows} | {', '.join(words)} |")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
