"""The order in which a recipe gives a model's KV heads wide windows: learned on the text of the run, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.convert.heads import HeadPlan, Weights, count_weights, load_plan, save_plan, search_heads, tiered_windows
from nha.convert.settings import HeadSearchSettings
from nha.data.corpus import Corpus
from nha.distill.recipes import RECIPES
from nha.models.cache_file import fingerprint

# Their mean ranks heads: the first finds few heads for near text, the second more of them, for farther text as well.
SEARCHES = (HeadSearchSettings(), HeadSearchSettings(penalty=0.005, max_distance=512, seed=1))
DOCUMENTS, DOCUMENT_TOKENS = 256, 8192


def mean_weights(found: list[Weights]) -> Weights:
    """The mean of the mixing weights of several searches.

    >>> mean_weights([[[1.0, 0.0], None], [[0.0, 0.0], None]])
    [[0.5, 0.0], None]
    """
    return [
        None if rows[0] is None else [round(sum(w) / len(w), 4) for w in zip(*rows, strict=True)]
        for rows in zip(*found, strict=True)
    ]


def recipe_plan(name: str, settings: dict[str, Any], weights: Weights) -> HeadPlan:
    """The plan of a recipe for learned weights."""
    recipe = RECIPES[name]
    tiers = recipe.head_tiers(count_weights(weights))
    windows = tiered_windows(weights, tiers, recipe.window_size)
    return HeadPlan(settings, weights, sum(count for count, _ in tiers), tiers[0][1], windows)


def find_heads(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    path: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> HeadPlan:
    """The plan of a recipe for a model whose heads nobody has ranked yet; `path` keeps it for the next time.

    Clozes are made of documents to train on, and, with a warning, of the built-in text where these give too few.
    Raises ValueError for a file at `path` that is of another model or corpus.
    """
    about: dict[str, Any] = {"weights": fingerprint(model), "dtype": str(model.dtype), "corpus": corpus.identity}
    about["mean_of"] = [one.identity() for one in SEARCHES]
    if path.is_file():
        return recipe_plan(name, about, load_plan(path, about).weights)
    drawn = np.random.default_rng(0).permutation(corpus.train_indices)[:DOCUMENTS]
    texts = [str(tokenizer.decode(corpus.document(int(index))[:DOCUMENT_TOKENS])) for index in drawn]
    steps, found = sum(one.steps for one in SEARCHES), []
    for number, settings in enumerate(SEARCHES):

        def advance(done: int, _: int, before: int = number * settings.steps) -> None:
            if progress is not None:
                progress(before + done, steps)

        try:
            plan = search_heads(model, tokenizer, texts, settings, progress=advance)
        except ValueError as error:
            warnings.warn(f"heads are ranked on the built-in text: {error}", stacklevel=2)
            plan = search_heads(model, tokenizer, None, settings, progress=advance)
        found.append(plan.weights)
    plan = recipe_plan(name, about, mean_weights(found))
    save_plan(plan, path)
    return plan
