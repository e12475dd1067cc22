"""The models and variants of one evaluation, checked before any weight is read and measured one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nha.errors import BadInput
from nha.evaluate.measure import Progress
from nha.evaluate.partial import PartialResults
from nha.evaluate.variants import VARIANTS, use_variant
from nha.models import loading
from nha.models.windows import set_windows

MODEL = "model"  # the name of the evaluated model in results
Measure = Callable[[PreTrainedModel, Progress], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """The subject of an evaluation: a model with its windows and variants, models to compare it with, the dtype."""

    source: loading.Source
    windows: int | list[int] | None
    variants: list[str]
    compared: dict[str, loading.Source]
    dtype: str

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that differ for every other evaluation: files of all models, windows, variants, dtype."""
        return {
            "model": _files(self.source),
            "windows": self.windows,
            "variants": self.variants,
            "compared": {name: _files(source) for name, source in self.compared.items()},
            "dtype": self.dtype,
        }


def _files(source: loading.Source) -> list[Any]:
    """A model's name, its revision on the Hub, and the sizes and times of change of its files."""
    found: list[Any] = [source.name, getattr(source.config, "_commit_hash", None)]
    if source.directory is not None:
        for path in sorted(source.directory.iterdir()):
            if path.suffix in (".safetensors", ".json", ".bin", ".model", ".txt"):
                status = path.stat()
                found.append([path.name, status.st_size, status.st_mtime_ns])
    return found


def make_plan(
    model: str,
    *,
    windows: int | list[int] | None = None,
    ablations: bool = False,
    compare: Sequence[str] = (),
    dtype: str = "auto",
) -> Plan:
    """Check all names of an evaluation; `compare` holds NAME=MODEL. Raises BadInput for what cannot be."""
    source = loading.find(model)
    hybrid = source.config is not None and loading.is_hybrid(source.config)
    if windows is not None:
        loading.check_windows_changeable(source, windows)
    if ablations and not hybrid:
        raise BadInput(f"expected a hybrid for --ablations, {source.name} is not one: convert it with nha hybridize")
    compared: dict[str, loading.Source] = {}
    for entry in compare:
        name, equals, where = entry.partition("=")
        if not (name and equals and where) or name in compared or name == MODEL:
            raise BadInput(f"expected --compare as NAME=MODEL with a name of its own, got {entry!r}")
        compared[name] = loading.find(where)
    variants = [name for name in VARIANTS if ablations or name == "hybrid"] if hybrid else [MODEL]
    return Plan(source, windows, variants, compared, dtype)


def load_planned(
    plan: Plan, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a plan, with the plan's windows, and its tokenizer, which may have been read already."""
    model, tokenizer = loading.load(plan.source, dtype=plan.dtype, tokenizer=tokenizer)
    if plan.windows is not None:
        set_windows(model, plan.windows)
    return model, tokenizer


@contextmanager
def variant_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the context, a hybrid is one of its variants; `MODEL` is any model as it is."""
    if name == MODEL:
        yield
    else:
        with use_variant(model, name):
            yield


def each_model(
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    done: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, PreTrainedModel, str]]:
    """(name, model, variant) of everything to measure but the names in `done`, one model at a time.

    Raises BadInput for a compared model with another tokenizer.
    """
    for variant in plan.variants:
        name = MODEL if variant in ("hybrid", MODEL) else variant.replace("_", " ")
        if name not in done:
            yield name, model, variant
    for name, source in plan.compared.items():
        if name in done:
            continue
        progress(f"loading {source.label}", 0, 1)
        other, reader = loading.load(source, dtype=plan.dtype)
        progress(f"loading {source.label}", 1, 1)
        if reader.get_vocab() != tokenizer.get_vocab():
            raise BadInput(f"expected {source.name} to have the tokenizer of {plan.source.name}, it has another")
        yield name, other, "hybrid" if hasattr(other.config, "window_sizes") else MODEL


def measure_each(
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    measure: Measure,
    progress: Progress,
    partial: PartialResults | None = None,
) -> dict[str, dict[str, Any]]:
    """The results of `measure(model, progress)` for every model and variant, by name, with the `seconds` spent.

    Each is kept in `partial` as soon as it is known; those that are there already are not measured again.
    """
    partial = partial or PartialResults()
    for name, other, variant in each_model(plan, model, tokenizer, progress, frozenset(partial.parts)):

        def named(what: str, done: int, total: int, name: str = name) -> None:
            progress(f"{name}: {what}", done, total)

        started = time.perf_counter()
        with variant_of(other, variant):
            found = measure(other, named)
        partial.add(name, found | {"seconds": round(time.perf_counter() - started, 3)})
    return partial.parts
