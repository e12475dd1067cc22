"""Recipes of a distillation: measured settings for some, few or no full layers, which every option overrides.

Imports no PyTorch: the command line needs this file to print its help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from nha.convert.settings import FULL_FRACTION, fraction_of, searched_layers
from nha.distill.settings import DistillSettings
from nha.settings import option_name


@dataclass(frozen=True)
class Recipe:
    """Settings of a distillation as a function of the model's size.

    Attributes:
        meaning: one sentence for the command line and the docs.
        full_fraction: fraction of the layers that keep full attention, at least one if it is not 0.
        long_fraction: fraction of the tokens that come in longer sequences.
        teacher_fraction: fraction of the tokens that train the original first, where whole matrices are trained.
        changes: other settings that are not the default.
    """

    meaning: str
    full_fraction: float
    long_fraction: float
    teacher_fraction: float
    changes: Mapping[str, Any] = field(default_factory=dict)


# One mixture for all three, so that they share a control; measured in results/quality with 25 M tokens.
MIXTURE = {"tokens": 25e6, "long_range_fraction": 0.5, "recall_fraction": 0.25}
RECIPES = {
    "quality": Recipe("some full layers, 4 of 30: the most recall", FULL_FRACTION, 0.5, 0.4, MIXTURE),
    "balanced": Recipe("few full layers, 1 of 30: a third of the cache of quality", 1 / 30, 0.5, 0.4, MIXTURE),
    "constant": Recipe("no full layer: memory that does not grow", 0.0, 0.5, 0.4, {**MIXTURE, "tokens": 40e6}),
}
SEARCHED_SINGLE: dict[tuple[int, ...], tuple[int, ...]] = {
    (8, 18, 20, 23): (18,)
}  # the best layer alone, where a search found these four


def choose_full_layers(base: str, layers: int, fraction: float) -> tuple[int, ...]:
    """The layers that keep full attention: those that a search found for this model, else evenly spaced ones.

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


def recipe_values(
    name: str, layers: int, base: str = "", given: Mapping[str, Any] | None = None, context: int | None = None
) -> dict[str, Any]:
    """The settings of a recipe that are not the default, by name; those `given` override the recipe's.

    A window per layer, or full layers, override the recipe's full layers. No sequence is longer than `context`, the
    tokens that the model was made for: beyond it the teacher has nothing to teach. Raises ValueError for an unknown
    recipe.

    >>> recipe_values("quality", 12, given={"tokens": 1e6})["full_layers"]
    (3, 9)
    >>> short = recipe_values("constant", 12, context=1024)
    >>> short["seq_len"], short["long_tokens"]
    (1024, 0.0)
    """
    if name not in RECIPES:
        raise ValueError(f"expected a recipe out of {', '.join(RECIPES)}, got {name!r}")
    recipe, given = RECIPES[name], dict(given or {})
    values = {**recipe.changes, **given}
    tokens = values.get("tokens", DistillSettings().tokens)
    values = _within(context, values) if context else values
    plain = {name: values.get(name, getattr(DistillSettings, name)) for name in ("seq_len", "long_seq_len")}
    longer = plain["long_seq_len"] > plain["seq_len"]
    values.setdefault("long_tokens", recipe.long_fraction * tokens if longer else 0.0)
    if values.get("trainable", "attention") in ("attention", "layers"):  # others cannot train a teacher
        values.setdefault("teacher_tokens", min(recipe.teacher_fraction * tokens, tokens - values["long_tokens"]))
    if not isinstance(values.get("window_size", 0), (tuple, list)):
        values.setdefault("full_layers", choose_full_layers(base, layers, recipe.full_fraction))
    return values


def _within(context: int, values: dict[str, Any]) -> dict[str, Any]:
    """Settings with sequences of at most `context` tokens, except where they name other lengths."""
    lengths = {name: min(getattr(DistillSettings, name), context) for name in ("seq_len", "long_seq_len")}
    return {n: x for n, x in lengths.items() if x != getattr(DistillSettings, n)} | values


def recipe_settings(
    name: str, layers: int, base: str = "", given: Mapping[str, Any] | None = None, context: int | None = None
) -> DistillSettings:
    """The settings of a recipe for a model of so many layers, as `recipe_values` has them.

    >>> recipe_settings("constant", 24, given={"tokens": 1e6}).long_tokens
    500000.0
    """
    return DistillSettings(**recipe_values(name, layers, base, given, context))


def changed_settings(settings: DistillSettings, names: Collection[str] | None = None) -> dict[str, Any]:
    """The settings that are not the default, by name.

    >>> changed_settings(DistillSettings(tokens=1e6))
    {'tokens': 1000000.0}
    """
    plain = DistillSettings()
    found = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(settings)}
    return {n: v for n, v in found.items() if v != getattr(plain, n) and (names is None or n in names)}


def recipes_table(layers: int = 30, base: str = "HuggingFaceTB/SmolLM2-135M-Instruct") -> str:
    """A Markdown table of all recipes and their settings for a model."""
    lines = ["| recipe | meaning | settings for SmolLM2-135M |", "|---|---|---|"]
    options = {entry.name: option_name(entry) for entry in dataclasses.fields(DistillSettings)}
    for name, recipe in RECIPES.items():
        settings = changed_settings(recipe_settings(name, layers, base))
        words = [f"`{options[n]} {_text(value)}`" for n, value in settings.items()]
        lines.append(f"| `{name}` | {recipe.meaning} | {', '.join(words)} |")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
