"""An evaluation on public sets of a model, its variants and other models, each relative to the control."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.evaluate.compare import Plan, each_model, variant_of
from nha.evaluate.measure import Progress
from nha.evaluate.partial import PartialResults
from nha.evaluate.public.run import PublicData, measure_public, relative, summary

CONTROL = "control"  # the name of the model that others are relative to


def compare_public(
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PublicData,
    partial: PartialResults,
    progress: Progress,
    max_batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Results of all models of a plan, as plain data.

    {"results": {name: data of `measure_public`}, "relative": {name: data of `relative`} if one is named `CONTROL`,
    "summary": {name: data of `summary`}, "notes": what did not fit a model's context}.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, other, variant in each_model(plan, model, tokenizer, progress):

        def named(part: str, done: int, total: int, name: str = name) -> None:
            progress(f"{name}: {part}", done, total)

        with variant_of(other, variant):
            results[name] = measure_public(
                other,
                tokenizer,
                data,
                name=name,
                partial=partial,
                progress=named,
                max_batch_tokens=max_batch_tokens,
            )
    control = results.get(CONTROL)
    others = {name: row for name, row in results.items() if name != CONTROL} if control else {}
    return {
        "results": results,
        "relative": {name: relative(row, control, data.settings.seed) for name, row in others.items() if control},
        "summary": {name: summary(row) for name, row in results.items()},
        "notes": [f"{name}, {note}" for name, row in results.items() for note in row["notes"]],
    }
